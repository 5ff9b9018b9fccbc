"""What a client may send: OpenAI's fields, and the extensions that vLLM's clients know.

Types are strict (a number in quotes is a mistake, not a number) and every number has bounds, because what gets past this page
reaches the engine that all clients share. Unknown fields are tolerated: clients of other servers send many. Fields that ask
for something this server cannot do are listed, so that they are refused with a clear line instead of being ignored.

Source of names and defaults: OpenAI's API reference (chat/completions, completions); vLLM's OpenAI-compatible server for
`ignore_eos`, `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `return_token_ids`, `/tokenize`, `/detokenize`.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime_ref.core.sampling_params import SamplingParams

# Below this a division of logits could overflow; the distribution is a single token long before.
GREEDY_BELOW = 1e-5
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions

Token = Annotated[int, Field(ge=0, lt=2**31)]
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
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Answering(_Body):
    """Fields that chat and plain completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    speculate: bool | None = Field(None, description="false: no drafts for this request")
    drafts: Annotated[int, Field(ge=0, le=64)] | None = Field(None, description="at most so many drafts per round")
    adaptive_drafts: bool | None = Field(None, description="choose the number of drafts by what was accepted so far")
    acceptance_rule: Literal["equality", "rejection"] | None = None
    return_drafts: bool | None = Field(None, description="stream the text of each token and how many were accepted drafts")

    def check_support(self, names: tuple[str, ...], raw: dict[str, Any]) -> None:
        """Refuses fields that change the answer in a way that this server does not offer."""
        for name in names:
            value = raw.get(name)
            if value and not (name == "response_format" and isinstance(value, dict) and value.get("type") == "text"):
                raise BadRequest(f"{name}: not supported by this server", param=name, code="unsupported_parameter")

    def sampling(self, *, defaults: dict[str, float], max_tokens: int, seed: int, logprobs: int | None,
                 adaptive: bool) -> SamplingParams:
        """The engine's parameters. `defaults`: of the checkpoint's generation_config.json.

        Raises:
            BadRequest: a value that the sampler refuses.
        """
        def chosen(name: str, otherwise):
            value = getattr(self, name)
            return defaults.get(name, otherwise) if value is None else value

        temperature, stop = chosen("temperature", 1.0), self.stop or ()
        try:
            return SamplingParams(
                max_tokens=max_tokens, temperature=0.0 if temperature < GREEDY_BELOW else temperature,
                top_p=chosen("top_p", 1.0), top_k=max(0, chosen("top_k", 0)), min_p=chosen("min_p", 0.0), seed=seed,
                presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
                repetition_penalty=chosen("repetition_penalty", 1.0), logprobs=logprobs,
                stop=(stop,) if isinstance(stop, str) else tuple(stop), stop_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos), speculate=self.speculate is not False, drafts=self.drafts,
                adaptive=adaptive if self.adaptive_drafts is None else self.adaptive_drafts,
                rule=self.acceptance_rule or "equality")
        except ValueError as error:
            raise BadRequest(str(error), param=str(error).partition(":")[0]) from None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or [])


class ChatRequest(Answering):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Answering):
    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wanted_tokens(self) -> int:
        return self.max_tokens or self.max_completion_tokens or COMPLETION_TOKENS


class TokenizeRequest(_Body):
    """`prompt`, or `messages` to be put through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[Token]


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


def validate(model: type[T], raw: dict[str, Any]) -> T:
    """The body as a request.

    Raises:
        BadRequest: with the first thing that is wrong.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        # Of a field that may have several types, the attempt that came deepest says most.
        first = max(error.errors(include_url=False, include_context=False), key=lambda e: len(e["loc"]))
        fields = {name for body in (model, Message, TextPart, StreamOptions) for name in body.model_fields}
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if isinstance(p, int) or p in fields)
        got = "" if first["type"] == "missing" else f", got {short(repr(first['input']))}"
        param = str(first["loc"][0]) if first["loc"] else None
        raise BadRequest(f"{where.lstrip('.')}: {first['msg']}{got}", param=param) from None


def short(text: object) -> str:
    text = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 100 else text[:97] + "..."
