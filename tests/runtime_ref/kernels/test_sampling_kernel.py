"""Judgement on the device: torch's arg-max, the reference's draws, and its verdicts."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.sampler import distribution, draw, sample, uniform
from runtime_ref.engine.speculative import Proposal, accept
from runtime_ref.kernels.sampling import can_verify, verify


@pytest.mark.parametrize("vocabulary, chunk", [(130, 64), (64, 64), (1000, 128)])
def test_verdicts_are_those_of_the_reference(vocabulary, chunk):
    generator = torch.Generator().manual_seed(vocabulary)
    counts, logits = [3, 0, 7], torch.randn(13, vocabulary, generator=generator)
    own = logits.argmax(-1).to(torch.int32)
    drafts = own.clone()
    drafts[[1, 9]] += 1  # sequence 0 keeps one of three, sequence 2 four of seven
    first, count = (torch.tensor(c, dtype=torch.int32) for c in ([0, 4, 5], counts))
    tokens, accepted = verify(logits, drafts, first, count, chunk=chunk)
    assert torch.equal(tokens, own) and accepted.tolist() == [1, 0, 4]
    for s, (begin, n) in enumerate(zip(first.tolist(), counts, strict=True)):
        rows = slice(begin, begin + n + 1)
        verdict = accept(logits[rows], Proposal(drafts[begin:begin + n].tolist()), SamplingParams(), 10, [1], [])
        assert verdict.accepted == int(accepted[s])
        assert verdict.tokens == tokens[begin:begin + verdict.accepted + 1].tolist()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_no_token_and_its_neighbours_have_theirs(wrong):
    logits = torch.randn(4, 130, generator=torch.Generator().manual_seed(9))
    expected = logits.argmax(-1).tolist()
    logits[1, 100], logits[2, 3] = wrong, wrong
    assert draws(logits, [0.0] * 4, [0.0] * 4, 64) == [expected[0], -1, -1, expected[3]]
    assert draws(logits, [0.0, 0.5, 0.0, 0.0], [0.5] * 4, 64)[1:3] == [-1, -1]


def test_equal_logits_give_the_lower_token_within_and_across_chunks():
    logits = torch.zeros(2, 200)
    logits[0, [70, 150]] = 3.0
    tokens, _ = verify(logits, torch.zeros(2, dtype=torch.int32), *torch.zeros(2, 1, dtype=torch.int32), chunk=64)
    assert tokens.tolist() == [70, 0]


def draws(logits, temperatures, numbers, chunk):
    """Tokens of rows that are each a sequence without drafts."""
    R = logits.shape[0]
    first = torch.arange(R, dtype=torch.int32)
    return verify(logits, torch.zeros(R, dtype=torch.int32), first, torch.zeros_like(first), chunk=chunk,
                 temperature=torch.tensor(temperatures, dtype=torch.float64),
                 uniform=torch.tensor(numbers, dtype=torch.float64))[0].tolist()


@pytest.mark.parametrize("vocabulary, chunk", [(130, 64), (64, 64), (1000, 128)])
def test_draws_are_those_of_the_reference(vocabulary, chunk):
    """Warm and cold rows side by side, flat and peaked distributions, tokens that were ruled out."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(24, vocabulary, generator=generator) * 4
    logits[5:10, ::3] = -3e38
    logits[7, 64:] = -3e38  # whole chunks without a chance
    temperatures = [0.0, 0.8, 1.0, 3.0, 0.05, 100.0] * 4
    params = [SamplingParams(temperature=t, seed=i) for i, t in enumerate(temperatures)]
    numbers = [uniform(p.seed, 10 + i, "token") for i, p in enumerate(params)]
    found = draws(logits, temperatures, numbers, chunk)
    assert found == [sample(row, p, 10 + i, [], []) for i, (row, p) in enumerate(zip(logits, params, strict=True))]
    assert len(set(found)) > 8


def test_the_ends_of_the_distribution_are_tokens_that_have_a_chance():
    """Uniform numbers 0 and just below 1, where the first and the last tokens are ruled out."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(2))
    logits[0, :3] = logits[0, 190:] = -3e38
    params = SamplingParams(temperature=0.7)
    for number in (0.0, 1 - 2.0**-53):
        assert draws(logits, [0.7], [number], 64) == [draw(distribution(logits[0], params), number)]
    assert draws(logits, [0.7], [0.0], 64) == [3] and draws(logits, [0.7], [1 - 2.0**-53], 64) == [189]


def test_drafts_are_accepted_as_the_reference_accepts_them_above_temperature_0():
    params, logits = SamplingParams(temperature=0.9, seed=4), torch.randn(5, 130, generator=torch.Generator().manual_seed(8))
    own = [sample(row, params, 21 + i, [1], []) for i, row in enumerate(logits)]
    drafts = torch.tensor([own[0], own[1], (own[2] + 1) % 130, own[3], 0], dtype=torch.int32)
    numbers = torch.tensor([uniform(4, 21 + i, "token") for i in range(5)], dtype=torch.float64)
    tokens, accepted = verify(logits, drafts, *torch.tensor([[0], [4]], dtype=torch.int32), chunk=64,
                             temperature=torch.full((5,), 0.9, dtype=torch.float64), uniform=numbers)
    verdict = accept(logits, Proposal(drafts[:4].tolist()), params, 20, [1], [])
    assert verdict.accepted == int(accepted[0]) == 2 and verdict.tokens == tokens[:3].tolist()


def test_the_kernel_says_what_it_does_not_draw():
    here = [SamplingParams(), SamplingParams(temperature=1.0),
            SamplingParams(temperature=1.0, rule="rejection", speculate=False)]
    not_here = [SamplingParams(temperature=1.0, top_k=5), SamplingParams(temperature=1.0, top_p=0.9),
                SamplingParams(temperature=1.0, min_p=0.1), SamplingParams(presence_penalty=1.0),
                SamplingParams(temperature=1.0, rule="rejection")]
    assert all(map(can_verify, here)) and not any(map(can_verify, not_here))
    with pytest.raises(ValueError, match="expected float64 both"):
        verify(torch.zeros(1, 4), *torch.zeros(3, 1, dtype=torch.int32), temperature=torch.ones(1))
