"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, log-probabilities.

Randomness is counted, not streamed: the uniform number for a position of a request is a hash of (seed, position, purpose).
So a sampled answer does not depend on the batch, on preemption, or (with target-sample equality) on drafting, and needs no
generator state. Tokens are drawn by inverting the cumulative distribution in float64.

Order, as OpenAI-style servers have it: penalties on the logits, temperature, then top-k, top-p and min-p on what remains.
Log-probabilities are those of the raw logits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from runtime_ref.core.sampling_params import SamplingParams

FINITE = torch.finfo(torch.float32).max


@dataclass
class Logprob:
    """Of one emitted token; `top` holds (token, log-probability), most likely first."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


def uniform(seed: int, position: int, purpose: str) -> float:
    """In [0, 1), the same for the same arguments."""
    digest = hashlib.blake2b(f"{seed} {position} {purpose}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def penalize(logits: torch.Tensor, params: SamplingParams, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits [V] after the penalties for what was said so far."""
    if not params.penalized:
        return logits
    logits = logits.clone()
    if params.repetition_penalty != 1.0 and (prompt or answer):
        seen = torch.tensor(sorted({*prompt, *answer}))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = torch.tensor(answer).unique(return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts.float()
    for token, bias in params.logit_bias:
        logits[token] += bias
    # A penalty of 1e-300 divides by what float32 holds as zero.
    logits.clamp_(-FINITE, FINITE)
    if len(answer) < params.min_tokens:
        logits[list(params.held_back)] = -torch.inf
    return logits


def distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """float64 probabilities [V] that sum to 1: what a token is drawn from (one-hot at temperature 0)."""
    if params.temperature == 0:
        return torch.zeros(logits.shape, dtype=torch.float64).index_fill_(0, logits.argmax(), 1.0)
    logits = logits.double()
    p = ((logits - logits.max()) / params.temperature).softmax(-1)  # the difference first: any temperature stays finite
    if params.top_k and params.top_k < p.shape[0]:
        p = torch.where(p < p.topk(params.top_k).values[-1], 0.0, p)
    if params.min_p:
        p = torch.where(p < params.min_p * p.max(), 0.0, p)
    if params.top_p < 1:
        # Keep the most likely ones up to and including the one that reaches top_p.
        ordered, index = p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = before < params.top_p * p.sum()
        kept[0] = True  # whatever rounding made of a tiny top_p
        p = torch.zeros_like(p).scatter_(0, index, torch.where(kept, ordered, 0.0))
    return p / p.sum()


def draw(p: torch.Tensor, u: float) -> int:
    """The token at which the cumulative distribution of p [V] passes u; never one of probability 0."""
    total = p.cumsum(-1)
    found = int(torch.searchsorted(total, torch.tensor(u * float(total[-1]), dtype=torch.float64), right=True))
    if found < p.shape[0] and p[found] > 0:
        return found
    return int(p.nonzero()[-1])


def sample(logits: torch.Tensor, params: SamplingParams, position: int, prompt: list[int], answer: list[int]) -> int:
    """The target's own token at `position` given logits [V]."""
    logits = penalize(logits, params, prompt, answer)
    if params.temperature == 0:
        return int(logits.argmax())
    return draw(distribution(logits, params), uniform(params.seed, position, "token"))


def logprob_of(logits: torch.Tensor, token: int, top: int) -> Logprob:
    """Log-probability of a token under the raw logits, and the `top` most likely ones."""
    values = logits.double().log_softmax(-1)
    best = values.topk(min(top, values.shape[0])) if top else None
    pairs = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Logprob(token, float(values[token]), pairs)


def logprobs_of(logits: torch.Tensor, tokens: list[int], top: int) -> list[Logprob]:
    """`logprob_of` of each row [n, V] and its token, a few rows at a time: float64 copies of large vocabularies are large."""
    found = []
    for begin in range(0, len(tokens), 16):
        values = logits[begin:begin + 16].double().log_softmax(-1)
        own = torch.tensor(tokens[begin:begin + 16])
        chosen = values.gather(1, own[:, None])[:, 0].tolist()
        best = values.topk(min(top, values.shape[1])) if top else None
        for i, (token, value) in enumerate(zip(own.tolist(), chosen, strict=True)):
            pairs = [] if best is None else list(zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True))
            found.append(Logprob(token, value, pairs))
    return found
