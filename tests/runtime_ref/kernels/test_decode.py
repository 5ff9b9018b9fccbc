"""C3: decoding in a kernel equals the codec for all 16 codes under every allowed scale byte, bit for bit, in both forms."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from mxfp4 import dequantize
from mxfp4.format import BLOCK_SIZE, E2M1_VALUES
from runtime_ref.kernels.mxfp4_decode import DECODE_PTX, decode_kernel
from runtime_ref.kernels.repack import MAX_SCALE_BYTE, SCALE_OFFSET, Tile, pack_pages
from runtime_ref.measure.static.ptx_emulator import run_ptx
from tests.runtime_ref.kernels.at_once import INTERPRETED

SCALES = MAX_SCALE_BYTE + 1


def every_code_under_every_scale(tile: Tile):
    """(codes, scales) of [scales, 16, depth]: page row r, block c of page s holds the 16 codes rotated by r + c."""
    element = (torch.arange(tile.depth)[None] + torch.arange(tile.rows)[:, None]) % 16
    codes = (element[:, 0::2] | element[:, 1::2] << 4).to(torch.uint8).expand(SCALES, -1, -1).contiguous()
    blocks = tile.depth // BLOCK_SIZE
    # Neighbouring blocks and rows have different scales, and every block place sees every byte.
    shift = torch.arange(tile.rows)[:, None] * blocks + torch.arange(blocks)[None]
    scales = ((torch.arange(SCALES)[:, None, None] + shift) % SCALES).to(torch.uint8)
    return codes, scales


@pytest.mark.parametrize("tile", [Tile(16, 64), Tile(16, 128)], ids=str)
def test_integer_decoding_equals_the_codec(tile):
    codes, scales = every_code_under_every_scale(tile)
    pages = pack_pages(codes, scales, tile)
    out = torch.full((2, SCALES, tile.rows, tile.depth // 2), float("nan"))
    decode_kernel[(SCALES,)](pages, out[0], out[1], ROWS=tile.rows, DEPTH=tile.depth, PTX=not INTERPRETED)
    expected = dequantize(codes, scales, dtype=torch.float32)
    assert torch.equal(torch.cat((out[0], out[1]), -1).view(torch.int32), expected.view(torch.int32))


def test_assembly_decoding_equals_the_codec():
    tile = Tile(16, 64)
    codes, scales = every_code_under_every_scale(tile)
    pages = pack_pages(codes, scales, tile).view(SCALES, tile.page_bytes)
    words = pages[:, :tile.rows * 32].numpy().copy().view(np.uint32).reshape(SCALES, tile.rows, tile.depth // 8)
    stored = (scales.to(torch.int64) + SCALE_OFFSET).numpy().astype(np.uint32)
    doubled = stored << 7 | stored << 23
    lower, upper = doubled[..., :1], doubled[..., 1:]
    registers = run_ptx(DECODE_PTX, {"$4": words, "$5": lower, "$6": lower, "$7": upper, "$8": upper})
    halves = [np.stack([registers[name] >> shift & 0xFFFF for name in pair for shift in (0, 16)], -1)
              for pair in (("$0", "$1"), ("$2", "$3"))]
    got = np.concatenate([h.reshape(SCALES, tile.rows, -1) for h in halves], -1).astype(np.uint16)
    expected = dequantize(codes, scales, dtype=torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(got, expected)


def test_assembly_decodes_random_words_to_e2m1_values_and_uses_every_bit():
    one = np.uint32((127 + 126) << 7 & 0xFFFF) * np.uint32(0x10001)  # 2^126: scale 1

    def decode(words):
        registers = run_ptx(DECODE_PTX, {"$4": words} | {f"${i}": np.full_like(words, one) for i in (5, 6, 7, 8)})
        halves = np.stack([registers[f"${i}"] >> shift & 0xFFFF for i in range(4) for shift in (0, 16)])
        return (halves << 16).astype(np.uint32).view(np.float32)

    words = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    assert set(np.unique(decode(words)).tolist()) == set(E2M1_VALUES)
    flips = decode(np.uint32(0xFFFFFFFF) ^ np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.uint32)
    changed = flips != decode(np.array([0xFFFFFFFF], np.uint32)).view(np.uint32)
    assert (changed.sum(0) == 1).all(), "each bit of a word feeds exactly one of its eight values"
    assert (changed.sum(1) == 4).all(), "each value has four bits"


def test_emulator_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="fma.rn.bf16x2 .*is not known"):
        run_ptx("{ fma.rn.bf16x2 $0, $1, $1; }", {"$1": np.zeros(1, np.uint32)})
    with pytest.raises(ValueError, match="'c' was never written"):
        run_ptx("{ and.b32 $0, $1, c; }", {"$1": np.zeros(1, np.uint32)})
