"""The drafter's optional Markov head: what a drafted token says about the next one.

A block's positions are predicted side by side, so two of them may each begin another phrase. The head adds
U[previous token] . W to a position's logits (DSpark, arXiv 2607.05147; trained in `modeling/drafter.py`), and drafts are then
chosen one after the other. At temperature 0 a drafter may ask for the best whole path through a few candidates of each
position instead (`selector_top_k`, as in DFlash 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class MarkovHead:
    """previous [vocabulary, r], next [r, vocabulary] float32; candidates: of each position of a path, 0 = token by token."""

    previous: torch.Tensor
    next: torch.Tensor
    candidates: int = 0

    def bias(self, tokens: torch.Tensor) -> torch.Tensor:
        """Addition [n, vocabulary] to the logits after each of the tokens [n]."""
        return self.previous[tokens] @ self.next

    def chain(self, logits: torch.Tensor, anchor: int, choose: Callable[[torch.Tensor, int], int]) -> list[int]:
        """Tokens after `anchor` for logits [n, V], each by `choose(its logits given the token before, its index)`."""
        tokens = [anchor]
        for i, row in enumerate(logits):
            tokens.append(choose(row + self.bias(torch.tensor(tokens[-1:]))[0], i))
        return tokens[1:]

    def path(self, logits: torch.Tensor, anchor: int) -> list[int]:
        """The best path for logits [n, V]: the sum of its tokens' logits and of their log-probabilities' change by the head.

        Viterbi over the candidates of each position, those of the highest logits.
        """
        scores, options = logits.topk(min(self.candidates, logits.shape[1]))
        before, total, back = torch.tensor([anchor]), torch.zeros(1), []
        for row, own, tokens in zip(logits, scores, options, strict=True):
            bias = self.bias(before)
            normal = (row + bias).logsumexp(-1, keepdim=True)
            total, best = (total[:, None] + bias[:, tokens] - normal + own).max(0)
            back.append(best)
            before = tokens
        at = int(total.argmax())
        found = []
        for tokens, best in zip(options.flip(0), reversed(back), strict=True):
            found.append(int(tokens[at]))
            at = int(best[at])
        return found[::-1]
