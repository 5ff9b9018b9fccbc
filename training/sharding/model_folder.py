"""A sharded model as an ordinary Hugging Face folder, written by all ranks side by side.

Experts that are published as one matrix each are written by the rank that holds them, without a gather; experts that are
published fused, and everything else, are gathered one tensor at a time and dealt to the ranks in turn. Files differ from those
of one process (one or more per rank), names, shapes and bytes of the tensors do not.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from checkpoint.load import owned_rows
from checkpoint.tensor_files import INDEX
from storage.files import begin_folder, finish_folder
from training.checkpoint import disk_errors
from training.sharding.shards import reshard

FILE_BYTES = 5 * 10**9
_EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")


@contextmanager
def folder_of_all_ranks(final: Path, accelerator) -> Iterator[Path]:
    """`<final>.partial`, empty, for all ranks to fill; it takes the place of `final` when all are done.

    Raises:
        OSError: a disk is full or not writable; `final` is as it was.
    """
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        begin_folder(partial)
    accelerator.wait_for_everyone()
    try:
        with disk_errors():
            yield partial
    except OSError as error:
        raise OSError(f"{final} could not be written: {error}; the last checkpoint is kept, --resume tries again") from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for tensors in partial.glob("*.safetensors"):  # safetensors makes files that nobody else may read, whatever the umask
            shutil.copymode(partial / "config.json", tensors)
        finish_folder(partial, final)
    accelerator.wait_for_everyone()


def write_model(model: nn.Module, folder: Path, rounded: Callable[[str], torch.Tensor | None], dtype: torch.dtype,
                whole: Callable[[torch.Tensor], AbstractContextManager] = nullcontext) -> None:
    """Writes config.json, files of tensors and their index; every rank calls it.

    Args:
        model: a transformers model made of FSDP units.
        folder: exists already on every rank.
        rounded: parameter name -> this rank's rows as they are to be published, or None for a parameter to publish as it is.
        dtype: of all parameters in the folder.
        whole: puts a parameter together on every rank for as long as it lasts, for other shards than FSDP's.
    """
    from transformers.core_model_loading import revert_weight_conversion

    rank, world = dist.get_rank(), dist.get_world_size()
    files = _Files(folder, rank)
    reshard(model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        values = rounded(name)
        if values is None:
            with whole(parameter):
                all_of_it = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if number % world == rank:
                    files.add(revert_weight_conversion(model, {name: all_of_it.detach().to("cpu", dtype, copy=True)}))
            continue
        if not _per_expert(model, parameter, name):
            all_of_it = _gathered(values, parameter)
            if number % world == rank:
                files.add(revert_weight_conversion(model, {name: all_of_it.detach().cpu()}))
            continue
        first = owned_rows(parameter).start
        if values.shape[0] and _is_first_copy(parameter):
            published = revert_weight_conversion(model, {name: values.detach().cpu()})
            files.add({_renumbered(key, first): tensor for key, tensor in published.items()})
    if rank == 0:
        files.add(revert_weight_conversion(model, _buffers(model)))
    files.close()
    parts: list = [None] * world
    dist.all_gather_object(parts, (files.where, files.bytes))
    if rank == 0:
        where = {name: file for part, _ in parts for name, file in part.items()}
        index = {"metadata": {"total_size": sum(size for _, size in parts)}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _write_config(model, folder, dtype)


def _renumbered(name: str, first: int) -> str:
    return _EXPERT.sub(lambda number: str(int(number[0]) + first), name)


def _per_expert(model, parameter, name: str) -> bool:
    """Whether a fused tensor is published as one matrix per expert."""
    from transformers.core_model_loading import revert_weight_conversion

    one = torch.empty((1, *parameter.shape[1:]), dtype=torch.bfloat16)
    return all(_EXPERT.search(key) for key in revert_weight_conversion(model, {name: one}))


def _gathered(values: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    whole = DTensor.from_local(values, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
                               stride=parameter.stride())
    return whole.full_tensor()


def _is_first_copy(parameter: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same rows."""
    mesh = parameter.device_mesh
    return all(coordinate == 0 for coordinate, placement in zip(mesh.get_coordinate(), parameter.placements, strict=True)
               if isinstance(placement, Replicate))


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    persistent = model.state_dict().keys()
    return {name: b.detach().cpu() for name, b in model.named_buffers() if name in persistent}


def _write_config(model, folder: Path, dtype: torch.dtype) -> None:
    config = model.config
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


class _Files:
    """This rank's safetensors files, closed when they reach FILE_BYTES."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.where: dict[str, str] = {}
        self.bytes = self.written = 0
        self._open: dict[str, torch.Tensor] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if self._open and sum(t.nbytes for t in self._open.values()) + tensor.nbytes > FILE_BYTES:
                self.close()
            self._open[name] = tensor.contiguous()
            self.bytes += tensor.nbytes

    def close(self) -> None:
        if not self._open:
            return
        file = f"model-rank{self.rank:05d}-{self.written:05d}.safetensors"
        save_file(self._open, self.folder / file, metadata={"format": "pt"})
        self.where |= dict.fromkeys(self._open, file)
        self._open, self.written = {}, self.written + 1
