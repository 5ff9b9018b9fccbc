"""Contract C4: what is emitted depends on the prompt and the request alone, in bf16, token for token."""

import pytest
import torch
from pace import KERNELS, paced

from runtime_ref.core.sampling_params import SamplingParams

TOKENS = paced(40, 9)
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
PLAIN = SamplingParams(max_tokens=TOKENS, ignore_eos=True, speculate=False)


@pytest.fixture(scope="module")
def alone(make_engine, prompts):
    """Answers without a drafter, one prompt at a time."""
    engine = make_engine(drafter=False, prefix_cache=False)
    return [engine.generate([p], PLAIN)[0] for p in prompts]


def test_a_random_drafter_changes_no_token(make_engine, prompts, alone):
    engine = make_engine()
    assert [engine.generate([p], GREEDY)[0] for p in prompts] == alone
    assert engine.stats()["rounds"] > 0


def test_a_batch_gives_each_member_its_own_answer(make_engine, prompts, alone):
    assert make_engine(drafter=False).generate(prompts, PLAIN) == alone
    assert make_engine().generate(prompts, GREEDY) == alone


@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.4])
def test_drafts_that_are_often_right_are_accepted_and_change_no_token(with_oracle, prompts, alone, wrong):
    engine = with_oracle(prompts, alone, wrong)
    assert [engine.generate([p], GREEDY)[0] for p in prompts] == alone
    assert engine.generate(prompts, GREEDY) == alone
    length = engine.stats()["acceptance_length"]
    assert length > {0.0: 6.0, 0.1: 3.5, 0.4: 1.5}[wrong]


@pytest.mark.parametrize("drafts", [1, 2, 3, 4, 6])
def test_any_number_of_drafts_changes_no_token(with_oracle, prompts, alone, drafts):
    engine = with_oracle(prompts, alone, 0.2)
    mixed = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, drafts=(drafts + i) % 8) for i in range(len(prompts))]
    assert engine.generate(prompts, mixed) == alone


def test_adaptive_draft_length_changes_no_token_and_stops_drafting_when_nothing_is_accepted(with_oracle, make_engine, prompts):
    some, length = prompts[:paced(12, 2)], paced(40, 16)  # it gives up after seven rounds
    plain = make_engine(drafter=False).generate(some, SamplingParams(max_tokens=length, ignore_eos=True))
    engine = with_oracle(some, plain, wrong=0.9, draft_costs={0: 1.0, 3: 1.6, 7: 2.2})
    assert engine.generate(some, SamplingParams(max_tokens=length, ignore_eos=True, adaptive=True)) == plain
    stats = engine.stats()
    assert stats["acceptance_length"] < 1.3 and stats["rounds"] < 0.5 * stats["tokens"]


@pytest.mark.parametrize("rows", [64, 72, 200])
def test_the_size_of_prefill_pieces_changes_no_token(make_engine, prompts, alone, rows):
    assert make_engine(rows=rows).generate(prompts, GREEDY) == alone


def test_a_small_cache_preempts_and_changes_no_token(make_engine, prompts, alone):
    engine = make_engine(pages={"full": 7, "window": 30, "draft": 40}, prefix_cache=False)
    assert engine.generate(prompts, GREEDY) == alone
    assert engine.stats()["preemptions"] > 0
    assert engine.stats()["pages"] == {"full": 0, "window": 0, "draft": 0}


def test_prefixes_are_taken_over_and_change_no_token(make_engine, prompts, alone):
    engine = make_engine()
    long = [p for p in prompts if len(p) > 64]
    expected = [a for p, a in zip(prompts, alone, strict=True) if len(p) > 64]
    assert [engine.generate([p], GREEDY)[0] for p in long] == expected
    assert [engine.generate([p], GREEDY)[0] for p in long] == expected
    assert engine.generate(long, GREEDY) == expected
    assert engine.stats()["prefix_hits"] >= 2 * len(long)
    assert engine.stats()["cached_tokens"] >= 2 * 64 * len(long)


def test_an_answer_is_a_prefix_that_a_longer_prompt_takes_over(make_engine, prompts, alone):
    engine = make_engine()
    prompt, answer = prompts[-1], alone[-1]
    engine.generate([prompt], GREEDY)
    fresh = make_engine(prefix_cache=False)
    longer = prompt + answer + [5, 6, 7]
    assert engine.generate([longer], GREEDY) == fresh.generate([longer], GREEDY)
    assert engine.stats()["prefix_hits"] == 1


@pytest.mark.parametrize("rule", ["equality", "rejection"])
def test_sampled_answers_do_not_depend_on_the_batch(make_engine, prompts, rule):
    params = [SamplingParams(max_tokens=paced(24, 6), temperature=0.8, seed=i, rule=rule, top_p=0.95)
              for i in range(len(prompts))]
    engine = make_engine()
    together = engine.generate(prompts, params)
    assert [engine.generate([p], s)[0] for p, s in zip(prompts, params, strict=True)] == together


def test_equality_gives_the_sampled_tokens_of_plain_decoding(with_oracle, make_engine, prompts):
    params = [SamplingParams(max_tokens=paced(30, 9), temperature=0.7, seed=i, ignore_eos=True, min_p=0.01)
              for i in range(len(prompts))]
    plain = make_engine(drafter=False).generate(prompts, params)
    engine = with_oracle(prompts, plain, 0.2)
    assert engine.generate(prompts, params) == plain
    assert engine.stats()["acceptance_length"] > 2


def test_penalties_see_the_accepted_drafts(with_oracle, make_engine, prompts):
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, presence_penalty=0.5, frequency_penalty=0.3,
                            repetition_penalty=1.1)
    plain = make_engine(drafter=False).generate(prompts, params)
    engine = with_oracle(prompts, plain, 0.2)
    assert engine.generate(prompts, params) == plain
    assert engine.stats()["acceptance_length"] > 2


@pytest.mark.skipif(KERNELS, reason="the kernels compute in bf16 alone")
def test_float32_is_lossless_too(make_engine, prompts):
    plain = make_engine(dtype=torch.float32, drafter=False)
    expected = [plain.generate([p], PLAIN)[0] for p in prompts]
    assert make_engine(dtype=torch.float32).generate(prompts, GREEDY) == expected
