"""A small client of OpenAI-compatible servers: completions by token ids, chat, counters. Standard library only."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

TIMEOUT = 600.0
# Sums over all labels of counters by the names that servers give them; the first that is there counts.
COUNTERS = {"drafts": ("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_drafts"),
            "accepted": ("vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_accepted_tokens")}
# Servers that give the acceptance length itself.
GAUGES = ("sglang:spec_accept_length",)


class Refused(ValueError):
    """The server answered with an error. `status`: of HTTP, or 0 if there was no answer."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """One choice of a completion; `tokens` are ids, None if the server does not give them."""

    text: str
    tokens: list[int] | None
    logprobs: list[float] | None
    finish: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float = field(compare=False, default=0.0)


class Endpoint:
    """A server. `url`: with or without /v1."""

    def __init__(self, url: str, model: str | None = None):
        if not re.match(r"https?://", url):
            raise ValueError(f"--endpoint: {url!r}, expected http://host:port")
        self.root = url.rstrip("/").removesuffix("/v1")
        self.key = os.environ.get("OPENAI_API_KEY")
        cards = self.get("/v1/models").get("data")
        self.cards = {m.get("id"): m for m in cards if isinstance(m, dict)} if isinstance(cards, list) else {}
        self.models = list(self.cards)
        if model is not None and model not in self.models:
            raise ValueError(f"--model: {model!r}, the server has {', '.join(map(str, self.models)) or 'none'}")
        if not self.models:
            raise ValueError(f"--endpoint: {url}: /v1/models names no model")
        self.model = model or self.models[0]

    def _open(self, path: str, body: dict | None = None, timeout: float = TIMEOUT) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.root + path, data, headers), timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode("utf-8", "replace")
            raise Refused(f"{path}: HTTP {error.code}: {_message(text)}", error.code) from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise Refused(f"{self.root}{path}: no answer: {getattr(error, 'reason', error)}", 0) from None

    def get(self, path: str) -> dict:
        """A JSON object.

        Raises:
            Refused.
        """
        return self._parsed(path, self._open(path, timeout=30.0))

    @staticmethod
    def _parsed(path: str, data: bytes) -> dict:
        try:
            found = json.loads(data)
        except ValueError:
            raise Refused(f"{path}: not JSON: {data[:60]!r}", 200) from None
        if not isinstance(found, dict):
            raise Refused(f"{path}: {type(found).__name__}, expected an object", 200)
        return found

    def post(self, path: str, body: dict) -> dict:
        """As `get`, with a body."""
        return self._parsed(path, self._open(path, {"model": self.model} | body))

    def complete(self, prompt: list[int] | str, **fields) -> list[Answer]:
        """The choices of a completion.

        Raises:
            Refused: also an answer that is not of OpenAI's form.
        """
        began = time.perf_counter()
        raw = self.post("/v1/completions", {"prompt": prompt, "return_token_ids": True} | fields)
        seconds = time.perf_counter() - began
        usage = raw.get("usage") or {}
        try:
            return [Answer(c["text"], c.get("token_ids"), (c.get("logprobs") or {}).get("token_logprobs"),
                           c.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens"), seconds)
                    for c in raw["choices"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise Refused(f"/v1/completions: an answer of another form ({error!r})", 200) from None

    def chat(self, messages: list[dict], **fields) -> dict:
        """The whole answer of /v1/chat/completions."""
        return self.post("/v1/chat/completions", {"messages": messages} | fields)

    def counters(self) -> dict[str, float] | None:
        """Counts of drafting rounds and accepted drafts, or "length"; None if the server has none of them."""
        try:
            text = self._open("/metrics", timeout=30.0).decode("utf-8", "replace")
        except Refused:
            return None
        found = {}
        for key, names in COUNTERS.items():
            for name in names:
                if (values := _values(text, name)):
                    found.setdefault(key, sum(values))
        for name in GAUGES:
            if (values := _values(text, name)):
                found["length"] = values[-1]
        return found or None


def _values(text: str, name: str) -> list[float]:
    """Values of a metric in Prometheus' text form."""
    return [float(v) for v in re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([-+.eE\d]+)$", text, re.M)]


def _message(text: str) -> str:
    try:
        error = json.loads(text).get("error", text)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except (ValueError, AttributeError):
        return text.strip()[:200]
