"""Contract C6: with a drafter, both rules emit the target's distribution. And the sampler's own properties."""

import itertools
import zlib

import pytest
import torch
from pace import KERNELS

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.draft_length import DraftLength
from runtime_ref.engine.sampler import distribution, draw, logprob_of, penalize, sample, uniform
from runtime_ref.engine.speculative import Proposal, accept, propose

VOCABULARY, DRAFTS, TRIALS = 5, 2, 4000
# Upper 0.001 quantile of chi-square with 5^3 - 1 = 124 degrees of freedom (Wilson-Hilferty, 180.8 by table).
CHI_SQUARE_124 = 180.8


def _number(parts):
    return zlib.crc32(repr(list(parts)).encode())


def _target(prefix):
    """Logits of the next token after `prefix`: another random row for every prefix."""
    generator = torch.Generator().manual_seed(_number(prefix))
    return torch.randn(VOCABULARY, generator=generator) * 1.2


def _drafter(prefix):
    generator = torch.Generator().manual_seed(_number(["draft", *prefix]))
    return _target(prefix) + 0.9 * torch.randn(VOCABULARY, generator=generator)


def _three_tokens(params):
    """The first three tokens after the anchor, by rounds of two drafts."""
    said, position = [], 0
    accepted = rounds = 0
    while len(said) < 3:
        rows, drafts_q, tokens = [], [], []
        for i in range(DRAFTS):  # the drafter sees its own drafts here; the rules only need that q is what was sampled from
            one = propose(_drafter([*said, *tokens])[None], params, position + i)
            tokens += one.tokens
            drafts_q.append(one.q)
        q = torch.cat(drafts_q) if drafts_q[0] is not None else None
        rows = torch.stack([_target([*said, *tokens[:i]]) for i in range(DRAFTS + 1)])
        verdict = accept(rows, Proposal(tokens, q), params, position, [], said)
        said, position = said + verdict.tokens, position + len(verdict.tokens)
        accepted, rounds = accepted + verdict.accepted, rounds + 1
    return tuple(said[:3]), accepted / rounds


@pytest.mark.parametrize("rule", ["equality", "rejection"])
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_emitted_text_has_the_targets_distribution(rule, settings):
    expected = {}
    for text in itertools.product(range(VOCABULARY), repeat=3):
        p = 1.0
        for i, token in enumerate(text):
            p *= float(distribution(_target(text[:i]), SamplingParams(**settings))[token])
        expected[text] = p * TRIALS
    counts = dict.fromkeys(expected, 0)
    accepted = 0.0
    for seed in range(TRIALS):
        text, share = _three_tokens(SamplingParams(rule=rule, seed=seed, **settings))
        counts[text] += 1
        accepted += share / TRIALS
    assert all(counts[text] == 0 for text, e in expected.items() if e == 0)
    common = [t for t, e in expected.items() if e >= 5]
    rare = [t for t, e in expected.items() if e < 5]
    chi = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in common)
    if (tail := sum(expected[t] for t in rare)) > 0:
        chi += (sum(counts[t] for t in rare) - tail) ** 2 / tail
    assert chi < CHI_SQUARE_124
    assert 0.3 < accepted < DRAFTS


def test_rejection_accepts_more_than_equality_when_the_drafter_is_soft():
    shares = {rule: sum(_three_tokens(SamplingParams(rule=rule, seed=s, temperature=1.0))[1] for s in range(300)) / 300
              for rule in ("equality", "rejection")}
    assert shares["rejection"] > shares["equality"]


def test_a_perfect_drafter_is_always_accepted_by_rejection():
    params = SamplingParams(temperature=1.0, rule="rejection")
    rows = torch.randn(8, 11)
    proposal = propose(rows[:7], params, 4)
    assert accept(rows, proposal, params, 4, [], []).accepted == 7


def test_counted_randomness_is_uniform_and_the_same_for_the_same_place():
    values = torch.tensor([uniform(1, i, "token") for i in range(4000)])
    assert abs(float(values.mean()) - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    assert uniform(1, 2, "token") == uniform(1, 2, "token") != uniform(1, 2, "draft") != uniform(2, 2, "draft")


@pytest.mark.parametrize("u", [0.0, 0.3, 0.999999999])
def test_impossible_tokens_are_never_drawn(u):
    p = torch.tensor([0.0, 0.4, 0.0, 0.6, 0.0], dtype=torch.float64)
    assert draw(p, u) in (1, 3)


def test_filters_keep_what_they_name():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    kept = [distribution(logits, SamplingParams(temperature=1.0, **s)).nonzero().flatten().tolist()
            for s in ({"top_k": 2}, {"top_p": 0.65}, {"top_p": 0.75}, {"min_p": 0.29}, {"top_k": 4, "top_p": 0.5}, {})]
    assert kept == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0], [0, 1, 2, 3, 4]]
    assert distribution(logits, SamplingParams()).tolist() == [1, 0, 0, 0, 0]


def test_a_small_temperature_is_greedy_and_ties_go_to_one_token():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample(logits, SamplingParams(temperature=1e-3), 0, [], []) == 1 == sample(logits, SamplingParams(), 0, [], [])
    assert sample(torch.zeros(4), SamplingParams(), 0, [], []) == sample(torch.zeros(4), SamplingParams(), 9, [1], [2])


def test_penalties_touch_the_tokens_they_should():
    logits = torch.tensor([1.0, -1.0, 2.0, 0.0])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalize(logits, params, [3], [0, 0, 2]).tolist() == [0.0, -1.0, 1.25, 0.0]
    assert penalize(logits, SamplingParams(repetition_penalty=2.0), [0], [1]).tolist() == [0.5, -2.0, 2.0, 0.0]
    assert logits.tolist() == [1.0, -1.0, 2.0, 0.0]


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.tensor([0.5, 0.25, 0.25]).log() + 3
    found = logprob_of(logits, 1, 1)
    assert found.logprob == pytest.approx(torch.tensor(0.25).log().item(), abs=1e-6)
    assert found.top[0][0] == 0 and logprob_of(logits, 2, 0).top == []


@pytest.mark.parametrize("wrong, named", [
    ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"max_tokens": 0}, "max_tokens"),
    ({"rule": "maybe"}, "rule"), ({"temperature": float("nan")}, "temperature"), ({"stop": ("",)}, "stop")])
def test_parameters_out_of_range_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=f"^{named}: .*expected"):
        SamplingParams(**wrong)


@pytest.mark.parametrize("wrong, named", [
    ({"seed": 1.5}, "seed"), ({"seed": None}, "seed"), ({"temperature": "hot"}, "temperature"), ({"top_k": 2.0}, "top_k"),
    ({"max_tokens": True}, "max_tokens"), ({"min_p": float("nan")}, "min_p"), ({"presence_penalty": float("inf")}, "presence"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"temperature": float("inf")}, "temperature"), ({"top_p": float("nan")}, "top_p"), ({"logprobs": -1}, "logprobs")])
def test_parameters_of_a_wrong_kind_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=f"^{named}.*expected"):
        SamplingParams(**wrong)


EXTREMES = [{"temperature": 1e-300}, {"temperature": 5e-324, "top_p": 5e-324, "top_k": 3}, {"temperature": 100.0, "min_p": 1.0},
            {"temperature": 1e-300, "repetition_penalty": 1e-300}, {"repetition_penalty": 1e-300, "presence_penalty": -2.0},
            {"temperature": 1e-12, "repetition_penalty": 100.0, "frequency_penalty": -2.0},
            {"temperature": 0.5, "seed": -10**30}, {"temperature": 1.0, "top_k": 10**9, "min_p": 5e-324}]


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_parameters_give_a_distribution(extreme):
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(**extreme)
    for logits in (torch.randn(50, generator=generator) * 10, torch.zeros(50), torch.full((50,), 3e38)):
        p = distribution(penalize(logits, params, [1, 2], [3, 3, 4]), params)
        assert p.isfinite().all() and (p >= 0).all() and float(p.sum()) == pytest.approx(1.0)
        assert p[draw(p, uniform(params.seed, 5, "token"))] > 0


@pytest.mark.parametrize("rule", ["equality", "rejection"])
def test_an_engine_survives_extreme_parameters(make_engine, rule):
    engine = make_engine()
    params = [SamplingParams(max_tokens=8, ignore_eos=True, rule=rule, **extreme) for extreme in EXTREMES]
    answers = engine.generate([[5, 6, 7]] * len(params), params)
    assert all(len(answer) == 8 for answer in answers)


def test_logits_that_are_not_finite_end_the_engine_and_say_where(make_engine, monkeypatch):
    engine = make_engine(drafter=False)
    run = engine.backend.run

    def broken(*args, **options):
        found = run(*args, **options)
        found.pop("best", None)  # what the compiled ops say of sound logits
        return found | {"logits": found["logits"].clone().index_fill_(1, torch.tensor([7]), float("nan"))}

    monkeypatch.setattr(engine.backend, "run", broken)
    with pytest.raises(FloatingPointError, match=r"request 0: the logits after position \d+ are not finite \(token 7"):
        engine.generate([[1, 2, 3]], SamplingParams())


@pytest.mark.parametrize("wrong", [-1, None, 1.0, True, "a"])
def test_a_prompt_of_anything_but_tokens_is_refused(make_engine, wrong):
    engine = make_engine(drafter=False)
    vocabulary = engine.backend.config.vocab_size
    with pytest.raises(ValueError, match=f"prompt: token .*expected 0 to {vocabulary - 1}"):
        engine.add([1, vocabulary if wrong is None else wrong], SamplingParams())


@pytest.mark.skipif(KERNELS, reason="the same for every backend: runs with the default one")
def test_costs_of_rounds_decide_whether_an_adaptive_request_drafts(make_engine):
    adaptive = SamplingParams(max_tokens=150, ignore_eos=True, adaptive=True)
    for costs, rounds in (({0: 1.0, 3: 4.0, 7: 9.0}, 0), ({0: 1.0, 3: 3.0, 7: 6.0}, 3)):
        engine = make_engine(draft_costs=costs)
        engine.generate([[5, 6, 7]], adaptive)
        assert engine.stats()["rounds"] == rounds  # never, or at once and after 32 and 64 plain tokens
        for _ in range(4):
            engine.generate([[5, 6, 7]], adaptive)
        assert engine.stats()["rounds"] == rounds  # the next ones take the first one's word for it
    engine = make_engine()
    engine.generate([[5, 6, 7]], adaptive)
    assert engine.adaptive.costs[0] == 1.0 and all(cost > 1 for n, cost in engine.adaptive.costs.items() if n)
    engine.cache.clear_prefixes()
    assert set(engine.stats()["pages"].values()) == {0}


def test_three_drafts_that_are_always_accepted_lead_to_seven():
    length = DraftLength({0: 1.0, 3: 2.7, 7: 4.2}, rates=[0.85] * 3 + [0.5] * 4)
    assert length.next() == 3
    for _ in range(40):
        length.update(length.next(), length.next())
    assert length.next() == 7


def test_drafts_that_are_left_out_cost_no_row_and_count_by_how_likely_they_were():
    whole, cut = (DraftLength({0: 1.0, 7: 4.0}, rates=[0.6] * 7, row=0.3) for _ in range(2))
    for _ in range(60):
        whole.update(7, 2)
        cut.update(2, 2, [0.0] + [0.5] * 4)
    assert cut.kept == {7: pytest.approx(2, abs=0.01)} and whole.kept == {7: 7}
    assert cut.value(7) == pytest.approx(3 / (4.0 - 5 * 0.3), rel=0.01) and whole.value(7) < 1
    assert cut.rates[2] < 0.01 and cut.rates[3] == pytest.approx(0.5, abs=0.01)
    assert cut.worth == 0.3 * max(1.0, cut.value(7))


@pytest.mark.skipif(KERNELS, reason="the same for every backend: runs with the default one")
def test_costs_follow_what_rounds_take_beside_other_work(make_engine):
    adaptive = make_engine(draft_costs={0: 1.0, 3: 2.0, 7: 3.0}).adaptive
    adaptive.took(7, 7, 9.0)
    assert adaptive.costs == {0: 1.0, 3: 2.0, 7: 3.0}  # given, not measured: nothing moves them
    adaptive.row = 0.25
    adaptive.took(7, 7, 9.0)  # nothing to compare it with yet
    length, _ = adaptive.begin(SamplingParams(adaptive=True))
    asked = []
    for _ in range(6):
        asked.append(length.next())
        length.update(asked[-1], asked[-1])
    assert asked == [0, 0, 0, 0, 3, 3]  # first what a plain step costs
    for _ in range(200):
        adaptive.took(0, 0, 2.0)
        adaptive.took(7, 3, 8.0)  # and four rows that were left out
    assert length.costs == {0: 1.0, 3: 2.0, 7: pytest.approx(5.0)}
    adaptive.took(7, 7, 1e9)
    assert adaptive.costs[7] < 6
    for _ in range(100):
        adaptive.took(7, 7, 1e9)
    assert adaptive.costs[7] == pytest.approx(8 / 1.1)  # so that somebody may find out that it is better by now


def test_draft_length_follows_what_is_accepted():
    good, bad = (DraftLength({0: 1.0, 3: 1.6, 7: 2.2}) for _ in range(2))
    for _ in range(30):
        if (n := good.next()):
            good.update(n, n)
        else:
            good.update(0, 0)
        bad.update(bad.next(), 0)
    assert good.next() == 7 and bad.next() == 0
    tried = bad.rounds
    for _ in range(40):
        bad.update(bad.next(), 0)
    assert bad.rounds > tried  # it tries again now and then


def test_a_round_that_paid_is_followed_by_another():
    length = DraftLength({0: 1.0, 7: 5.2}, rates=[0.5] * 7, explores=True)
    for accepted in (7, 6):
        assert length.best == 0 and length.next() == 7
        length.update(7, accepted)
    length = DraftLength({0: 1.0, 7: 5.2}, rates=[0.5] * 7, explores=True)
    length.update(length.next(), 4)
    assert length.next() == 0
