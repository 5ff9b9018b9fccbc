"""Whole models as shards on the ranks of a launch, and single modules of them whole on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from checkpoint.load import load_model
from training.sharding.layout import Layout
from training.sharding.shards import settle


def load_shards(path: str | Path, layout: Layout, *, dtype: torch.dtype, compute_dtype: torch.dtype | None = None,
                trust_remote_code: bool = False, masters: tuple[str, ...] = ()) -> nn.Module:
    """A checkpoint's model, of which every rank reads and holds its shards; on the CPU or the rank's accelerator.

    Args:
        dtype: of the weights as read. compute_dtype: of everything, if it is another (float32 copies for an evaluation).
        masters: experts modules that are FSDP units of their own, with float32 parameters.
    """
    compute_dtype = compute_dtype or dtype
    config = layout.distributed_config(mixed_precision=compute_dtype is torch.bfloat16, experts=masters)
    model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code, distributed_config=config)
    if compute_dtype is torch.float32:
        model.float()
    else:
        for name in masters:
            model.get_submodule(name).float()
    settle(model)
    return model


def whole_copy(module: nn.Module) -> nn.Module:
    """A frozen module of the same kind with the gathered weights of `module`, an FSDP unit without submodules; every rank
    calls it."""
    from torch.distributed.fsdp import FSDPModule

    kind = next(k for k in type(module).__mro__ if not issubclass(k, FSDPModule))
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    plain.__dict__.update({k: v for k, v in module.__dict__.items() if not k.startswith("_")})
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor):
            parameter = parameter.detach().full_tensor()
        plain.register_parameter(name, None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        plain.register_buffer(name, buffer)
    return plain
