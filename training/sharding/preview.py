"""What each rank of a launch would hold, found by running the real sharding code without a launch.

torch's fake process group answers every collective at once, and the meta device has no memory: transformers' plans and FSDP2
place a model of a trillion parameters on hundreds of ranks in seconds, in this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from checkpoint.load import owned_rows
from training.sharding.layout import Layout


@dataclass(frozen=True)
class Placement:
    """Elements on the fullest rank, and how the experts of one layer lie.

    Attributes:
        experts, others: weights that rank 0, which is never emptier than another, holds.
        local_experts: experts of each layer on rank 0.
        idle_ranks: ranks that hold no expert of a layer.
        even: all ranks hold equally many experts, so that codes can be gathered.
    """

    experts: int
    others: int
    local_experts: int
    idle_ranks: int
    even: bool


def place(model_on_meta: Callable[[], nn.Module], expert_names: set[str], layout: Layout) -> Placement:
    """Shards the model as training would.

    Raises:
        ValueError: experts that expert-parallel groups cannot share.
    """
    modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in expert_names))
    with _fake_ranks(layout.ranks):
        model = model_on_meta().bfloat16()
        wanted = layout.distributed_config(mixed_precision=True, experts=modules)
        config, _, meshes = type(model).prepare_distribute_model(wanted)
        model = type(model).maybe_distribute_model(model, config, meshes)
        held = {name: p.to_local().numel() for name, p in model.named_parameters()}
        tensor = dict(model.named_parameters())[min(expert_names)]
        rows, experts = len(owned_rows(tensor)), tensor.shape[0]
    shards = layout.fsdp
    used = -(-experts // rows)
    inside = sum(size for name, size in held.items() if name in expert_names)
    return Placement(experts=inside, others=sum(held.values()) - inside, local_experts=rows,
                     idle_ranks=(shards - used) * layout.replicas, even=experts % shards == 0)


@contextmanager
def _fake_ranks(ranks: int):
    """This process as rank 0 of many, none of which exists. A process group that is already there is refused."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made outside of a launch"
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
