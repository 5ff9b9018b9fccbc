"""Repacking is exact, and what cannot be decoded from a page is refused."""

import pytest
import torch

from mxfp4.format import BLOCK_SIZE
from runtime_ref.kernels.repack import MAX_SCALE_BYTE, Tile, pack_pages, repack_experts, unpack_pages


def random_weights(*shape, seed=0):
    """(codes, scales) of a random [..., n, K] matrix with every code and scales from the whole allowed range."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    blocks = (*shape[:-1], shape[-1] // BLOCK_SIZE)
    scales = torch.randint(0, MAX_SCALE_BYTE + 1, blocks, generator=generator, dtype=torch.uint8)
    return codes, scales


@pytest.mark.parametrize("tile", [Tile(16, 64), Tile(64, 256), Tile(32, 128)], ids=str)
@pytest.mark.parametrize("shape", [(64, 256), (3, 100, 288), (2, 2, 1, 32), (63, 96)], ids=str)
def test_unpacking_returns_the_very_bytes(shape, tile):
    codes, scales = random_weights(*shape)
    pages = pack_pages(codes, scales, tile)
    assert pages.shape == (*shape[:-2], -(-shape[-2] // tile.rows), -(-shape[-1] // tile.depth), tile.page_bytes)
    back = unpack_pages(pages, tile, shape[-2], shape[-1])
    assert torch.equal(back[0], codes) and torch.equal(back[1], scales)


def test_padding_is_code_zero_under_scale_byte_zero():
    codes, scales = random_weights(5, 32)
    full_codes, full_scales = unpack_pages(pack_pages(codes, scales, Tile(16, 64)), Tile(16, 64), 16, 64)
    assert not full_codes[5:].any() and not full_codes[:, 16:].any()
    assert not full_scales[5:].any() and not full_scales[:, 1:].any()


def test_scales_above_two_are_refused_with_their_place():
    codes, scales = random_weights(2, 8, 64)
    scales[1, 5, 1] = MAX_SCALE_BYTE + 1
    with pytest.raises(ValueError, match=r"scale byte 129 at index \[1, 5, 1\].*up to 2"):
        pack_pages(codes, scales, Tile(16, 64))


def test_shapes_that_do_not_belong_together_are_refused():
    codes, scales = random_weights(8, 64)
    with pytest.raises(ValueError, match="do not belong together"):
        pack_pages(codes, scales[:, :1], Tile(16, 64))


@pytest.mark.parametrize("rows, depth", [(8, 64), (48, 64), (16, 32)])
def test_impossible_tiles_are_refused(rows, depth):
    with pytest.raises(ValueError, match="power of two"):
        Tile(rows, depth)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_hold_each_ranks_rows_and_columns(ranks):
    E, I, H = 2, 192, 64
    tile = Tile(16, 64)
    gate_up, down = random_weights(E, 2 * I, H, seed=1), random_weights(E, H, I, seed=2)
    share = I // ranks
    for rank in range(ranks):
        pages = repack_experts(gate_up, down, rank=rank, ranks=ranks, up_tile=tile, down_tile=tile)
        assert (pages.experts, pages.hidden, pages.inner) == (E, H, share)
        for got, whole in zip(unpack_pages(pages.up, tile, pages.up.shape[1] * 16, H), gate_up, strict=True):
            # Groups of eight gate rows and eight up rows.
            gate, up = got.unflatten(1, (-1, 2, 8)).unbind(2)
            assert torch.equal(gate.flatten(1, 2)[:, :share], whole[:, rank * share:(rank + 1) * share])
            assert torch.equal(up.flatten(1, 2)[:, :share], whole[:, I + rank * share:I + (rank + 1) * share])
        for got, whole in zip(unpack_pages(pages.down, tile, H, share), down, strict=True):
            width = whole.shape[-1] // ranks
            assert torch.equal(got, whole[..., rank * width:(rank + 1) * width])


def test_an_inner_dimension_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="inner dimension of 96 cannot be shared"):
        repack_experts(random_weights(1, 192, 64), random_weights(1, 64, 96), rank=0, ranks=2 * 2)
