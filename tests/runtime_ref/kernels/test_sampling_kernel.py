"""Greedy judgement on the device: torch's arg-max, and the verdicts of the reference."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from runtime_ref.kernels.sampling import judge
from runtime_ref.sampler import SamplingParams
from runtime_ref.speculative import Proposal, accept


@pytest.mark.parametrize("vocabulary, chunk", [(130, 64), (64, 64), (1000, 128)])
def test_verdicts_are_those_of_the_reference(vocabulary, chunk):
    generator = torch.Generator().manual_seed(vocabulary)
    counts, logits = [3, 0, 7], torch.randn(13, vocabulary, generator=generator)
    own = logits.argmax(-1).to(torch.int32)
    drafts = own.clone()
    drafts[[1, 9]] += 1  # sequence 0 keeps one of three, sequence 2 four of seven
    first, count = (torch.tensor(c, dtype=torch.int32) for c in ([0, 4, 5], counts))
    tokens, accepted = judge(logits, drafts, first, count, chunk=chunk)
    assert torch.equal(tokens, own) and accepted.tolist() == [1, 0, 4]
    for s, (begin, n) in enumerate(zip(first.tolist(), counts, strict=True)):
        rows = slice(begin, begin + n + 1)
        verdict = accept(logits[rows], Proposal(drafts[begin:begin + n].tolist()), SamplingParams(), 10, [1], [])
        assert verdict.accepted == int(accepted[s])
        assert verdict.tokens == tokens[begin:begin + verdict.accepted + 1].tolist()


def test_equal_logits_give_the_lower_token_within_and_across_chunks():
    logits = torch.zeros(2, 200)
    logits[0, [70, 150]] = 3.0
    tokens, _ = judge(logits, torch.zeros(2, dtype=torch.int32), *torch.zeros(2, 1, dtype=torch.int32), chunk=64)
    assert tokens.tolist() == [70, 0]
