"""A rank's part of a parameter: which rows of dimension 0 it holds, and sums over all ranks that count each row once.

The optimizer, clipping, averaging and reports work on *local shards*: ordinary tensors that share memory with the FSDP
parameters, so that everything written for one process runs unchanged; only norms and reports cross ranks. What is saved
goes the other way: a tensor of a shard's shape is wrapped as the DTensor that the parameter is.

Rejected: the optimizer over DTensors (Muon's libraries take them for matrices, fused optimizers refuse them, and every
element-wise operation pays the dispatcher).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from checkpoint.load import owned_rows


def copies(tensor: torch.Tensor) -> int:
    """Ranks that hold the same rows."""
    if not isinstance(tensor, DTensor):
        return 1
    return torch.Size(size for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
                      if isinstance(placement, Replicate)).numel()


@dataclass
class LocalShard:
    """This rank's part of an FSDP parameter.

    Attributes:
        name: the parameter's name in the model.
        parameter: the sharded parameter (a DTensor).
        local: [rows, ...] parameter for the optimizer; shares memory with `parameter`.
    """

    name: str
    parameter: nn.Parameter
    local: nn.Parameter

    def pull_gradient(self) -> None:
        """Moves the reduced gradient to the local view; zeros where no token of any rank reached the weights."""
        gradient, self.parameter.grad = self.parameter.grad, None
        self.local.grad = torch.zeros_like(self.local) if gradient is None else gradient.to_local()

    def as_global(self, local: torch.Tensor) -> torch.Tensor:
        """A tensor of the shard's rows as the sharded tensor it belongs to; shapes may differ in the other dimensions.

        Of an ordinary parameter (one process) the tensor itself.
        """
        if not isinstance(self.parameter, DTensor):
            return local
        shape = torch.Size((self.parameter.shape[0], *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        nothing = torch.empty((0, *local.shape[1:]), dtype=local.dtype, device=self.local.device)
        whole = DTensor.from_local(nothing, self.parameter.device_mesh, self.parameter.placements, run_check=False, shape=shape,
                                   stride=stride)
        whole._local_tensor = local  # as it is: from_local would move a copy in host memory to the mesh's devices
        return whole


def local_shards(parameters: list[tuple[str, nn.Parameter]]) -> list[LocalShard]:
    """Local views of named FSDP parameters, after loading and before the first forward pass.

    The FSDP units must have settled their storage first (`settle`).
    """
    return [LocalShard(name, p, nn.Parameter(p._local_tensor.detach(), requires_grad=p.requires_grad))
            for name, p in parameters]


def settle(model: nn.Module) -> None:
    """What every FSDP unit needs between loading and views of its parameters.

    Units take over the loaded tensors now (torch does it at the first forward pass): uneven shards are copied into padded
    storage, and views made before that would be of the old one. And they leave inputs as they come: some routers give
    float32 weights, which would be rounded on the way into a unit that begins at the experts.
    """
    for module in fsdp_units(model):
        state = module._get_fsdp_state()
        state._mp_policy = dataclasses.replace(state._mp_policy, cast_forward_inputs=False)
        for group in state._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.reset_sharded_param()


def reshard(model: nn.Module) -> None:
    """Lets go of every gathered weight, after which all parameters are the sharded ones again."""
    for module in fsdp_units(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            group._to_sharded()  # module.reshard() passes over units that are to stay gathered after a forward pass


def fsdp_units(model: nn.Module) -> list:
    """The FSDP units of a model. What `settle` and `reshard` use of them is private API of torch 2.13, kept to these two."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def total_norm(shards: list[tuple[torch.Tensor, int]], device: torch.device) -> torch.Tensor:
    """Norm over all ranks of local gradients, given with the number of ranks that hold each; 0-d float32.

    Squares are summed in float64 and ranks in their order, so that every rank gets the same bits in every run.
    """
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for gradient, held in shards:
        squares += torch.linalg.vector_norm(gradient).double().square() / held
    parts = [torch.zeros_like(squares) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, squares)
    return torch.stack(parts).sum().sqrt().float()


def gather_rows(values: torch.Tensor, shard: LocalShard) -> torch.Tensor:
    """Values of a shard's rows (any dtype, [rows, ...]) put together over all ranks: [all rows, ...], on every rank."""
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (owned_rows(shard.parameter), values.cpu()))
    whole = values.cpu().new_zeros((shard.parameter.shape[0], *values.shape[1:]))
    for rows, part in parts:
        whole[rows.start:rows.stop] = part
    return whole
