"""Work that needs whole matrices (Muon's orthogonalisation) on matrices whose rows are divided among all ranks.

Matrices are dealt to the ranks in turn. Each is put together on its rank, worked on there, and handed back in rows: all ranks
work side by side, none holds more than its share, and twice the bytes of the rows cross the network.

Rejected: the work on local rows (orthogonal rows of a part are another update, and differ with the number of ranks); every
matrix gathered on every rank (as many bytes for each rank as there are ranks, and all do the same work).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from training.sharding.shards import LocalShard


def require_divided_by_rows(shards: list[LocalShard]) -> None:
    """Raises ValueError for a matrix that is cut in another way than into runs of rows, one for each rank."""
    for shard in shards:
        if tuple(shard.parameter.placements) != (Shard(0),) or shard.parameter.device_mesh.size() != dist.get_world_size():
            raise ValueError(f"{shard.name}: divided as {shard.parameter.placements} over {shard.parameter.device_mesh.size()} "
                             "ranks; Muon puts matrices together from rows that all ranks share")


def on_whole_matrices(parts: list[torch.Tensor], shards: list[LocalShard],
                      work: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """This rank's rows of `work` of every matrix; all ranks call it with theirs.

    Args:
        parts: this rank's rows, in the shape of each shard's local tensor.
        work: matrix -> matrix of the same shape. dtype: of what it returns.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    heights = [-(-shard.parameter.shape[0] // ranks) for shard in shards]  # of all runs of rows but the last ones
    gathered: dict[int, list[torch.Tensor]] = {}
    for i, (part, height) in enumerate(zip(parts, heights, strict=True)):
        padded = part.new_zeros(height, *part.shape[1:])
        padded[:len(part)] = part
        if i % ranks == rank:
            gathered[i] = [torch.empty_like(padded) for _ in range(ranks)]
        dist.gather(padded, gathered.get(i), dst=i % ranks)
    done: dict[int, list[torch.Tensor]] = {}
    for i, runs in gathered.items():
        rows = shards[i].parameter.shape[0]
        whole = torch.cat(runs)
        whole[:rows] = work(whole[:rows])
        done[i] = [run.to(dtype).contiguous() for run in whole.split(heights[i])]
    found = []
    for i, (part, height) in enumerate(zip(parts, heights, strict=True)):
        out = torch.empty(height, *part.shape[1:], dtype=dtype, device=part.device)
        dist.scatter(out, done.get(i), src=i % ranks)
        found.append(out[:len(part)])
    return found
