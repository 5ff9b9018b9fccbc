"""What a client may send: OpenAI's fields, and the extensions that vLLM's clients know.

Types are strict (a number in quotes is a mistake, not a number) and everything has bounds, because what gets past this page
reaches the engine that all clients share. Lists are validated up to the first mistake, so that refusing a body costs no more
than reading it. No field is ignored that could change an answer: what this server cannot do is refused, and so is a name that
it does not know (most often a misspelled one).

Source of names and defaults: OpenAI's API reference (chat/completions, completions); vLLM's OpenAI-compatible server for
`ignore_eos`, `top_k`, `min_p`, `min_tokens`, `repetition_penalty`, `stop_token_ids`, `skip_special_tokens`,
`chat_template_kwargs`, `continue_final_message`, `return_token_ids`, `/tokenize`, `/detokenize`.
"""

from __future__ import annotations

import difflib
import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

# Below this a division of logits could overflow; the distribution is a single token long before.
GREEDY_BELOW = 1e-5
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
# Longest lists; what fits the model is checked later, against the server's own limits.
MOST_TOKENS, MOST_PROMPTS, MOST_MESSAGES, MOST_PARTS, MOST_TOOLS = 1 << 22, 4096, 4096, 1024, 256


def _whole(value: Any) -> Any:
    """16.0 is the whole number 16: JSON does not tell the two apart, and some clients write floats."""
    return int(value) if type(value) is float and value.is_integer() else value


def _list(of: Any, most: int, least: int = 0) -> Any:
    return Annotated[list[of], Field(min_length=least, max_length=most, fail_fast=True)]


Whole = BeforeValidator(_whole)
Token = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Whole, Field(ge=1, le=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
T = TypeVar("T", bound=BaseModel)


class BadRequest(ValueError):
    """A mistake of the client: becomes an OpenAI error object.

    Args:
        param: the field that is wrong, if one is. code: short machine-readable reason. status: HTTP status.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class _Body(BaseModel):
    # Unknown names are looked for after validation (`check_names`): pydantic would list every one of them.
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False,
                              json_schema_extra={"additionalProperties": False})


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = Field(None, description="has no effect: events are never padded")


# Fields that change no answer: accepted, and of no effect here.
NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
             "prediction", "request_id", "priority", "cache_salt")
# Fields that ask for what this server does not do -> values that ask for nothing.
NOT_OFFERED: dict[str, tuple] = {
    "allowed_token_ids": ([],), "audio": (), "bad_words": ([],), "best_of": (1,), "chat_template": (), "documents": ([],),
    "early_stopping": (False,), "function_call": (), "functions": ([],), "guided_choice": (), "guided_decoding_backend": (),
    "guided_grammar": (), "guided_json": (), "guided_regex": (), "include_reasoning": (True,),
    "include_stop_str_in_output": (False,), "kv_transfer_params": (), "length_penalty": (1,), "logits_processors": ([],),
    "min_p_tokens_to_keep": (), "mm_processor_kwargs": (), "modalities": (["text"],), "prompt_embeds": (),
    "prompt_logprobs": (), "reasoning": (), "repetition_context_size": (), "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,), "structured_outputs": (), "suffix": ("",), "thinking": (),
    "truncate_prompt_tokens": (), "typical_p": (1,), "use_beam_search": (False,), "verbosity": (), "web_search_options": ()}
INSTEAD = {"functions": "tools", "function_call": "tool_choice", "guided_json": "response_format",
           "structured_outputs": "response_format", "thinking": "chat_template_kwargs", "reasoning": "reasoning_effort",
           "prompt_logprobs": "echo with logprobs, of /v1/completions"}


class Answering(_Body):
    """Fields that chat and plain completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Whole, Field(ge=1, le=128)] | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Whole, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens: Annotated[int, Whole, Field(ge=0, le=2**31)] | None = None
    seed: Annotated[int, Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    stop: StopString | _list(StopString, 16) | None = None
    stop_token_ids: _list(Token, 128) | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    speculate: bool | None = Field(None, description="false: no drafts for this request")
    drafts: Annotated[int, Whole, Field(ge=0, le=64)] | None = Field(None, description="at most so many drafts per round")
    adaptive_drafts: bool | None = Field(None, description="choose the number of drafts by what was accepted so far")
    acceptance_rule: Literal["equality", "rejection"] | None = None
    return_drafts: bool | None = Field(None, description="stream the text of each token and how many were accepted drafts")

    def tokens_asked_for(self, otherwise: int | None) -> int | None:
        """The limit of tokens, under either of its names.

        Raises:
            BadRequest: two different ones.
        """
        found = {n for n in (self.max_tokens, self.max_completion_tokens) if n is not None}
        if len(found) > 1:
            raise BadRequest(f"max_tokens: {self.max_tokens}, but max_completion_tokens: {self.max_completion_tokens}, "
                             "expected one of them", param="max_tokens")
        return found.pop() if found else otherwise

    def sampling(self, defaults: dict[str, float], adaptive: bool, vocabulary: int) -> dict[str, Any]:
        """Arguments of the engine's SamplingParams, without `max_tokens` and `seed`.

        Args:
            defaults: of the checkpoint's generation_config.json. vocabulary: tokens of the model, for `logit_bias`.

        Raises:
            BadRequest.
        """
        def chosen(name: str, otherwise):
            value = getattr(self, name)
            return defaults.get(name, otherwise) if value is None else value

        temperature, stop = chosen("temperature", 1.0), self.stop or []
        return {"temperature": 0.0 if temperature < GREEDY_BELOW else temperature, "top_p": chosen("top_p", 1.0),
                "top_k": max(0, chosen("top_k", 0)), "min_p": chosen("min_p", 0.0),
                "presence_penalty": self.presence_penalty or 0.0, "frequency_penalty": self.frequency_penalty or 0.0,
                "repetition_penalty": chosen("repetition_penalty", 1.0), "min_tokens": self.min_tokens or 0,
                "logit_bias": self._biases(vocabulary), "stop": [stop] if isinstance(stop, str) else stop,
                "stop_ids": self.stop_token_ids or [], "ignore_eos": bool(self.ignore_eos),
                "skip_special": self.skip_special_tokens is not False, "speculate": self.speculate is not False,
                "drafts": self.drafts, "adaptive": adaptive if self.adaptive_drafts is None else self.adaptive_drafts,
                "rule": self.acceptance_rule or "equality"}

    def _biases(self, vocabulary: int) -> list[tuple[int, float]]:
        found = []
        for name, value in (self.logit_bias or {}).items():
            token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
            if not 0 <= token < vocabulary:
                raise BadRequest(f"logit_bias: token {short(name)!r}, expected 0 to {vocabulary - 1}", param="logit_bias")
            found.append((token, value))
        return found


class TextPart(_Body):
    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | dict[str, Any] | None = None


class ToolCall(_Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Annotated[int, Whole] | None = None


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | _list(TextPart, MOST_PARTS) | None = None
    name: str | None = None
    tool_calls: _list(ToolCall, MOST_TOOLS) | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """The content as one text: parts on lines of their own, as vLLM and llama.cpp join them; null is empty."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or [])


class FunctionDefinition(_Body):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.:-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(_Body):
    name: str


class ToolChoice(_Body):
    type: Literal["function"]
    function: ChosenFunction


class NamedSchema(_Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class ChatRequest(Answering):
    messages: _list(Message, MOST_MESSAGES, 1)
    max_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Whole, Field(ge=0, le=20)] | None = None
    tools: _list(Tool, MOST_TOOLS) | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    reasoning_effort: str | None = None


class CompletionRequest(Answering):
    prompt: str | _list(Token, MOST_TOKENS) | _list(str, MOST_PROMPTS) | _list(_list(Token, MOST_TOKENS), MOST_PROMPTS)
    max_tokens: Annotated[int, Whole, Field(ge=0, le=2**31)] | None = None
    logprobs: Annotated[int, Whole, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    response_format: ResponseFormat | None = None


class TokenizeRequest(_Body):
    """`prompt`, or `messages` to be put through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: _list(Message, MOST_MESSAGES, 1) | None = None
    tools: _list(Tool, MOST_TOOLS) | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: _list(Token, MOST_TOKENS)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadRequest: not UTF-8, not JSON (NaN and Infinity are none), nested too deeply, numbers without end, no object.
    """
    def no_constant(name: str):
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=no_constant, parse_float=_finite)
    except (UnicodeDecodeError, ValueError) as error:
        raise BadRequest(f"body: not valid JSON: {short(error)}", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("body: nested too deeply", code="invalid_json") from None
    if not isinstance(value, dict):
        raise BadRequest(f"body: {type(value).__name__}, expected a JSON object", code="invalid_json")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value


def validate(model: type[T], raw: dict[str, Any], *, unknown: bool = False) -> T:
    """The body as a request.

    Args:
        unknown: names that nobody knows are tolerated.

    Raises:
        BadRequest: with the first thing that is wrong.
    """
    try:
        found = model.model_validate(raw)
    except ValidationError as error:
        # Of a field that may have several types, the attempt that came deepest says most.
        first = max(error.errors(include_url=False, include_context=False), key=lambda e: len(e["loc"]))
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if isinstance(p, int) or p in _NAMES)
        got = "" if first["type"] == "missing" else f", got {short(_glance(first['input']))}"
        param = str(first["loc"][0]) if first["loc"] else None
        raise BadRequest(f"{where.lstrip('.')}: {first['msg']}{got}", param=param) from None
    check_names(model, raw, unknown=unknown)
    return found


def _glance(value: object) -> str:
    """The beginning of a value's text, without making all of it."""
    if isinstance(value, str | bytes):
        return repr(value[:200])
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}" if len(value) > 8 else repr(value)
    return repr(value)


def check_names(model: type[BaseModel], raw: dict[str, Any], where: str = "", *, unknown: bool = False) -> None:
    """Refuses the first field that asks for something that is not offered, or that nobody knows.

    Raises:
        BadRequest.
    """
    known = {field.alias or name: name for name, field in model.model_fields.items()}
    top = where == ""
    for name, value in raw.items():
        if name in known or value is None:
            continue
        param = name if top else where.partition("[")[0].partition(".")[0]
        if top and name in NO_EFFECT or not top and value in ([], {}, ""):
            continue  # clients send back what they got: "annotations": [], "refusal": ""
        if top and name in NOT_OFFERED:
            if any(type(value) is type(neutral) and value == neutral or value == neutral and type(value) in (int, float)
                   for neutral in NOT_OFFERED[name]):
                continue
            instead = f", expected {INSTEAD[name]}" if name in INSTEAD else ""
            raise BadRequest(f"{name}: not supported by this server{instead}", param=param, code="unsupported_parameter")
        if not unknown:
            near = difflib.get_close_matches(str(name)[:64], known, 1)
            meant = f", did you mean {near[0]}?" if near else ""
            raise BadRequest(f"{where}{'.' if where else ''}{short(name)}: unknown field{meant}", param=short(param),
                             code="unknown_parameter")
    for field, body in _NESTED.items():
        value = raw.get(field) if field in known else None
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, dict):
                at = f"{where}{'.' if where else ''}{field}" + (f"[{i}]" if isinstance(value, list) else "")
                check_names(body, item, at, unknown=unknown)


# Fields that hold bodies of their own, on any level.
_NESTED: dict[str, type[BaseModel]] = {"messages": Message, "tools": Tool, "stream_options": StreamOptions,
                                       "response_format": ResponseFormat, "tool_calls": ToolCall}
_BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, Message, TextPart, StreamOptions, Tool,
           FunctionDefinition, ToolCall, FunctionCall, ToolChoice, ResponseFormat, NamedSchema)
_NAMES = {name for body in _BODIES for name in body.model_fields}


def short(text: object) -> str:
    text = str(text)[:400].encode("utf-8", "backslashreplace").decode("utf-8").replace("\n", " ")
    return text if len(text) <= 100 else text[:97] + "..."
