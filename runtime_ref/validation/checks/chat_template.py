"""Check 0, the chat template: does it end, does it fit the tokenizer, and what it does to drafts and to caches.

A template is code that comes with the folder, so it is rendered in a child process with bounds (`guard.bounded`).
"""

from __future__ import annotations

import re
from pathlib import Path

from runtime_ref.validation.guard import OutOfBounds, bounded
from runtime_ref.validation.result import Check

TEMPLATE_CAUSE = "the chat template is not this model's: its marks must be single tokens of the tokenizer"
ENDLESS_CAUSE = "the chat template does not end, or takes all memory: a server that renders it stops answering"
RENDER_CAUSE = "the chat template cannot be rendered"
THINKING_CAUSE = ("thinking is on when served and was off in training, or the other way round (enable_thinking): the drafter "
                  "sees text that it was not trained on")
REWRITE_CAUSE = ("the chat template rewrites earlier turns: masks of the answers come out empty in training, and a server's "
                 "prefix cache misses at every turn")
# A short conversation with what templates usually distinguish.
DIALOGUE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2 + 2?"}]
MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>")
SECONDS = 10.0


def check_template(check: Check, tokenizer, folder: Path) -> None:
    """Adds what is wrong with the template of a tokenizer."""
    if not tokenizer.chat_template:
        check.notes.append("no chat template: chat requests are refused, completions work")
        return

    def render(messages, generate=True, **switches):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **switches)

    def everything() -> dict:
        prompts = [render(dialogue) for dialogue in (DIALOGUE, DIALOGUE[1:], DIALOGUE[1:2])]
        return {"prompts": prompts, "earlier": render(DIALOGUE[:3], False), "later": render(DIALOGUE, False),
                "thinking": {str(on): render(DIALOGUE[1:2], enable_thinking=on) for on in (True, False)}}

    try:
        texts = bounded(everything, seconds=SECONDS)
    except OutOfBounds as error:
        check.fail(f"chat template: {error}", ENDLESS_CAUSE)
        return
    except ValueError as error:
        check.fail(f"chat template: {error}", RENDER_CAUSE)
        return
    for dialogue, text in zip((DIALOGUE, DIALOGUE[1:], DIALOGUE[1:2]), texts["prompts"], strict=True):
        lost = [m["content"] for m in dialogue if m["role"] == "user" and m["content"] not in text]
        if lost:
            check.fail(f"chat template: the message {lost[0]!r} does not appear in the prompt", TEMPLATE_CAUSE)
            return
    spelled = [m for m in dict.fromkeys(MARK.findall(texts["prompts"][-1]))
               if len(tokenizer.encode(m, add_special_tokens=False)) != 1]
    if spelled:
        check.fail(f"chat template: {spelled[0]} is {len(tokenizer.encode(spelled[0], add_special_tokens=False))} tokens, "
                   "expected one", TEMPLATE_CAUSE)
    if not texts["later"].startswith(texts["earlier"]):
        check.notes.append(f"chat template: a later turn changes the text of an earlier one: {REWRITE_CAUSE}")
    _thinking(check, texts["thinking"], texts["prompts"][-1], folder)


def _thinking(check: Check, rendered: dict[str, str], default: str, folder: Path) -> None:
    """Whether the template thinks by default where training did not, as far as the folder says."""
    if rendered["True"] == rendered["False"]:
        return
    served = default == rendered["True"]
    trained = _trained_switch(folder / "resolved.yaml", served)
    words = {True: "on", False: "off"}
    if trained is None:
        check.notes.append(f"chat template: enable_thinking is {words[served]} unless a request says otherwise; acceptance "
                           "holds for the setting that the drafter was trained with, which this folder does not say")
    elif trained != served:
        check.fail(f"chat template: enable_thinking is {words[served]} by default, the recipe trained with it "
                   f"{words[trained]}", THINKING_CAUSE)


def _trained_switch(recipe: Path, default: bool) -> bool | None:
    """The value of a key `enable_thinking` anywhere in the recipe that a folder carries; the template's default where a recipe
    of this project says nothing else."""
    import yaml

    try:
        waiting = [found := yaml.safe_load(recipe.read_text(encoding="utf-8"))]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if isinstance(item.get("enable_thinking"), bool):
                return item["enable_thinking"]
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return default if isinstance(found, dict) and "chat" in found else None
