"""The compiled ops: the codec's bits, the torch backend's numbers, a row's own bits beside any others."""

import platform
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerance import MODEL_FP32

from mxfp4 import dequantize
from runtime_ref.backends.base import Cut
from runtime_ref.backends.c import structs
from runtime_ref.backends.c.backend import CBackend, refuses
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import target_program
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine

pytestmark = pytest.mark.skipif(structs.compiled_ops()[0] is None, reason=f"compiled ops: {structs.compiled_ops()[1]}")
PAGES = {"full": 40, "window": 40}


def computed(backend, ids, pieces):
    """Logits of `ids` computed in pieces of the given sizes."""
    cache, program = KvCache(backend.pools), target_program(backend.config)
    tables, found, at = cache.tables(), [], 0
    for n in pieces:
        cache.extend(tables, list(tables), at + n)
        found.append(backend.run(program, backend.plan([SequenceChunk(tables, at, ids[at:at + n])]))["logits"][:n])
        at += n
        cache.evict_outside_window(tables, dict.fromkeys(tables, at))
    return torch.cat(found)


# Registers of 16 lanes, of 8 with the look-up of AVX2, what every processor has: a machine tests its own and those below it.
WIDTHS = {"native": None, "avx512": "-mno-avx512bf16", "avx2": "-march=haswell", "plain": "-march=x86-64-v2"}


@pytest.fixture(params=WIDTHS)
def width(request, monkeypatch):
    """The compiled ops for processors that have less than this one."""
    needed = {"avx2": "avx2", "avx512": "avx512f"}.get(request.param)
    found = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    if request.param != "native" and (not found or needed is not None and needed not in found):
        pytest.skip(f"this processor has no {request.param}")
    built = structs.compiled_ops((*structs.FLAGS, *([] if request.param == "native" else [WIDTHS[request.param]])))
    assert built[0] is not None, built[1]
    monkeypatch.setattr(structs, "compiled_ops", lambda: built)
    monkeypatch.setattr("runtime_ref.backends.c.backend.compiled_ops", lambda: built)


def test_decoding_equals_the_codec_for_every_code_and_scale_byte(width):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).contiguous()  # all pairs of codes under every scale byte
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16).contiguous()
    found = torch.empty(256, 512)
    packed = structs.PackedMatrix(codes.data_ptr(), scales.data_ptr(), 256, 16)
    structs.compiled_ops()[0].decode_rows(packed, 256, 512, found.data_ptr())
    expected = dequantize(codes, scales, dtype=torch.float32)
    assert torch.equal(found[:255].view(torch.int32), expected[:255].view(torch.int32))
    assert found[255].isnan().all() and expected[255].isnan().all()


@pytest.mark.parametrize("text", ["ids", "one token"])
def test_logits_are_the_torch_backends(weights, ids, text, width):
    ids = ids if text == "ids" else ids[:1]
    ours, theirs = (kind(weights, dtype=torch.float32, pages=PAGES) for kind in (CBackend, TorchBackend))
    torch.testing.assert_close(computed(ours, ids, [len(ids)]), computed(theirs, ids, [len(ids)]), **MODEL_FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [[1] * 200, [8] * 25, [2, 61, 1, 64, 72], [3, 5, 7, 100, 4, 6, 75]])
def test_logits_do_not_depend_on_how_the_text_is_cut(weights, ids, dtype, pieces):
    backend = CBackend(weights, dtype=dtype, pages=PAGES)
    assert torch.equal(computed(backend, ids, pieces), computed(backend, ids, [200]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_any_registers_a_rows_bits_are_its_own(weights, ids, dtype, width):
    backend = CBackend(weights, dtype=dtype, pages=PAGES)
    assert torch.equal(computed(backend, ids, [2, 61, 1, 6, 3, 7, 4, 5, 8, 103]), computed(backend, ids, [200]))


def test_every_task_leaves_the_buffers_of_the_torch_backend(weights, ids):
    """Task by task, in float32; queries, keys and values of rows that exist."""
    program, seen = target_program(weights.config, target_layers=[1]), {}
    for kind in (TorchBackend, CBackend):
        backend = kind(weights, dtype=torch.float32, pages=PAGES)
        cache = KvCache(backend.pools)
        tables = cache.tables()
        cache.extend(tables, list(tables), 72)
        backend.run(program, backend.plan([SequenceChunk(tables, 0, ids[:64], "none")]))
        found = seen[backend.capabilities.name] = []
        backend.run(program, backend.plan([SequenceChunk(tables, 64, ids[64:72])]),
                    watch=lambda op, buffers, found=found: found.append({n: buffers[n].clone() for n in op.writes}))
    for op, theirs, ours in zip(program, seen["torch"], seen["c"], strict=True):
        for name in op.writes:
            if name == "index":
                assert torch.equal(ours[name], theirs[name]), op
            else:
                torch.testing.assert_close(ours[name], theirs[name], **MODEL_FP32, msg=lambda m, op=op: f"{op}: {m}")


def test_both_backends_answer_alone_as_in_a_batch_with_drafts_and_without(make_engine, prompts):
    short = prompts[:7]
    plain = SamplingParams(max_tokens=16, ignore_eos=True, speculate=False)
    drafting = SamplingParams(max_tokens=16, ignore_eos=True)
    for backend in ("c", "torch"):
        engine = make_engine(backend=backend)
        alone = [engine.generate([p], plain)[0] for p in short]
        assert engine.backend.capabilities.name == backend
        assert engine.generate(short, plain) == alone == engine.generate(short, drafting)


def test_drafts_are_those_of_the_torch_drafter(folder, weights, ids):
    found = []
    target_hidden = torch.randn(90, 3 * 64, generator=torch.Generator().manual_seed(1))
    for kind in (TorchBackend, CBackend):
        backend = kind(weights, dtype=torch.float32, pages=PAGES)
        drafter = backend.load_drafter(folder / "dflash", 20, 256)
        cache = KvCache({"draft": drafter.pool})
        one, two = cache.tables(), cache.tables()
        for tables in (one, two):
            cache.extend(tables, ["draft"], 100)
        drafter.extend_tables(target_hidden[:80], 0, one["draft"])
        drafter.extend_tables(target_hidden[:20], 0, two["draft"])
        found.append(drafter.logits([DraftRequest(one, ids[0], 90, 7, target_hidden[80:]), DraftRequest(two, ids[1], 20, 3,
                                                                                                        None)]))
        again = drafter.logits([DraftRequest(two, ids[1], 20, 3, None)])
        if kind is CBackend:
            assert torch.equal(again[0], found[-1][1])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **MODEL_FP32)


def one_call(backend, drafter, ids, worth):
    """Two sequences that draft and one that reads its prompt, in one call: (chunks, logits, chances)."""
    cache = KvCache(backend.pools | {"draft": drafter.pool})
    tables, program = [cache.tables() for _ in range(3)], target_program(backend.config, drafter.target_layers)
    for own in tables:
        cache.extend(own, list(own), 100)
    read = backend.run(program, backend.plan([SequenceChunk(own, 0, ids[:40], "none") for own in tables]))["target_hidden"]
    requests = [DraftRequest(tables[0], ids[40], 40, 7, read[:40]), DraftRequest(tables[2], ids[41], 40, 3, read[80:])]
    chunks = [SequenceChunk(tables[0], 40, [ids[40], *[0] * 7]), SequenceChunk(tables[1], 40, ids[50:60], "last"),
              SequenceChunk(tables[2], 40, [ids[41], *[0] * 3])]
    truth = array("f", [(i + 0.5) / 16 for i in range(16)])
    buffers, chances = backend.run_round(program, chunks, drafter, [0, 2], requests, [Cut(worth, truth), None])
    return chunks, buffers, chances, requests


def kept_of(chances, worth):
    reach, kept = 1.0, 0
    for chance in chances:
        reach *= (min(int(16 * chance), 15) + 0.5) / 16
        if reach < worth:
            break
        kept += 1
    return kept


@pytest.mark.parametrize("worth", [0.0, 0.45, 0.6, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_in_one_call_is_the_drafters_likeliest_tokens_and_the_targets_own_logits(folder, weights, ids, dtype, worth):
    backend = CBackend(weights, dtype=dtype, pages=PAGES)
    drafter = backend.load_drafter(folder / "dflash", 20, 256)
    with torch.inference_mode():  # drafts that are surer than a random drafter's
        drafter.norm.mul_(4)
    chunks, buffers, chances, requests = one_call(backend, drafter, ids, worth)
    drafts = drafter.logits([replace(request, target_hidden=None) for request in requests])
    for logits, found in zip(drafts, chances, strict=True):
        torch.testing.assert_close(torch.tensor(found), logits.softmax(-1).amax(-1), **MODEL_FP32)
    kept = kept_of(chances[0], worth)
    assert {0.0: kept == 7, 2.0: kept == 0}.get(worth, 0 < kept < 7), chances[0]
    assert chunks[0].tokens == [ids[40], *drafts[0].argmax(-1).tolist()[:kept]]
    assert chunks[2].tokens == [ids[41], *drafts[1].argmax(-1).tolist()]
    assert [chunk.row for chunk in chunks] == [0, 1 + kept, 11 + kept]
    program = target_program(backend.config, drafter.target_layers)
    again = backend.run(program, backend.plan([replace(chunk) for chunk in chunks]))
    assert torch.equal(buffers["logits"], again["logits"]) and len(again["logits"]) == kept + 6
    assert torch.equal(buffers["target_hidden"][:kept + 15], again["target_hidden"])
    assert list(buffers["best"][:kept + 6]) == list(again["best"]) == again["logits"].argmax(-1).tolist()


def test_a_drafter_that_computes_no_numbers_proposes_nothing_and_changes_no_token(make_engine, prompts):
    engine, drafting = make_engine(backend="c"), SamplingParams(max_tokens=12, ignore_eos=True)
    plain = engine.generate(prompts[:3], replace(drafting, speculate=False))
    with torch.inference_mode():
        engine.drafter.norm.fill_(float("nan"))
    assert engine.generate(prompts[:3], drafting) == plain == engine.generate(prompts[:3], replace(drafting, adaptive=True))
    assert engine.stats()["rounds"] and not engine.stats()["drafted"]


def test_drafts_that_are_cut_off_change_no_token(make_engine, prompts):
    engine = make_engine(backend="c", draft_costs={0: 1.0, 3: 0.5, 7: 0.6})
    plain = engine.generate(prompts[:7], SamplingParams(max_tokens=40, ignore_eos=True, speculate=False))
    for temperature in (0.0, 0.9):
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=temperature, seed=5)
        expected = plain if not temperature else engine.generate(prompts[:7], replace(params, speculate=False))
        engine.adaptive.row, engine.adaptive.took = 0.07, lambda asked, kept, seconds: None  # no clock decides here
        before = engine.stats()
        assert engine.generate(prompts[:7], replace(params, adaptive=True)) == expected
        counts = {key: engine.stats()[key] - before[key] for key in ("rounds", "drafted")}
        assert 0 < counts["drafted"] < 2.9 * counts["rounds"]  # of at least three asked for


def test_the_likeliest_of_equals_is_the_first_and_what_is_not_finite_has_none():
    V, rows = 37, 6
    logits = torch.full((rows, 48), 9.0)  # beyond the vocabulary: larger than what is in it
    logits[:, :V] = torch.randn(rows, V, generator=torch.Generator().manual_seed(0)).round()
    logits[1, :V], logits[2, 36], logits[3, 20], logits[4, 35] = 1.0, 5.0, float("nan"), float("inf")
    best, chance = array("i", bytes(4 * rows)), array("f", bytes(4 * rows))
    step = structs.Step(logits=logits.data_ptr(), best=best.buffer_info()[0], chance=chance.buffer_info()[0], vocabulary=V,
                        wanted=rows, head=structs.Matrix(n=48))
    code = array("i", [structs.OP["best"], -1])
    structs.compiled_ops()[0].run(step, code.buffer_info()[0], 1)
    right = [0, 1, 2, 5]
    assert [best[i] for i in right] == [int(logits[i, :V].argmax()) for i in right] and best[1] == 0 and best[2] == 36
    assert best[3] == best[4] == -1 and chance[3] == chance[4] == 0
    torch.testing.assert_close(torch.tensor(chance)[right], logits[right, :V].softmax(-1).amax(-1), **MODEL_FP32)


def test_without_a_compiler_torch_serves_and_says_why(folder, monkeypatch, weights):
    monkeypatch.setattr("runtime_ref.backends.c.backend.compiled_ops", lambda: (None, "no C compiler (cc) on this machine"))
    assert refuses(weights) == "no C compiler (cc) on this machine"
    with pytest.warns(UserWarning, match="no C compiler"):
        engine = Engine.from_folder(folder)
    assert engine.backend.capabilities.name == "torch"
    with pytest.raises(ValueError, match="backend c: no C compiler"):
        Engine.from_folder(folder, backend="native")  # the older name
