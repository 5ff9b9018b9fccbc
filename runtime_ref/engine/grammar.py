"""Answers that must match a grammar: which tokens may come next.

llguidance parses as the answer grows and says for every token of the vocabulary whether some right answer goes on with it.
Tokens that may not come get probability 0 in the target's distribution, at each position that a round judges; nothing else
changes, so an answer with drafts is the one without. State moves by emitted tokens only, one of which may end the answer: the
grammar allows the model's end tokens where the text may end.

Source: llguidance (guidance-ai), `LLMatcher`; its limits of work for each step hold for grammars that clients send.
"""

from __future__ import annotations

import importlib.util

import torch

MISSING = "needs the package llguidance: pip install -e '.[structured]'"
# Between two words of JSON; without a bound a model may go on with spaces for ever.
WHITESPACE = r"[ \t\n]{0,20}"


def installed() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def json_grammar(schema: str) -> str:
    """The grammar of texts that fit a JSON schema.

    Raises:
        ValueError: not a schema, or one that cannot be followed; the package is missing.
    """
    if not installed():
        raise ValueError(MISSING)
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    wrong, said = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise ValueError((said[0].strip() or "not a JSON schema").splitlines()[0])
    return grammar


class Grammars:
    """The vocabulary as grammars need it; made once for an engine.

    Raises:
        ValueError: no tokenizer, or not a fast one; the package is missing.
    """

    def __init__(self, tokenizer, vocabulary: int, end_ids: frozenset[int]):
        if tokenizer is None:
            raise ValueError("grammar: needs a tokenizer, this engine has none")
        if not installed():
            raise ValueError(f"grammar: {MISSING}")
        from llguidance.hf import from_tokenizer

        ends = sorted(i for i in end_ids if i < vocabulary) or [tokenizer.eos_token_id]
        self.vocabulary, self._words = vocabulary, from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends)

    def begin(self, grammar: str) -> Constraint:
        """The state before an answer.

        Raises:
            ValueError: not a grammar.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"grammar: {matcher.get_error().strip().splitlines()[0]}")
        return Constraint(matcher, self.vocabulary)


class Constraint:
    """Where an answer stands in its grammar.

    Attributes:
        ended: nothing may follow, not even an end token. error: why, if that is not the grammar's end.
    """

    def __init__(self, matcher, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary
        self.ended, self.error = False, ""

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [V], those of tokens that may not come next at minus infinity; as they are if the grammar gave up."""
        bits = self._matcher.compute_logit_bias() if not self.ended else b""
        self._look()
        if self.ended:
            return logits
        allowed = torch.frombuffer(bytearray(bits), dtype=torch.uint8)[:self._vocabulary] > 0
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> None:
        """Moves on by an emitted token."""
        if not self.ended:
            self._matcher.consume_token(token)
            self._look()

    def _look(self) -> None:
        if self._matcher.is_error():
            self.error = (self._matcher.get_error().strip() or "beyond its limits").splitlines()[0]
        self.ended = self._matcher.is_stopped()
