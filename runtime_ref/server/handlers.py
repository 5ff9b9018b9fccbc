"""The routes: HTTP requests in, OpenAI bodies and event streams out.

Bodies are read, limited and parsed here and not by the framework, so that every mistake, down to a broken byte, becomes the
same OpenAI error object, and so that NaN, endless numbers and endless nesting stop at the door. The OpenAPI page shows the
same schemas.

A client that goes away is noticed while the server waits for the engine, not only when it next writes: each answer races
against the connection's end, and whoever loses frees the request's slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hmac
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from runtime_ref.server import openai_requests as schema
from runtime_ref.server.engine_thread import Busy, EngineDown, EngineWorker
from runtime_ref.server.metrics import CONTENT_TYPE, Metrics
from runtime_ref.server.openai_requests import BadRequest
from runtime_ref.server.openai_responses import END, Answer, Vocabulary, Wanted, dumps, error_body

PAGE = Path(__file__).with_name("chat.html")
UNSUPPORTED_CHAT = ("tools", "functions", "response_format", "logit_bias", "audio", "prompt_logprobs")
UNSUPPORTED_COMPLETION = ("suffix", "logit_bias", "response_format", "prompt_logprobs")
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
UNREAD = (401, 408, 413, 415)  # the body is not read to its end, so that the connection cannot be used again
INLINE_CHARACTERS = 4096  # longer texts are tokenized beside the event loop


@dataclass
class Settings:
    """What a server is started with.

    Attributes:
        model: name under which the checkpoint is served. api_key: None = open to everyone who can connect.
        body_bytes: largest body. body_seconds: longest time for a body to arrive.
        defaults: sampling defaults of the checkpoint's generation_config.json.
        adaptive: number of drafts by what was accepted, unless a request says otherwise.
    """

    model: str
    api_key: str | None = None
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    defaults: dict[str, float] = field(default_factory=dict)
    adaptive: bool = True


class Gone(Exception):
    """The client has closed the connection."""


class Api:
    """State and handlers of one server."""

    def __init__(self, worker: EngineWorker, tokenizer, settings: Settings):
        engine = worker.engine
        self.worker, self.settings = worker, settings
        self.tokenizer = copy.deepcopy(tokenizer)  # the engine's thread has its own
        self.vocabulary = Vocabulary(self.tokenizer)
        self.metrics = Metrics(settings.model)
        self.size = engine.backend.config.vocab_size
        self.context = min(engine.options.max_context, engine.backend.config.max_position_embeddings)
        self._tokenizing = asyncio.Lock()

    async def body(self, request: Request) -> dict:
        """The JSON object that was sent; also checks key and media type.

        Raises:
            BadRequest, Gone.
        """
        self.authorize(request)
        media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media != "application/json":
            raise BadRequest(f"content-type: {media}, expected application/json", status=415)
        data = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    data += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(data) > self.settings.body_bytes:
                        raise BadRequest(f"body: more than {self.settings.body_bytes} bytes", status=413, code="body_too_large")
        except TimeoutError:
            raise BadRequest(f"body: not complete after {self.settings.body_seconds:g} s", status=408) from None
        return schema.parse_json(bytes(data))

    def authorize(self, request: Request) -> None:
        if self.settings.api_key is None:
            return
        sent = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(sent, f"Bearer {self.settings.api_key}".encode()):
            raise BadRequest("authorization: missing or wrong API key, expected 'Bearer KEY'", status=401,
                             code="invalid_api_key")

    def named(self, model: str | None) -> None:
        if model is not None and model != self.settings.model:
            raise BadRequest(f"model: {schema.short(model)!r} does not exist, expected {self.settings.model!r}", param="model",
                             code="model_not_found", status=404)

    async def encode(self, text: str, *, special: bool, param: str) -> list[int]:
        """Tokens of a text.

        Raises:
            BadRequest: half of a surrogate pair in it, or certainly too long.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRequest(f"{param}: not valid Unicode (half of a surrogate pair)", param=param) from None
        if len(text) <= INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=special)
        async with self._tokenizing:
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=special)

    def templated(self, messages: list[schema.Message], *, prompt: bool = True) -> str:
        """The chat template applied.

        Raises:
            BadRequest: no template in the checkpoint, or messages that it refuses.
        """
        if not self.tokenizer.chat_template:
            raise BadRequest("messages: this checkpoint has no chat template, expected a request to /v1/completions",
                             param="messages", code="no_chat_template")
        plain = [{"role": m.role, "content": m.text} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise BadRequest(f"messages: {schema.short(error)}", param="messages") from None

    def fitting(self, prompt: list[int], param: str) -> list[int]:
        """A prompt with room for an answer.

        Raises:
            BadRequest: empty, too long, or a token beyond the vocabulary.
        """
        if not prompt:
            raise BadRequest(f"{param}: empty, expected at least one token", param=param)
        if len(prompt) >= self.context:
            raise BadRequest(f"{param}: {len(prompt)} tokens, expected fewer than {self.context}", param=param,
                             code="context_length_exceeded")
        if max(prompt) >= self.size:
            raise BadRequest(f"{param}: token {max(prompt)}, expected 0 to {self.size - 1}", param=param)
        return prompt

    async def prompts(self, prompt) -> list[list[int]]:
        """Each prompt's tokens, from text, tokens, or a list of either."""
        if isinstance(prompt, str):
            prompt = [prompt]
        elif prompt and isinstance(prompt[0], int):
            prompt = [prompt]
        if not prompt:
            raise BadRequest("prompt: empty, expected text, tokens, or a list of them", param="prompt")
        if len(prompt) > self.worker.max_requests:
            raise BadRequest(f"prompt: {len(prompt)} prompts, expected at most {self.worker.max_requests}", param="prompt")
        return [self.fitting(await self.encode(p, special=True, param="prompt") if isinstance(p, str) else p, "prompt")
                for p in prompt]

    async def answer(self, request: Request, asked: schema.Answering, prompts: list[list[int]], wanted: Wanted) -> Response:
        """Runs a request: a JSON body, or a stream."""
        n, longest = asked.n or 1, max(map(len, prompts))
        tokens = asked.wanted_tokens or self.context - longest
        if longest + tokens > self.context:
            raise BadRequest(f"max_tokens: {tokens} after a prompt of {longest} tokens, expected at most {self.context} "
                             "together", param="max_tokens", code="context_length_exceeded")
        seed = random.getrandbits(63) if asked.seed is None else asked.seed
        params = [asked.sampling(defaults=self.settings.defaults, max_tokens=tokens, seed=seed + i, logprobs=wanted.logprobs,
                                 adaptive=self.settings.adaptive) for i in range(n)]
        options = asked.stream_options or schema.StreamOptions()
        wanted.usage, wanted.usage_always = bool(options.include_usage), bool(options.continuous_usage_stats)
        wanted.token_ids, wanted.drafts = bool(asked.return_token_ids), bool(asked.return_drafts)
        each = [prompt for prompt in prompts for _ in range(n)]
        ticket = self.worker.submit(each, params * len(prompts))
        answer = Answer(ticket, wanted, each, n, self.vocabulary, self.metrics)
        streaming = None
        try:
            await unless_gone(request, ticket.accepted())
            if asked.stream:
                streaming = EventStream(answer)
                return streaming
            return Response(dumps(await unless_gone(request, answer.whole())), media_type="application/json")
        except Gone:
            answer.left()
            raise
        finally:
            if streaming is None:  # a stream closes its ticket itself
                ticket.close()

    async def chat(self, request: Request) -> Response:
        raw = await self.body(request)
        asked = schema.validate(schema.ChatRequest, raw)
        self.named(asked.model)
        asked.check_support(UNSUPPORTED_CHAT, raw)
        text = self.templated(asked.messages)
        prompt = self.fitting(await self.encode(text, special=False, param="messages"), "messages")
        return await self.answer(request, asked, [prompt], Wanted(True, self.settings.model, asked.wanted_logprobs))

    async def completions(self, request: Request) -> Response:
        raw = await self.body(request)
        asked = schema.validate(schema.CompletionRequest, raw)
        self.named(asked.model)
        asked.check_support(UNSUPPORTED_COMPLETION, raw)
        if asked.echo and asked.logprobs is not None:
            raise BadRequest("echo: not together with logprobs (those of prompts are not computed)", param="echo")
        prompts = await self.prompts(asked.prompt)
        wanted = Wanted(False, self.settings.model, asked.wanted_logprobs)
        if asked.echo:
            wanted.echo = [self.tokenizer.decode(p, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                           for p in prompts for _ in range(asked.n or 1)]
        return await self.answer(request, asked, prompts, wanted)

    async def tokenize(self, request: Request) -> Response:
        asked = schema.validate(schema.TokenizeRequest, await self.body(request))
        self.named(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise BadRequest("prompt: expected either prompt or messages", param="prompt")
        if asked.messages is not None:
            text = self.templated(asked.messages, prompt=asked.add_generation_prompt is not False)
            tokens = await self.encode(text, special=bool(asked.add_special_tokens), param="messages")
        else:
            tokens = await self.encode(asked.prompt, special=asked.add_special_tokens is not False, param="prompt")
        body = {"count": len(tokens), "max_model_len": self.context, "tokens": tokens}
        if asked.return_token_strs:
            body["token_strs"] = self.tokenizer.convert_ids_to_tokens(tokens)
        return Response(dumps(body), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        asked = schema.validate(schema.DetokenizeRequest, await self.body(request))
        self.named(asked.model)
        if asked.tokens and max(asked.tokens) >= self.size:
            raise BadRequest(f"tokens: {max(asked.tokens)}, expected 0 to {self.size - 1}", param="tokens")
        text = self.tokenizer.decode(asked.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Response(dumps({"prompt": text}), media_type="application/json")

    async def models(self, request: Request) -> Response:
        self.authorize(request)
        return JSONResponse({"object": "list", "data": [self.card()]})

    async def model(self, request: Request, name: str) -> Response:
        self.authorize(request)
        self.named(name)
        return JSONResponse(self.card())

    def card(self) -> dict:
        return {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "fp4-dflash",
                "max_model_len": self.context}

    async def health(self, request: Request) -> Response:
        self.worker.check()
        return JSONResponse({"status": "ok"})

    async def prometheus(self, request: Request) -> Response:
        found = await self.worker.statistics()
        return Response(self.metrics.render(found, up=self.worker.down is None), media_type=CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    def error(self, error: Exception) -> Response:
        """The OpenAI error object of what went wrong; counted."""
        headers, param, code = None, None, None
        if isinstance(error, Busy):
            status, code, headers = 429, "queue_full", {"Retry-After": "1"}
        elif isinstance(error, EngineDown):
            status, code = 503, "engine_down"
        elif isinstance(error, HTTPException):
            status, headers = error.status_code, error.headers
        else:
            status, param, code = getattr(error, "status", 400), getattr(error, "param", None), getattr(error, "code", None)
        self.metrics.refuse(status)
        message = error.detail if isinstance(error, HTTPException) else str(error)
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        if status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        if status in UNREAD:
            headers = {**(headers or {}), "Connection": "close"}
        return JSONResponse(error_body(message, kind, param=param, code=code), status, headers)


async def unless_gone(request: Request, work: Awaitable):
    """The result of `work`, unless the connection ends before.

    Raises:
        Gone, and what `work` raises.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(receive: Callable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends an answer's events; closes its ticket when the client goes, also while nothing is being sent."""

    def __init__(self, answer: Answer):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        sending, leaving = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(OSError):  # the connection broke under a write
                    sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
            self.answer.ticket.close()
            self.answer.left()

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self.answer.stream():
            # The last event ends the body too: one write less. In JSON no line is END, so nothing else ends like this.
            await send({"type": "http.response.body", "body": event.encode(), "more_body": not event.endswith(END)})
