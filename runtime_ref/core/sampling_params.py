"""Sampling parameters of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """What a request may ask for.

    Attributes:
        temperature: 0 = greedy. top_k: 0 = off. min_p: relative to the most likely token.
        seed: of this request; every rank must be given the same.
        presence_penalty, frequency_penalty: subtracted from logits of tokens of the answer; repetition_penalty: divides
            (multiplies, if negative) logits of tokens of prompt and answer.
        logprobs: None, or how many alternatives to return beside the chosen token.
        stop: strings that end the answer (not part of it); stop_ids: tokens that do. ignore_eos: the model's end is none.
        speculate: use the drafter, if there is one. drafts: at most so many per round (None: the drafter's block).
        min_tokens: no end token, and none of stop_ids, before so many; `held_back` are those tokens (the engine sets it).
        logit_bias: (token, what is added to its logit).
        skip_special: special tokens have no text.
        prompt_logprobs: None, or how many alternatives to return beside each token of the prompt; then `max_tokens` may be 0.
        grammar: what the answer must match, as llguidance has it (`engine.grammar`).
        adaptive: choose the number of drafts by what was accepted so far.
        rule: "equality" (emit the target's own sample; drafts are greedy) or "rejection" (drafts are sampled).
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    speculate: bool = True
    drafts: int | None = None
    adaptive: bool = False
    rule: str = "equality"
    min_tokens: int = 0
    held_back: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    skip_special: bool = True
    prompt_logprobs: int | None = None
    grammar: str | None = None

    def __post_init__(self):
        for name in ("max_tokens", "top_k", "seed", "logprobs", "drafts", "temperature", "top_p", "min_p", "presence_penalty",
                     "frequency_penalty", "repetition_penalty", "min_tokens", "prompt_logprobs"):
            value = getattr(self, name)
            whole = name in ("max_tokens", "top_k", "seed", "logprobs", "drafts", "min_tokens", "prompt_logprobs")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                if value is not None or name not in ("logprobs", "drafts", "prompt_logprobs"):
                    raise ValueError(f"{name}: {value!r}, expected {'a whole number' if whole else 'a number'}")
        checks = [("max_tokens", self.max_tokens, self.max_tokens >= (self.prompt_logprobs is None), "1 or more"),
                  ("temperature", self.temperature, 0 <= self.temperature <= 100, "0 to 100"),
                  ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, up to 1"),
                  ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
                  ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
                  ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2, "-2 to 2"),
                  ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 2, "-2 to 2"),
                  ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "more than 0, up to 100"),
                  ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "0 or more"),
                  ("drafts", self.drafts, self.drafts is None or self.drafts >= 0, "0 or more"),
                  ("min_tokens", self.min_tokens,
                   0 <= self.min_tokens <= self.max_tokens, f"0 to {self.max_tokens}, max_tokens"),
                  ("stop", self.stop, all(self.stop), "no empty string"),
                  ("rule", self.rule, self.rule in RULES, " or ".join(RULES))]
        for name, value, fine, expected in checks:
            if not fine:
                raise ValueError(f"{name}: {value!r}, expected {expected}")

    @property
    def plain_greedy(self) -> bool:
        """The arg-max of the logits is the token, whatever came before."""
        return self.temperature == 0 and not self.penalized and self.grammar is None

    @property
    def penalized(self) -> bool:
        """What was said before, or the request itself, changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
                    or self.min_tokens)


RULES = ("equality", "rejection")
