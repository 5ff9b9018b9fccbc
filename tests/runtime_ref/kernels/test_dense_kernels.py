"""Products of rows and what stands around them: against the torch ops, at odd sizes, with bits that ignore other rows."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from tolerance import ROW_KERNEL

from runtime_ref.backends.torch import ops
from runtime_ref.core.tensor_parallel import SINGLE_RANK
from runtime_ref.kernels import launches
from runtime_ref.kernels.launches import Heads, Matrix, Tiling
from tests.runtime_ref.kernels.at_once import INTERPRETED

TILING = Tiling(columns=32, depth=64, experts=16, block=64, float_dot=INTERPRETED)
EPSILON = 1e-5
POISON = float("nan")


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def bf16(*shape, **options):
    return random(*shape, **options).to(torch.bfloat16)


def matrix(n, k, fp8=False, seed=1):
    if not fp8:
        return Matrix(bf16(n, k, seed=seed, scale=k**-0.5))
    codes = random(n, k, seed=seed, scale=60.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return Matrix(codes, 2.0**-8 * (1 + torch.rand(n, -(-k // 128), generator=torch.Generator().manual_seed(seed))))


def error(found, expected):
    assert not found.isnan().any()
    return float((found.float() - expected).norm() / expected.norm())


def same_bits(a, b):
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def rounded(x):
    return x.to(torch.bfloat16).float()


def poisoned(*shape, dtype=torch.bfloat16):
    return torch.full(shape, POISON, dtype=dtype)


@pytest.mark.parametrize("rows, width", [(1, 64), (7, 100), (9, 63)])
def test_norm(rows, width):
    x, weight = bf16(rows, width), random(width, seed=2)
    found, narrow = launches.norm(x, weight, EPSILON, TILING)
    expected = ops.norm(x.float(), weight, EPSILON)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert same_bits(narrow, found.to(torch.bfloat16))


def projected(x, m, heads, head_norm=None, value_scale=0.7, slots=None):
    R = x.shape[0]
    rotary = torch.rand(50, max(1, heads.rotated // 2), generator=torch.Generator().manual_seed(3)) * 6
    positions = (torch.arange(R) * 3).to(torch.int32)
    slots = torch.arange(R).flip(0).to(torch.int32) + 2 if slots is None else slots
    q, k, v = poisoned(heads.queries, R, heads.d), poisoned(heads.keys, 30, heads.d), poisoned(heads.keys, 30, heads.v)
    laid = Matrix(launches.paired(m.w, heads), None if m.scales is None else launches.paired(m.scales, heads))
    gamma = random(x.shape[1], seed=4)
    split = (heads.queries + heads.keys) * heads.d
    laid_norm = None
    if head_norm is not None:
        laid_norm = launches.paired(torch.cat((head_norm, head_norm[:0])), heads)[:split], EPSILON
    launches.project(x, laid, heads, (rotary.cos(), rotary.sin()), positions, slots, q, k, v, TILING, norm=(gamma, EPSILON),
                     head_norm=laid_norm, value_scale=value_scale)
    y = rounded(ops.norm(x.float(), gamma, EPSILON)) @ m.decoded().T
    qk = y[:, :split].unflatten(1, (-1, heads.d)).transpose(0, 1)
    values = y[:, split:].unflatten(1, (-1, heads.v)).transpose(0, 1)
    if head_norm is not None:
        qk = ops.norm(qk, head_norm.view(-1, 1, heads.d), EPSILON)
    half, angle = heads.rotated // 2, rotary[positions.long()]
    a, b = qk[..., :half], qk[..., half:heads.rotated]
    qk = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), qk[..., heads.rotated:]), -1)
    return (q, k, v), (qk[:heads.queries] * heads.d**-0.5, qk[heads.queries:], values * value_scale), slots.long()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads, hidden, rows", [(Heads(2, 1, 48, 32, 16), 160, 9), (Heads(3, 3, 24, 20, 8), 63, 1),
                                                 (Heads(4, 2, 16, 8, 16), 200, 8), (Heads(1, 1, 40, 40, 0), 64, 3)])
def test_projection_norms_rotates_and_writes(heads, hidden, rows, fp8):
    found, expected, slots = projected(bf16(rows, hidden), matrix(heads.rows, hidden, fp8), heads)
    assert error(found[0], expected[0]) < ROW_KERNEL
    for store, wanted in zip(found[1:], expected[1:], strict=True):
        assert error(store[:, slots], wanted) < ROW_KERNEL
        rest = torch.ones(store.shape[1], dtype=torch.bool)
        rest[slots] = False
        assert store[:, rest].isnan().all()


def test_projection_norms_each_head_and_leaves_rows_without_a_slot():
    heads = Heads(2, 2, 24, 16, 12)
    norm = random(4 * 24, seed=6)
    slots = torch.tensor([5, -1, 0], dtype=torch.int32)
    found, expected, _ = projected(bf16(3, 70), matrix(heads.rows, 70), heads, norm, slots=slots)
    assert error(found[0], expected[0]) < ROW_KERNEL
    for store, wanted in zip(found[1:], expected[1:], strict=True):
        assert error(store[:, [5, 0]], wanted[:, [0, 2]]) < ROW_KERNEL
        assert store[:, [i for i in range(30) if i not in (0, 5)]].isnan().all()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows, n, k", [(1, 64, 64), (7, 33, 100), (9, 63, 260)])
def test_product(rows, n, k, fp8):
    x, m = bf16(rows, k), matrix(n, k, fp8)
    found = launches.product(x, m, poisoned(rows, n, dtype=torch.float32), TILING)
    assert error(found, ops.spread(x.float(), m.decoded().T[None])[0]) < 1e-6


def test_product_of_heads_with_residual_in_place():
    heads, m, x = bf16(3, 9, 20), matrix(50, 60), bf16(9, 50, seed=8)
    expected = ops.add_parts(x.float(), ops.merge_heads(heads.float(), m.decoded().T[None]), SINGLE_RANK, torch.bfloat16)
    found = launches.product(heads, m, x, TILING, residual=x)
    assert found is x and error(found, expected) < ROW_KERNEL


def test_parts_of_a_product_are_added_in_order():
    x, m = bf16(5, 256), matrix(40, 256)
    found = launches.product(x, m, poisoned(5, 40, dtype=torch.float32), TILING, parts=4)
    parts = [launches.product(x[:, i:i + 64].contiguous(), Matrix(m.w[:, i:i + 64].contiguous()),
                              poisoned(5, 40, dtype=torch.float32), TILING) for i in range(0, 256, 64)]
    assert same_bits(found, ((parts[0] + parts[1]) + parts[2]) + parts[3])
    kept = launches.product(x, m, poisoned(4, 5, 40, dtype=torch.float32), TILING, parts=4)
    assert same_bits(kept, torch.stack(parts))
    residual = bf16(5, 40, seed=3)
    whole = launches.product(x, m, poisoned(5, 40), TILING, residual=residual, parts=4)
    assert torch.equal(launches.add(residual, kept, TILING), whole)


def test_head_norms_the_rows_that_are_asked_for():
    x, m, weight = bf16(9, 100), matrix(130, 100), random(100, seed=2)
    rows = torch.tensor([8, 0, 3], dtype=torch.int32)
    found = launches.product(x, m, poisoned(3, 130, dtype=torch.float32), TILING, norm=(weight, EPSILON), rows=rows)
    y = rounded(ops.norm(x[rows.long()].float(), weight, EPSILON))
    assert error(found, ops.head_logits(y, m.decoded().T[None], SINGLE_RANK)) < ROW_KERNEL


@pytest.mark.parametrize("rows, inner, hidden", [(1, 32, 64), (9, 50, 100)])
def test_swiglu(rows, inner, hidden):
    x, m, weight = bf16(rows, hidden), matrix(2 * inner, hidden), random(hidden, seed=2)
    found = launches.swiglu(x, m, TILING, norm=(weight, EPSILON))
    assert error(found, ops.gated(rounded(ops.norm(x.float(), weight, EPSILON)) @ m.decoded().T)) < ROW_KERNEL


def test_rows_are_gathered_written_and_added_exactly():
    table, ids = bf16(30, 100), torch.tensor([29, 0, 7, 7], dtype=torch.int32)
    assert same_bits(launches.gather(table, ids, TILING), table[ids.long()])
    source, slots = bf16(3, 4, 20), torch.tensor([9, 2, -1, 0], dtype=torch.int32)
    store = poisoned(3, 12, 20)
    launches.write(source, store, slots, TILING)
    assert same_bits(store[:, [9, 2, 0]], source[:, [0, 1, 3]]) and int(store[0, :, 0].isnan().sum()) == 9
    x, partial = bf16(7, 33), random(3, 7, 33, seed=4)
    total = partial[0] + partial[1] + partial[2] + x.float()
    assert same_bits(launches.add(x, partial, TILING), total.to(torch.bfloat16))


class Rules:
    """What `model.route` reads of a configuration and a layer."""

    def __init__(self, router):
        self.router, self.correction, self.bias = router.w.T[None].contiguous(), router.correction, None
        self.scores = "sigmoid"
        self.n_group, self.topk_group, self.n_routed_experts = router.groups, router.top_groups, router.w.shape[0]
        self.num_experts_per_tok, self.norm_topk_prob = router.choices, router.normed
        self.routed_scaling_factor = router.factor


@pytest.mark.parametrize("options", [{}, {"normed": False, "factor": 2.5}, {"groups": 4, "top_groups": 2}])
@pytest.mark.parametrize("rows, experts, hidden", [(9, 20, 100), (3, 24, 64)])
def test_router_chooses_what_torch_chooses(rows, experts, hidden, options):
    router = launches.Router(random(experts, hidden, scale=hidden**-0.5), random(experts, seed=3, scale=0.1), 3, **options)
    x, weight = bf16(rows, hidden, seed=5), random(hidden, seed=6)
    index, found, narrow = launches.route(x, router, TILING, norm=(weight, EPSILON))
    y = ops.norm(x.float(), weight, EPSILON)
    expected = ops.route(y, Rules(router), Rules(router))
    assert torch.equal(index.long(), expected[0])
    torch.testing.assert_close(found, expected[1], rtol=1e-5, atol=0)
    assert error(narrow, y) < ROW_KERNEL


def test_router_breaks_ties_towards_the_lower_index_and_sees_the_correction():
    w = torch.zeros(20, 32)
    correction = torch.zeros(20)
    correction[[4, 17]] = 0.5
    index, weight, _ = launches.route(bf16(2, 32), launches.Router(w, correction, 4), TILING)
    assert index.tolist() == [[4, 17, 0, 1]] * 2
    assert torch.equal(weight, torch.full((2, 4), 0.25))


def test_a_row_alone_has_the_bits_it_has_among_others():
    H, many = 100, bf16(17, 100, seed=9)
    weight, m, heads = random(H, seed=2), matrix(90, H), Heads(2, 1, 24, 18, 8)
    router = launches.Router(random(20, H, scale=0.1), random(20, seed=3), 3)
    norm = (weight, EPSILON)

    def rowwise(x):
        R = x.shape[0]
        q, k, v = torch.empty(2, R, 24).bfloat16(), torch.empty(1, R, 24).bfloat16(), torch.empty(1, R, 18).bfloat16()
        rotary = torch.full((1, 4), 0.7)
        launches.project(x, m, heads, (rotary.cos(), rotary.sin()), torch.zeros(R, dtype=torch.int32),
                         torch.arange(R, dtype=torch.int32), q, k, v, TILING, norm=norm)
        index, chosen, narrow = launches.route(x, router, TILING, norm=norm)
        merged = launches.product(q, Matrix(m.w[:, :48].contiguous()), torch.empty(R, 90), TILING)
        return [q[:, :, :].transpose(0, 1), k[0], v[0], index, chosen, narrow, merged, launches.swiglu(x, m, TILING, norm=norm),
                launches.product(x, m, torch.empty(R, 90), TILING, norm=norm), launches.norm(x, weight, EPSILON, TILING)[0]]

    together = rowwise(many)
    for at in (0, 5, 8, 16):
        for whole, alone in zip(together, rowwise(many[at:at + 1]), strict=True):
            assert same_bits(whole[at:at + 1], alone)


def test_matrices_and_tilings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="expected bfloat16 without, or uint8 with"):
        Matrix(torch.zeros(4, 200, dtype=torch.uint8), torch.ones(4, 1))
    with pytest.raises(ValueError, match="powers of two"):
        Tiling(columns=24)
    with pytest.raises(ValueError, match="even widths"):
        Heads(2, 1, 25, 8, 8)
