"""State of a sharded run on disk: every rank writes what it holds, any number of ranks reads it back.

    step-00000100/
        shards/                             torch.distributed.checkpoint in safetensors files: masters, moments, means, codes;
                                            pieces of the ranks that wrote them, under the names and shapes of the whole
        trainer.safetensors                 step, position in the data, learning-rate schedule, layout of the run
        random_states_<rank>.safetensors    Python, NumPy and torch generators
        resolved.yaml, complete.json        as in every checkpoint (`training.checkpoint`)

torch's own storage (`.metadata`, `*.distcp`) is not used: its index is a pickle, which can run code.

Frozen weights are not saved: the base checkpoint has them. On the layout that wrote it a run continues bit for bit. On
another one the same masters and moments go on, with other batches on each rank and other sums, which is said.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from training.sharding.shards import LocalShard

FOLDER, TRAINER = "shards", "trainer.safetensors"


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint was written by a sharded run."""
    return (path / FOLDER).is_dir()


def write_tensors(folder: Path, tensors: dict[str, dict[str, torch.Tensor]], shards: list[LocalShard]) -> None:
    """Writes {kind: {parameter name: this rank's rows}}; every rank calls it."""
    by_name = {shard.name: shard for shard in shards}
    state = {f"{kind}/{name}": by_name[name].as_global(tensor)
             for kind, named in tensors.items() for name, tensor in named.items()}
    writer = HuggingFaceStorageWriter(path=str(folder / FOLDER), save_distributed=True)
    dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())


def read_tensors(folder: Path, shards: list[LocalShard]) -> dict[str, dict[str, torch.Tensor]]:
    """What `write_tensors` wrote, this rank's rows of it, whoever wrote them.

    Raises:
        ValueError: damaged files, or tensors of parameters that this model does not have, or in another shape.
    """
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / FOLDER}: not a whole distributed checkpoint: {error}") from None
    by_name = {shard.name: shard for shard in shards}
    local: dict[str, dict[str, torch.Tensor]] = {}
    state = {}
    for key, entry in stored.items():
        kind, _, name = key.partition("/")
        if name not in by_name:
            raise ValueError(f"{folder}: has {kind} of {name}, a parameter that this run does not train")
        shard, shape = by_name[name], entry.size
        if shape[0] != shard.parameter.shape[0] or kind == "master" and shape != shard.parameter.shape:
            raise ValueError(f"{folder}: does not fit this recipe's model: {name}: shape {list(shape)} in the checkpoint, "
                             f"{list(shard.parameter.shape)} here")
        tensor = torch.empty((shard.local.shape[0], *shape[1:]), dtype=entry.properties.dtype, device=shard.local.device)
        local.setdefault(kind, {})[name] = tensor
        state[key] = shard.as_global(tensor)
    missing = by_name.keys() - local.get("master", {}).keys()
    if missing:
        raise ValueError(f"{folder}: has no masters of {min(missing)}")
    dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    return local


def optimizer_tensors(optimizer: torch.optim.Optimizer, shards: list[LocalShard]) -> tuple[dict, dict]:
    """({kind: {name: tensor of the shard's shape}}, {kind: {name: number}}) of an optimizer over local shards."""
    names = {id(shard.local): shard.name for shard in shards}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    numbers: dict[str, dict[str, float]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = names[id(parameter)]
            if isinstance(value, torch.Tensor) and value.ndim:
                tensors.setdefault(f"optimizer.{key}", {})[name] = value
            else:
                numbers.setdefault(key, {})[name] = float(value)
    return tensors, numbers


def restore_optimizer(optimizer: torch.optim.Optimizer, shards: list[LocalShard], tensors: dict, numbers: dict) -> None:
    """The inverse of `optimizer_tensors`; numbers come back as 0-d float32 tensors, as torch's optimizers keep steps."""
    by_name = {shard.name: shard.local for shard in shards}
    for kind, named in tensors.items():
        if kind.startswith("optimizer."):
            for name, tensor in named.items():
                optimizer.state[by_name[name]][kind.removeprefix("optimizer.")] = tensor
    for key, named in numbers.items():
        for name, number in named.items():
            optimizer.state[by_name[name]][key] = torch.tensor(number, dtype=torch.float32)
