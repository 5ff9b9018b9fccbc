"""Matrices that Muon cannot put together from rows of all ranks are refused, one line, with how they are divided."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from training.sharding.shards import LocalShard
from training.sharding.whole_matrices import require_divided_by_rows


def shard(placements, ranks):
    parameter = SimpleNamespace(placements=placements, device_mesh=SimpleNamespace(size=lambda: ranks))
    return LocalShard("layers.0.proj.weight", parameter, torch.nn.Parameter(torch.zeros(2, 4)))


@pytest.mark.parametrize("placements, ranks", [((Shard(1),), 4), ((Shard(0),), 2), ((Replicate(), Shard(0)), 4),
                                               ((Shard(0), Shard(1)), 4)])
def test_a_matrix_that_is_cut_otherwise_than_by_rows_among_all_ranks_is_refused(monkeypatch, placements, ranks):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    require_divided_by_rows([shard((Shard(0),), 4)])
    with pytest.raises(ValueError, match=r"layers\.0\.proj\.weight: divided as .*Shard.* over . ranks; Muon puts") as error:
        require_divided_by_rows([shard((Shard(0),), 4), shard(placements, ranks)])
    assert "\n" not in str(error.value)


def test_zero3_refusals_have_the_numbers():
    from training.sharding.zero3 import require_whole_blocks

    require_whole_blocks("experts", (4, 64, 32), -1, 2)
    with pytest.raises(ValueError, match=r"8,192 weights on 3 ranks are runs of 2,731, and 2,731 = 85 x 32 \+ 11: .* 2 ranks$"):
        require_whole_blocks("experts", (4, 64, 32), -1, 3)
    with pytest.raises(ValueError, match=r"blocks of 32 run along dimension 1, across the flat ranges"):
        require_whole_blocks("experts", (4, 64, 32), 1, 2)
