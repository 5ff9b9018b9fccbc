"""Verdicts from logits that stay on the device: for the sequences whose parameters `kernels.sampling` can judge.

The others' rows are copied to the host and judged there. Which is which follows from a sequence's own parameters.
"""

from __future__ import annotations

import torch

from runtime_ref.kernels.sampling import draws_here
from runtime_ref.model import Span, logit_rows
from runtime_ref.sampler import uniform
from runtime_ref.scheduler import Work
from runtime_ref.speculative import Proposal, Verdict
from runtime_ref.triton_backend import JudgedRows, TritonBackend


def judge_on_device(backend: TritonBackend, logits: torch.Tensor, work: list[Work], spans: list[Span],
                    proposals: dict[int, Proposal]) -> dict[int, Verdict]:
    """Verdicts by sequence. A sequence whose logits are not finite has none: the host finds out where.

    Args:
        logits: float32 [rows that want them, V] on the device, sequence after sequence as in `spans`.
    """
    rows, ids, row = [], [], 0
    for item, span in zip(work, spans, strict=True):
        count, sequence = logit_rows(span), item.sequence
        if count and draws_here(sequence.params):
            params, anchor = sequence.params, span.start + item.count - 1
            numbers = [0.0] * count
            if params.temperature > 0:
                numbers = [uniform(params.seed, anchor + 1 + i, "token") for i in range(count)]
            drafts = proposals[sequence.id].tokens if item.drafts else []
            rows.append(JudgedRows(row, drafts, params.temperature, numbers))
            ids.append(sequence.id)
        row += count
    if not rows:
        return {}
    return {i: Verdict(tokens, accepted) for i, (tokens, accepted) in zip(ids, backend.judge(logits, rows), strict=True)
            if -1 not in tokens}
