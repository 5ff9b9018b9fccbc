"""From the engine's steps to OpenAI's bodies: whole answers, and chunks of a stream.

A chunk is what the engine's thread flushed for one choice: the tokens of one step or, where steps are short, of a few; with
`return_drafts` always of one, since drafts are accepted step by step. Nothing here knows about HTTP.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from runtime_ref.engine.sampler import Logprob
from runtime_ref.engine.sequence import Output
from runtime_ref.server.engine_thread import EngineDown, RequestHandle, StepOutput
from runtime_ref.server.metrics import Metrics, Timing
from runtime_ref.server.tool_calls import Said, as_message, reader

# JSON has no -Infinity; clients know this number for "not at all".
NEVER = -9999.0
# The last event of a stream.
END = "data: [DONE]\n\n"


dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@lru_cache(maxsize=1)
def byte_of_symbol() -> dict[str, int]:
    """Byte-level vocabularies write each byte as one printable character: printable bytes as themselves, the others as the
    characters from U+0100 on, in order (the GPT-2 alphabet)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class Vocabulary:
    """Text and bytes of single tokens."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int]]] = {}

    def piece(self, token: int) -> tuple[str, list[int]]:
        """Text of a token (U+FFFD where it holds part of a character) and its exact bytes."""
        if token not in self._known:
            text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            data = list(text.encode("utf-8"))
            if "\ufffd" in text:
                symbols, table = self._tokenizer.convert_ids_to_tokens(token) or "", byte_of_symbol()
                if symbols and all(s in table for s in symbols):
                    data = [table[s] for s in symbols]
            self._known[token] = (text, data)
        return self._known[token]

    def chat_logprob(self, found: Logprob) -> dict:
        def entry(token: int, value: float) -> dict:
            text, data = self.piece(token)
            return {"token": text, "logprob": max(value, NEVER), "bytes": data}

        return entry(found.token, found.logprob) | {"top_logprobs": [entry(t, v) for t, v in found.top]}

    def name(self, token: int) -> str:
        """A token as a key: its text, or its bytes where it holds part of a character, for many of those have the same text."""
        text, data = self.piece(token)
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data) if "\ufffd" in text else text

    def completion_logprobs(self, found: list[Logprob], offset: int, alternatives: bool, opening: int | None = None) -> dict:
        """Args:
            opening: a token before these, of which nothing is known: the first one of a prompt.
        """
        out: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if opening is not None:
            out = {"tokens": [self.name(opening)], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [offset]}
            offset += len(self.piece(opening)[0])
        for one in found:
            name = self.name(one.token)
            out["tokens"].append(name)
            out["token_logprobs"].append(max(one.logprob, NEVER))
            top = {self.name(t): max(v, NEVER) for t, v in reversed(one.top)}
            out["top_logprobs"].append(top | {name: max(one.logprob, NEVER)} if alternatives else None)
            out["text_offset"].append(offset)
            offset += len(self.piece(one.token)[0])
        return out


@dataclass
class ChoiceState:
    """What one choice has said so far."""

    timing: Timing
    prompt: list[int]
    said: Said = field(default_factory=Said)
    reader: Any = None  # of calls and thoughts; None: all of it is text
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str | None = None
    begun: bool = False
    offset: int = 0  # characters of the tokens so far, for text_offset


@dataclass
class ResponseOptions:
    """What of the request decides the form of the answer."""

    chat: bool
    model: str
    logprobs: int | None = None
    token_ids: bool = False
    drafts: bool = False
    usage: bool = False
    usage_always: bool = False
    echo: list[str] | None = None  # text of each choice's prompt
    reading: dict[str, Any] | None = None
    one_call: bool = False


class Response:
    """One request's answer; `prompts` holds each choice's prompt, `n` of them share one."""

    def __init__(self, handle: RequestHandle, options: ResponseOptions, prompts: list[list[int]], n: int,
                 vocabulary: Vocabulary, metrics: Metrics):
        self.handle, self.options, self.n, self.vocabulary, self.metrics = handle, options, n, vocabulary, metrics
        self.choices = [ChoiceState(Timing(handle.born), prompt, reader=reader(**options.reading) if options.reading else None)
                        for prompt in prompts]
        self.head = {"id": f"{'chatcmpl' if options.chat else 'cmpl'}-{uuid.uuid4().hex}", "object": "",
                     "created": int(time.time()), "model": options.model}

    async def whole(self) -> dict:
        """The body of an answer that is not streamed.

        Raises:
            EngineDown.
        """
        async for outputs in self.handle.outputs():
            for step in outputs:
                self._count(step)
                self._take(step)
        body = self.head | {"object": "chat.completion" if self.options.chat else "text_completion",
                            "choices": [self._choice(i) for i in range(len(self.choices))], "usage": self.usage(),
                            "metrics": self.report()}
        if self.options.token_ids and self.options.chat:
            body["prompt_token_ids"] = self.choices[0].prompt
        return body

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events, the last one [DONE]. An engine that fails on the way is told as an error event."""
        last: list[str] = []  # said together with the end, which spares a write
        try:
            async for outputs in self.handle.outputs():
                for step in outputs:
                    self._count(step)
                said = [self._event(body) for step in (outputs if self.options.drafts else joined(outputs))
                        for body in self._chunks(step, self._take(step))]
                if all(choice.finish is not None for choice in self.choices):
                    last = said
                elif said:
                    yield "".join(said)
            if self.options.usage:
                last.append(self._event(self._chunk([]) | {"usage": self.usage(), "metrics": self.report()}))
        except EngineDown as error:
            last.append(self._event(error_body(str(error), "server_error", code="engine_down")))
        yield "".join([*last, END])

    def _worth_saying(self, step: StepOutput) -> bool:
        """Whether a client can see anything of it but text: a part of a character, or of a stop string, it cannot."""
        output, options = step.output, self.options
        return bool(output.finish or output.logprobs or options.token_ids or options.drafts
                    or not self.choices[step.choice].begun)

    def _event(self, body: dict) -> str:
        return f"data: {dumps(body)}\n\n"

    def usage(self) -> dict:
        prompt = sum(len(c.prompt) for c in self.choices[::self.n])
        answer = sum(len(c.tokens) for c in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def report(self) -> dict:
        """Of the first choice, as benchmark tools expect it."""
        return self.choices[0].timing.report()

    def left(self) -> None:
        """The client has gone: counted as aborted."""
        for choice in self.choices:
            if choice.finish is None:
                self.metrics.finish(choice.timing, "abort", len(choice.prompt))

    def _count(self, step: StepOutput) -> None:
        choice, output = self.choices[step.choice], step.output
        self.metrics.token(choice.timing, step)
        choice.timing.add(step)
        choice.tokens += output.tokens
        if output.finish is not None:
            choice.finish = str(output.finish)
            self.metrics.finish(choice.timing, choice.finish, len(choice.prompt))

    def _take(self, step: StepOutput) -> Said:
        """Takes over what was said, as text, thoughts and calls; returns what is new of it."""
        choice, output = self.choices[step.choice], step.output
        said = Said(output.text or "")
        if choice.reader is not None:
            said = choice.reader.push(said.text, final=output.finish is not None)
            if self.options.one_call:
                said.calls = said.calls[:1 - len(choice.said.calls)]
        choice.said.add(said)
        choice.logprobs += output.logprobs
        choice.prompt_logprobs += output.prompt_logprobs
        if choice.said.calls and output.finish == "stop":
            choice.finish = "tool_calls"
        return said

    def _choice(self, index: int) -> dict:
        choice, options = self.choices[index], self.options
        body: dict = {"index": index}
        if options.chat:
            said = choice.said
            body["message"] = {"role": "assistant", "content": said.text if said.text or not said.calls else None,
                               "refusal": None}
            if said.calls:
                body["message"]["tool_calls"] = as_message(said.calls)
            if said.thought:
                body["message"]["reasoning_content"] = said.thought
        else:
            body["text"] = (options.echo[index] if options.echo else "") + choice.said.text
        opening = choice.prompt[0] if options.echo else None
        body |= {"logprobs": self._logprobs(choice.prompt_logprobs + choice.logprobs, 0, opening),
                 "finish_reason": choice.finish}
        if options.token_ids:
            body["token_ids"] = choice.tokens
            if not options.chat:
                body["prompt_token_ids"] = choice.prompt
        return body

    def _logprobs(self, found: list[Logprob], offset: int, opening: int | None = None) -> dict | None:
        if self.options.logprobs is None:
            return None
        if self.options.chat:
            return {"content": [self.vocabulary.chat_logprob(one) for one in found], "refusal": None}
        return self.vocabulary.completion_logprobs(found, offset, self.options.logprobs > 0, opening)

    def _chunk(self, choices: list[dict]) -> dict:
        body = self.head | {"object": "chat.completion.chunk" if self.options.chat else "text_completion", "choices": choices}
        if self.options.usage:
            body["usage"] = self.usage() if self.options.usage_always else None
        return body

    def _chunks(self, step: StepOutput, said: Said) -> list[dict]:
        """One chunk, or none where there is nothing to see; before a chat's first one the role, as clients expect it."""
        options, output, index, bodies = self.options, step.output, step.choice, []
        choice = self.choices[index]
        if not (said.text or said.thought or said.calls or self._worth_saying(step)):
            return []
        first, choice.begun = not choice.begun, True
        body: dict = {"index": index}
        if options.chat:
            body["delta"] = {"content": said.text}
            if said.calls:
                body["delta"]["tool_calls"] = as_message(said.calls, len(choice.said.calls) - len(said.calls), stream=True)
            if said.thought:
                body["delta"]["reasoning_content"] = said.thought
            if first:
                opening = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                           "finish_reason": None}
                bodies.append(self._chunk([opening]) | ({"prompt_token_ids": choice.prompt} if options.token_ids else {}))
        else:
            body["text"] = (options.echo[index] if options.echo and first else "") + said.text
        opening = choice.prompt[0] if options.echo and first else None
        body |= {"logprobs": self._logprobs(output.prompt_logprobs + output.logprobs, choice.offset, opening),
                 "finish_reason": None if output.finish is None else choice.finish}
        if options.logprobs is not None and not options.chat:
            spoken = (choice.prompt if options.echo and first else []) + output.tokens
            choice.offset += sum(len(self.vocabulary.piece(t)[0]) for t in spoken)
        if options.token_ids:
            body["token_ids"] = output.tokens
            if first and not options.chat:
                body["prompt_token_ids"] = choice.prompt
        if options.drafts:
            body["drafts"] = {"pieces": output.pieces, "drafted": output.drafted, "accepted": output.accepted}
        return [*bodies, self._chunk([body])]


def joined(outputs: list[StepOutput]) -> list[StepOutput]:
    """One step per choice, in the order in which the choices first appear."""
    if len(outputs) == 1:
        return outputs
    found: dict[int, list[StepOutput]] = {}
    for step in outputs:
        found.setdefault(step.choice, []).append(step)
    return [_joined(own) for own in found.values()]


def _joined(outputs: list[StepOutput]) -> StepOutput:
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    one = Output(last.output.id, [], last.output.finish, "".join(step.output.text or "" for step in outputs))
    for step in outputs:
        output = step.output
        one.tokens += output.tokens
        one.logprobs += output.logprobs
        one.prompt_logprobs += output.prompt_logprobs
        one.pieces += output.pieces
        one.drafted, one.accepted = one.drafted + output.drafted, one.accepted + output.accepted
    return StepOutput(last.choice, one, last.at)


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
