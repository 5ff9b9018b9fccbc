"""A body -> what the engine is asked for: parsed, validated, put through the chat template, in tokens.

Runs in the worker processes (see `request_workers`), which is why it takes bytes and gives plain data. What comes out has been
checked against every limit that does not depend on the moment, so it is small and the server's process may take it as it is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from runtime_ref.engine.grammar import MISSING, installed, json_grammar
from runtime_ref.server import openai_requests as schema
from runtime_ref.server.chat_template import render, template_of
from runtime_ref.server.openai_requests import BadRequest
from runtime_ref.server.tool_calls import MARKS, form_of

if TYPE_CHECKING:
    from runtime_ref.server.request_workers import Limits


MOST_CALLS = 32  # in one answer, where calls are forced
MOST_SCHEMA = 1 << 18  # characters; the engine's thread reads the grammar too, between two steps


@dataclass
class Prepared:
    """A request for answers.

    Attributes:
        prompts: tokens of each prompt. max_tokens: None: as many as the context holds.
        sampling: arguments of SamplingParams but for `max_tokens` and `seed`.
        logprobs: None, or how many alternatives beside each token. echo: each prompt's text, if it is to be repeated.
        reading: how the answer is read: arguments of `tool_calls.reader`; None: all of it is text.
        one_call: at most one call of a tool is told.
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
    reading: dict[str, Any] | None = None
    one_call: bool = False


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
        tools, reading, grammar = self._tools(asked)
        variables = dict(asked.chat_template_kwargs or {})
        if asked.reasoning_effort is not None:
            variables["reasoning_effort"] = asked.reasoning_effort
        text = render(self.tokenizer, asked.messages, tools=tools, variables=variables,
                      add_generation_prompt=asked.add_generation_prompt is not False,
                      continue_final_message=bool(asked.continue_final_message))
        prompt = self._fitting(self._encode(text, bool(asked.add_special_tokens), "messages", limits), "messages", limits)
        if (formatted := self._format(asked.response_format)) is not None:
            grammar, reading = formatted, None  # JSON alone, from the first token on
        return self._prepared(asked, [prompt], limits, logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
                              max_tokens=asked.tokens_asked_for(None), grammar=grammar, reading=reading,
                              one_call=asked.parallel_tool_calls is False)

    def _tools(self, asked: schema.ChatRequest) -> tuple[list[dict] | None, dict[str, Any] | None, str | None]:
        """Tools as the template shows them, how the answer is read, and the grammar that it must match.

        Raises:
            BadRequest: a choice that is none, a template whose calls cannot be read, tools together with a response format.
        """
        choice = asked.tool_choice or "auto"
        if not asked.tools and asked.tool_choice not in (None, "none"):
            raise BadRequest("tool_choice: only together with tools", param="tool_choice")
        form = form_of(template_of(self.tokenizer, bool(asked.tools)))
        reading = {"form": form} if form == "channels" else None  # also without tools: its answers have channels
        if not asked.tools or choice == "none":
            return None, reading, None
        if asked.response_format is not None and asked.response_format.type != "text":
            raise BadRequest("response_format: not together with tools", param="response_format")
        tools = tools_of(asked.tools)
        functions = {tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"} for tool in tools}
        if choice == "auto":
            if form is None:
                raise BadRequest("tools: this checkpoint's chat template shows no form of calls that this server can read "
                                 f"({', '.join(mark for marks in MARKS.values() for mark in marks)})", param="tools",
                                 code="unsupported_parameter")
            return tools, {"form": form, "kinds": kinds_of(functions)}, None
        if choice == "required":
            calls = [{"type": "object", "properties": {"name": {"const": name}, "arguments": parameters},
                      "required": ["name", "arguments"], "additionalProperties": False}
                     for name, parameters in functions.items()]
            most = 1 if asked.parallel_tool_calls is False else MOST_CALLS
            forced = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}
            return tools, {"form": "list"}, self._grammar(forced, "tools")
        name = choice.function.name
        if name not in functions:
            raise BadRequest(f"tool_choice: function {schema.short(name)!r}, expected {' or '.join(map(repr, functions))}",
                             param="tool_choice")
        return tools, {"form": "object", "name": name}, self._grammar(functions[name], "tools")

    def _format(self, asked: schema.ResponseFormat | None) -> str | None:
        """The grammar of a response format; None: any text."""
        if asked is None or asked.type == "text":
            return None
        if asked.type == "json_object":
            return self._grammar({"type": "object"}, "response_format")
        if asked.json_schema is None or asked.json_schema.schema_ is None:
            raise BadRequest("response_format.json_schema.schema: missing, expected a JSON schema", param="response_format")
        return self._grammar(asked.json_schema.schema_, "response_format")

    def _grammar(self, found: dict | bool, param: str) -> str:
        if not installed():
            raise BadRequest(f"{param}: {MISSING}", param=param, code="structured_output_unavailable")
        text = json.dumps(found)
        if len(text) > MOST_SCHEMA:
            raise BadRequest(f"{param}: a JSON schema of {len(text)} characters, expected at most {MOST_SCHEMA}", param=param,
                             code="invalid_json_schema")
        try:
            return json_grammar(text)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{param}: the JSON schema cannot be followed: {schema.short(error)}", param=param,
                             code="invalid_json_schema") from None

    def _completions(self, raw: dict, limits: Limits) -> dict[str, Any]:
        asked = schema.validate(schema.CompletionRequest, raw, unknown=limits.unknown)
        prompts = self._prompts(asked, limits)
        if asked.max_tokens == 0 and not asked.echo:
            raise BadRequest("max_tokens: 0, expected 1 or more, or echo true", param="max_tokens")
        echo = [self._decode(p) for p in prompts] if asked.echo else None
        return self._prepared(asked, prompts, limits, logprobs=asked.logprobs, echo=echo,
                              max_tokens=asked.tokens_asked_for(schema.COMPLETION_TOKENS),
                              grammar=self._format(asked.response_format))

    def _prepared(self, asked: schema.Answering, prompts: list[list[int]], limits: Limits, grammar: str | None = None,
                  **more) -> dict[str, Any]:
        sampling = asked.sampling(limits.defaults, limits.adaptive, limits.vocabulary)
        if grammar is not None:
            if asked.ignore_eos:
                raise BadRequest("ignore_eos: not together with an answer that has to match a schema", param="ignore_eos")
            sampling["grammar"] = grammar
        if more.get("reading") is not None:
            sampling["skip_special"] = False  # marks of calls are special tokens in many vocabularies
        if more.get("echo") is not None and (more["logprobs"] is not None or more["max_tokens"] == 0):
            sampling["prompt_logprobs"] = more["logprobs"] or 0
        if asked.stream_options is not None and not asked.stream:
            raise BadRequest("stream_options: only together with stream true", param="stream_options")
        options = asked.stream_options or schema.StreamOptions()
        return asdict(Prepared(
            model=asked.model, prompts=prompts, sampling=sampling,
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


def kinds_of(functions: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Function -> parameter -> its type, where a schema names one."""
    found: dict[str, dict[str, str]] = {}
    for name, parameters in functions.items():
        properties = parameters.get("properties")
        found[name] = {key: value["type"] for key, value in (properties if isinstance(properties, dict) else {}).items()
                       if isinstance(value, dict) and isinstance(value.get("type"), str)}
    return found
