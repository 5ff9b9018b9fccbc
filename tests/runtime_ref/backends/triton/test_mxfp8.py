"""Backend "triton-mxfp8": experts in hw_fp4 pages, their activations rounded to MXFP8. Other numbers, the same contracts."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from wrong_folders import judged

from runtime_ref.core.batch import SequenceChunk
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.measure.gpu_suite.steps import use_megakernel

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engines(small_folder):
    """The engine in question, and that of backend "triton"."""
    options = EngineOptions(max_context=128, max_running=4, prefix_pages=2)
    return [Engine.from_folder(small_folder, backend=name, options=options) for name in ("triton-mxfp8", "triton")]


def logits(engine, prompt):
    tables = engine.cache.tables()
    engine.cache.extend(tables, list(tables), len(prompt))
    found = engine.backend.run(engine.program, engine.backend.plan([SequenceChunk(tables, 0, prompt)]))["logits"]
    engine.cache.release(tables)
    return found


def test_drafts_and_other_rows_change_no_token(engines, small_prompts):
    engine = engines[0]
    prompts = [prompt[:20] for prompt in small_prompts]
    together = engine.generate(prompts, GREEDY)
    plain = SamplingParams(max_tokens=6, ignore_eos=True, speculate=False)
    assert [engine.generate([prompt], plain)[0] for prompt in prompts] == together
    assert engine.stats()["rounds"] > 0


def test_its_numbers_are_near_those_of_bf16_activations_but_others(engines, small_prompts):
    rounded, exact = (logits(engine, small_prompts[1]) for engine in engines)
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.2
    assert [e.backend.capabilities.mxfp8_activations for e in engines] == [True, False]


def test_a_megakernel_refuses_it_in_one_line(engines):
    with pytest.raises(ValueError, match="no experts for FP4 tensor cores .*they run op by op"):
        use_megakernel(engines[0], 1)


@pytest.mark.long
def test_validate_judges_it_by_references_that_round_alike(exported, tmp_path, capsys):
    code, verdict = judged(exported, tmp_path, capsys, "--backend", "triton-mxfp8")
    ops = next(check for check in verdict["checks"] if check["name"] == "ops")
    assert code == 0 and ops["status"] == "passed", json.dumps(verdict["causes"])
    assert "triton" in ops["numbers"]["backends"]
