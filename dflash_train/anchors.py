"""Random anchors and the labels of their blocks.

Each step draws fresh anchors, without replacement, among the positions of a row where serving could stand. With sequence
parallelism a rank draws from its own shard of the row only (`shard`): the signals of a long sequence then come from all
ranks at once and nothing is communicated but the `window - 1` features before the shard (MiMo's recipe).

Source: DFlash (arXiv 2602.06036): anchors resampled every epoch; model card of MiMo-V2.5-Pro-FP4-DFlash: local sampling.
"""

from __future__ import annotations

import torch


def sample_anchors(allowed_BS: torch.Tensor, count: int, generator: torch.Generator,
                   shard: slice | None = None) -> torch.Tensor:
    """int64 [B, count], ascending; rows with fewer allowed positions begin with -1.

    Args:
        allowed_BS: bool.
        shard: positions of the row that belong to this rank; None: all.
    """
    allowed = allowed_BS
    if shard is not None:
        allowed = torch.zeros_like(allowed_BS)
        allowed[:, shard] = allowed_BS[:, shard]
    order = torch.rand(allowed.shape, generator=generator)
    order = torch.where(allowed, order, torch.inf)
    count = min(count, allowed.shape[1])
    drawn = order.topk(count, dim=1, largest=False)
    return torch.where(drawn.values.isinf(), -1, drawn.indices).sort(dim=1).values


def block_labels(tokens_BS: torch.Tensor, ends_BS: torch.Tensor, anchors_BA: torch.Tensor, block: int) -> torch.Tensor:
    """Tokens [B, A, block - 1] at the masked positions; -100 after the dialogue's end and where there is no anchor."""
    index = anchors_BA[:, :, None] + torch.arange(1, block, device=anchors_BA.device)
    end = ends_BS.gather(1, anchors_BA.clamp_min(0)).to(index.dtype)[:, :, None]
    inside = (index < end) & (anchors_BA >= 0)[:, :, None]
    labels = tokens_BS.long().gather(1, index.clamp(0, tokens_BS.shape[1] - 1).flatten(1)).view_as(index)
    return torch.where(inside, labels, -100)


def teacher_index(anchors_BA: torch.Tensor, block: int, length: int) -> torch.Tensor:
    """int64 [B, A, block - 1]: position whose last hidden state predicts the token at each masked position."""
    index = anchors_BA.clamp_min(0)[:, :, None] + torch.arange(block - 1, device=anchors_BA.device)
    return index.clamp_max(length - 1)
