"""How a row of data becomes tokens: one set of rules for QAT text, drafter prompts and dialogues, validation and the server.

Shapes of a row that are understood:

    {"messages": [{"role", "content", ...}, ...], "tools": [...]}     the OpenAI chat form; tools are optional
    {"conversations": [{"from", "value"}, ...]}                       ShareGPT
    {"prompt": ..., "response" | "completion": ...}                   one turn; both texts, or both lists of messages
    {"prompt": ...}                                                   a prompt alone
    {FIELD: text}                                                     plain text

Rules. A null content is empty text; a list of text parts is joined by newlines; everything else of a message (tool calls,
names, reasoning) reaches the template as it is. Role `developer` becomes `system` for templates that do not know it. A chat
template writes its own beginning-of-text token, so none is added to what it renders; plain text begins as the tokenizer
begins texts. Finished assistant turns at the end of a prompt are cut: the model is asked to answer, not to go on talking to
itself.

A prompt that is a string is rendered as one user turn where the tokenizer has a chat template (`auto`), because an
instruct model that sees a bare question mostly answers with its end token. It is taken as it is where there is no template,
where the row says `kind: open` (text to be continued), or where it begins with a control token (it is rendered already).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.reading import first_line

PROMPT_FORMATS = ("auto", "chat", "text")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
                   "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool",
                   "function_response": "tool"}


@dataclass(frozen=True)
class Rendering:
    """How dialogues are rendered.

    Attributes:
        prompt_format: "auto", "chat" or "text", for prompts that are strings.
        template_options: switches of the chat template, e.g. {"enable_thinking": False}.
    """

    prompt_format: str = "auto"
    template_options: dict = field(default_factory=dict)


AUTO = Rendering()


def begin_ids(tokenizer) -> list[int]:
    """What the tokenizer puts before plain text: its beginning-of-text token, or nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return []
    ids = tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
    return [bos] if list(ids[:1]) == [bos] else []


def text_ids(tokenizer, text: str) -> list[int]:
    """Tokens of plain text that begins a context.

    Raises:
        ValueError: half of a surrogate pair, which is no text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no text") from None
    return [*begin_ids(tokenizer), *tokenizer([text], add_special_tokens=False)["input_ids"][0]]


def flat_content(content) -> str:
    """Text of a message's content: a string, null, or a list of text parts (joined by newlines).

    Raises:
        ValueError: a part that is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content is {type(content).__name__}, expected text")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content holds a part of type {kind!r}, expected text")
        texts.append(text)
    return "\n".join(texts)


def normal_messages(messages) -> list[dict]:
    """Messages as templates expect them: role, text content, and every other field that is not null.

    Raises:
        ValueError: not a list of objects with a role, a content that is not text.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of one message or more")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} is not an object with a role")
        try:
            content = flat_content(message.get("content"))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        found.append({k: v for k, v in message.items() if v is not None} | {"content": content})
    return found


def row_messages(row: dict) -> list[dict] | None:
    """The messages of a row in any of the chat forms, answers included; None for a row of plain text.

    Raises:
        ValueError: messages that are not messages.
    """
    if row.get("messages") is not None:
        try:
            return normal_messages(row["messages"])
        except ValueError as error:
            raise ValueError(f"messages: {error}") from None
    if row.get("conversations") is not None:
        turns = row["conversations"]
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise ValueError("conversations: expected a list of objects")
        if turns and "role" in turns[0]:
            return normal_messages(turns)
        unknown = [t.get("from") for t in turns if t.get("from") not in _SHAREGPT_ROLES]
        if unknown:
            raise ValueError(f"conversations: from: {unknown[0]!r}, expected one of {', '.join(_SHAREGPT_ROLES)}")
        return normal_messages([{"role": _SHAREGPT_ROLES[t["from"]], "content": t.get("value")} for t in turns])
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        answer = _answer(row)
        return normal_messages(prompt + (answer if isinstance(answer, list) else
                                         [] if answer is None else [{"role": "assistant", "content": answer}]))
    return None


def _answer(row: dict):
    return next((row[key] for key in ("response", "completion") if row.get(key) is not None), None)


def render(tokenizer, messages: list[dict], *, answer_next: bool, tools=None, options: dict | None = None) -> list[int]:
    """Tokens of a dialogue through the tokenizer's chat template.

    Args:
        messages: as from `normal_messages`.
        answer_next: end with the opening of an assistant turn.
        tools, options: passed on to the template.

    Raises:
        ValueError: no template, or one that refuses the messages.
    """
    from jinja2 import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template; expected plain text")

    def run(turns):
        return tokenizer.apply_chat_template(turns, add_generation_prompt=answer_next, tools=tools or None, return_dict=True,
                                             **(options or {}))["input_ids"]

    try:
        if any(m["role"] == "developer" for m in messages) and "developer" not in str(tokenizer.chat_template):
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        return list(run(messages))
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(first_line(error)[:160]) from None


def without_answers(messages: list[dict]) -> list[dict]:
    """The dialogue up to the last turn that is not the assistant's."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def as_chat(row: dict, text: str, tokenizer, rendering: Rendering) -> bool:
    """Whether a prompt that is a string is rendered as a user turn."""
    if rendering.prompt_format != "auto":
        return rendering.prompt_format == "chat"
    if getattr(tokenizer, "chat_template", None) is None or row.get("kind") == "open":
        return False
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return not text.lstrip().startswith(tuple(special))


def prompt_tokens(row: dict, tokenizer, prompt_field: str = "prompt", rendering: Rendering = AUTO) -> list[int]:
    """Tokens of a row's prompt, answers at its end cut off.

    Raises:
        ValueError: no prompt in any known form, one that the template refuses, an empty one.
    """
    messages = row_messages(row)
    if messages is None and isinstance(row.get(prompt_field), str):
        text = row[prompt_field]
        if not text:
            raise ValueError("empty prompt")
        if not as_chat(row, text, tokenizer, rendering):
            try:
                return text_ids(tokenizer, text)
            except ValueError as error:
                raise ValueError(f"{prompt_field}: {error}") from None
        messages = [{"role": "user", "content": text}]
    if messages is None:
        raise ValueError(f"neither {prompt_field!r} (text) nor 'messages'; it has {sorted(row)}")
    asked = without_answers(messages)
    if not asked:
        raise ValueError("messages: nothing but assistant turns, expected a question")
    try:
        ids = render(tokenizer, asked, answer_next=True, tools=row.get("tools"), options=rendering.template_options)
    except ValueError as error:
        raise ValueError(f"messages: {error}") from None
    if not ids:
        raise ValueError("empty prompt")
    return ids


def answered_turns(row: dict, tokenizer, end_ids: list[int], prompt_field: str = "prompt", rendering: Rendering = AUTO,
                   text_field: str = "text") -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids of each assistant turn of a row; plain text is an answer without a prompt.

    An answer ends with an end token: one is appended where the template or the text does not write it.

    Raises:
        ValueError: no answer in any known form.
    """
    messages, answer = row_messages(row), _answer(row)
    if messages is None and isinstance(answer, str) and isinstance(row.get(prompt_field), str):
        if as_chat(row, row[prompt_field], tokenizer, rendering):
            messages = [{"role": "user", "content": row[prompt_field]}, {"role": "assistant", "content": answer}]
        else:
            return [(prompt_tokens(row, tokenizer, prompt_field, rendering), _ended(tokenizer, answer, end_ids))]
    if messages is None and isinstance(row.get(text_field), str):
        return [([], [*begin_ids(tokenizer), *_ended(tokenizer, row[text_field], end_ids)])]
    if messages is None:
        raise ValueError(f"neither 'response' nor 'text'; it has {sorted(row)}")
    if isinstance(answer, str) and messages[-1]["role"] != "assistant":
        messages = [*messages, {"role": "assistant", "content": answer}]
    found, options, tools = [], rendering.template_options, row.get("tools")
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:i], answer_next=True, tools=tools, options=options) if i else []
        whole = render(tokenizer, messages[:i + 1], answer_next=False, tools=tools, options=options)
        if whole[:len(prompt)] == prompt:
            found.append((prompt, until_end(whole[len(prompt):], tokenizer, end_ids)))
        else:  # the template opens an answer with more than it keeps of one (an empty thought, say)
            found.append((prompt, _ended(tokenizer, message["content"], end_ids)))
    if not found:
        raise ValueError("messages: no assistant turn, expected one to learn from")
    return found


def dialogue_tokens(row: dict, tokenizer, rendering: Rendering = AUTO) -> list[int]:
    """Tokens of a whole dialogue, answers included, for training on it as a document.

    Raises:
        ValueError: no dialogue in any known form, or one that the template refuses.
    """
    messages = _whole_dialogue(row, tokenizer, rendering)
    if messages is None:
        return text_ids(tokenizer, row["prompt"] + (_answer(row) or ""))
    return render(tokenizer, messages, answer_next=False, tools=row.get("tools"), options=rendering.template_options)


def _whole_dialogue(row: dict, tokenizer, rendering: Rendering) -> list[dict] | None:
    """The messages of a row, its answer included; None where prompt and answer are one text. Raises ValueError: no dialogue."""
    messages, answer = row_messages(row), _answer(row)
    if messages is None and isinstance(row.get("prompt"), str):
        if not as_chat(row, row["prompt"], tokenizer, rendering):
            return None
        messages = [{"role": "user", "content": row["prompt"]}]
    if messages is None:
        raise ValueError(f"no dialogue; it has {sorted(row)}")
    if isinstance(answer, str) and messages[-1]["role"] != "assistant":
        messages = [*messages, {"role": "assistant", "content": answer}]
    return messages


def said_by_assistant(row: dict, ids: list[int], tokenizer, rendering: Rendering = AUTO) -> list[bool]:
    """Which of a dialogue's tokens (`ids`, as `dialogue_tokens` gives them) are answers, with the token that ends each.

    Templates need no marks of their own for it: a turn lies between what the dialogue has in common, from both ends, with one
    that has another text in its place. Where the dialogue before it, opened for an answer, begins this one, the turn begins
    there: what the template puts before the text (the opening of a thought) is then the assistant's to say. A turn that cannot
    be found so, because the template demands what stands there, is not marked, unless the dialogue up to its end begins this.

    Raises:
        ValueError: as `dialogue_tokens`.
    """
    said = [False] * len(ids)
    messages = _whole_dialogue(row, tokenizer, rendering)
    if messages is None:
        begin = _common(ids, text_ids(tokenizer, row["prompt"])) if row["prompt"] else 0
        return said[:begin] + [True] * (len(ids) - begin)

    def rendered(turns: list[dict], answer_next: bool = False) -> list[int]:
        return render(tokenizer, turns, answer_next=answer_next, tools=row.get("tools"), options=rendering.template_options)

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = rendered(messages[:i], answer_next=True) if i else []
        opened = ids[:len(opening)] == opening
        alike = message["content"].encode(errors="replace").endswith(_OTHER_TEXTS[0].encode()[-1:])
        other = {"role": "assistant", "content": _OTHER_TEXTS[alike]}
        try:
            changed = rendered([*messages[:i], other, *messages[i + 1:]])
            begin = len(opening) if opened else _common(ids, changed)
            end = min(len(ids), len(ids) - _common(ids[::-1], changed[::-1]) + 1)
        except ValueError:  # a result of a tool whose call is gone
            begin = len(opening) if opened else len(ids)
            end = _common(ids, rendered(messages[:i + 1]))
        said[begin:end] = [True] * max(0, end - begin)
    return said


_OTHER_TEXTS = "\ue000", "\ue001"  # private use, which end in different bytes


def _common(one: list[int], other: list[int]) -> int:
    """How many entries both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def end_token(tokenizer, end_ids: list[int]) -> int:
    """The token that ends an answer where nobody says which: the tokenizer's own if it is one of `end_ids`."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0]


def until_end(ids: list[int], tokenizer, end_ids: list[int]) -> list[int]:
    """Up to the first end token, which is kept (templates write a line break after it); one is appended where there is none."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return ids[:place + 1]
    return [*ids, end_token(tokenizer, end_ids)]


def _ended(tokenizer, text: str, end_ids: list[int]) -> list[int]:
    ids = list(tokenizer([text], add_special_tokens=False)["input_ids"][0])
    return ids if ids and ids[-1] in end_ids else [*ids, end_token(tokenizer, end_ids)]
