"""From logits to accepted tokens on the device: the third launch of a step.

Each program takes a chunk of the vocabulary for one row and leaves its best value and place and, above temperature 0, the
float64 sum of its exponentials; whoever delivers the last chunk of a row has the row's token, whoever delivers the last row
counts how many drafts in a row were the target's own tokens (rule "equality"). A token per row and a count per sequence leave
the device instead of 600 KB of logits a row.

At temperature 0 the token is the lowest of the best. Above it, it is where the cumulative distribution passes the uniform
number of its position. That number is counted, not streamed (`sampler.uniform`), so the host knows it before the step and
hands it over; the cumulative sum runs over chunks, then inside the one that is hit.

References: `torch.argmax`, `sampler.sample`, and `speculative.accept` with rule "equality". Draws are the reference's
unless the uniform number lies within the rounding of a float64 sum of a boundary between two tokens (the order of the sum and
the last place of the exponential differ).

Penalties, top-k, top-p, min-p and rule "rejection" are not here (`can_verify`) but in `engine.device_sampling`: a
vocabulary-wide sort belongs to no megakernel. Who judges a sequence follows from its own parameters alone, so other rows cannot
change its tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.kernels.counters import arrivals

CHUNK = 2048  # float64 sums of a longer one do not fit in registers
_APART = 4  # between the counter of rows and those of chunks: both aligned, whatever the number of rows, to 16 bytes


@triton.jit
def _draw(logits, best, mass, goal, temperature, vocabulary, CHUNKS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The token of a row [vocabulary] at which the cumulative distribution passes `goal` in [0, 1); never one of probability 0.

    best float32 and mass float64 [CHUNKS]: each chunk's highest value, and the sum of exponentials above it.
    """
    c = tl.arange(0, WIDE)
    own = tl.load(best + c, mask=c < CHUNKS, other=float("-inf"))
    top = tl.max(own, 0)
    share = tl.load(mass + c, mask=c < CHUNKS, other=0.0) * tl.exp((own.to(tl.float64) - top) / temperature)
    running = tl.cumsum(share, 0)
    goal = goal * tl.max(running, 0)
    hit = tl.minimum(tl.sum(((running <= goal) & (c < CHUNKS)).to(tl.int32), 0), CHUNKS - 1)
    before = tl.sum(tl.where(c == hit - 1, running, 0.0), 0)
    at = hit * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + at, mask=at < vocabulary, other=float("-inf"))
    weights = tl.exp((values.to(tl.float64) - top) / temperature)
    passed = (before + tl.cumsum(weights, 0) <= goal) & (at < vocabulary)
    last = tl.max(tl.where(weights > 0, at, -1), 0)
    return tl.minimum(hit * BLOCK + tl.sum(passed.to(tl.int32), 0), last)


@triton.jit(do_not_specialize=["R", "sequences"])
def verify_kernel(logits, drafts, first, count, temperatures, uniform, best, place, mass, arrived, tokens, accepted, rows_left,
                 vocabulary, R, sequences, CHUNKS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, chunk). `verify` documents and fills the arguments."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    source = logits + row.to(tl.int64) * vocabulary
    values = tl.load(source + at, mask=at < vocabulary, other=float("-inf"))
    top = tl.max(values, 0)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        above = values.to(tl.float64) - tl.where(top == float("-inf"), 0.0, top)
        tl.store(mass + row * CHUNKS + chunk, tl.sum(tl.exp(above / temperature), 0))
    # A maximum passes over NaN, so logits that are not finite are marked: their row has no token.
    broken = tl.max(((values - values != 0) & (at < vocabulary)).to(tl.int32), 0) > 0
    tl.store(best + row * CHUNKS + chunk, tl.where(broken, float("nan"), top))
    tl.store(place + row * CHUNKS + chunk, chunk * BLOCK + tl.argmax(values, 0, tie_break_left=True).to(tl.int32))
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == CHUNKS - 1:
        tl.debug_barrier()
        c = tl.arange(0, WIDE)
        found = tl.load(best + row * CHUNKS + c, mask=c < CHUNKS, other=float("-inf"))
        if tl.max((found != found).to(tl.int32), 0) > 0:
            tl.store(tokens + row, -1)
        elif temperature > 0:
            token = _draw(source, best + row * CHUNKS, mass + row * CHUNKS, tl.load(uniform + row), temperature, vocabulary,
                          CHUNKS, WIDE, BLOCK)
            tl.store(tokens + row, token)
        else:
            tl.store(tokens + row, tl.load(place + row * CHUNKS + tl.argmax(found, 0, tie_break_left=True)))
        tl.store(arrived + row, 0)
        tl.debug_barrier()
        if tl.atomic_add(rows_left, 1, sem="acq_rel", scope="gpu") == R - 1:
            tl.debug_barrier()
            for s in range(0, sequences):
                begin = tl.load(first + s)
                right = 0
                same = 1
                for i in range(0, tl.load(count + s)):
                    same = same * (tl.load(tokens + begin + i) == tl.load(drafts + begin + i)).to(tl.int32)
                    right += same
                tl.store(accepted + s, right)
            tl.store(rows_left, 0)


def can_verify(params: SamplingParams) -> bool:
    """Whether the token of these parameters is what `verify` says."""
    plain = not (params.penalized or params.top_k or params.min_p) and params.top_p == 1
    alone = params.logprobs is None and params.prompt_logprobs is None and params.grammar is None
    return alone and (params.plain_greedy or plain and (params.rule == "equality" or not params.speculate))


def verify(logits: torch.Tensor, drafts: torch.Tensor, first: torch.Tensor, count: torch.Tensor, *,
          temperature: torch.Tensor | None = None, uniform: torch.Tensor | None = None, chunk: int = CHUNK,
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's token of every row, and how many drafts of each sequence are accepted.

    Args:
        logits: float32 [R, V]. drafts: int32 [R], the draft that stands at row + 1 (anything in a sequence's last row).
        first, count: int32 [S]: a sequence's first row and its drafts.
        temperature, uniform: float64 [R]; `sampler.uniform(seed, position, "token")` of the token that a row decides. Without
            them all rows are greedy.

    Returns:
        tokens int32 [R], -1 where logits are not finite; accepted int32 [S].

    Raises:
        ValueError: temperature or uniform that is not float64.
    """
    (R, V), device = logits.shape, logits.device
    chunks = triton.cdiv(V, chunk)
    if temperature is None:
        temperature = uniform = torch.zeros(R, dtype=torch.float64, device=device)
    if temperature.dtype is not torch.float64 or uniform is None or uniform.dtype is not torch.float64:
        found = None if uniform is None else uniform.dtype
        raise ValueError(f"temperature is {temperature.dtype}, uniform {found}; expected float64 both")
    best = torch.empty((R, chunks), dtype=torch.float32, device=device)
    place = torch.empty((R, chunks), dtype=torch.int32, device=device)
    mass = torch.empty((R, chunks), dtype=torch.float64, device=device)
    tokens, accepted = torch.empty(R, dtype=torch.int32, device=device), torch.empty_like(first)
    with arrivals(R + _APART, device) as counters:
        verify_kernel[(R, chunks)](logits, drafts, first, count, temperature, uniform, best, place, mass, counters[_APART:],
                                  tokens, accepted, counters[:1], V, R, first.shape[0], CHUNKS=chunks,
                                  WIDE=triton.next_power_of_2(chunks), BLOCK=chunk)
    return tokens, accepted
