"""Many rows at once, where the logits are: the verdicts of the reference, sequence by sequence."""

import random
from dataclasses import replace

import pytest
import torch

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.device_sampling import Round, choose, distributions, draws, penalized
from runtime_ref.engine.sampler import distribution, draw, penalize, uniform
from runtime_ref.engine.speculative import Proposal, accept, matched

V = 57
FILTERS = [{}, {"top_k": 5}, {"top_k": 500}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.5, "min_p": 0.02},
           {"top_p": 1e-9}]
PENALTIES = [{}, {"repetition_penalty": 1.4}, {"presence_penalty": 0.7, "frequency_penalty": -0.3},
             {"logit_bias": ((3, 4.5), (9, -80.0))}, {"min_tokens": 6, "held_back": (1, 2, 3)},
             {"repetition_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": ((5, 1.5),), "min_tokens": 2,
              "held_back": (0,)}]
TEMPERATURES = [0.0, 0.3, 1.0, 1.7, 5e-324]


def drawn_params(rng: random.Random, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=16, seed=seed, temperature=rng.choice(TEMPERATURES),
                          rule=rng.choice(["equality", "rejection"]), **rng.choice(FILTERS) | rng.choice(PENALTIES))


def make_round(rng: random.Random, seed: int, first: int) -> tuple[Round, torch.Tensor, list[int]]:
    """A sequence's round, its logits, and its drafts: three in four are what the reference would emit."""
    params, generator = drawn_params(rng, seed), torch.Generator().manual_seed(seed)
    n, position = rng.randrange(6), 20 + seed
    prompt, answer = ([rng.randrange(V) for _ in range(rng.randrange(most))] for most in (8, 9))
    logits = torch.randn(n + 1, V, generator=generator) * 3
    if params.rule == "rejection" and params.temperature > 0:
        q = torch.stack([distribution(row + torch.randn(V, generator=generator), params) for row in logits[:n]]) if n else None
        drafts = [draw(q[i], uniform(seed, position + 1 + i, "draft")) for i in range(n)]
        return Round(params, first, n, position, prompt, answer, q), logits, drafts
    drafts = []
    for i in range(n):
        own = accept(logits[:i + 1], Proposal(list(drafts)), params, position, prompt, answer).tokens[-1]
        drafts.append(own if rng.random() < 0.75 else rng.randrange(V))
    return Round(params, first, n, position, prompt, answer), logits, drafts


@pytest.mark.parametrize("seed", range(6))
def test_verdicts_are_those_of_the_reference(seed):
    """Forty sequences of random parameters at once, more rows than are taken at a time."""
    rng, rounds, rows, drafts, own = random.Random(seed), [], [], [], []
    for i in range(40):
        made, logits, tokens = make_round(rng, 1000 * seed + i, sum(map(len, rows)))
        rounds.append(made)
        rows.append(logits)
        own.append(tokens)
        drafts += [*tokens, 0]
    at, found = choose(torch.cat(rows), rounds, torch.tensor(drafts, dtype=torch.int32))
    assert at.tolist() == list(range(len(drafts)))
    right = 0
    for made, logits, tokens in zip(rounds, rows, own, strict=True):
        verdict = matched(tokens, found[made.first:made.first + made.drafts + 1].tolist())
        assert verdict == accept(logits, Proposal(tokens, made.q), made.params, made.position, made.prompt, made.answer), made
        right += verdict.accepted
    assert right > 20


def test_distributions_are_those_of_the_reference_row_by_row():
    rng = random.Random(1)
    params = [drawn_params(rng, i) for i in range(48)]
    params = [p if p.temperature else replace(p, temperature=0.9) for p in params]
    logits = torch.randn(48, V, generator=torch.Generator().manual_seed(1)) * 4
    logits[7] = 0.0  # ties are kept together
    found = distributions(logits, params)
    for row, own, one in zip(logits, found, params, strict=True):
        expected = distribution(row, one)
        assert torch.equal(own > 0, expected > 0)
        torch.testing.assert_close(own, expected, rtol=1e-14, atol=0)


def test_penalties_have_the_bits_of_the_reference_and_know_the_drafts_before_a_row():
    rng, rounds, drafts = random.Random(2), [], []
    for i, own in enumerate(PENALTIES):
        answer = [3, 5, 5, 9] if i % 2 else []
        rounds.append(Round(SamplingParams(max_tokens=9, **own), len(drafts), 3, 10, [1, 2, 5], answer))
        drafts += [rng.choice([3, 5, 11]) for _ in range(3)] + [0]
    logits = torch.randn(len(drafts), V, generator=torch.Generator().manual_seed(2))
    found = penalized(logits, rounds, torch.tensor(drafts, dtype=torch.int32))
    for made in rounds:
        for i in range(4):
            said = made.answer + drafts[made.first:made.first + i]
            assert torch.equal(found[made.first + i], penalize(logits[made.first + i], made.params, made.prompt, said))


def test_a_row_that_is_not_finite_has_no_token_and_its_neighbours_have_theirs():
    params = SamplingParams(temperature=1.0, top_k=4, repetition_penalty=1.2)
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(3))
    rounds = [Round(params, i, 0, i, [1], []) for i in range(4)]
    expected = choose(logits, rounds, torch.zeros(4, dtype=torch.int32))[1].tolist()
    for row, wrong in ((1, float("nan")), (2, float("-inf"))):
        logits[row, 9] = wrong
    assert choose(logits, rounds, torch.zeros(4, dtype=torch.int32))[1].tolist() == [expected[0], -1, -1, expected[3]]


def test_draws_at_the_ends_are_tokens_that_have_a_chance():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    assert [draws(p, torch.tensor([u], dtype=torch.float64)).item() for u in (0.0, 0.2, 0.25, 1 - 2.0**-53)] == [1, 1, 3, 3]
