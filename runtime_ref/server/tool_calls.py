"""What a model says -> text, thoughts and calls of tools, in the form that its chat template taught it.

    tags      <tool_call> ... </tool_call>  Qwen3, MiMo, GLM: the block holds a JSON object, <function=NAME> with
                                            <parameter=KEY> blocks, or a name with <arg_key>, <arg_value> pairs
    channels  <|channel|> ... <|message|>   gpt-oss: "analysis" are thoughts, "commentary to=functions.NAME" calls, "final" text
    marker    [TOOL_CALLS] ...              Mistral: a JSON list, or NAME[ARGS]{...}, up to the answer's end
    list      [{"name", "arguments"}, ...]  no model's own form: what the server forces for tool_choice "required"
    object    {...}                         the same for one named function: its arguments

Which one is read off the template. Readers take text piece by piece, as a stream brings it, and hold back no more than what may
become a mark. A call is told when it is complete; what looks like one and cannot be read is text.

Source: the chat templates of Qwen3, Qwen3-Coder, GLM-4.5, gpt-oss (harmony format) and Mistral.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, field
from typing import Any

# Form -> marks by which a template shows that its model speaks so.
MARKS = {"channels": ("<|channel|>", "<|message|>"), "tags": ("<tool_call>",), "marker": ("[TOOL_CALLS]",)}


@dataclass
class Said:
    """What a piece of an answer brought."""

    text: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # (name, arguments as JSON)

    def add(self, other: Said) -> None:
        self.text += other.text
        self.thought += other.thought
        self.calls += other.calls


def form_of(template: str) -> str | None:
    """How a template's model calls tools; None: in no way that is known here."""
    return next((form for form, marks in MARKS.items() if all(mark in template for mark in marks)), None)


def reader(form: str, *, name: str = "", kinds: dict[str, dict[str, str]] | None = None):
    """A reader of one answer.

    Args:
        name: of the function, for the form "object".
        kinds: function -> parameter -> its JSON schema's type, for forms that write values as they are.
    """
    if form == "channels":
        return Channels()
    if form == "tags":
        return Tags("<tool_call>", "</tool_call>", lambda block: [_call_in_tags(block, kinds or {})])
    if form == "marker":
        return Tags("[TOOL_CALLS]", None, _calls_after_marker)
    if form == "list":
        return Whole(lambda text: _calls_of(json.loads(text)))
    return Whole(lambda text: [(name, json.dumps(_object(json.loads(text)), ensure_ascii=False))])


class Tags:
    """Text with blocks of calls between two marks (`closing` None: up to the end)."""

    def __init__(self, opening: str, closing: str | None, read):
        self.opening, self.closing, self.read = opening, closing, read
        self._held, self._inside = "", False

    def push(self, text: str, final: bool = False) -> Said:
        self._held += text
        said = Said()
        while True:
            if not self._inside:
                before, mark, rest = self._held.partition(self.opening)
                if not mark:
                    keep = 0 if final else _beginning(self._held, self.opening)
                    said.text += self._held[:len(self._held) - keep]
                    self._held = self._held[len(self._held) - keep:]
                    return said
                said.text += before
                self._held, self._inside = rest, True
            end = self._held.find(self.closing) if self.closing else -1
            if end < 0 and not final:
                return said
            block = self._held if end < 0 else self._held[:end]
            self._held, self._inside = "" if end < 0 else self._held[end + len(self.closing):], False
            try:
                said.calls += self.read(block)
            except (ValueError, RecursionError):
                said.text += self.opening + block + ("" if end < 0 else self.closing)


class Channels:
    """gpt-oss's messages: <|start|>ROLE<|channel|>HEADER<|message|>BODY<|end|>, the first one from the channel on."""

    ENDS = re.compile(r"<\|(?:end|call|return|start)\|>")

    def __init__(self):
        self._held, self._header = "", ""
        self._body: str | None = None  # of a call, as far as it came; None outside of one
        self._inside = self._begun = False

    def push(self, text: str, final: bool = False) -> Said:
        self._held += text
        said = Said()
        while self._held:
            if not self._inside:
                head, mark, rest = self._held.partition("<|message|>")
                if not mark:
                    if final and not self._begun:  # an answer that knows no channels
                        said.text, self._held = re.sub(r"<\|[a-z]+\|>", "", self._held), ""
                    return said
                self._header = head
                self._held, self._inside, self._begun = rest, True, True
                self._body = "" if "to=" in head else None
            end = self.ENDS.search(self._held)
            keep = 0 if final or end else _beginning(self._held, "<|return|>", "<|start|>", "<|call|>", "<|end|>")
            body = self._held[:end.start()] if end else self._held[:len(self._held) - keep]
            self._held = self._held[end.end():] if end else self._held[len(self._held) - keep:]
            self._take(body, said)
            if end or final:
                self._close(said)
            if not end:
                break
        if final and self._inside:
            self._close(said)
        return said

    def _take(self, body: str, said: Said) -> None:
        if self._body is not None:
            self._body += body
        elif self._header.rpartition("<|channel|>")[2].strip().startswith("analysis"):
            said.thought += body
        else:
            said.text += body

    def _close(self, said: Said) -> None:
        if self._body is not None:
            name = re.search(r"to=(?:functions\.)?([^\s<]+)", self._header)
            try:
                assert name is not None
                said.calls.append((name[1], json.dumps(_object(json.loads(self._body or "{}")), ensure_ascii=False)))
            except (ValueError, RecursionError):
                said.text += self._body
        self._body, self._inside = None, False


class Whole:
    """An answer that is nothing but calls; told at its end, as text if it was cut before."""

    def __init__(self, read):
        self.read, self._held = read, ""

    def push(self, text: str, final: bool = False) -> Said:
        self._held += text
        if not final:
            return Said()
        try:
            return Said(calls=self.read(self._held))
        except (ValueError, RecursionError):
            return Said(text=self._held)


def _beginning(text: str, *marks: str) -> int:
    """Length of the end of a text that may be the beginning of a mark."""
    return max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):  # JSON in JSON, as some models write it
        value = json.loads(value)
    if not isinstance(value, dict):
        raise ValueError("arguments that are no object")
    return value


def _calls_of(found: Any) -> list[tuple[str, str]]:
    calls = []
    for one in found if isinstance(found, list) else [found]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise ValueError("a call without a name")
        arguments = one.get("arguments", one.get("parameters"))
        calls.append((one["name"], json.dumps(_object({} if arguments is None else arguments), ensure_ascii=False)))
    return calls


def _calls_after_marker(block: str) -> list[tuple[str, str]]:
    calls = []
    for part in block.split("[TOOL_CALLS]"):
        name, mark, arguments = part.strip().partition("[ARGS]")
        calls += _calls_of({"name": name, "arguments": json.loads(arguments)} if mark else json.loads(part))
    return calls


def _call_in_tags(block: str, kinds: dict[str, dict[str, str]]) -> tuple[str, str]:
    block = block.strip()
    if block.startswith("{"):
        return _calls_of(json.loads(block))[0]
    if function := re.match(r"<function=([^>\n]+)>(.*)", block, re.DOTALL):
        name, pairs = function[1].strip(), re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", function[2], re.DOTALL)
    elif function := re.match(r"([\w.:-]+)\s*(?=<arg_key>|$)", block):
        name = function[1]
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", block, re.DOTALL)
    else:
        raise ValueError("no call in any known form")
    own = kinds.get(name, {})
    return name, json.dumps({key.strip(): _value(text, own.get(key.strip())) for key, text in pairs}, ensure_ascii=False)


def _value(text: str, kind: str | None) -> Any:
    """A parameter that was written as it is: text if it should be, else what it spells."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def as_message(calls: list[tuple[str, str]], first: int = 0, *, stream: bool = False) -> list[dict[str, Any]]:
    """Calls in OpenAI's form; in a stream each one has its place in the answer."""
    return [{**({"index": first + i} if stream else {}), "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
             "function": {"name": name, "arguments": arguments}} for i, (name, arguments) in enumerate(calls)]
