"""Check 5: does drafting leave the distribution of sampled tokens alone? Both acceptance rules, on the model's own logits.

Randomness is counted (a hash of seed, position and purpose), so what each draw must give is known: `reference_round` says it
for all seeds at once. Three questions, cheap ones first:

- are the engine's rounds those of the reference, draw by draw? A rule that accepts three points too often differs in three
  rounds of a hundred: 512 rounds miss it once in six million.
- do the reference's own draws have the target's distribution (chi-square over `DRAWS` of them)? It judges the noise itself.
- where rounds differ, do the *engine's* draws have the distribution? A rule may use other random numbers and be right. To tell
  an acceptance that is three points off from chance (4.3 standard deviations, found 999 times in 1,000) takes
  ((4.3 + 3.1) x 0.5 / 0.03)^2 = 15,200 draws; `ENGINE_DRAWS` are made. What is wrong is named by the fault hypothesis whose
  exact distribution fits the draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine import sampler, speculative
from runtime_ref.engine.engine import Engine
from runtime_ref.engine.sampler import distribution
from runtime_ref.validation.checks.decoding import Prompts, prompt_logits
from runtime_ref.validation.quantities import Number, Table
from runtime_ref.validation.result import Check

ROUNDS, DRAWS, ENGINE_DRAWS = 512, 65_536, 16_384
TEMPERATURES = (1.0, 0.7)
POSITION = 10
# Tokens that the logits are cut to: enough for any rule to show, and few enough for the statistics to be sharp.
SUPPORT = 32
LEAST_ENTROPY = 1.5  # nats
# Standard normal quantile of one false alarm in 100,000 for the chi-square statistic (Wilson-Hilferty).
CHI_SQUARE_Z = 4.3
NOISE_CAUSE = ("draft noise is reused: the token that replaces a rejected draft is drawn with the random number that drew the "
               "draft")


def check_sampler(check: Check, engine: Engine, prompts: Prompts) -> None:
    """Adds the rules whose draws do not have the target's distribution."""
    # The widest distribution of some prompts, flattened if need be: one that is certain of its token would pass any sampler.
    candidates = [prompt_logits(engine, prompt)[-1].float() for prompt in prompts.all[:16]]
    logits, flattened = max((c.topk(min(SUPPORT, c.shape[0])).values for c in candidates), key=_entropy), 1.0
    while _entropy(logits) < LEAST_ENTROPY and flattened < 1e6:
        logits, flattened = logits / 1.25, flattened * 1.25
    generator = torch.Generator().manual_seed(5)
    logits = logits[torch.randperm(logits.shape[0], generator=generator)]
    drafts = logits + torch.randn(logits.shape, generator=generator)  # a drafter that is near, but not equal
    check.measure(Number.ENTROPY, _entropy(logits))
    check.measure(Number.FLATTENED, flattened)
    noise = {purpose: torch.tensor([sampler.uniform(seed, POSITION + 1, purpose) for seed in range(DRAWS)], dtype=torch.float64)
             for purpose in ("draft", "accept", "token")}
    rows, worst = [["rule", "temperature", "equal rounds", "of", "chi-square z", "accepted", "expected"]], 0.0
    for rule in ("equality", "rejection"):
        for temperature in TEMPERATURES:
            row = _judge(check, logits, drafts, SamplingParams(temperature=temperature, rule=rule), noise)
            rows.append([rule, temperature, *row])
            worst = max(worst, row[2])
    check.tables[Table.SAMPLES] = rows
    check.measure(Number.CHI_SQUARE, worst, CHI_SQUARE_Z)
    check.measure(Number.ROUNDS_COMPARED, ROUNDS)
    check.measure(Number.DRAWS, DRAWS)


def _judge(check: Check, logits: torch.Tensor, drafts: torch.Tensor, params: SamplingParams, noise: dict) -> list:
    """One rule at one temperature: [equal rounds, of, chi-square z, accepted share, expected share]."""
    p, q = distribution(logits, params), draft_distribution(drafts, params)
    drafted, tokens = reference_round(p, q, params.rule, noise)
    expected = float(torch.minimum(p, q).sum()) if params.rule == "rejection" else float(p[int(q.argmax())])
    rounds = [engine_round(logits, drafts, params, seed) for seed in range(ROUNDS)]
    same = sum(pair == (int(drafted[i]), int(tokens[i])) for i, pair in enumerate(rounds))
    where = f"{params.rule} at temperature {params.temperature}"
    z = chi_square_z(torch.bincount(tokens, minlength=p.shape[0]).double(), p)
    accepted = float((drafted == tokens).double().mean())
    if z > CHI_SQUARE_Z:
        check.fail(f"{where}: chi-square z {z:.1f} of the reference's draws, expected at most {CHI_SQUARE_Z}",
                   "the sampler's random numbers are not uniform, or those of different purposes depend on each other")
    if same < ROUNDS:
        rounds += [engine_round(logits, drafts, params, seed) for seed in range(ROUNDS, ENGINE_DRAWS)]
        z, accepted = _judge_draws(check, where, rounds, p, q, params, expected, same)
    return [same, ROUNDS, z, accepted, expected]


def _judge_draws(check: Check, where: str, rounds: list, p, q, params: SamplingParams, expected: float, same: int):
    """The engine's own draws, which are not the reference's: (chi-square z, accepted share)."""
    counts = torch.bincount(torch.tensor([token for _, token in rounds]), minlength=p.shape[0]).double()
    accepted = sum(draft == token for draft, token in rounds) / len(rounds)
    z = chi_square_z(counts, p)
    off = abs(accepted - expected) / max(1e-9, (expected * (1 - expected) / len(rounds)) ** 0.5)
    if z <= CHI_SQUARE_Z and off <= CHI_SQUARE_Z:
        check.notes.append(f"{where}: {ROUNDS - same} of {ROUNDS} rounds are not the reference's, but {len(rounds)} draws have "
                           "its distribution")
        return z, accepted
    check.fail(f"{where}: chi-square z {z:.1f} of {len(rounds)} draws, expected at most {CHI_SQUARE_Z}; {accepted:.1%} of the "
               f"drafts accepted, expected {expected:.1%}")
    fits = [(chi_square_z(counts, wrong), cause) for cause, wrong in sampling_faults(p, q, params)]
    best, cause = min(fits, key=lambda fit: fit[0])
    if best > CHI_SQUARE_Z:
        cause = f"the acceptance rule {params.rule} changes the distribution"
        if off > CHI_SQUARE_Z:
            cause += f": drafts are accepted too {'often' if accepted > expected else 'rarely'}"
    check.fail(f"{where}: no known bug explains it" if best > CHI_SQUARE_Z else f"{where}: explained by this fault", cause)
    return z, accepted


def draft_distribution(drafts: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What drafts are drawn from: one token for rule "equality"."""
    if params.rule == "rejection":
        return distribution(drafts, params)
    return torch.zeros(drafts.shape, dtype=torch.float64).index_fill_(0, drafts.argmax(), 1.0)


def engine_round(logits: torch.Tensor, drafts: torch.Tensor, params: SamplingParams, seed: int) -> tuple[int, int]:
    """(draft, emitted token) of one round of one draft, by the engine."""
    import dataclasses

    own = dataclasses.replace(params, seed=seed)
    proposal = speculative.propose(drafts[None], own, POSITION)
    result = speculative.accept(torch.stack((logits, logits)), proposal, own, POSITION, [], [])
    return proposal.tokens[0], result.tokens[0]


def reference_round(p: torch.Tensor, q: torch.Tensor, rule: str, noise: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(drafts, emitted tokens) [n] of n rounds at once, from random numbers [n] by purpose ("draft", "accept", "token").

    p, q [V] float64: the target's distribution and the one that drafts are drawn from. Rule "equality" emits a sample of p;
    "rejection" keeps a draft x with probability min(1, p(x) / q(x)), else emits a sample of max(p - q, 0).
    """
    if rule == "equality":
        own = _inverse(p, noise["token"])
        return torch.full_like(own, int(q.argmax())), own
    drafted = _inverse(q, noise["draft"])
    kept = noise["accept"] * q[drafted] < p[drafted]
    rest = (p - q).clamp_min(0)
    return drafted, torch.where(kept, drafted, _inverse(rest if float(rest.sum()) > 0 else p, noise["token"]))


def _inverse(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Tokens [n] at which the cumulative distribution of p [V] passes u [n]; never one of probability 0."""
    total = p.cumsum(-1)
    found = torch.searchsorted(total, u * total[-1], right=True).clamp_max(p.shape[0] - 1)
    return torch.where(p[found] > 0, found, int(p.nonzero()[-1]))


def sampling_faults(p: torch.Tensor, q: torch.Tensor, params: SamplingParams) -> Iterator[tuple[str, torch.Tensor]]:
    """(cause, the distribution [V] of emitted tokens) of rules that engines got wrong, computed exactly."""
    untempered = p.pow(params.temperature)
    if params.temperature != 1:
        yield "sampled tokens ignore the temperature", untempered / untempered.sum()
    if params.rule == "equality":
        yield "a draft is emitted without asking the target", q
        for points in range(1, 101):
            yield (f"drafts are accepted too often: {points} % of them whatever the target samples",
                   (1 - points / 100) * p + points / 100 * q)
        return
    rest = (p - q).clamp_min(0)
    rest = rest / rest.sum()
    kept = torch.minimum(p, q)
    yield NOISE_CAUSE, _reused_noise(p, q, rest)
    yield "a rejected draft is replaced by a sample of the target, not of max(p - q, 0)", kept + (1 - kept.sum()) * p
    yield "a rejected draft is replaced by another draft", kept + (1 - kept.sum()) * q
    yield "a draft is emitted without asking the target", q
    yield ("a draft is accepted with the random number that drew it",
           (own := _same_number(p, q)) + (1 - own.sum()) * rest)
    for points in range(1, 60):
        for sign, word in ((-1, "often"), (1, "rarely")):
            lax = torch.minimum(p / (1 + sign * points / 100), q)
            yield (f"drafts are accepted too {word}: as if the target's probability were {1 / (1 + sign * points / 100):.2f} "
                   "times as large", lax + (1 - lax.sum()) * rest)


def _reused_noise(p: torch.Tensor, q: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Emitted tokens where one random number u draws the draft and, if that is rejected, its replacement.

    Between two neighbouring points of both cumulative distributions draft and replacement are constant.
    """
    points = torch.cat((q.cumsum(0), rest.cumsum(0), torch.zeros(1, dtype=p.dtype))).clamp(0, 1).sort().values
    middle, width = (points[1:] + points[:-1]) / 2, points[1:] - points[:-1]
    draft, other = _inverse(q, middle), _inverse(rest, middle)
    keep = (p[draft] / q[draft].clamp_min(1e-300)).clamp_max(1)
    out = torch.zeros_like(p)
    return out.index_add_(0, draft, width * keep).index_add_(0, other, width * (1 - keep))


def _same_number(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Share of each token that is drafted and kept where the same u draws it and decides whether it is kept."""
    high = q.cumsum(0)
    low = high - q
    return (torch.minimum(high, (p / q.clamp_min(1e-300)).clamp_max(1)) - low).clamp_min(0)


def _entropy(logits: torch.Tensor) -> float:
    return float(torch.distributions.Categorical(logits=logits).entropy())


def chi_square_z(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Chi-square of counts against p as a standard normal deviate; tokens expected less than five times form one class."""
    n = float(counts.sum())
    order = p.argsort(descending=True)
    expected, observed = p[order] * n, counts[order]
    common = int((expected >= 5).sum())
    expected = torch.cat((expected[:common], expected[common:].sum()[None]))
    observed = torch.cat((observed[:common], observed[common:].sum()[None]))
    if float(expected[-1]) < 1:  # too thin a class: join it to the last common one
        expected, observed = (torch.cat((t[:-2], t[-2:].sum()[None])) for t in (expected, observed))
    freedom = max(1, expected.shape[0] - 1)
    statistic = float(((observed - expected) ** 2 / expected.clamp_min(1e-12)).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
