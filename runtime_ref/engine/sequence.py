"""One request on its way: tokens, how far the caches reach, what its drafter has not seen yet."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from runtime_ref.core.kv_cache import PAGE, Table, extend_hashes
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.draft_length import DraftLength
from runtime_ref.engine.grammar import Constraint
from runtime_ref.engine.sampler import Logprob


class Finish(StrEnum):
    """Why an answer ended: an end token or stop string, the token limit, the client, or a grammar beyond its limits."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"
    ABORT = "abort"


@dataclass
class Sequence:
    """A request.

    Attributes:
        tokens: prompt and answer. computed: positions whose keys and values are in the cache; while the answer is being
            decoded that is all but the last token, the anchor.
        target_hidden: features of positions hidden_from .. computed - 1, for the drafter (None if it gets no drafts).
        hashes: of the full pages of `tokens`.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    arrival: int
    tables: dict[str, Table]
    drafting: bool
    length: DraftLength | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    cached_pages: int = 0
    target_hidden: list[torch.Tensor] = field(default_factory=list)
    hidden_from: int = 0
    hashes: list[bytes] = field(default_factory=list)
    finish: Finish | None = None
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    preemptions: int = 0
    cached: int = 0
    born: float = field(default_factory=time.monotonic)
    constraint: Constraint | None = None
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    scored: int = 0  # tokens of the prompt, after the first, whose log-probabilities are known

    def __post_init__(self):
        self.tokens = list(self.prompt)
        extend_hashes(self.hashes, self.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt):]

    @property
    def waiting_tokens(self) -> int:
        """Tokens that the target has not computed: 1 while decoding, more while the prompt is read."""
        return len(self.tokens) - self.computed

    @property
    def answered(self) -> bool:
        """Whether the first token of the answer exists (false while the prompt is read for the first time)."""
        return len(self.tokens) > len(self.prompt)

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and not all known."""
        return self.params.prompt_logprobs is not None and self.scored < len(self.prompt) - 1

    @property
    def left(self) -> int:
        """Tokens that may still be emitted."""
        return self.params.max_tokens - (len(self.tokens) - len(self.prompt))

    def reset(self) -> None:
        """Back to nothing computed, as after a preemption; tokens stay."""
        self.computed = self.remembered = self.hidden_from = 0
        self.target_hidden = []

    def add_hidden(self, target_hidden: torch.Tensor, start: int) -> None:
        """Features [n, target layers * H] of positions start.. (those before it were added or seen)."""
        if not self.target_hidden:
            self.hidden_from = start
        self.target_hidden.append(target_hidden)

    def pending_hidden(self) -> torch.Tensor | None:
        if not self.target_hidden:
            return None
        return self.target_hidden[0] if len(self.target_hidden) == 1 else torch.cat(self.target_hidden)

    @property
    def seen_by_drafter(self) -> int:
        """Positions whose features are in the drafter's cache."""
        return self.hidden_from if self.target_hidden else self.computed

    def full_pages(self, drafter: bool) -> range:
        """Logical pages that are committed, full and not yet known to the prefix cache."""
        end = min(self.computed, self.seen_by_drafter) if drafter else self.computed
        extend_hashes(self.hashes, self.tokens)
        return range(self.remembered, min(end // PAGE, len(self.hashes)))


@dataclass
class Output:
    """What one step gave one request; `pieces` is the text that each token made ready to show, `text` all of it."""

    id: int
    tokens: list[int]
    finish: Finish | None = None
    text: str | None = None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    prompt_logprobs: list[Logprob] = field(default_factory=list)  # of the prompt's second token on, with the first output
