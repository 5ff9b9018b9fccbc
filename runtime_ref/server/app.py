"""The application: which path leads where, what the OpenAPI page says, and the life of the engine beside it."""

from __future__ import annotations

import contextlib

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from runtime_ref.server import openai_requests as schema
from runtime_ref.server.access import Access
from runtime_ref.server.engine_thread import Busy, EngineDown, Refused
from runtime_ref.server.handlers import Api, Gone

TEXT, NUMBER, LIST, OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "array"}, {"type": "object"}
MAYBE_TEXT = {"type": ["string", "null"]}


def _object(**properties) -> dict:
    return {"type": "object", "required": list(properties), "properties": properties}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT))
ANSWER = _object(id=TEXT, object=TEXT, created=NUMBER, model=TEXT, choices=LIST | {"items": OBJECT},
                 usage=_object(prompt_tokens=NUMBER, completion_tokens=NUMBER, total_tokens=NUMBER))
HEADS = ("/", "/health", "/ping")
CARD = _object(id=TEXT, object=TEXT, created=NUMBER, owned_by=TEXT)


def _content(kind: str, found: dict) -> dict:
    return {"description": "", "content": {kind: {"schema": found}}}


def _documented(found: dict, *, body: type[BaseModel] | None = None, stream: bool = False,
                kind: str = "application/json") -> dict:
    """Arguments of a route: what it takes and what it answers."""
    answer = _content(kind, found)
    if stream:
        answer["content"]["text/event-stream"] = {"schema": _object(data=TEXT)}  # of one event
    responses = {200: answer, "4XX": _content("application/json", ERROR), 503: _content("application/json", ERROR)}
    extra = {}
    if body is not None:
        sent = body.model_json_schema(ref_template="#/components/schemas/{model}")
        sent.pop("$defs", None)
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": sent}}}}
    return {"responses": responses, "openapi_extra": extra, "response_model": None, "response_class": Response}


def application(api: Api) -> Access:
    """The ASGI application; starts the engine's thread with itself and stops it when it ends."""
    @contextlib.asynccontextmanager
    async def life(_: FastAPI):
        api.worker.start()
        yield
        await api.worker.stop()

    app = FastAPI(title="FP4-DFlash reference runtime", version="1", lifespan=life, docs_url=None, redoc_url=None,
                  redirect_slashes=False)
    _routes(app, api)
    _errors(app, api)
    _schemas(app)
    return Access(app, api.settings.access, api.error)


def _routes(app: FastAPI, api: Api) -> None:
    # The handlers' own annotations are strings of another module; these closures are what FastAPI inspects.
    def get(path: str, handler, documented: dict, **more) -> None:
        async def endpoint(request: Request) -> Response:
            return await handler(request)

        app.add_api_route(path, endpoint, methods=["GET"], name=handler.__name__, **documented, **more)
        if path in HEADS:  # of interest to load balancers; not on the OpenAPI page
            app.add_api_route(path, endpoint, methods=["HEAD"], name=handler.__name__, include_in_schema=False)

    def post(path: str, handler, documented: dict) -> None:
        async def endpoint(request: Request) -> Response:
            return await handler(request)

        app.add_api_route(path, endpoint, methods=["POST"], name=handler.__name__, **documented)

    async def model(request: Request, name: str) -> Response:
        return await api.model(request, name)

    post("/v1/chat/completions", api.chat, _documented(ANSWER, body=schema.ChatRequest, stream=True))
    post("/v1/completions", api.completions, _documented(ANSWER, body=schema.CompletionRequest, stream=True))
    post("/tokenize", api.tokenize, _documented(_object(count=NUMBER, max_model_len=NUMBER, tokens=LIST),
                                                body=schema.TokenizeRequest))
    post("/detokenize", api.detokenize, _documented(_object(prompt=TEXT), body=schema.DetokenizeRequest))
    get("/v1/models", api.models, _documented(_object(object=TEXT, data=LIST | {"items": CARD})))
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"], **_documented(CARD))
    get("/health", api.health, _documented(_object(status=TEXT)))
    get("/ping", api.health, _documented(_object(status=TEXT)))
    get("/version", api.version, _documented(_object(version=TEXT)))
    get("/metrics", api.prometheus, _documented(TEXT, kind="text/plain"))
    get("/", api.page, _documented(TEXT, kind="text/html"), include_in_schema=False)


def _errors(app: FastAPI, api: Api) -> None:
    offered = sorted({route.path.replace(":path", "") for route in app.routes})

    async def error_response(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error.detail = _where_to(request, error, offered)
        return api.error(error)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def broken(request: Request, error: Exception) -> Response:  # raised again behind it, so that the log has it
        return api.error(HTTPException(500, "a mistake in the server; its log has the details"))

    for kind in (schema.BadRequest, Refused, Busy, EngineDown, HTTPException):
        app.add_exception_handler(kind, error_response)
    app.add_exception_handler(Gone, gone)
    app.add_exception_handler(500, broken)


def _where_to(request: Request, error: HTTPException, offered: list[str]) -> str:
    """What is wrong with a path or a method, and what there is."""
    path = f"{request.method} {schema.short(request.url.path)}"
    if error.status_code == 405:
        return f"{path}: method not allowed, expected {(error.headers or {}).get('Allow', 'another')}"
    return f"{path}: not offered by this server; it has {', '.join(offered)}"


def _schemas(app: FastAPI) -> None:
    """Adds the definitions that request bodies refer to."""
    made = app.openapi()
    found = made.setdefault("components", {}).setdefault("schemas", {})
    for body in (schema.ChatRequest, schema.CompletionRequest, schema.TokenizeRequest, schema.DetokenizeRequest):
        found |= body.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {})
