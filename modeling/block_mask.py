"""Who sees whom in block-diffusion drafting: one rule, in the four forms that training and decoding need.

A block is [anchor, MASK x (B - 1)]. Its queries stand at positions anchor, anchor + 1, ... and see

    context   the target's features at positions *before* the anchor (the anchor's own feature does not exist yet),
              of the same document, less than `window` positions before the query;
    block     every position of their own block (non-causal), or those up to their own (`causal`), never another block.

Forms: `visible_context` / `visible_block` are the rule itself, over positions; `dense_mask` spreads it over a packed row
(the reference, and the check of the others); `key_ranges` cuts sorted anchors into chunks that meet a slice of the
context each (the CPU's path, cost per anchor independent of the row's length); `flex_mask` is the same rule for
flex_attention (GPU).

Self-contained (torch only): shipped inside exported checkpoints beside the drafter.

Source: DFlash (arXiv 2602.06036) for the block; MiMo-V2.5-Pro-FP4-DFlash's configuration for the symmetric window.
"""

from __future__ import annotations

import torch


def block_positions(anchors: torch.Tensor, block: int) -> torch.Tensor:
    """Positions [..., block] of the blocks that begin at `anchors` [...]."""
    return anchors[..., None] + torch.arange(block, device=anchors.device)


def visible_context(query: torch.Tensor, key: torch.Tensor, anchor: torch.Tensor, window: int | None) -> torch.Tensor:
    """Bool: a context feature at position `key` is seen by a query at `query` whose block begins at `anchor` (broadcast)."""
    seen = (key < anchor) & (query >= anchor)
    return seen if window is None else seen & (query - key < window)


def visible_block(block: int, causal: bool, device: torch.device | None = None) -> torch.Tensor:
    """Bool [block, block]: queries (rows) against keys of their own block."""
    full = torch.ones(block, block, dtype=torch.bool, device=device)
    return full.tril() if causal else full


def dense_mask(anchors_BA: torch.Tensor, starts_BS: torch.Tensor, block: int, window: int | None, causal: bool) -> torch.Tensor:
    """Bool [B, A * block, S + A * block]: queries of all blocks against the context, then against all blocks' keys.

    Args:
        anchors_BA: index of each anchor in its row; negative = no anchor (its block sees itself only, nothing else).
        starts_BS: for each index of the row, the index at which its document begins.
    """
    B, A = anchors_BA.shape
    S, device = starts_BS.shape[1], anchors_BA.device
    query = block_positions(anchors_BA, block).flatten(1)[:, :, None]
    anchor = anchors_BA.repeat_interleave(block, dim=1)[:, :, None]
    begin = starts_BS.gather(1, anchors_BA.clamp_min(0)).repeat_interleave(block, dim=1)[:, :, None]
    key = torch.arange(S, device=device)
    context = visible_context(query, key, anchor, window) & (key >= begin)
    own = torch.eye(A, dtype=torch.bool, device=device)[:, None, :, None] & visible_block(block, causal, device)[None, :, None]
    own = own.reshape(A * block, A * block).expand(B, -1, -1)
    return torch.cat((context, own), dim=2)


def key_ranges(anchors_BA: torch.Tensor, starts_BS: torch.Tensor, window: int | None, chunk: int) -> list[tuple]:
    """Chunks of sorted anchors with the slice of context that each can see.

    Args:
        anchors_BA: ascending in each row, negative ones (no anchor) first.

    Returns:
        list of (slice of A, first key [B], number of keys): keys first..first + number - 1 hold all that is visible.
    """
    pieces = []
    starts = starts_BS.gather(1, anchors_BA.clamp_min(0))
    low = starts if window is None else torch.maximum(starts, anchors_BA - window + 1)
    low = torch.where(anchors_BA < 0, torch.iinfo(torch.int64).max, low)  # no anchor sees nothing
    for begin in range(0, anchors_BA.shape[1], chunk):
        part = slice(begin, min(begin + chunk, anchors_BA.shape[1]))
        last = anchors_BA[:, part].amax(1).clamp_min(0)
        first = torch.minimum(low[:, part].amin(1), last)
        pieces.append((part, first, int((last - first).max())))
    return pieces


def flex_mask(anchors_BA: torch.Tensor, starts_BS: torch.Tensor, block: int, window: int | None, causal: bool):
    """`torch.nn.attention.flex_attention.BlockMask` of the same rule as `dense_mask`."""
    from torch.nn.attention.flex_attention import create_block_mask

    B, A = anchors_BA.shape
    S = starts_BS.shape[1]
    begins_BA = starts_BS.gather(1, anchors_BA.clamp_min(0))

    def rule(b, h, q, k):
        anchor, begin, offset = anchors_BA[b, q // block], begins_BA[b, q // block], q % block
        context = (k < S) & (k < anchor) & (k >= begin)
        if window is not None:
            context = context & (anchor + offset - k < window)
        own = (k >= S) & ((k - S) // block == q // block)
        if causal:
            own = own & ((k - S) % block <= offset)
        return context | own

    return create_block_mask(rule, B, None, A * block, S + A * block, device=anchors_BA.device)
