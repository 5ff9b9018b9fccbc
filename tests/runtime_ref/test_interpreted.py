"""Whole engines on the embedded model with the kernels in Triton's interpreter, where a step takes seconds: what `make
test-kernels` asks of compiled kernels, with a handful of tokens each (`make test-interpreter`)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from wrong_folders import judged

from modeling.load import load_tokenizer
from runtime_ref.engine import Engine, EngineOptions
from runtime_ref.kv_cache import PAGE
from runtime_ref.sampler import SamplingParams
from runtime_ref.triton_backend import TritonBackend
from tests.runtime_ref.conftest import seed_folder

pytestmark = [pytest.mark.interpreter, pytest.mark.skipif(
    os.environ.get("FP4_TEST_INTERPRETER") != "1", reason="minutes in Triton's interpreter: make test-interpreter")]
WORKER = Path(__file__).parent / "triton" / "kernel_rank_worker.py"
PROMPTS = [[5, 6, 7, 8, 9], [300]]
TOKENS = 4


@pytest.fixture(scope="module", autouse=True)
def interpreted(kernels_without_a_gpu):
    """The kernels run in the interpreter."""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return seed_folder(tmp_path_factory.mktemp("embedded"))


def make_engine(folder, *, drafter, **options):
    options = EngineOptions(**{"max_context": 64, "prefix_cache": False, "max_running": 2, **options})
    return Engine.from_folder(folder, backend="triton", drafter=drafter, options=options)


def answers(folder, prompts, *, drafter, **sampling):
    engine = make_engine(folder, drafter=drafter)
    params = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=i, **sampling) for i in range(len(prompts))]
    return engine.generate(prompts, params), engine.stats()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_drafts_and_a_batch_change_no_token(embedded, sampling):
    alone = [answers(embedded, [prompt], drafter=False, **sampling)[0][0] for prompt in PROMPTS[:1]]
    together, stats = answers(embedded, PROMPTS, drafter=True, **sampling)
    assert together[0] == alone[0] and len(alone[0]) == TOKENS
    assert stats["rounds"] > 0


def test_pieces_of_prompts_and_prefixes_taken_over_change_no_token(embedded, ids):
    prompt, short = ids[:PAGE + 6], SamplingParams(max_tokens=2, ignore_eos=True)
    plain = make_engine(embedded, drafter=False, max_context=128).generate([prompt], short)
    engine = make_engine(embedded, drafter=True, max_context=128, rows=24, prefix_cache=True)
    assert engine.generate([prompt], short) == plain == engine.generate([prompt], short)
    assert engine.stats()["cached_tokens"] == PAGE


def test_a_small_cache_preempts_and_changes_no_token(embedded, ids):
    """Both answers need a second page; there is one page for that."""
    prompts, few = [ids[:PAGE - 2], ids[PAGE:2 * PAGE - 2]], SamplingParams(max_tokens=4, ignore_eos=True)
    alone = make_engine(embedded, drafter=False, max_context=128)
    engine = make_engine(embedded, drafter=False, max_context=128, pages={"full": 3, "window": 3})
    assert engine.generate(prompts, few) == [alone.generate([p], few)[0] for p in prompts]
    assert engine.stats()["preemptions"] > 0 and not any(engine.stats()["pages"].values())


def test_a_server_streams_what_the_engine_says(embedded):
    from live_server import MODEL, live_server
    from openai import OpenAI

    tokenizer = load_tokenizer(embedded)
    expected = answers(embedded, PROMPTS[:1], drafter=False)[0][0]
    with live_server(make_engine(embedded, drafter=True), tokenizer, body_bytes=200_000, stall_seconds=600) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
        events = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0, stream=True,
                                           extra_body={"ignore_eos": True, "return_token_ids": True,
                                                       "adaptive_drafts": False})
        assert [token for event in events for token in event.choices[0].token_ids] == expected


def test_tokens_and_logits_of_two_ranks_are_those_of_one(embedded):
    done = subprocess.run([sys.executable, str(WORKER), str(embedded), "1", "2"], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["ranks"], line["walked"]) for line in lines] == [(1, False), (2, False), (2, True)]
    assert all(line[what] == lines[0][what] for line in lines[1:] for what in ("tokens", "logits"))


def test_wrong_kernels_are_found_and_named(embedded, tmp_path, capsys, monkeypatch):
    """By validate, of what it serves: the values are not scaled."""
    right = TritonBackend.__init__

    def wrong(self, weights, **options):
        weights.config.attention_value_scale = None
        right(self, weights, **options)

    monkeypatch.setattr(TritonBackend, "__init__", wrong)
    folder = shutil.copytree(embedded, tmp_path / "copy")
    shutil.rmtree(folder / "dflash")  # shortens the text that is run
    code, verdict = judged(folder, tmp_path, capsys, "--backend", "triton")
    ops = next(c for c in verdict["checks"] if c["name"] == "ops")
    assert code == 1 and ops["status"] == "failed" and not any("torch" in c for c in ops["causes"])
    assert any("attention_value_scale" in c and "the runtime" in c for c in ops["causes"]), verdict["causes"]
