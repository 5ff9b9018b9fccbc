"""Drafts verified by the target's likeliest tokens, which a backend may find beside its logits."""

from __future__ import annotations

from collections.abc import Sequence

from runtime_ref.core.batch import SequenceChunk, logit_rows
from runtime_ref.engine.scheduler import ScheduledSequence
from runtime_ref.engine.speculative import Proposal, VerifyResult, matched


def verify_likeliest(best: Sequence[int], scheduled: list[ScheduledSequence], chunks: list[SequenceChunk],
                     proposals: dict[int, Proposal]) -> dict[int, VerifyResult]:
    """Results of the sequences for which these tokens say everything, by sequence.

    Args:
        best: the target's likeliest token of each row that wants logits, sequence after sequence as in `chunks`; -1 where they
            are not finite (such a sequence has no result: the caller finds out where).
    """
    found, row = {}, 0
    for item, chunk in zip(scheduled, chunks, strict=True):
        sequence, own = item.sequence, best[row:(row := row + logit_rows(chunk))]
        params = sequence.params
        if (own and params.plain_greedy and params.logprobs is None and not sequence.unscored and sequence.left > 0
                and -1 not in own):
            proposal = proposals.get(sequence.id)
            found[sequence.id] = matched([] if proposal is None else proposal.tokens, own)
    return found
