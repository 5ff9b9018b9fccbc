"""HTTP requests in, OpenAI bodies and event streams out.

Bodies are read and limited here and not by the framework, so that every mistake, down to a broken byte, becomes the same OpenAI
error object. What is in them is none of this process's business: worker processes parse, validate and tokenize them (see
`request_workers`). The OpenAPI page shows their schemas.

A client that goes away is noticed while the server waits for the engine, not only when it next writes: each answer races
against the connection's end, and whoever loses frees the request's slot.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import hashlib
import importlib.metadata
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.server import openai_responses
from runtime_ref.server.access import AccessRules
from runtime_ref.server.engine_thread import Busy, EngineDown, EngineWorker
from runtime_ref.server.metrics import CONTENT_TYPE, Metrics
from runtime_ref.server.openai_requests import BadRequest, short
from runtime_ref.server.openai_responses import END, ResponseOptions, Vocabulary, dumps, error_body
from runtime_ref.server.preparation import Prepared
from runtime_ref.server.request_workers import Limits, RequestWorkers

PAGE = Path(__file__).with_name("chat.html")
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
UNREAD = (401, 403, 408, 413, 415, 503)  # the body may not have been read to its end, so the connection cannot be used again


@dataclass
class Settings:
    """What a server is started with.

    Attributes:
        names: under which the checkpoint is served; answers carry the one that was asked for, the first if none was.
        access: who may ask.
        body_bytes: largest body; bodies_bytes: all that are arriving or being prepared. body_seconds: longest time to arrive.
        defaults: sampling defaults of the checkpoint's generation_config.json.
        adaptive: number of drafts by what was accepted, unless a request says otherwise.
        unknown_fields: fields that nobody knows are tolerated.
    """

    names: tuple[str, ...]
    access: AccessRules = field(default_factory=AccessRules)
    body_bytes: int = 4 << 20
    bodies_bytes: int = 64 << 20
    body_seconds: float = 30.0
    defaults: dict[str, float] = field(default_factory=dict)
    adaptive: bool = True
    unknown_fields: bool = False
    checksums: str | None = None


class Gone(Exception):
    """The client has closed the connection."""


class Api:
    """State and handlers of one server."""

    def __init__(self, worker: EngineWorker, tokenizer, settings: Settings, preparing: RequestWorkers):
        engine = worker.engine
        self.worker, self.settings, self.preparing = worker, settings, preparing
        self.vocabulary = Vocabulary(copy.deepcopy(tokenizer))  # the engine's thread has its own
        self.metrics = Metrics(settings.names[0])
        self.created = int(time.time())
        self.context = min(engine.options.max_context, engine.backend.config.max_position_embeddings)
        self.limits = Limits(self.context, engine.backend.config.vocab_size, worker.max_requests, settings.defaults,
                             settings.adaptive, settings.unknown_fields)
        self._arriving = 0  # bytes of bodies that are arriving or being prepared

    async def prepared(self, request: Request, kind: str) -> dict:
        """What the worker processes make of the body that is sent.

        Raises:
            BadRequest, Gone.
        """
        request.state.arrived = time.monotonic()
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise BadRequest(f"content-type: {short(media) or 'none'}, expected application/json", status=415,
                             code="unsupported_media_type")
        data = bytearray()
        try:
            await self._read(request, data)
            work = self.preparing.submit(kind, bytes(data), self.limits)
            found = await unless_gone(request, asyncio.wrap_future(work))
        finally:
            self._arriving -= len(data)
        if found["model"] is not None and found["model"] not in self.settings.names:
            raise self._unknown_model(found["model"])
        return found

    async def _read(self, request: Request, data: bytearray) -> None:
        """Appends a body to `data`, and counts it among those that are arriving."""
        settings = self.settings
        try:
            async with asyncio.timeout(settings.body_seconds):
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    piece = message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(data) + len(piece) > settings.body_bytes:
                        raise BadRequest(f"body: more than {settings.body_bytes} bytes", status=413, code="body_too_large")
                    if self._arriving + len(piece) > settings.bodies_bytes:
                        raise BadRequest(f"body: those of all requests are more than {settings.bodies_bytes} bytes, try later",
                                         status=503, code="bodies_too_large")
                    data += piece
                    self._arriving += len(piece)
        except TimeoutError:
            raise BadRequest(f"body: not complete after {settings.body_seconds:g} s", status=408) from None

    def _unknown_model(self, name: str) -> BadRequest:
        expected = " or ".join(map(repr, self.settings.names))
        return BadRequest(f"model: {short(name)!r} does not exist, expected {expected}", param="model", code="model_not_found",
                          status=404)

    async def answer(self, request: Request, asked: Prepared, *, chat: bool) -> Response:
        """Runs a request: a JSON body, or a stream."""
        longest = max(map(len, asked.prompts))
        tokens = self.context - longest if asked.max_tokens is None else asked.max_tokens
        if longest + tokens > self.context:
            raise BadRequest(f"max_tokens: {tokens} after a prompt of {longest} tokens, expected at most {self.context} "
                             "together", param="max_tokens", code="context_length_exceeded")
        options = ResponseOptions(
            chat, asked.model or self.settings.names[0], asked.logprobs, asked.token_ids, asked.drafts, asked.usage,
            asked.usage_always, reading=asked.reading, one_call=asked.one_call)
        if asked.echo is not None:
            options.echo = [text for text in asked.echo for _ in range(asked.n)]
        each = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        handle = self.worker.submit(each, self._params(asked, tokens) * len(asked.prompts), born=request.state.arrived)
        answer = openai_responses.Response(handle, options, each, asked.n, self.vocabulary, self.metrics)
        streaming = None
        try:
            await unless_gone(request, handle.accepted())
            if asked.stream:
                streaming = EventStream(answer)
                return streaming
            return Response(dumps(await unless_gone(request, answer.whole())), media_type="application/json")
        except Gone:
            answer.left()
            raise
        finally:
            if streaming is None:  # a stream closes its handle itself
                handle.close()

    def _params(self, asked: Prepared, tokens: int) -> list[SamplingParams]:
        """Of each of a prompt's answers."""
        seed = random.getrandbits(63) if asked.seed is None else asked.seed
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in asked.sampling.items()}
        try:
            return [SamplingParams(**plain, max_tokens=tokens, seed=seed + i, logprobs=asked.logprobs) for i in range(asked.n)]
        except ValueError as error:
            raise BadRequest(str(error), param=str(error).partition(":")[0]) from None

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, Prepared(**await self.prepared(request, "chat")), chat=True)

    async def completions(self, request: Request) -> Response:
        return await self.answer(request, Prepared(**await self.prepared(request, "completions")), chat=False)

    async def tokenize(self, request: Request) -> Response:
        return Response(dumps((await self.prepared(request, "tokenize"))["body"]), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        return Response(dumps((await self.prepared(request, "detokenize"))["body"]), media_type="application/json")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.card(name) for name in self.settings.names]})

    async def model(self, request: Request, name: str) -> Response:
        if name not in self.settings.names:
            raise self._unknown_model(name)
        return JSONResponse(self.card(name))

    def card(self, name: str) -> dict:
        known = {"checksums": self.settings.checksums} if self.settings.checksums else {}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "fp4-dflash",
                "root": self.settings.names[0], "parent": None, "max_model_len": self.context} | known

    async def health(self, request: Request) -> Response:
        self.worker.check()
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        try:
            return JSONResponse({"version": importlib.metadata.version("fp4-dflash")})
        except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
            return JSONResponse({"version": "unknown"})

    async def prometheus(self, request: Request) -> Response:
        found = await self.worker.statistics()
        return Response(self.metrics.render(found, up=self.worker.down is None, loop_delay=self.worker.loop_delay,
                                            restarts=self.preparing.restarts), media_type=CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        text = PAGE.read_text(encoding="utf-8")
        return HTMLResponse(text, headers=page_headers(text))

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


def page_headers(text: str) -> dict[str, str]:
    """The page's own code, named by its sum, and its own server: whatever an answer holds, it runs, loads and sends nothing."""
    def source(name: str) -> str:
        code = text.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"

    return {"Content-Security-Policy": f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; "
                                       "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


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
    """Sends an answer's events; closes its handle when the client goes, also while nothing is being sent."""

    def __init__(self, answer: openai_responses.Response):
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
            self.answer.handle.close()
            self.answer.left()

    async def _send(self, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self.answer.stream():
            # The last event ends the body too: one write less. In JSON no line is END, so nothing else ends like this.
            await send({"type": "http.response.body", "body": event.encode(), "more_body": not event.endswith(END)})
