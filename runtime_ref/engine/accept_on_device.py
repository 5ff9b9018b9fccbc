"""Drafts verified, and tokens sampled, where the logits are: for the sequences whose parameters `kernels.sampling` can verify.

The others' rows are copied to the host and verified there. Which is which follows from a sequence's own parameters.
"""

from __future__ import annotations

import torch

from runtime_ref.core.batch import SequenceChunk, logit_rows
from runtime_ref.engine.sampler import uniform
from runtime_ref.engine.scheduler import ScheduledSequence
from runtime_ref.engine.speculative import Proposal, VerifyResult
from runtime_ref.kernels.sampling import can_verify, verify


@torch.inference_mode()
def verify_on_device(logits: torch.Tensor, scheduled: list[ScheduledSequence], chunks: list[SequenceChunk],
                     proposals: dict[int, Proposal]) -> dict[int, VerifyResult]:
    """Results by sequence, from one launch. A sequence whose logits are not finite has none: the host finds out where.

    Args:
        logits: float32 [rows that want them, V] on the device, sequence after sequence as in `chunks`.
    """
    R, row = logits.shape[0], 0
    drafts, temperatures, numbers = [0] * R, [0.0] * R, [0.0] * R
    ids, first, count = [], [], []
    for item, chunk in zip(scheduled, chunks, strict=True):
        rows, sequence = logit_rows(chunk), item.sequence
        params, anchor = sequence.params, chunk.start + item.count - 1
        if rows and can_verify(params):
            own = proposals[sequence.id].tokens if item.drafts else []
            drafts[row:row + len(own)] = own
            if params.temperature > 0:
                temperatures[row:row + rows] = [params.temperature] * rows
                numbers[row:row + rows] = [uniform(params.seed, anchor + 1 + i, "token") for i in range(rows)]
            ids.append(sequence.id)
            first.append(row)
            count.append(len(own))
        row += rows
    if not ids:
        return {}
    whole = {"dtype": torch.int32, "device": logits.device}
    real = {"dtype": torch.float64, "device": logits.device}
    tokens, accepted = verify(logits, *(torch.tensor(column, **whole) for column in (drafts, first, count)),
                              temperature=torch.tensor(temperatures, **real), uniform=torch.tensor(numbers, **real))
    tokens, found = tokens.tolist(), {}
    for i, begin, n in zip(ids, first, accepted.tolist(), strict=True):
        emitted = tokens[begin:begin + n + 1]
        if -1 not in emitted:
            found[i] = VerifyResult(emitted, n)
    return found
