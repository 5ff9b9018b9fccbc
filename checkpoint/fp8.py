"""FP8 E4M3 in blocks of 128 x 128, each with a float32 scale: what releases store dense matrices in.

The grid of scales need not run through a whole matrix: it starts anew with each chunk of a fused qkv and each head of a split
k or v of MiMo-V2 (`modeling.names.qkv_scale_rows` says where). Readers that take the block height to be rows / scale rows
decode such matrices wrongly, without an error.
"""

from __future__ import annotations

import torch

from modeling.names import FP8_BLOCK, qkv_scale_rows

FP8_MAX = 448.0


def grid_shape(segments: list[int], columns: int) -> tuple[int, int]:
    """Shape of the scales of a matrix whose rows are cut into `segments`."""
    return sum(-(-n // FP8_BLOCK) for n in segments), -(-columns // FP8_BLOCK)


def spread_rows(scale_inv: torch.Tensor, segments: list[int]) -> torch.Tensor:
    """One row of scales for each row of the matrix: float32 [rows, ceil(columns / 128)] of a grid."""
    spread, row = [], 0
    for n in segments:
        blocks = -(-n // FP8_BLOCK)
        spread.append(scale_inv[row:row + blocks].float().repeat_interleave(FP8_BLOCK, 0)[:n])
        row += blocks
    return torch.cat(spread)


def require_grid(name: str, found: tuple[int, ...], segments: list[int], columns: int) -> None:
    """ValueError if scales of shape `found` are not the grid of a matrix [sum(segments), columns]."""
    expected = grid_shape(segments, columns)
    if tuple(found) != expected:
        raise ValueError(f"{name}_scale_inv: shape {list(found)}, expected {list(expected)} "
                         f"for a weight of {[sum(segments), columns]}")


def dequantize_fp8(name: str, weight: torch.Tensor, scale_inv: torch.Tensor, config=None) -> torch.Tensor:
    """Each block times its scale.

    Args:
        weight: float8_e4m3fn [rows, columns]; scale_inv: float32 [scale rows, ceil(columns / 128)].
        config: a MiMoV2Config, for tensors whose grid restarts within the rows.

    Returns:
        float32 [rows, columns].

    Raises:
        ValueError: a scale grid of an unexpected shape.
    """
    rows, columns = weight.shape
    segments = qkv_scale_rows(name, rows, config)
    require_grid(name, scale_inv.shape, segments, columns)
    return weight.float() * spread_rows(scale_inv, segments).repeat_interleave(FP8_BLOCK, 1)[:, :columns]


def quantize_fp8(name: str, weight: torch.Tensor, config=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a matrix, each block with the scale that takes its maximum to 448.

    Returns:
        float8_e4m3fn [rows, columns], float32 [scale rows, ceil(columns / 128)].
    """
    codes, scales, start = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), [], 0
    columns = weight.shape[1]
    for rows in qkv_scale_rows(name, weight.shape[0], config):
        for top in range(start, start + rows, FP8_BLOCK):
            band = weight[top:min(top + FP8_BLOCK, start + rows)].float()
            padded = torch.nn.functional.pad(band, (0, -columns % FP8_BLOCK)).unflatten(1, (-1, FP8_BLOCK))
            scale = (padded.abs().amax((0, 2)) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            codes[top:top + band.shape[0]] = (padded / scale[None, :, None]).flatten(1)[:, :columns].to(torch.float8_e4m3fn)
            scales.append(scale)
        start += rows
    return codes, torch.stack(scales)
