"""The Triton backend on a small model: every op against its torch reference, and contract C4 in Triton's interpreter."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from safetensors.torch import load_file, save_file
from tolerance import TRITON_LOGITS

from modeling.names import qkv_rows
from mxfp4 import dequantize
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.backends.triton import backend as triton_backend
from runtime_ref.checkpoints.device_weights import load_kernel_weights, random_weights
from runtime_ref.checkpoints.load import load_target
from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.fusion import fused
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import check_program, target_program
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.core.tensor_parallel import SINGLE_RANK
from runtime_ref.engine import accept_on_device
from runtime_ref.engine.engine import Engine
from runtime_ref.kernels.launches import paired
from runtime_ref.kernels.repack import unpack_pages
from runtime_ref.validation.checks.runtime_ops import run_watched
from tests.runtime_ref.backends.triton.op_by_op import check_each_op, relative
from tests.runtime_ref.conftest import OracleProposer

ROOT = Path(__file__).resolve().parents[4]
PLAIN = SamplingParams(max_tokens=4, ignore_eos=True, speculate=False)
GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 128, (21,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def backend(small_engine):
    return small_engine(drafter=False).backend


@pytest.fixture(scope="module")
def torch_backend(small_folder):
    return TorchBackend(load_target(small_folder), dtype=torch.bfloat16, pages={"full": 12, "window": 12})


@pytest.fixture(scope="module")
def alone(small_engine, small_prompts):
    """Answers without a drafter, one prompt at a time."""
    engine = small_engine(drafter=False, prefix_cache=False)
    return [engine.generate([p], PLAIN)[0] for p in small_prompts]


def test_every_op_equals_the_torch_backends_on_the_inputs_it_had(backend, torch_backend, ids):
    assert len(check_each_op(backend, torch_backend, target_program(backend.config, [0, 2]), ids)) == 18


def test_logits_are_those_of_the_torch_backend_where_routing_agrees(backend, torch_backend, ids):
    chosen = ({}, {})
    buffers = [run_watched(b, ids, watch=lambda op, found, own=own: own.update({op.layer: found["index"][:len(ids)]})
                           if op.name == "route" else None)[0] for b, own in zip((backend, torch_backend), chosen, strict=True)]
    same = torch.stack([(chosen[0][i].long().sort(-1)[0] == chosen[1][i].sort(-1)[0]).all(-1) for i in chosen[0]]).all(0)
    assert same.float().mean() > 0.7
    assert relative(buffers[0]["logits"][same], buffers[1]["logits"][:len(ids)][same]) < TRITON_LOGITS


def test_the_fused_list_makes_the_bits_of_the_list_op_by_op(backend, ids):
    program = target_program(backend.config, [0, 2])
    check_program(fused(program))
    assert len(fused(program)) < len(program) / 2 + 3 and {t.name for t in fused(program)} <= backend.ops.keys()
    assert {t.name for t in fused(program, ranks=2)} <= backend.ops.keys()
    whole, _, _ = run_watched(backend, ids, target_layers=[0, 2])
    apart, _, _ = run_watched(backend, ids, target_layers=[0, 2], watch=lambda op, found: None)
    for name in ("logits", "target_hidden.0", "target_hidden.2"):
        assert torch.equal(whole[name], apart[name]) and not whole[name].isnan().any()


def test_pieces_rings_and_pages_change_no_bit(backend):
    """70 tokens in pieces: a window of 16 forgets its first page, rows move through blocks and cross a page."""
    ids = torch.randint(1, 128, (70,), generator=torch.Generator().manual_seed(9)).tolist()
    program, found = target_program(backend.config), []
    for pieces in ([70], [3, 60, 1, 6]):
        cache = KvCache(backend.pools, prefix=False)
        tables, at, logits = cache.tables(), 0, []
        for n in pieces:
            cache.extend(tables, list(tables), at + n)
            logits.append(backend.run(program, backend.plan([SequenceChunk(tables, at, ids[at:at + n])]))["logits"])
            at += n
            cache.evict_outside_window(tables, dict.fromkeys(tables, at))
        found.append(torch.cat(logits))
        assert len(tables["window"].pages) == 2 - (70 - 16 + 1) // 64
        cache.release(tables)
    assert torch.equal(*found)


def test_a_random_drafter_and_a_batch_change_no_token(small_engine, small_prompts, alone):
    engine = small_engine(prefix_cache=False)
    assert engine.generate(small_prompts, GREEDY) == alone
    assert engine.stats()["rounds"] > 0


def test_drafts_that_are_often_right_are_accepted_and_change_no_token(small_engine, small_prompts, alone):
    plain = small_engine(drafter=False, prefix_cache=False)
    oracle = OracleProposer({tuple(p): a for p, a in zip(small_prompts, alone, strict=True)}, 130, 0.2)
    engine = Engine(plain.backend, oracle, plain.options)
    oracle.know(engine)
    assert engine.generate(small_prompts, GREEDY) == alone
    assert engine.stats()["acceptance_length"] > 1.5


def test_sampled_tokens_of_equality_are_those_of_plain_decoding(small_engine, small_prompts):
    params = [SamplingParams(max_tokens=3, temperature=0.8, seed=i, ignore_eos=True) for i in range(2)]
    plain = small_engine(drafter=False).generate(small_prompts[:2], params)
    assert small_engine().generate(small_prompts[:2], params) == plain


def test_what_the_device_judges_the_host_judges_alike(small_engine, small_prompts, monkeypatch):
    """Sequences of every kind side by side, with drafts, and each kind by the host alone."""
    params = [SamplingParams(max_tokens=6, ignore_eos=True, **own) for own in (
        {}, {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_p": 0.9},
        {"temperature": 1.2, "seed": 5, "rule": "rejection", "top_k": 20},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": ((7, 2.0),), "min_tokens": 3})]
    prompts = [*small_prompts, *small_prompts[1:]]
    engine, judged = small_engine(prefix_cache=False, max_running=5), Counter()
    for name in ("verify", "choose"):
        real = getattr(accept_on_device, name)

        def watched(*args, real=real, name=name, **options):
            judged[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(accept_on_device, name, watched)
    together = engine.generate(prompts, params)
    assert judged["verify"] and judged["choose"] and engine.stats()["rounds"] > 0
    monkeypatch.setattr(accept_on_device, "stays_on_device", lambda params: False)
    judged.clear()
    assert engine.generate(prompts, params) == together and not judged


def test_how_experts_are_handed_out_by_the_number_of_tokens_changes_none(small_engine, small_prompts, monkeypatch):
    expected = small_engine(drafter=False).generate(small_prompts[:2], GREEDY)
    monkeypatch.setattr(triton_backend, "DISPATCH", {8: {"packed": False, "ahead": 256}, 64: {"tickets": False, "programs": 1}})
    engine = small_engine(drafter=False)
    assert engine.generate(small_prompts[:2], GREEDY) == expected
    assert {n: (space.launch.packed, space.launch.tickets) for n, space in engine.backend._spaces.items()} == {
        8: (False, True), 64: (True, False)}


def test_drafts_are_those_of_the_torch_drafter(small_engine, ids):
    """Features in two pieces, then blocks of two sizes: the torch drafter gets the same features."""
    mine, theirs = (small_engine(backend) for backend in ("triton", "torch"))
    target_hidden = torch.randn(37, 2 * 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    found = []
    for engine in (mine, theirs):
        cache = KvCache({"draft": engine.drafter.pool})
        tables, features = cache.tables(), target_hidden if engine is mine else target_hidden.float()
        cache.extend(tables, ["draft"], 37 + 8)
        engine.drafter.extend_tables(features[:34], 0, tables["draft"])
        found.append([engine.drafter.logits([DraftRequest(tables, 5, 37, count, features[34:] if count == 7 else None)])[0]
                      for count in (7, 2)])
    for own, expected in zip(*found, strict=True):
        assert own.shape == expected.shape and relative(own, expected) < TRITON_LOGITS


def with_fp8_attention(folder, out):
    """The folder with every fused qkv in FP8, its grid of scales restarting at each chunk."""
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("qkv_proj.weight")]:
        w, layer = tensors[name].float(), int(name.split(".")[2])
        chunks = load_target(folder).config.num_key_value_heads
        scale = torch.rand(chunks * -(-w.shape[0] // chunks // 128), 1, generator=torch.Generator().manual_seed(layer)) * 0.01
        rows = w.shape[0] // chunks
        grid = torch.cat([scale[c * (len(scale) // chunks):][:len(scale) // chunks].repeat_interleave(128, 0)[:rows]
                          for c in range(chunks)])
        tensors[name], tensors[f"{name}_scale_inv"] = (w / grid).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("fp8", [False, True])
def test_kernel_weights_mean_the_weights_of_the_torch_backend(small_folder, tmp_path, fp8):
    folder = with_fp8_attention(small_folder, tmp_path / "fp8") if fp8 else small_folder
    mine, theirs = load_kernel_weights(folder), load_target(folder)
    assert torch.equal(mine.embed.float(), theirs.embed) and torch.equal(mine.norm, theirs.norm)
    for layer, expected in zip(mine.layers, theirs.layers, strict=True):
        assert (layer.qkv.scales is not None) == fp8
        a = expected.attention
        rows = torch.cat((a.qk.transpose(1, 2).flatten(0, 1), a.v.transpose(1, 2).flatten(0, 1)))
        assert torch.equal(layer.qkv.decoded(), paired(rows, layer.heads))
        assert torch.equal(layer.o.decoded().T, a.o.flatten(0, 1))
        if layer.pages is None:
            continue
        codes, scales = unpack_pages(layer.pages.down, layer.pages.down_tile, 64, 32)
        for e in range(theirs.config.n_routed_experts):
            down = expected.mlp.experts.matrices[e]["down"]
            assert torch.equal(dequantize(codes[e], scales[e], dtype=torch.float32), down.decode())
    assert all(len(rows) for rows in qkv_rows(theirs.config, 0).values())


def test_random_weights_have_the_loaded_ones_shapes_and_run(small_folder, ids):
    from runtime_ref.backends.triton.backend import TritonBackend

    loaded = load_kernel_weights(small_folder)
    made = random_weights(loaded.config, SINGLE_RANK, device="cpu")
    backend = TritonBackend(made, pages={"full": 2, "window": 2}, positions=64)
    buffers, _, _ = run_watched(backend, ids[:8])
    assert buffers["logits"].isfinite().all() and buffers["logits"].std() > 0
    assert made.layers[1].pages.up.shape == loaded.layers[1].pages.up.shape


def test_float32_is_refused(small_engine):
    with pytest.raises(ValueError, match="dtype float32, expected bfloat16"):
        small_engine(dtype=torch.float32)


def test_without_a_gpu_an_interpreter_and_a_compiler_one_line_says_so(small_folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code = f"from runtime_ref.engine.engine import Engine; Engine.from_folder({str(small_folder)!r}, backend='triton')"
    environment = os.environ | {"TRITON_INTERPRET": "0", "CC": "no-such-compiler"}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "ValueError: backend 'triton': torch sees no GPU, and kernels on the CPU need a C compiler" in ran.stderr
