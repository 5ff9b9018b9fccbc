"""Messages -> the prompt that the checkpoint's chat template makes of them, or a refusal: nothing is dropped on the way.

A template is a program of the checkpoint's author. What it does not read it drops without a word, so whatever a client sends
beside role and content is looked for in the template's source first. It may also be hostile: it runs in transformers' sandbox,
and the process that runs it has limits of time and memory (see `request_workers`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from runtime_ref.server.openai_requests import BadRequest, Message, short

# Whatever a template's own code may raise; a mistake of ours would be found by the tests of this file.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
                   TypeError, ValueError)
# Names under which templates read an earlier turn's reasoning.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Arguments of `apply_chat_template` itself, which are not the template's variables.
RESERVED = {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
            "continue_final_message", "tokenize",
            "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
            "return_assistant_tokens_mask", "tokenizer_kwargs"}


def template_of(tokenizer, tools: bool = False) -> str:
    """The template's source; empty if there is none."""
    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.get_chat_template(tools=[{}] if tools else None)
    except ValueError:  # several templates, and no default among them
        return ""


def reads(template: str, name: str) -> bool:
    """Whether a template's source has a name, as a variable, an attribute or a string."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def render(tokenizer, messages: list[Message], *, tools: list[dict] | None = None, variables: dict[str, Any] | None = None,
           add_generation_prompt: bool = True, continue_final_message: bool = False) -> str:
    """The prompt's text.

    Args:
        tools: function definitions as OpenAI has them. variables: of the template (`enable_thinking`, ...).

    Raises:
        BadRequest: no template, something in the request that it does not read, or an error of the template.
    """
    template = template_of(tokenizer, bool(tools))
    if not template:
        raise BadRequest("messages: this checkpoint has no chat template, expected a request to /v1/completions",
                         param="messages", code="no_chat_template")
    if continue_final_message and add_generation_prompt:
        raise BadRequest("continue_final_message: not together with add_generation_prompt, expected one of them true",
                         param="continue_final_message")
    if continue_final_message and messages[-1].role != "assistant":
        raise BadRequest(f"continue_final_message: the last message is the {messages[-1].role}'s, expected the assistant's",
                         param="continue_final_message")
    if tools and not reads(template, "tools"):
        raise _unread("tools", "tools")
    for name in variables or {}:
        if name in RESERVED or not name.isidentifier() or not reads(template, name):
            raise BadRequest(f"chat_template_kwargs: {short(name)!r} is no variable of this checkpoint's chat template",
                             param="chat_template_kwargs")
    plain = [_plain(message, i, template) for i, message in enumerate(messages)]
    return _guarded(lambda: tokenizer.apply_chat_template(
        plain, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message, **(variables or {})))


def _guarded(work: Callable[[], str]) -> str:
    try:
        return work()
    except TEMPLATE_ERRORS as error:
        kind = "" if isinstance(error, TemplateError) else f"the chat template failed: {type(error).__name__}: "
        raise BadRequest(f"messages: {kind}{short(error)}", param="messages", code="chat_template_failed") from None


def _plain(message: Message, index: int, template: str) -> dict[str, Any]:
    """A message as templates read it: arguments of calls as objects, reasoning under the template's own name."""
    where, role = f"messages[{index}]", message.role
    if role == "developer" and not reads(template, "developer"):
        role = "system"  # what newer models call the developer's word; others would drop it
    if role == "tool" and not reads(template, "tool"):
        raise _unread(f"{where}.role: 'tool'")
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        if role != "assistant":
            raise BadRequest(f"{where}.tool_calls: of the {role}, expected them of the assistant", param="messages")
        if not reads(template, "tool_calls"):
            raise _unread(f"{where}.tool_calls")
        plain["tool_calls"] = [_call(call.id, call.function, f"{where}.tool_calls[{i}]")
                               for i, call in enumerate(message.tool_calls)]
    if message.tool_call_id is not None:
        if role != "tool":
            raise BadRequest(f"{where}.tool_call_id: of the {role}, expected it in a message of a tool", param="messages")
        plain["tool_call_id"] = message.tool_call_id  # templates go by the order of calls and results
    if message.name is not None:
        if role != "tool" and not reads(template, "name"):
            raise _unread(f"{where}.name")
        plain["name"] = message.name
    thought = message.reasoning_content or message.reasoning
    if thought:
        name = next((name for name in REASONING if reads(template, name)), None)
        if name is None or role != "assistant":
            raise _unread(f"{where}.reasoning_content")
        plain[name] = thought
    return plain


def _call(number: str | None, function, where: str) -> dict[str, Any]:
    arguments = function.arguments if function.arguments is not None else {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{where}.function.arguments: not valid JSON: {short(error)}", param="messages") from None
    if not isinstance(arguments, dict):
        raise BadRequest(f"{where}.function.arguments: {type(arguments).__name__}, expected a JSON object", param="messages")
    return {"id": number, "type": "function", "function": {"name": function.name, "arguments": arguments}}


def _unread(what: str, param: str = "messages") -> BadRequest:
    return BadRequest(f"{what}: this checkpoint's chat template does not read it", param=param, code="unsupported_parameter")
