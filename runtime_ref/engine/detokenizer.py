"""Tokens -> text as it may be shown: never half a character, never part of a stop string.

Byte-level vocabularies cut characters into several tokens, and some decoders treat the beginning of a text specially. So
text is decoded with a few tokens of context before it, and what ends in U+FFFD (an unfinished character) waits for the
next token. What might become a stop string waits too.
"""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "\ufffd"
# No character needs more than four bytes, and so more than four byte-level tokens.
LONGEST_CHARACTER = 4


class TextStream:
    """Text of one answer, token by token."""

    def __init__(self, tokenizer, stop: Sequence[str] = (), skip_special: bool = True):
        self.tokenizer, self.stop, self.skip_special = tokenizer, tuple(stop), skip_special
        self._tokens: list[int] = []
        self._context = 0  # tokens before this one are shown and no longer decoded
        self._shown = 0  # tokens whose text was taken over
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that may be shown after this token; `stopped` tells whether a stop string was met (it is not shown)."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context:self._shown])
        after = self._decode(self._tokens[self._context:])
        waiting = len(self._tokens) - self._shown
        if after.endswith(UNFINISHED) and waiting < LONGEST_CHARACTER:
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return self._release(after[len(before):])

    def finish(self) -> str:
        """What was still held back, at the end of the answer."""
        rest = self._decode(self._tokens[self._context:])[len(self._decode(self._tokens[self._context:self._shown])):]
        self._context = self._shown = len(self._tokens)
        text = self._release(rest) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep:] if keep else ""
        return text[:len(text) - keep]
