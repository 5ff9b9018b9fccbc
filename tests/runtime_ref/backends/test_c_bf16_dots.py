"""bf16 dot products of the compiled ops: the codec's bits, the other ops' numbers, a row's own bits beside others; bytes."""

from types import SimpleNamespace

import pytest
import torch
from tolerance import DRAFTS_IN_BYTES, NATIVE_DOTS

from mxfp4 import dequantize
from runtime_ref.backends.c import structs
from runtime_ref.backends.c.backend import CBackend
from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import PAGE, KvCache
from runtime_ref.core.program import target_program
from runtime_ref.validation import reference_ops as naive
from runtime_ref.validation.checks.runtime_ops import OP_ERROR

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(structs.compiled_ops()[0] is None or not structs.has_bf16_dot(BF16),
                                reason="no bf16 dot products here")
PAGES = {"full": 40, "window": 40}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def opened(backend, *more):
    """Tables of one sequence with room for 200 positions."""
    cache = KvCache(backend.pools | dict(more))
    tables = cache.tables()
    cache.extend(tables, list(tables), 200)
    return tables


def test_decoding_in_panels_equals_the_codec_for_every_code_and_scale_byte():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).contiguous()  # all pairs of codes under every scale byte
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16).contiguous()
    panels, beside = structs.coded_panels(codes), structs.scale_panels(scales)
    found = torch.empty(512, 256)
    packed = structs.PackedMatrix(panels.data_ptr(), beside.data_ptr(), panels.stride(0), beside.stride(0))
    structs.compiled_ops()[0].decode_panels(packed, 256, 512, found.data_ptr())
    expected = dequantize(codes, scales, dtype=torch.float32)
    assert torch.equal(found.T[:255], expected[:255])  # numbers: a sum that begins with zero has no minus zero
    assert found.T[255].isnan().all() and expected[255].isnan().all()


def op_errors(backend, ids) -> dict[str, float]:
    """Worst relative error by op of a step over `ids`, against the float64 reference on the inputs that the op had."""
    shown = SimpleNamespace(weights=backend.weights, config=backend.config, rotary=backend.rotary, pools=backend.pools,
                            mxfp8=False)
    span, kept, worst, chosen = SequenceChunk(opened(backend), 0, ids), {}, {}, []

    def watch(op, buffers):
        inputs = {name: kept[name] for name in op.reads if name in kept}
        if len(inputs) == len(op.reads):
            if op.name.startswith("attend") and backend.bf16_dot:
                shown.pools = {kind: in_rows(pool) for kind, pool in backend.pools.items()}
            expected = naive.expected(shown, op, inputs, span, len(ids))
            if expected is not None:
                got = naive.found(op, buffers, backend)
                if op.name == "route":  # a rounded activation may decide between two experts that score alike
                    same = ((got > 0) == (expected > 0)).all(1)
                    chosen.extend(same.tolist())
                    got, expected = got[same], expected[same]
                worst[op.name] = max(worst.get(op.name, 0.0), error(got, expected))
        kept.update({name: value.clone() for name, value in buffers.items()})

    backend.run(target_program(backend.config), backend.plan([span]), watch)
    assert sum(chosen) >= 0.95 * len(chosen)
    return worst


def in_rows(pool) -> SimpleNamespace:
    """A pool in dot products' order as [K, slots, width]."""
    def keys(t):
        return t.view(t.shape[0], -1, t.shape[2] // 2, PAGE, 2).permute(0, 1, 3, 2, 4).reshape(t.shape).float()

    def values(t):
        return t.view(t.shape[0], -1, PAGE // 2, t.shape[2], 2).transpose(3, 4).reshape(t.shape).float()

    return SimpleNamespace(keys={i: keys(t) for i, t in pool.keys.items()},
                           values={i: values(t) for i, t in pool.values.items()})


@pytest.mark.parametrize("rows", [1, 3, 8, 13, 100])
def test_every_op_is_its_float64_reference_but_for_rounded_activations(weights, ids, rows):
    worst = op_errors(CBackend(weights, dtype=BF16, pages=PAGES), ids[:rows])
    assert {"project_full", "attend_window", "merge_heads", "experts", "route", "dense_mlp", "head"} <= worst.keys()
    assert max(worst.values()) < NATIVE_DOTS, worst


def test_a_sequence_has_its_bits_beside_others_and_alone(weights, ids):
    """Blocks of eight rows that share their keys must not mix sequences."""
    backend, program = CBackend(weights, dtype=BF16, pages=PAGES), target_program(weights.config)
    cache = KvCache(backend.pools)
    one, two = cache.tables(), cache.tables()
    for tables in (one, two):
        cache.extend(tables, list(tables), 150)
    backend.run(program, backend.plan([SequenceChunk(one, 0, ids[:70], "none"), SequenceChunk(two, 0, ids[70:133], "none")]))
    step = [SequenceChunk(one, 70, ids[:5]), SequenceChunk(two, 63, ids[5:12])]
    together = backend.run(program, backend.plan(step))["logits"].clone()
    alone = [backend.run(program, backend.plan([SequenceChunk(s.tables, s.start, s.tokens)]))["logits"].clone() for s in step]
    row_by_row = [backend.run(program, backend.plan([SequenceChunk(two, 63 + i, [token])]))["logits"].clone()
                  for i, token in enumerate(ids[5:12])]
    assert torch.equal(together, torch.cat(alone)) and torch.equal(torch.cat(row_by_row), alone[1])


def test_what_lies_in_unused_pages_does_not_matter(weights, ids):
    backend, program = CBackend(weights, dtype=BF16, pages=PAGES), target_program(weights.config)
    found = []
    for fill in (0.0, 1e30):
        for pool in backend.pools.values():
            for store in (pool.keys, pool.values):
                for t in store.values():
                    t.fill_(fill)
        found.append(backend.run(program, backend.plan([SequenceChunk(opened(backend), 0, ids[:21])]))["logits"].clone())
    assert torch.equal(*found)


def test_without_the_instruction_the_numbers_are_the_same_but_for_the_order_of_sums(weights, ids, monkeypatch):
    """So acceptance does not depend on the processor: two builds are nearer to each other than bf16 is to float32."""
    def logits(backend, pieces=(100,)):
        tables, at, found = opened(backend), 0, []
        for n in pieces:
            step = backend.plan([SequenceChunk(tables, at, ids[at:at + n])])
            found.append(backend.run(target_program(weights.config), step)["logits"].clone())
            at += n
        return torch.cat(found)

    exact, dots = (logits(CBackend(weights, dtype=dtype, pages=PAGES)) for dtype in (torch.float32, BF16))
    plainly = structs.compiled_ops((*(flag for flag in structs.FLAGS if flag != "-O3"), "-O1", "-mno-avx512bf16"))
    assert plainly[0] is not None and not plainly[0].has_dots()
    monkeypatch.setattr(structs, "compiled_ops", lambda: plainly)
    monkeypatch.setattr("runtime_ref.backends.c.backend.compiled_ops", lambda: plainly)
    backend = CBackend(weights, dtype=BF16, pages=PAGES)
    assert not backend.bf16_dot
    worst = op_errors(backend, ids[:13])
    assert max(worst.values()) < NATIVE_DOTS, worst
    assert worst["experts"] > OP_ERROR < worst["project_full"]  # what enters them is rounded
    whole = logits(backend)
    assert error(whole, dots) < error(exact, dots) / 20  # 0.0011 and 0.16 of this random model
    assert torch.equal(logits(backend, (61, 1, 8, 30)), whole), "a row's bits depend on the rows beside it"


def test_dot_products_are_refused_where_there_are_none(weights, monkeypatch):
    with pytest.raises(ValueError, match="bf16_dot"):
        CBackend(weights, dtype=torch.float32, pages=PAGES, bf16_dot=True)


def test_float32_engines_do_not_round_what_enters_a_product(weights):
    assert not CBackend(weights, dtype=torch.float32, pages=PAGES).bf16_dot


@pytest.mark.parametrize("count", [1, 3, 7])
def test_int8_drafts_are_near_those_in_float32(folder, weights, ids, count):
    target_hidden, found = torch.randn(70, 3 * 64, generator=torch.Generator().manual_seed(1)), []
    for precision in ("bf16", "int8"):
        backend = CBackend(weights, dtype=BF16, pages=PAGES, bf16_dot=precision == "int8")
        drafter = backend.load_drafter(folder / "dflash", 20, 256, precision=precision)
        tables = opened(backend, ("draft", drafter.pool))
        found.append(drafter.logits([DraftRequest(tables, ids[0], 70, count, target_hidden)])[0])
    assert error(found[1], found[0]) < DRAFTS_IN_BYTES


def test_int8_drafts_are_an_option_of_one_backend_and_never_taken_unasked(folder, weights, make_engine):
    assert not CBackend(weights, dtype=BF16, pages=PAGES).load_drafter(folder / "dflash", 20, 256).memory.int8
    assert make_engine(backend="c", drafter_precision="int8").drafter.memory.int8
    with pytest.raises(ValueError, match="--drafter-precision int8: .* dtype bfloat16 only; expected bf16"):
        make_engine(backend="c", dtype=torch.float32, drafter_precision="int8")
    with pytest.raises(ValueError, match="--drafter-precision int8: the torch backend drafts in bf16"):
        make_engine(backend="torch", drafter_precision="int8")
    with pytest.raises(ValueError, match="drafter_precision 'int4': expected bf16, int8"):
        make_engine(backend="c", drafter_precision="int4")


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_a_product_in_bytes_is_exact_for_numbers_that_bytes_hold_and_gives_nan_for_nan(rows):
    generator = torch.Generator().manual_seed(2)
    w, x = (torch.randint(-127, 128, (n, 48), generator=generator).float() for n in (33, rows))
    w[:, 0], x[:, 1] = 127, -127  # every row's scale is 1
    x[0] = 0
    x[-1, 5] = float("nan") if rows == 9 else x[-1, 5]
    memory = structs.Memory(bf16_dot=True, int8=True)
    step = structs.Step(fc=memory.matrix(w), R=rows, H=48, norm=memory.pointer(torch.ones(48)))
    held = {"features": x, "x": torch.zeros(rows, 48), "y": torch.zeros(rows, 48), "halves": torch.zeros(8 * 48)}
    for name, t in held.items():
        setattr(step, name, t.data_ptr())
    code = torch.tensor([[structs.OP["fuse"], -1]], dtype=torch.int32)
    structs.compiled_ops()[0].run(step, code.data_ptr(), 1)
    expected = x.double() @ w.double().T
    whole = rows - (rows == 9)
    assert torch.equal(held["x"][:whole, :33].double(), expected[:whole]) and not held["x"][0].any()
    assert rows != 9 or held["x"][8, :33].isnan().all()
