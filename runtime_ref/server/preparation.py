"""A body -> what the engine is asked for: parsed, validated, put through the chat template, in tokens.

Runs in the worker processes (see `request_workers`), which is why it takes bytes and gives plain data. What comes out has been
checked against every limit that does not depend on the moment, so it is small and the server's process may take it as it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from runtime_ref.server import openai_requests as schema
from runtime_ref.server.chat_template import render
from runtime_ref.server.openai_requests import BadRequest

if TYPE_CHECKING:
    from runtime_ref.server.request_workers import Limits


@dataclass
class Prepared:
    """A request for answers.

    Attributes:
        prompts: tokens of each prompt. max_tokens: None: as many as the context holds.
        sampling: arguments of SamplingParams but for `max_tokens` and `seed`.
        logprobs: None, or how many alternatives beside each token. echo: each prompt's text, if it is to be repeated.
    """

    model: str | None
    prompts: list[list[int]]
    sampling: dict[str, Any]
    max_tokens: int | None
    seed: int | None
    n: int = 1
    logprobs: int | None = None
    stream: bool = False
    usage: bool = False
    usage_always: bool = False
    token_ids: bool = False
    drafts: bool = False
    echo: list[str] | None = None


class Preparation:
    """One tokenizer's requests."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokenizer.model_max_length = 1 << 62  # or every long text is warned of; what is too long is said here
        # No token stands for more text: longer ones cannot fit, and need not be tokenized to know it.
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)

    def prepare(self, kind: str, body: bytes, limits: Limits) -> dict[str, Any]:
        """What is sent back: fields of `Prepared`, or the whole answer of /tokenize and /detokenize with the `model` asked for.

        Raises:
            BadRequest.
        """
        raw = schema.parse_json(body)
        return {"chat": self._chat, "completions": self._completions, "tokenize": self._tokenize,
                "detokenize": self._detokenize}[kind](raw, limits)

    def _chat(self, raw: dict, limits: Limits) -> dict[str, Any]:
        asked = schema.validate(schema.ChatRequest, raw, unknown=limits.unknown)
        if asked.top_logprobs and not asked.logprobs:
            raise BadRequest(f"top_logprobs: {asked.top_logprobs}, expected logprobs true with it", param="top_logprobs")
        if asked.tools and asked.tool_choice != "none" or asked.tool_choice not in (None, "none"):
            raise BadRequest("tools: not supported by this server", param="tools", code="unsupported_parameter")
        self._plain_text(asked)
        variables = dict(asked.chat_template_kwargs or {})
        if asked.reasoning_effort is not None:
            variables["reasoning_effort"] = asked.reasoning_effort
        text = render(self.tokenizer, asked.messages, variables=variables,
                      add_generation_prompt=asked.add_generation_prompt is not False,
                      continue_final_message=bool(asked.continue_final_message))
        prompt = self._fitting(self._encode(text, bool(asked.add_special_tokens), "messages", limits), "messages", limits)
        return self._prepared(asked, [prompt], limits, logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
                              max_tokens=asked.tokens_asked_for(None))

    def _completions(self, raw: dict, limits: Limits) -> dict[str, Any]:
        asked = schema.validate(schema.CompletionRequest, raw, unknown=limits.unknown)
        self._plain_text(asked)
        prompts = self._prompts(asked, limits)
        if asked.echo and asked.logprobs is not None:
            raise BadRequest("echo: not together with logprobs (those of prompts are not computed)", param="echo")
        echo = [self._decode(p) for p in prompts] if asked.echo else None
        return self._prepared(asked, prompts, limits, logprobs=asked.logprobs, echo=echo,
                              max_tokens=asked.tokens_asked_for(schema.COMPLETION_TOKENS))

    def _plain_text(self, asked) -> None:
        if asked.response_format is not None and asked.response_format.type != "text":
            raise BadRequest("response_format: not supported by this server", param="response_format",
                             code="unsupported_parameter")

    def _prepared(self, asked: schema.Answering, prompts: list[list[int]], limits: Limits, **more) -> dict[str, Any]:
        if asked.stream_options is not None and not asked.stream:
            raise BadRequest("stream_options: only together with stream true", param="stream_options")
        options = asked.stream_options or schema.StreamOptions()
        return asdict(Prepared(
            model=asked.model, prompts=prompts, sampling=asked.sampling(limits.defaults, limits.adaptive, limits.vocabulary),
            seed=asked.seed, n=asked.n or 1, stream=bool(asked.stream), usage=bool(options.include_usage),
            usage_always=bool(options.continuous_usage_stats), token_ids=bool(asked.return_token_ids),
            drafts=bool(asked.return_drafts), **more))

    def _prompts(self, asked: schema.CompletionRequest, limits: Limits) -> list[list[int]]:
        """Each prompt's tokens, from text, tokens, or a list of either."""
        prompt = asked.prompt
        if isinstance(prompt, str) or prompt and isinstance(prompt[0], int):
            prompt = [prompt]
        if not prompt:
            raise BadRequest("prompt: empty, expected text, tokens, or a list of them", param="prompt")
        if len(prompt) > limits.max_requests:
            raise BadRequest(f"prompt: {len(prompt)} prompts, expected at most {limits.max_requests}", param="prompt")
        special = asked.add_special_tokens is not False
        return [self._fitting(self._encode(p, special, "prompt", limits) if isinstance(p, str) else p, "prompt", limits)
                for p in prompt]

    def _tokenize(self, raw: dict, limits: Limits) -> dict[str, Any]:
        asked = schema.validate(schema.TokenizeRequest, raw, unknown=limits.unknown)
        if (asked.prompt is None) == (asked.messages is None):
            raise BadRequest("prompt: expected either prompt or messages", param="prompt")
        if asked.messages is not None:
            text = render(self.tokenizer, asked.messages, tools=tools_of(asked.tools), variables=asked.chat_template_kwargs,
                          add_generation_prompt=asked.add_generation_prompt is not False,
                          continue_final_message=bool(asked.continue_final_message))
            tokens = self._encode(text, bool(asked.add_special_tokens), "messages", limits, fits=False)
        else:
            tokens = self._encode(asked.prompt, asked.add_special_tokens is not False, "prompt", limits, fits=False)
        body = {"count": len(tokens), "max_model_len": limits.context, "tokens": tokens}
        if asked.return_token_strs:
            body["token_strs"] = self.tokenizer.convert_ids_to_tokens(tokens)
        return {"model": asked.model, "body": body}

    def _detokenize(self, raw: dict, limits: Limits) -> dict[str, Any]:
        asked = schema.validate(schema.DetokenizeRequest, raw, unknown=limits.unknown)
        if asked.tokens and max(asked.tokens) >= limits.vocabulary:
            raise BadRequest(f"tokens: {max(asked.tokens)}, expected 0 to {limits.vocabulary - 1}", param="tokens")
        return {"model": asked.model, "body": {"prompt": self._decode(asked.tokens, skip_special=False)}}

    def _encode(self, text: str, special: bool, param: str, limits: Limits, *, fits: bool = True) -> list[int]:
        """Tokens of a text.

        Raises:
            BadRequest: half of a surrogate pair in it, or (if it must fit) certainly too long.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRequest(f"{param}: not valid Unicode (half of a surrogate pair)", param=param) from None
        if fits and len(text) > self.longest * limits.context:
            raise BadRequest(f"{param}: {len(text)} characters, which is more than {limits.context} tokens", param=param,
                             code="context_length_exceeded")
        return self.tokenizer.encode(text, add_special_tokens=special)

    def _decode(self, tokens: list[int], *, skip_special: bool = True) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def _fitting(self, prompt: list[int], param: str, limits: Limits) -> list[int]:
        """A prompt with room for an answer.

        Raises:
            BadRequest: empty, too long, or a token beyond the vocabulary.
        """
        if not prompt:
            raise BadRequest(f"{param}: empty, expected at least one token", param=param)
        if len(prompt) >= limits.context:
            raise BadRequest(f"{param}: {len(prompt)} tokens, expected fewer than {limits.context}", param=param,
                             code="context_length_exceeded")
        if max(prompt) >= limits.vocabulary:
            raise BadRequest(f"{param}: token {max(prompt)}, expected 0 to {limits.vocabulary - 1}", param=param)
        return prompt


def tools_of(tools: list[schema.Tool] | None) -> list[dict[str, Any]] | None:
    """Definitions as templates read them."""
    return [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
