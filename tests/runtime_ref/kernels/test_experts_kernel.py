"""The expert kernel against the model's experts, and the properties that timing and batch must not change.

All of it for pages that are decoded and for hw_fp4 ones, whose activations are rounded to MXFP8.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import EXPERTS_KERNEL, EXPERTS_RANKS

from runtime_ref.kernels.experts import Workspace, experts_kernel, kernel_arguments, round_rows, run_experts
from runtime_ref.kernels.repack import Tile, repack_experts
from tests.runtime_ref.kernels import expert_cases as cases
from tests.runtime_ref.kernels.expert_cases import A, E, H


@pytest.fixture(scope="module")
def weights():
    return cases.make_weights()


@pytest.fixture(scope="module", params=[cases.SMALL, cases.HW_FP4], ids=["decoded", "hw_fp4"])
def pages(weights, request):
    return cases.make_pages(weights, tile=request.param)


def call(x, index, weight, pages, **options):
    space = cases.poisoned(pages, x.shape[0], index.shape[1], **options)
    out = run_experts(x, index, weight, pages, space, torch.full(x.shape, float("nan")))
    assert not space.failed()
    return out


def entering(x, space):
    """x as the kernel reads it."""
    return round_rows(x, space) if space.hw_fp4 else x


def error(out, expected):
    return float((out.float() - expected).norm() / expected.norm())


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63, 64])
def test_equals_the_models_experts(weights, pages, tokens):
    x, index, weight = cases.make_tokens(tokens, seed=tokens)
    assert int(index.max()) < E - 1, "one expert stays without tokens"
    expected = cases.oracle(weights, pages.hw_fp4)(x.float(), index.long(), weight)
    assert error(call(x, index, weight, pages), expected) < EXPERTS_KERNEL


@pytest.mark.parametrize("tile", [Tile(16, 64), Tile(64, 256), Tile(64, 64, hw_fp4=True), Tile(128, 256, hw_fp4=True)], ids=str)
def test_page_shape_does_not_matter(weights, tile):
    x, index, weight = cases.make_tokens(3)
    expected = cases.oracle(weights, tile.hw_fp4)(x.float(), index.long(), weight)
    assert error(call(x, index, weight, cases.make_pages(weights, tile=tile)), expected) < EXPERTS_KERNEL


def test_all_tokens_on_one_expert(weights, pages):
    x, _, weight = cases.make_tokens(9)
    index = torch.full((9, 1), 2, dtype=torch.int32)
    expected = cases.oracle(weights, pages.hw_fp4)(x.float(), index.long(), weight[:, :1])
    assert error(call(x, index, weight[:, :1].contiguous(), pages), expected) < EXPERTS_KERNEL


def test_choices_outside_the_experts_count_as_none(weights, pages):
    x, index, weight = cases.make_tokens(3)
    index[1, 0], index[2] = -1, E
    valid = (index >= 0) & (index < E)
    expected = cases.oracle(weights, pages.hw_fp4)(x.float(), index.long().clamp(0, E - 1), weight * valid)
    out = call(x, index, weight, pages)
    assert error(out, expected) < EXPERTS_KERNEL
    assert not out[2].any()


def test_no_choice_at_all_gives_zeros(pages):
    x, index, weight = cases.make_tokens(2)
    assert same_bits(call(x, torch.full_like(index, -1), weight, pages), torch.zeros(2, H))


def test_a_row_alone_has_the_bits_it_has_among_eight(pages):
    x, index, weight = cases.make_tokens(8, seed=5)
    together = call(x, index, weight, pages)
    for i in (0, 3, 7):
        alone = call(x[i:i + 1].contiguous(), index[i:i + 1].contiguous(), weight[i:i + 1].contiguous(), pages)
        assert same_bits(alone, together[i:i + 1])


@pytest.mark.parametrize("options", [{"tickets": False}, {"chunk_tiles": 1}, {"stages": 1}, {"ahead": 1024}, {"packed": False},
                                     {"packed": False, "tickets": False, "ahead": 128}], ids=str)
def test_bits_do_not_depend_on_the_launch(pages, options):
    x, index, weight = cases.make_tokens(5)
    index[1, 0], index[3] = -1, E
    assert same_bits(call(x, index, weight, pages, **options), call(x, index, weight, pages))


def test_a_slot_for_every_choice_has_room_where_experts_are_few(pages):
    """Eighteen choices of three experts: packed, they are at most eight slots."""
    x, index, weight = cases.make_tokens(9)
    assert cases.poisoned(pages, 9).slots == 8 and cases.poisoned(pages, 9, packed=False).slots == 18
    assert same_bits(call(x, index, weight, pages, packed=False), call(x, index, weight, pages))


def test_bits_do_not_depend_on_the_order_of_the_work_list(pages):
    x, index, weight = cases.make_tokens(5)
    space = cases.poisoned(pages, 5)
    entries = space.slots * pages.up.shape[1]
    space.order[:entries] = space.order[:entries].flip(0)
    space.order[entries:] = space.order[entries:][torch.randperm(space.slots * space.chunks)]
    out = run_experts(x, index, weight, pages, space, torch.full(x.shape, float("nan")))
    assert same_bits(out, call(x, index, weight, pages))


def test_phases_of_several_programs_run_one_after_another(pages):
    x, index, weight = cases.make_tokens(5)
    space = cases.poisoned(pages, 5, tickets=False)
    out = torch.full(x.shape, float("nan"))
    positional, options = kernel_arguments(entering(x, space), index, weight, pages, space, out)
    for phase in (1, 2):
        experts_kernel[(3,)](*positional, **(options | {"WAIT": False, "PHASE": phase}))
    assert same_bits(out, call(x, index, weight, pages))


def test_scratch_is_ready_for_the_next_call(pages):
    x, index, weight = cases.make_tokens(5)
    space = cases.poisoned(pages, 8)
    first = run_experts(x, index, weight, pages, space, torch.empty(x.shape))
    assert not space.ready.any() and not space.arrived.any() and not space.control.any()
    other = cases.make_tokens(8, seed=9)
    run_experts(*other, pages, space, torch.empty(other[0].shape))
    assert same_bits(run_experts(x, index, weight, pages, space, torch.empty(x.shape)), first)


@pytest.mark.parametrize("tiles", [(cases.SMALL, Tile(32, 64)), (cases.HW_FP4, Tile(64, 64, hw_fp4=True))],
                         ids=["decoded", "hw_fp4"])
def test_parts_kept_apart_are_those_of_ranks_and_add_up_to_the_bits_of_one(tiles):
    weights, tile = cases.make_weights(inner=128), dict(zip(("up_tile", "down_tile"), tiles, strict=True))
    whole = repack_experts(*weights, **tile, parts=2)
    x, index, weight = cases.make_tokens(9)
    kept = torch.full((2, *x.shape), float("nan"))
    run_experts(x, index, weight, whole, cases.poisoned(whole, 9), kept)
    for rank in range(2):
        pages, own = repack_experts(*weights, rank=rank, ranks=2, **tile), torch.full((1, *x.shape), float("nan"))
        assert same_bits(run_experts(x, index, weight, pages, cases.poisoned(pages, 9), own)[0], kept[rank])
    assert same_bits(call(x, index, weight, whole), kept[0] + kept[1])
    assert error(kept.sum(0), cases.oracle(weights, tiles[0].hw_fp4)(x.float(), index.long(), weight)) < EXPERTS_KERNEL


def test_shards_sum_to_the_whole(weights, pages):
    x, index, weight = cases.make_tokens(4)
    parts = [call(x, index, weight, cases.make_pages(weights, rank, 3, pages.up_tile)) for rank in range(3)]
    assert error(sum(parts), call(x, index, weight, pages)) < EXPERTS_RANKS


def test_bf16_output_is_the_rounded_float32_output(pages):
    x, index, weight = cases.make_tokens(3)
    out = run_experts(x, index, weight, pages, cases.poisoned(pages, 3))
    assert torch.equal(out, call(x, index, weight, pages).to(torch.bfloat16))


def test_misfits_are_refused(pages):
    x, index, weight = cases.make_tokens(3)
    space = cases.poisoned(pages, 2)
    with pytest.raises(ValueError, match="3 tokens with 2 choices; this scratch holds 2 tokens"):
        run_experts(x, index, weight, pages, space)
    with pytest.raises(ValueError, match="expected contiguous bfloat16"):
        run_experts(x.float(), index, weight, pages, space)
    with pytest.raises(ValueError, match="expected int32 and float32"):
        run_experts(x, index.long(), weight, pages, space)
    with pytest.raises(ValueError, match="65 tokens in one call"):
        Workspace(pages, 65, A, cases.launched())


def test_a_lost_signal_becomes_a_flag_not_a_hang(pages):
    x, index, weight = cases.make_tokens(2)
    space = cases.poisoned(pages, 2, polls=3)
    space.launch = replace(space.launch, tickets=False)
    positional, options = kernel_arguments(entering(x, space), index, weight, pages, space, torch.empty(x.shape))
    experts_kernel[(1,)](*positional, **(options | {"PHASE": 2}))  # the first phase never ran
    assert space.failed()
