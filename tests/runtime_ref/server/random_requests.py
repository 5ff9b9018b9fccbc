"""Requests at random, right, wrong and hostile, as bytes on a socket: what no well-behaved client would send is the point."""

import json
import random
import select
import socket
import time
from dataclasses import dataclass

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "\x00", "\ud83d", "🙂", "e\u0301", "\u202e", "﷽" * 50, "a" * 3000, " ",
    "\n", ""]
ODD = [None, True, False, -1, 0, 1, 2.5, 16.0, 10**30, -(10**30), 1e308, 5e-324, "", "x", "1", [], [1], ["x"], [[]], {},
       {"a": 1},
       [None], [1, "a"], [-1], [2**31], {"type": "text"}, {"type": "json_object"}, {"type": "x"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}}}
SCHEMAS = [True, {}, {"type": "integer"}, {"type": "string", "maxLength": 3}, {"enum": ["a", 1, None]}, {"$ref": "#"},
       {"$ref": "#/x"},
           {"type": "array", "items": {"type": "array", "items": {"$ref": "#"}}}, {"type": "string", "pattern": "(a+)+$"},
           {"type": "string", "pattern": "("}, {"anyOf": [{"type": "integer"}] * 50}, {"type": "x"}, {"minimum": "a"}, False,
           {"type": "object", "properties": {str(i): {"type": "integer"} for i in range(200)}}]
# What is right for each field, most of the time.
FIELDS = {
    "max_tokens": lambda r: r.choice([1, 2, 8, 8, 24, 10**6]), "temperature": lambda r: r.choice([0, 0.0, 0.7, 1, 2, 100]),
    "top_p": lambda r: r.choice([1, 0.5, 1e-9]), "top_k": lambda r: r.choice([-1, 0, 1, 50]), "min_p": lambda r: r.random(),
    "n": lambda r: r.choice([1, 1, 2, 3, 200]), "seed": lambda r: r.choice([0, 1, -3, 2**63 - 1]),
    "stop": lambda r: r.choice(["a", ["e", " "], [], ["\ud800"], ["x" * 257], [""]]),
    "stop_token_ids": lambda r: [r.randrange(300)],
    "stream": lambda r: r.random() < 0.7, "stream_options": lambda r: {"include_usage": r.random() < 0.5},
    "presence_penalty": lambda r: r.uniform(-2, 2), "frequency_penalty": lambda r: r.uniform(-2, 2),
    "repetition_penalty": lambda r: r.choice([1, 0.5, 1.3]), "logit_bias": lambda r: {str(r.randrange(300)): r.uniform(-100,
    100)},
    "min_tokens": lambda r: r.choice([0, 1, 4]), "ignore_eos": lambda r: r.random() < 0.5,
    "skip_special_tokens": lambda r: False,
    "return_token_ids": lambda r: True, "return_drafts": lambda r: True, "speculate": lambda r: r.random() < 0.5,
    "drafts": lambda r: r.randrange(10), "adaptive_drafts": lambda r: r.random() < 0.5, "add_special_tokens": lambda r: True,
    "acceptance_rule": lambda r: r.choice(["equality", "rejection", "x"]), "user": lambda r: r.choice(SPECIAL),
    "response_format": lambda r: r.choice([{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {
        "name": "x", "schema": r.choice(SCHEMAS)}}, {"type": "json_schema"}]),
    "model": lambda r: r.choice(["small", "x", "", "../small", "small\x00"])}
CHAT = {
    "logprobs": lambda r: r.random() < 0.7, "top_logprobs": lambda r: r.choice([0, 3, 20]),
    "tools": lambda r: r.choice([[TOOL], [], [TOOL] * 3]),
    "tool_choice": lambda r: r.choice(["auto", "none", "required", {"type": "function", "function": {"name": r.choice(["add",
    "y"])}}]),
    "parallel_tool_calls": lambda r: False, "add_generation_prompt": lambda r: r.random() < 0.5,
    "continue_final_message": lambda r: True,
    "chat_template_kwargs": lambda r: r.choice([{}, {"enable_thinking": False}, {"messages": []}, {"__class__": 1}])}
PLAIN = {"logprobs": lambda r: r.choice([0, 2, 20]), "echo": lambda r: r.random() < 0.7, "suffix": lambda r: ""}


def text(r: random.Random) -> str:
    return "".join(r.choice(SPECIAL) if r.random() < 0.3 else r.choice("the quick brown fox 三 é").strip() or " "
                   for _ in range(r.choice([0, 1, 3, 12, 40])))


def message(r: random.Random) -> dict:
    found = {"role": r.choice(["user", "user", "assistant", "system", "developer", "tool", "pirate"]), "content": r.choice(
        [text(r), text(r), [{"type": "text", "text": text(r)}], None, [{"type": "image_url", "image_url": {"url": "x"}}], 5])}
    if r.random() < 0.15:
        found[r.choice(["name", "tool_calls", "tool_call_id", "reasoning_content", "refusal"])] = r.choice(
            [*ODD, [{"type": "function", "function": {"name": "add", "arguments": r.choice(["{", "{}", '{"a":1}',
            {"a": 1}])}}]])
    return found


def body(r: random.Random) -> tuple[str, dict]:
    """(path, JSON body): a few right fields, and sometimes an odd value or an unknown name."""
    chat = r.random() < 0.5
    found = {"max_tokens": r.choice([1, 4, 8])}
    for name, value in r.sample(sorted((FIELDS | (CHAT if chat else PLAIN)).items()), r.choice([0, 1, 2, 3, 5, 9])):
        found[name] = value(r)
    if chat:
        found["messages"] = [message(r) for _ in range(r.choice([1, 1, 2, 5]))]
    else:
        found["prompt"] = r.choice([text(r), text(r), [r.randrange(250) for _ in range(r.choice([1, 5, 90]))],
                                    [text(r), text(r)], [[1, 2], [3]], []])
    if r.random() < 0.3:
        found[r.choice([*found, "temprature", "best_of", "functions", ""])] = r.choice(ODD)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if r.random() < 0.12:
        path, found = r.choice([("/tokenize", {k: found[k] for k in found if k in ("prompt", "messages", "tools", "model")}),
                                ("/detokenize", {"tokens": r.choice([[1, 2, 3], [-1], "x", [10**12], []])})])
    return path, found


def encoded(r: random.Random, value: dict) -> bytes:
    """JSON, sometimes damaged."""
    data = bytearray(json.dumps(value, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass"))
    how = r.random()
    if how < 0.04 and data:
        data[r.randrange(len(data))] = r.randrange(256)
    elif how < 0.06:
        del data[r.randrange(len(data)):]
    elif how < 0.08:
        data = bytearray(b'{"prompt":' + b"[" * 20_000 + b"]" * 20_000 + b"}")
    elif how < 0.10:
        data = bytearray(b'{"prompt":"x","max_tokens":1,"seed":' + r.choice([b"9" * 400, b"1e400", b"-1e-400", b"NaN",
            b"0x10"]) + b"}")
    elif how < 0.12:
        data[:0] = b"\xef\xbb\xbf"
    return bytes(data)


@dataclass
class Case:
    """Bytes to send, in pieces with pauses, and how the client behaves."""

    pieces: list[bytes]
    pause: float = 0.0
    half_close: bool = False
    leaves_after: int | None = None  # bytes of the answer
    json: tuple[str, dict] | None = None  # a request that is well-formed HTTP and JSON


def head(path: str, length: int, *more: bytes, method: bytes = b"POST", version: bytes = b"1.1") -> bytes:
    return b"%b %b HTTP/%b\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n" % (
        method, path.encode(), version, length, b"".join(line + b"\r\n" for line in more))


def _chunked(r, path, data):
    chunks, at = [], 0
    while at < len(data):
        size = r.choice([1, 2, 7, 100, 5000])
        piece = data[at:at + size]
        chunks.append(b"%x\r\n%b\r\n" % (len(piece), piece))
        at += size
    first = head(path, 0).replace(b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n")
    end = r.choice([b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"", b"zz\r\n", b"-1\r\n\r\n", b"ffffffffffffffff\r\n"])
    return [first, *chunks[:400], end]


def _odd_heads(r, path, data):
    whole = head(path, len(data)) + data
    return r.choice([
        [head(path, len(data), b"X: " + b"a" * 200_000) + data], [head(path, len(data),
        *[b"X%d: y" % i for i in range(2000)]) + data],
        [head(path, len(data), b"Content-Length: 3") + data], [head(path, len(data), b"Transfer-Encoding: chunked") + data],
        [whole.replace(b"Content-Length: ", b"Content-Length: -")], [whole.replace(b"Content-Length: ",
        b"Content-Length: 9" * 20)],
        [whole.replace(b"application/json", r.choice([b"text/plain", b"", b"application/json; charset=utf-16", b"\xff"]))],
        [whole.replace(b"Host: localhost\r\n", r.choice([b"", b"Host: evil.example\r\n", b"Host: a\r\nHost: b\r\n",
        b"Host: \x00\r\n"]))],
        [head(path, len(data), b"Origin: http://evil.example") + data], [head(path, len(data), b"Expect: 100-continue"), data],
        [head(path, 0, b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
              b"Sec-WebSocket-Version: 13", method=b"GET")],
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)], [b"\r\n" * 5000],
        [r.randbytes(300)], [b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n"], [whole.replace(b"\r\n", b"\n")],
        [head(path, len(data), method=r.choice([b"PUT", b"TRACE", b"OPTIONS", b"CONNECT", b"X" * 100, b"post"])) + data],
        [head("http://localhost" + path, len(data)) + data], [head(path + "?x=%00%ff&" + "a" * 5000, len(data)) + data],
        [head("/v1/../" + path, len(data)) + data], [head("/v1/models/" + "%2e%2e/" * 50, 0, method=b"GET")],
        [head(path, len(data), version=r.choice([b"1.0", b"0.9", b"3.7"])) + data]])


def case(r: random.Random) -> Case:
    path, value = body(r)
    data = encoded(r, value)
    whole = head(path, len(data)) + data
    how = r.random()
    if how < 0.55:
        right = data == json.dumps(value).encode() and path.startswith("/v1/")
        return Case([whole], json=(path, value) if right else None)
    if how < 0.65:
        return Case([whole], leaves_after=r.choice([0, 1, 200, 400, 1000]))
    if how < 0.73:
        return Case(_chunked(r, path, data))
    if how < 0.78:
        return Case([whole * r.choice([2, 5, 20])])
    if how < 0.83:
        return Case([whole], half_close=True)
    if how < 0.87:
        cut = r.randrange(len(whole))
        return Case([whole[:cut]], half_close=r.random() < 0.5, leaves_after=0 if r.random() < 0.5 else None)
    if how < 0.90:
        return Case([whole[i:i + 1] for i in range(min(len(whole), 60))], pause=0.02, leaves_after=0)
    return Case(_odd_heads(r, path, data))


def send(address: tuple[str, int], sent: Case, seconds: float) -> bytes:
    """What comes back until the server closes, all of it is there, or the client leaves.

    Raises:
        TimeoutError: neither for `seconds`.
    """
    with socket.create_connection(address, timeout=seconds) as raw:
        got = b""
        try:
            for piece in sent.pieces:
                raw.sendall(piece)
                if sent.pause:
                    time.sleep(sent.pause)
            if sent.half_close:
                raw.shutdown(socket.SHUT_WR)
            while sent.leaves_after is None or len(got) < sent.leaves_after:
                if complete(got) and not select.select([raw], [], [], 0 if sent.json else 0.2)[0]:
                    break  # or an idle connection would be waited for
                piece = raw.recv(65536)
                got += piece
                if not piece:
                    break
        except (ConnectionResetError, BrokenPipeError):
            pass
        return got


def complete(answer: bytes) -> bool:
    """Whether the first answer is all there."""
    top, found, rest = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    for line in top.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(rest) >= int(line.split(b":")[1])
    return rest.endswith(b"0\r\n\r\n")


def parts(answer: bytes) -> tuple[int, bytes]:
    """(status, body) of a complete first answer."""
    top, _, rest = answer.partition(b"\r\n\r\n")
    if b"chunked" in top.lower():
        joined = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            joined, rest = joined + rest[:int(size, 16)], rest[int(size, 16) + 2:]
        rest = joined
    return int(top.split()[1]), rest
