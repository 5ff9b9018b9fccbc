"""Layouts: what divides is described, what does not is one line that names a size that would."""

import pytest

from recipes.schema import Cluster
from training.sharding.layout import Layout, layout_of, require_divisible


def cluster(**settings) -> Cluster:
    ranks = settings.get("replicas", 1) * settings.get("expert_parallel", 1)
    return Cluster(memory_gib=80.0, sharding="fsdp2", accelerators_per_node=ranks, **settings)


def test_ranks_are_divided_into_replicas_shards_and_expert_groups():
    layout = layout_of(cluster(replicas=2, expert_parallel=4), 16)
    assert (layout.fsdp, layout.expert_shards) == (8, 2)
    config = layout.distributed_config(mixed_precision=True)
    assert (config.fsdp_size, config.dp_replicate_size, config.ep_size, config.efsdp_size) == (8, 2, 4, 2)


def test_experts_have_a_unit_of_their_own_without_expert_parallelism():
    names = ("model.layers.1.mlp.experts", "model.layers.2.mlp.experts")
    assert Layout(4).distributed_config(mixed_precision=True, experts=names).fsdp_plan == {
        "model.layers.*.mlp.experts": "free_full_weight"}
    assert Layout(4, expert_parallel=2).distributed_config(mixed_precision=True, experts=names).fsdp_plan is None


@pytest.mark.parametrize("settings, ranks, words", [
    ({"expert_parallel": 8}, 2, "cluster.expert_parallel: 8 does not divide the 2 processes.*launch a multiple of 8"),
    ({"replicas": 3}, 4, "cluster.replicas: 3 does not divide the 4 launched processes.*launch a multiple of 3"),
    ({"replicas": 2, "expert_parallel": 2}, 2, "launch a multiple of 4"),
])
def test_a_launch_that_does_not_fit_is_one_line(settings, ranks, words):
    with pytest.raises(ValueError, match=words) as error:
        layout_of(cluster(**settings), ranks)
    assert "\n" not in str(error.value)


def test_experts_that_groups_cannot_share_are_named():
    with pytest.raises(ValueError, match="expert_parallel: 4 does not divide the 6 experts of layers.0"):
        require_divisible(Layout(4, expert_parallel=4), {"layers.0": 6})
