"""The compiled ops: the codec's bits, the torch backend's numbers, a row's own bits beside any others."""

import pytest
import torch
from tolerance import MODEL_FP32

from mxfp4 import dequantize
from runtime_ref.backends.c import structs
from runtime_ref.backends.c.backend import CBackend, refuses
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.core.batch import SequenceChunk
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


def test_decoding_equals_the_codec_for_every_code_and_scale_byte():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).contiguous()  # all pairs of codes under every scale byte
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16).contiguous()
    found = torch.empty(256, 512)
    packed = structs.PackedMatrix(codes.data_ptr(), scales.data_ptr(), 256, 16)
    structs.compiled_ops()[0].decode_rows(packed, 256, 512, found.data_ptr())
    expected = dequantize(codes, scales, dtype=torch.float32)
    assert torch.equal(found[:255].view(torch.int32), expected[:255].view(torch.int32))
    assert found[255].isnan().all() and expected[255].isnan().all()


@pytest.mark.parametrize("text", ["ids", "one token"])
def test_logits_are_the_torch_backends(weights, ids, text):
    ids = ids if text == "ids" else ids[:1]
    ours, theirs = (kind(weights, dtype=torch.float32, pages=PAGES) for kind in (CBackend, TorchBackend))
    torch.testing.assert_close(computed(ours, ids, [len(ids)]), computed(theirs, ids, [len(ids)]), **MODEL_FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [[1] * 200, [8] * 25, [2, 61, 1, 64, 72], [3, 5, 7, 100, 4, 6, 75]])
def test_logits_do_not_depend_on_how_the_text_is_cut(weights, ids, dtype, pieces):
    backend = CBackend(weights, dtype=dtype, pages=PAGES)
    assert torch.equal(computed(backend, ids, pieces), computed(backend, ids, [200]))


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
    from runtime_ref.core.batch import DraftRequest

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


def test_without_a_compiler_torch_serves_and_says_why(folder, monkeypatch, weights):
    monkeypatch.setattr("runtime_ref.backends.c.backend.compiled_ops", lambda: (None, "no C compiler (cc) on this machine"))
    assert refuses(weights) == "no C compiler (cc) on this machine"
    with pytest.warns(UserWarning, match="no C compiler"):
        engine = Engine.from_folder(folder)
    assert engine.backend.capabilities.name == "torch"
    with pytest.raises(ValueError, match="backend c: no C compiler"):
        Engine.from_folder(folder, backend="native")  # the older name
