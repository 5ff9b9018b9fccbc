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

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from training.checkpoint import SHARDS
from training.sharding.shards import LocalShard
from training.state_files import host_copy, load_state, random_state, save_state, set_random_state

TRAINER = "trainer.safetensors"


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint was written by a sharded run."""
    return (path / SHARDS).is_dir()


def state_writer(accelerator, tensors: dict[str, dict[str, torch.Tensor]], shards: list[LocalShard], own: dict, *,
                 copied: bool) -> Callable[..., None]:
    """What writes this rank's part of a checkpoint into a folder; every rank makes one and calls it.

    Args:
        tensors: {kind: {parameter name: this rank's rows}}.
        own: of the job; the first process's is written.
        copied: of copies in host memory, so that training may go on meanwhile.

    Returns:
        folder, group -> None: the process group (None: the default one) is what the ranks agree over.
    """
    generators = random_state() | {"micro_step": accelerator.step}
    if copied:
        tensors, own, generators = host_copy(tensors), host_copy(own), host_copy(generators)
    by_name = {shard.name: shard for shard in shards}
    state = {f"{kind}/{name}": by_name[name].as_global(tensor)
             for kind, named in tensors.items() for name, tensor in named.items()}
    name, main = random_states(accelerator), accelerator.is_main_process

    def write(folder: Path, group=None) -> None:
        writer = HuggingFaceStorageWriter(path=str(folder / SHARDS), save_distributed=True)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
        save_state(folder / name, generators)
        if main:
            save_state(folder / TRAINER, own)

    return write


def random_states(accelerator) -> str:
    return f"random_states_{accelerator.process_index}.safetensors"


def restore_generators(accelerator, path: Path) -> None:
    """Of the launch that wrote `path`, if it had as many ranks."""
    generators = load_state(path / random_states(accelerator))
    set_random_state(generators)
    accelerator.step = generators["micro_step"]


def read_state(path: Path, shards: list[LocalShard]) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """(the job's own part, tensors as `read_tensors` gives them) of a checkpoint; masters are written into the shards.

    Raises:
        ValueError: written without sharding, damaged, or of another model.
    """
    if not is_sharded(path):
        raise ValueError(f"{path}: written without sharding; resume it as it was trained (cluster.sharding=ddp, or "
                         "dflash.shard_drafter=false), or start a new run without --resume")
    saved, tensors = load_state(path / TRAINER), read_tensors(path, shards)
    for shard in shards:
        shard.local.data.copy_(tensors["master"][shard.name])
    return saved, tensors


def read_tensors(folder: Path, shards: list[LocalShard]) -> dict[str, dict[str, torch.Tensor]]:
    """What `state_writer` wrote of tensors, this rank's rows of it, whoever wrote them.

    Raises:
        ValueError: damaged files, or tensors of parameters that this model does not have, or in another shape.
    """
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / SHARDS}: not a whole distributed checkpoint: {error}") from None
    by_name = {shard.name: shard for shard in shards}
    local: dict[str, dict[str, torch.Tensor]] = {}
    state = {}
    for key, entry in stored.items():
        kind, _, name = key.partition("/")
        if name not in by_name:
            raise ValueError(f"{folder}: has {kind} of {name}, a parameter that this run does not train")
        shard, shape = by_name[name], entry.size
        here = [shard.parameter.shape[0], *shard.local.shape[1:]]
        if shape[0] != here[0] or kind == "master" and list(shape) != here:
            raise ValueError(f"{folder}: does not fit this recipe's model: {name}: shape {list(shape)} in the checkpoint, "
                             f"{here} here")
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
                numbers.setdefault(key, {})[name] = value if isinstance(value, int) else float(value)
    return tensors, numbers


def restore_optimizer(optimizer: torch.optim.Optimizer, shards: list[LocalShard], tensors: dict, numbers: dict) -> None:
    """The inverse of `optimizer_tensors`; floats come back as 0-d float32 tensors, as torch's optimizers keep steps."""
    by_name = {shard.name: shard.local for shard in shards}
    for kind, named in tensors.items():
        if kind.startswith("optimizer."):
            for name, tensor in named.items():
                optimizer.state[by_name[name]][kind.removeprefix("optimizer.")] = tensor
    for key, named in numbers.items():
        for name, number in named.items():
            optimizer.state[by_name[name]][key] = number if isinstance(number, int) else torch.tensor(number)
