"""Who may ask: the API key, the name under which the server was reached, and the page that a browser asks for.

A server on loopback without a key is open to every program of its machine, but not to every web page that a browser there
shows. Three things keep pages out:

    Host     A page whose name was rebound to 127.0.0.1 (DNS rebinding) sends its own name. Names that are not this server's
             are refused; addresses are not names, nobody can rebind them.
    Origin   Browsers say which page a request comes from. Foreign ones are refused, unless `--allow-origin` names them; those
             get the CORS headers that let their scripts read the answer.
    Content-Type   Without the check of the handlers a page could send JSON as "no type", for which browsers do not ask first.

None of it is a login: whoever can open a socket can write any header. That is what the key is for.

Source: the Fetch standard (CORS protocol, `Sec-Fetch-Site`), and Private Network Access for the preflight's last header.
"""

from __future__ import annotations

import hmac
import ipaddress
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from runtime_ref.server.openai_requests import BadRequest, short

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Need no key: whether the process lives, and the chat page, which holds nothing but its own code.
OPEN = ("/", "/health", "/ping")


@dataclass(frozen=True)
class AccessRules:
    """Attributes:
        api_key: None = open to everyone who can connect.
        hosts: names under which the server may be reached, besides addresses and localhost; None: any name.
        origins: pages that may ask, as `scheme://name[:port]`; "*" is every page.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] | None = ()
    origins: tuple[str, ...] = ()


def host_name(value: str) -> str:
    """A Host header's name, without the port and in small letters."""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].rstrip(".")


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Access:
    """The check, around the application.

    Args:
        refuse: makes the answer to a request that is refused.
    """

    def __init__(self, app: Callable, rules: AccessRules, refuse: Callable):
        self.app, self.rules, self.refuse = app, rules, refuse

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        more = [(b"x-request-id", _request_id(headers))]
        try:
            self._check_host(headers)
            more += self._check_origin(headers)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await self._preflight(headers, more, send)
                return
            self._check_key(scope["path"], headers)
        except BadRequest as error:
            await self.refuse(error)(scope, receive, _with(more, send))
            return
        await self.app(scope, receive, _with(more, send))

    def _check_host(self, headers: dict[bytes, str]) -> None:
        if self.rules.hosts is None:
            return
        name = host_name(headers.get(b"host", ""))
        if not (is_address(name) or name == "localhost" or name.endswith(".localhost") or name in self.rules.hosts):
            raise BadRequest(f"host: {short(name)!r} is not a name of this server (--allowed-host NAME adds one)", status=403,
                             code="host_not_allowed")

    def _check_origin(self, headers: dict[bytes, str]) -> list[tuple[bytes, bytes]]:
        """The CORS headers of the answer, if the page is another's that may ask."""
        origin = headers.get(b"origin")
        if origin is None:
            return []
        own = origin.partition("://")[2].lower() == headers.get(b"host", "").strip().lower()
        if own or headers.get(b"sec-fetch-site") == "same-origin":
            return []
        if "*" in self.rules.origins:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"x-request-id")]
        if origin.lower() in self.rules.origins:
            return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin"),
                    (b"access-control-expose-headers", b"x-request-id")]
        raise BadRequest(f"origin: pages of {short(origin)!r} may not ask this server (--allow-origin ORIGIN allows one)",
                         status=403, code="origin_not_allowed")

    def _check_key(self, path: str, headers: dict[bytes, str]) -> None:
        if self.rules.api_key is None or path in OPEN:
            return
        sent = headers.get(b"authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(sent, f"Bearer {self.rules.api_key}".encode()):
            raise BadRequest("authorization: missing or wrong API key, expected 'Bearer KEY'", status=401,
                             code="invalid_api_key")

    async def _preflight(self, headers: dict[bytes, str], more: list[tuple[bytes, bytes]], send) -> None:
        """Tells a browser that the page may send what it asked about."""
        wanted = headers.get(b"access-control-request-headers", "authorization, content-type")
        more = [*more, (b"access-control-allow-methods", b"GET, POST, OPTIONS"), (b"access-control-max-age", b"600"),
                (b"access-control-allow-headers", wanted.encode("latin-1"))]
        if headers.get(b"access-control-request-private-network") == "true":
            more.append((b"access-control-allow-private-network", b"true"))
        await send({"type": "http.response.start", "status": 204, "headers": more})
        await send({"type": "http.response.body", "body": b""})


def _request_id(headers: dict[bytes, str]) -> bytes:
    """The client's own, if it is short and plain, or a new one."""
    sent = headers.get(b"x-request-id", "")
    if 0 < len(sent) <= 128 and sent.isascii() and sent.isprintable():
        return sent.encode()
    return uuid.uuid4().hex.encode()


def _with(more: list[tuple[bytes, bytes]], send: Callable) -> Callable:
    """`send` that adds headers to the answer."""
    async def adding(message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return adding
