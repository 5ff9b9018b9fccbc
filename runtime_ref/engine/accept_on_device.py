"""A round whose drafts and tokens are chosen where the logits are: the host reads once, when everything is done.

Greedy and plainly drawn sequences are verified by `kernels.sampling` in one launch; filters, penalties and the rule "rejection"
by `engine.device_sampling`. Only what the host wants to see or must know first stays with it: log-probabilities and grammars,
whose rows of logits it copies. Which is which follows from a sequence's own parameters.
"""

from __future__ import annotations

import torch

from runtime_ref.backends.base import Backend, Drafter
from runtime_ref.core.batch import DraftRequest, SequenceChunk, logit_rows
from runtime_ref.core.launch_report import WaitGivenUp
from runtime_ref.core.program import Op
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.device_sampling import Round, choose, distributions, draws
from runtime_ref.engine.sampler import uniform
from runtime_ref.engine.scheduler import ScheduledSequence
from runtime_ref.engine.speculative import Proposal, VerifyResult, likeliest, matched
from runtime_ref.kernels.sampling import can_verify, verify


def stays_on_device(params: SamplingParams) -> bool:
    """Whether a sequence's tokens are chosen without the host."""
    biased = [token for token, _ in params.logit_bias]
    return (params.logprobs is None and params.prompt_logprobs is None and params.grammar is None
            and len(set(biased)) == len(biased))


@torch.inference_mode()
def run_on_device(backend: Backend, program: list[Op], drafter: Drafter | None, scheduled: list[ScheduledSequence],
                  chunks: list[SequenceChunk], requests: dict[int, DraftRequest],
                  ) -> tuple[dict, dict[int, Proposal], dict[int, VerifyResult]]:
    """Drafts, step and verdict of a round.

    Args:
        chunks: of the scheduled sequences, without drafts; they get zeros in their place.
        requests: of the sequences that get drafts, by their place in `chunks`.

    Returns:
        The step's buffers with logits on the device, proposals by sequence, and results by sequence. A sequence whose logits
        are not finite has no result: the host finds out where.

    Raises:
        WaitGivenUp: a program or rank gave up waiting inside a launch; nothing of the round may be used.
    """
    drafted, q = None, {}
    if requests:
        asked = [(scheduled[i].sequence, scheduled[i].sequence.computed) for i in requests]
        drafted, q = _drafts(drafter.logits(list(requests.values())), [(s.id, s.params, at) for s, at in asked])
        for i, request in requests.items():
            chunks[i].tokens += [0] * request.count
    step = backend.plan(chunks)
    into = [chunks[i].row + scheduled[i].count + k for i, request in requests.items() for k in range(request.count)]
    if drafted is not None:
        step.ids[torch.tensor(into, device=backend.device)] = drafted
    buffers = backend.run(program, step, host=False)
    results, tokens = _verdicts(backend, drafter, buffers["logits"], scheduled, chunks, requests, drafted, q)
    proposals = {}
    for i, request in requests.items():
        sequence = scheduled[i].sequence
        own, tokens = tokens[:request.count], tokens[request.count:]
        chunks[i].tokens[-request.count:] = own
        drawn = q.get(sequence.id)
        proposals[sequence.id] = Proposal(own, drawn if drawn is None or sequence.id in results else drawn.cpu())
        if sequence.id in results:
            results[sequence.id] = matched(own, results[sequence.id].tokens)
    return buffers, proposals, {i: r for i, r in results.items() if -1 not in r.tokens}


def _drafts(logits: list[torch.Tensor], asked: list[tuple[int, SamplingParams, int]]) -> tuple[torch.Tensor, dict]:
    """int32 drafts of all sequences side by side, and of drawn ones float64 [n, V] that they were drawn from, by sequence.

    asked: id, parameters and the anchor's position of each.
    """
    tokens, q, at, numbers, params = torch.cat(logits).argmax(-1), {}, [], [], []
    begin = 0
    for (sequence, own, position), rows in zip(asked, logits, strict=True):
        if not likeliest(own):
            at += range(begin, begin + len(rows))
            numbers += [uniform(own.seed, position + 1 + i, "draft") for i in range(len(rows))]
            params += [own] * len(rows)
            q[sequence] = len(rows)
        begin += len(rows)
    if at:
        here = torch.tensor(at, device=tokens.device)
        p = distributions(torch.cat(logits)[here], params)
        tokens[here] = draws(p, torch.tensor(numbers, dtype=torch.float64, device=tokens.device))
        q = dict(zip(q, p.split(list(q.values())), strict=True))
    return tokens.to(torch.int32), q


def _verdicts(backend, drafter, logits, scheduled, chunks, requests, drafted, q) -> tuple[dict[int, VerifyResult], list[int]]:
    """All rows' tokens of each sequence whose tokens are chosen here, and the drafts: the one read of the round."""
    R, row, device = logits.shape[0], 0, logits.device
    places, plain, special, standing = {}, [], [], []
    for i, (item, chunk) in enumerate(zip(scheduled, chunks, strict=True)):
        rows, sequence = logit_rows(chunk), item.sequence
        count = requests[i].count if i in requests else 0
        standing += range(row, row + count)
        if rows and stays_on_device(sequence.params):
            places[sequence.id] = row, rows
            own = Round(sequence.params, row, rows - 1, chunk.start + item.count - 1, sequence.prompt, sequence.answer,
                        q.get(sequence.id))
            (plain if can_verify(sequence.params) else special).append(own)
        row += rows
    drafts = torch.zeros(R, dtype=torch.int32, device=device)
    if drafted is not None:
        drafts[torch.tensor(standing, device=device)] = drafted
    tokens = _plain(logits, plain, drafts) if plain else torch.full((R,), -1, dtype=torch.int32, device=device)
    if special:
        at, found = choose(logits, special, drafts)
        tokens[at] = found.to(torch.int32)
    flags = backend.wait_flags(drafter)
    late = torch.cat(flags) if flags else torch.zeros(1, dtype=torch.int32, device=device)
    late = late.any(0, keepdim=True).to(torch.int32)
    read = torch.cat([tokens, *([] if drafted is None else [drafted]), late]).tolist()
    if read[-1]:
        raise WaitGivenUp(f"rank {backend.ranks.rank}: a program gave up waiting inside a launch; the step is not used")
    return {i: VerifyResult(read[begin:begin + rows], 0) for i, (begin, rows) in places.items()}, read[R:-1]


def _plain(logits: torch.Tensor, rounds: list[Round], drafts: torch.Tensor) -> torch.Tensor:
    """int32 [R]: tokens of the rows of `rounds`, in one launch."""
    R, device = logits.shape[0], logits.device
    temperatures, numbers = [0.0] * R, [0.0] * R
    for own in rounds:
        if own.params.temperature > 0:
            for i in range(own.drafts + 1):
                temperatures[own.first + i] = own.params.temperature
                numbers[own.first + i] = uniform(own.params.seed, own.position + 1 + i, "token")
    first, count = ([getattr(own, name) for own in rounds] for name in ("first", "drafts"))
    whole = {"dtype": torch.int32, "device": device}
    real = {"dtype": torch.float64, "device": device}
    return verify(logits, drafts, torch.tensor(first, **whole), torch.tensor(count, **whole),
                  temperature=torch.tensor(temperatures, **real), uniform=torch.tensor(numbers, **real))[0]
