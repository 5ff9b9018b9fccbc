"""How ranks divide a model: FSDP2 shards, expert-parallel groups, replicas.

Two views of the same ranks, as transformers' `DistributedConfig` builds them:

    dense weights     replicas x fsdp                       each layer is cut into `fsdp` shards and gathered for use
    routed experts    replicas x expert shards x ep         a rank of an expert-parallel group owns experts / ep experts, cut
                                                            into `expert shards` = fsdp / ep shards; tokens travel (all-to-all)

With expert parallelism 1 the experts are gathered like the rest, in an FSDP group of their own.

Rejected: Accelerate's FSDP plugin. It knows no expert parallelism, wraps one model together with the optimizer that holds
its parameters (here are two models, and the optimizer holds local shards), and loads the whole model on rank 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from recipes.schema import Cluster
from storage.terminal import counted


@dataclass(frozen=True)
class Layout:
    """A division of `ranks` processes."""

    ranks: int
    expert_parallel: int = 1
    replicas: int = 1

    @property
    def fsdp(self) -> int:
        """Ranks that share one copy of the dense weights."""
        return self.ranks // self.replicas

    @property
    def expert_shards(self) -> int:
        """Ranks that share the experts of one expert-parallel rank."""
        return self.fsdp // self.expert_parallel

    def __str__(self) -> str:
        return f"{self.ranks} ranks: fsdp {self.fsdp}, expert parallel {self.expert_parallel}, replicas {self.replicas}"

    def distributed_config(self, *, mixed_precision: bool, experts: tuple[str, ...] = ()):
        """transformers' description of this layout.

        Args:
            mixed_precision: compute in bfloat16 whatever the shards' dtype, reduce gradients in float32.
            experts: experts modules ("model.layers.3.mlp.experts") that get an FSDP group of their own. Under expert
                parallelism they have one anyway.
        """
        from transformers.distributed import DistributedConfig

        plan = {re.sub(r"\.\d+\.", ".*.", name): "free_full_weight" for name in experts} if self.expert_parallel == 1 else {}
        return DistributedConfig(fsdp_size=self.fsdp, dp_replicate_size=self.replicas, ep_size=self.expert_parallel,
                                 fsdp_mixed_precision=mixed_precision, fsdp_plan=plan or None)


def layout_of(cluster: Cluster, ranks: int) -> Layout:
    """The recipe's layout for a launch of `ranks` processes.

    Raises:
        ValueError: replicas or expert-parallel groups that do not divide the ranks.
    """
    if ranks % cluster.replicas:
        raise ValueError(f"cluster.replicas: {cluster.replicas} does not divide the "
                         f"{counted(ranks, 'launched process', 'launched processes')}; launch a "
                         f"multiple of {cluster.replicas} or set cluster.replicas=1")
    shards = ranks // cluster.replicas
    if shards % cluster.expert_parallel:
        wanted = cluster.replicas * cluster.expert_parallel
        raise ValueError(f"cluster.expert_parallel: {cluster.expert_parallel} does not divide the "
                         f"{counted(shards, 'process', 'processes')} of a replica; launch a multiple of {wanted}, or "
                         f"set cluster.expert_parallel to a divisor of {shards}")
    return Layout(ranks, cluster.expert_parallel, cluster.replicas)


def require_divisible(layout: Layout, experts: dict[str, int]) -> None:
    """Raises ValueError for an experts module {name: number of experts} that expert-parallel groups cannot share equally."""
    for name, count in experts.items():
        if count % layout.expert_parallel:
            raise ValueError(f"cluster.expert_parallel: {layout.expert_parallel} does not divide the {count} experts of "
                             f"{name}; expected a divisor of {count}")
