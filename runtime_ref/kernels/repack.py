"""Expert weights rearranged once at load for the kernels: pages that are read in one piece and decoded in few instructions.

A checkpoint stores a row's codes in K order, two per byte, and the scales elsewhere. A kernel wants, for a tile of `rows`
output rows and `depth` values of K, one contiguous page: first the codes, then the tile's scales.

    codes   [rows, depth / 2] bytes. Four neighbouring bytes are a little-endian word with eight codes: four values of the
            page's lower half of K (k, k+1, k+2, k+3) and four of its upper half (the same, plus depth / 2)
    scales  [2, rows, depth / 64] bytes: the blocks of the lower half, then those of the upper half

Halves, because the kernel multiplies both with one matrix product each and so never interleaves values: `lower` meets
x[k .. k + depth/2), `upper` the rest, activations stay in their natural order.

In a word, bits are placed where `decode` needs them least moved. A bf16 number has its sign in bit 15 and its exponent
in bits 14..7, so an E2M1 code with its sign at bit 15 and its magnitude at bits 8..6 *is* the value times 2^-126 (0.5
is a subnormal). Both 16-bit halves of the word look alike, and hold the even and the odd element of four pairs:

    pair 0   (lower 0, 1)   sign 15   magnitude 8 7 6       in place
    pair 1   (lower 2, 3)   sign 12   magnitude 5 4 3       shift left by 3
    pair 2   (upper 0, 1)   sign  9   magnitude 2 1 0       shift left by 6
    pair 3   (upper 2, 3)   sign 14   magnitude 13 11 10    what is left over: three shifts

A scale byte b is stored as b + 126: shifted left by 7 it is the bf16 number 2^126 * 2^(b - 127), and one product makes the
weight, exactly. That ends at b = 128 (a scale of 2), which trained weights never come near; larger bytes are refused.

Odd sizes are filled with code 0 under scale byte 0, which add exact zeros.

Tensor cores that read E2M1 themselves (`blackwell_mxfp4`) get hw_fp4 pages: codes [rows, depth / 2] and scales
[rows, depth / 32], both as in the checkpoint, of any scale.

Rejected: the checkpoint's nibble order (8 to 10
instructions per weight), scales in a tensor of their own (a second, short read per tile).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxfp4.format import BLOCK_SIZE

SCALE_OFFSET = 126
MAX_SCALE_BYTE = 254 - SCALE_OFFSET


@dataclass(frozen=True)
class Tile:
    """Shape of a page: output rows and values of K. Both powers of two, rows >= 16 (hw_fp4: 64), depth >= 64."""

    rows: int = 64
    depth: int = 256
    hw_fp4: bool = False

    def __post_init__(self):
        for name, value, least in (("rows", self.rows, 64 if self.hw_fp4 else 16), ("depth", self.depth, 2 * BLOCK_SIZE)):
            if value < least or value & (value - 1):
                raise ValueError(f"tile {name} {value}: expected a power of two of at least {least}")

    @property
    def page_bytes(self) -> int:
        return self.rows * self.depth // 2 + self.rows * self.depth // BLOCK_SIZE


@dataclass(frozen=True)
class ExpertPages:
    """One rank's shard of a layer's experts.

    up [E, inner / (rows / 2), hidden / depth, page] and down [E, hidden / rows, inner / depth, page], uint8, every quotient
    rounded up. Rows of `up` alternate in groups of eight: eight gate rows, then the eight up rows they multiply. The inner
    dimension is cut into `parts` runs of whole pages that are summed apart.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_tile: Tile
    down_tile: Tile
    hidden: int
    inner: int
    parts: int = 1

    def __post_init__(self):
        assert self.up_tile.hw_fp4 == self.down_tile.hw_fp4, "one kernel reads both"

    @property
    def experts(self) -> int:
        return self.up.shape[0]

    @property
    def hw_fp4(self) -> bool:
        return self.up_tile.hw_fp4

    def to(self, device) -> ExpertPages:
        return ExpertPages(self.up.to(device), self.down.to(device), self.up_tile, self.down_tile, self.hidden, self.inner,
                           self.parts)


def pack_pages(codes: torch.Tensor, scales: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Pages of a matrix or a stack of matrices.

    Args:
        codes: uint8 [..., n, K / 2] as `mxfp4.quantize` writes them.
        scales: uint8 [..., n, K / 32].

    Returns:
        uint8 [..., ceil(n / rows), ceil(K / depth), tile.page_bytes], contiguous.

    Raises:
        ValueError: a scale byte above 128 (its index is named), or shapes that do not belong together.
    """
    if codes.shape[:-1] != scales.shape[:-1] or codes.shape[-1] * 2 != scales.shape[-1] * BLOCK_SIZE:
        raise ValueError(f"codes {list(codes.shape)} and scales {list(scales.shape)} do not belong together; expected "
                         f"[..., n, K / 2] and [..., n, K / 32]")
    scales = scales.view(torch.uint8)
    if not tile.hw_fp4 and scales.numel() and int(scales.max()) > MAX_SCALE_BYTE:
        where = (scales > MAX_SCALE_BYTE).nonzero()[0].tolist()
        raise ValueError(f"scale byte {int(scales[tuple(where)])} at index {where}: the packed decoding holds scales up to 2 "
                         f"(byte {MAX_SCALE_BYTE}); run this checkpoint with the torch backend")
    *lead, n, half = codes.shape
    rows, depth = -(-n // tile.rows) * tile.rows, -(-2 * half // tile.depth) * tile.depth
    codes = torch.nn.functional.pad(codes, (0, depth // 2 - half, 0, rows - n))
    scales = torch.nn.functional.pad(scales, (0, depth // BLOCK_SIZE - scales.shape[-1], 0, rows - n))
    if tile.hw_fp4:
        return torch.cat([t.reshape(*lead, rows // tile.rows, tile.rows, depth // tile.depth, -1).movedim(-2, -3).flatten(-2)
                          for t in (codes, scales)], -1).contiguous()
    elements = torch.stack((codes & 15, codes >> 4), -1)
    # [..., row tile, K tile, row, half of K, words, 4]
    elements = elements.reshape(*lead, rows // tile.rows, tile.rows, depth // tile.depth, 2, tile.depth // 8, 4)
    elements = elements.movedim(-5, -4).to(torch.int32)
    body = _words(elements[..., 0, :, :], elements[..., 1, :, :])
    body = torch.stack([(body >> shift & 255).to(torch.uint8) for shift in (0, 8, 16, 24)], -1).flatten(-3)
    scales = scales.view(*lead, rows // tile.rows, tile.rows, depth // tile.depth, 2, tile.depth // (2 * BLOCK_SIZE))
    tail = (scales + SCALE_OFFSET).movedim(-3, -4).movedim(-2, -3).flatten(-3)
    return torch.cat((body, tail), -1).contiguous()


def unpack_pages(pages: torch.Tensor, tile: Tile, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact inverse: codes uint8 [..., n, k / 2] and scales uint8 [..., n, k / 32]."""
    *lead, row_tiles, k_tiles, size = pages.shape
    assert size == tile.page_bytes and row_tiles * tile.rows >= n and k_tiles * tile.depth >= k
    body, tail = pages.split((tile.rows * tile.depth // 2, tile.rows * tile.depth // BLOCK_SIZE), -1)
    if tile.hw_fp4:
        codes, scales = (t.unflatten(-1, (tile.rows, -1)).movedim(-2, -3).reshape(*lead, row_tiles * tile.rows, -1)
                         for t in (body, tail))
        return codes[..., :n, :k // 2].contiguous(), scales[..., :n, :k // BLOCK_SIZE].contiguous()
    body = body.reshape(*lead, row_tiles, k_tiles, tile.rows, tile.depth // 8, 4).to(torch.int64)
    elements = torch.stack(_elements(sum(body[..., i] << 8 * i for i in range(4))), -3)
    # [..., row tile, K tile, row, half, words, 4] -> rows, K
    elements = elements.movedim(-4, -5).reshape(*lead, row_tiles * tile.rows, k_tiles * tile.depth)[..., :n, :k]
    codes = (elements[..., 0::2] | elements[..., 1::2] << 4).to(torch.uint8)
    tail = tail.reshape(*lead, row_tiles, k_tiles, 2, tile.rows, tile.depth // (2 * BLOCK_SIZE))
    scales = tail.movedim(-2, -3).movedim(-3, -4).reshape(*lead, row_tiles * tile.rows, -1)[..., :n, :k // BLOCK_SIZE]
    return codes.contiguous(), (scales - SCALE_OFFSET).contiguous()


def repack_experts(gate_up: tuple[torch.Tensor, torch.Tensor], down: tuple[torch.Tensor, torch.Tensor], *, rank: int = 0,
                   ranks: int = 1, up_tile: Tile = Tile(), down_tile: Tile = Tile(), parts: int = 1) -> ExpertPages:
    """One rank's pages of a layer: its share of every expert's inner dimension (all experts, no straggler).

    Args:
        gate_up: (codes [E, 2 I, H / 2], scales [E, 2 I, H / 32]), gate rows first.
        down: (codes [E, H, I / 2], scales [E, H, I / 32]).
        parts: of this rank's share that are summed apart.

    Raises:
        ValueError: an inner dimension that `ranks` cannot share in blocks of 32, a scale byte above 128.
    """
    codes, scales = gate_up
    inner, hidden = codes.shape[1] // 2, codes.shape[2] * 2
    if inner % (ranks * BLOCK_SIZE) or not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}: an inner dimension of {inner} cannot be shared in blocks of {BLOCK_SIZE}")
    share = inner // ranks
    assert parts == 1 or share % (parts * down_tile.depth) == 0, "a part is made of whole pages"
    mine = slice(rank * share, (rank + 1) * share)
    up = [_alternate(t.unflatten(1, (2, inner))[:, :, mine], up_tile.rows) for t in (codes, scales.view(torch.uint8))]
    codes, scales = down
    codes = codes[..., rank * share // 2:(rank + 1) * share // 2]
    scales = scales.view(torch.uint8)[..., rank * share // BLOCK_SIZE:(rank + 1) * share // BLOCK_SIZE]
    return ExpertPages(pack_pages(*up, up_tile), pack_pages(codes, scales, down_tile), up_tile, down_tile, hidden, share,
                       parts)


def _alternate(gate_up: torch.Tensor, rows: int) -> torch.Tensor:
    """[E, 2, n, c] -> [E, 2 n', c]: groups of eight gate and eight up rows, n filled with zeros to a multiple of rows / 2."""
    E, _, n, c = gate_up.shape
    fill = -n % (rows // 2)
    gate_up = torch.nn.functional.pad(gate_up, (0, 0, 0, fill))
    return gate_up.reshape(E, 2, (n + fill) // 8, 8, c).transpose(1, 2).reshape(E, 2 * (n + fill), c)


def _words(lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """int32 words from codes [..., 4] of both halves of K."""
    pairs = torch.stack((lower[..., 0:2], lower[..., 2:4], upper[..., 0:2], upper[..., 2:4]), 0)
    sign, magnitude = pairs >> 3, pairs & 7
    half = ((sign[0] << 15 | magnitude[0] << 6) | (sign[1] << 12 | magnitude[1] << 3) | (sign[2] << 9 | magnitude[2])
            | (sign[3] << 14 | (magnitude[3] & 4) << 11 | (magnitude[3] & 3) << 10))
    return half[..., 0] | half[..., 1] << 16


def _elements(word: torch.Tensor) -> list[torch.Tensor]:
    """Codes [..., 4] of the lower and of the upper half, from int64 words."""
    half = torch.stack((word & 0xFFFF, word >> 16), -1)
    pairs = [half >> 12 & 8 | half >> 6 & 7, half >> 9 & 8 | half >> 3 & 7, half >> 6 & 8 | half & 7,
             half >> 11 & 8 | half >> 11 & 4 | half >> 10 & 3]
    return [torch.cat(pairs[:2], -1), torch.cat(pairs[2:], -1)]
