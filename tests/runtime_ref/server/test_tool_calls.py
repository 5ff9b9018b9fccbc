"""Calls of tools are read in each family's form, in whatever pieces they come, and nothing is lost or made up."""

import json
import random

import pytest

from runtime_ref.server.openai_requests import BadRequest
from runtime_ref.server.preparation import Preparation
from runtime_ref.server.request_workers import Limits
from runtime_ref.server.tool_calls import Said, form_of, reader
from tests.runtime_ref.server.test_chat_template import CHANNELS, FUNCTION, TOOLS

KINDS = {"look": {"city": "string", "n": "integer"}}
CITY = '{"city": "Köln", "n": 2}'
# (form, what the model says, text, thoughts, calls)
ANSWERS = [
    ("tags", f'Sure.\n<tool_call>\n{{"name": "look", "arguments": {CITY}}}\n</tool_call>', "Sure.\n", "", [("look", CITY)]),
    ("tags", f'<tool_call>{{"name": "look", "arguments": {json.dumps(CITY)}}}</tool_call>', "", "", [("look", CITY)]),
    ("tags", f'<tool_call>{{"name": "a", "parameters": {{}}}}</tool_call>\n<tool_call>{{"name": "look", "arguments": {CITY}}}'
             "</tool_call>", "\n", "", [("a", "{}"), ("look", CITY)]),
    ("tags", "<tool_call>\n<function=look>\n<parameter=city>\nKöln\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>\n"
             "</tool_call>", "", "", [("look", CITY)]),
    ("tags", "<tool_call>\n<function=look>\n<parameter=city>\n2\n</parameter>\n</function>\n</tool_call>", "", "",
     [("look", '{"city": "2"}')]),
    ("tags", "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n<arg_key>n</arg_key>\n"
             "<arg_value>2</arg_value>\n</tool_call>", "", "", [("look", CITY)]),
    ("tags", "<tool_call><function=f><parameter=code>\nif a:\n    b()\n</parameter><parameter=yes>True</parameter></function>"
             "</tool_call>!", "!", "", [("f", '{"code": "if a:\\n    b()", "yes": true}')]),
    ("tags", "a < b <tool> <tool_calls>", "a < b <tool> <tool_calls>", "", []),
    ("tags", "<tool_call>what?!</tool_call> no", "<tool_call>what?!</tool_call> no", "", []),
    ("tags", '<tool_call>{"name": "look", "argu', '<tool_call>{"name": "look", "argu', "", []),
    ("tags", f'<tool_call>{{"name": "look", "arguments": {CITY}}}', "", "", [("look", CITY)]),  # the mark was the end token
    ("tags", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', "", []),
    ("channels", "<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant<|channel|>final<|message|>It rains.<|return|>",
     "It rains.", "Hm, so.", []),
    ("channels", f"<|channel|>analysis<|message|>look it up<|end|><|start|>assistant<|channel|>commentary to=functions.look "
                 f"<|constrain|>json<|message|>{CITY}<|call|>", "", "look it up", [("look", CITY)]),
    ("channels", f"<|channel|>commentary to=functions.look<|message|>{CITY}", "", "", [("look", CITY)]),
    ("channels", f"<|start|>assistant to=functions.look<|channel|>commentary json<|message|>{CITY}<|call|>", "", "",
     [("look", CITY)]),
    ("channels", "<|channel|>commentary<|message|>First I look.<|end|><|start|>assistant", "First I look.", "", []),
    ("channels", "no channels at all", "no channels at all", "", []),
    ("channels", "<|channel|>commentary to=functions.look<|message|>{oh", "{oh", "", []),
    ("marker", f'Well [TOOL_CALLS][{{"name": "look", "arguments": {CITY}}}, {{"name": "a", "arguments": {{}}}}]', "Well ", "",
     [("look", CITY), ("a", "{}")]),
    ("marker", f"[TOOL_CALLS]look[ARGS]{CITY}", "", "", [("look", CITY)]),
    ("marker", "[TOOL_CALLS]nothing", "[TOOL_CALLS]nothing", "", []),
    ("list", f'[{{"name": "look", "arguments": {CITY}}}]', "", "", [("look", CITY)]),
    ("list", '[{"name": "look", "argum', '[{"name": "look", "argum', "", []),
    ("object", CITY, "", "", [("look", CITY)])]


def read(form, pieces):
    reading, said = reader(form, name="look", kinds=KINDS), Said()
    for i, piece in enumerate(pieces):
        said.add(reading.push(piece, final=i == len(pieces) - 1))
    return said


@pytest.mark.parametrize("form, text, said, thought, calls", ANSWERS, ids=lambda v: str(v)[:40])
def test_an_answer_is_read_in_whatever_pieces_it_comes(form, text, said, thought, calls):
    rng = random.Random(len(text))
    cuts = [[], range(1, len(text)), *([sorted(rng.sample(range(len(text)), min(len(text), 4)))] * 20)]
    for cut in cuts:
        edges = [0, *cut, len(text)]
        found = read(form, [text[a:b] for a, b in zip(edges, edges[1:], strict=False)])
        assert (found.text, found.thought, found.calls) == (said, thought, calls)
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


def test_text_is_not_held_back_longer_than_a_mark_could_begin():
    reading = reader("tags")
    assert reading.push("one <to").text == "one " and reading.push("day").text == "<today"
    reading = reader("channels")
    assert reading.push("<|channel|>final<|message|>one <|").text == "one " and reading.push("x").text == "<|x"


@pytest.mark.parametrize("form", ["tags", "channels", "marker", "list", "object"])
def test_random_and_broken_answers_lose_nothing_and_raise_nothing(form):
    rng = random.Random(7)
    marks = ["<tool_call>", "</tool_call>", "<|channel|>", "<|message|>", "<|end|>", "[TOOL_CALLS]", "[ARGS]", "<function=",
             "{", "}", "[" * 3000, "\\u", '"', "to=functions.x", "name", "<arg_key>", "a", "é", " "]
    for _ in range(300):
        pieces = [rng.choice(marks) for _ in range(rng.randrange(1, 12))]
        found = read(form, pieces)
        if form in ("tags", "marker", "list", "object") and not found.calls:
            assert found.text == "".join(pieces)


def test_the_form_is_read_off_the_template():
    assert form_of(TOOLS) == "tags" and form_of(CHANNELS) == "channels"
    assert form_of("{{ '[TOOL_CALLS]' }}") == "marker" and form_of("{{ messages }}") is None


@pytest.fixture
def preparation(tokenizer, monkeypatch):
    def make(template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return Preparation(tokenizer)

    return make


def prepared(preparation, **more):
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [FUNCTION], **more}
    limits = Limits(context=4096, vocabulary=264, max_requests=8)
    return preparation.prepare("chat", json.dumps(body).encode(), limits)


def test_tools_are_shown_and_calls_read_unless_they_are_not_wanted(preparation, tokenizer):
    own = preparation(TOOLS)
    auto = prepared(own)
    assert '"look"' in tokenizer.decode(auto["prompts"][0]) and auto["reading"]["form"] == "tags"
    assert auto["sampling"]["skip_special"] is False and "grammar" not in auto["sampling"]
    none = prepared(own, tool_choice="none")
    assert "look" not in tokenizer.decode(none["prompts"][0]) and none["reading"] is None
    assert prepared(own, parallel_tool_calls=False)["one_call"] is True


def test_json_alone_is_not_read_as_channels(preparation):
    pytest.importorskip("llguidance")
    own = preparation(CHANNELS)
    assert prepared(own, tools=None)["reading"] == {"form": "channels"}
    found = prepared(own, tools=None, response_format={"type": "json_object"})
    assert found["reading"] is None and found["sampling"]["grammar"]


@pytest.mark.parametrize("template, change, said", [
    (TOOLS, {"tools": None, "tool_choice": "auto"}, "only together with tools"),
    (TOOLS, {"tools": [], "tool_choice": "required"}, "only together with tools"),
    (TOOLS, {"tool_choice": {"type": "function", "function": {"name": "lok"}}}, "expected 'look'"),
    (TOOLS, {"response_format": {"type": "json_object"}}, "not together with tools"),
    (TOOLS, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
    (TOOLS, {"tools": [{"type": "web_search"}]}, "type"),
    (CHANNELS + "{# tools #}", {"tool_choice": "sometimes"}, "tool_choice"),
    ("{{ tools }}{{ messages }}", {}, "no form of calls that this server can read"),
    ("{{ messages }}", {}, "no form of calls"), ("{{ messages }}<tool_call>", {}, "does not read it")])
def test_what_cannot_be_done_with_tools_is_refused(preparation, template, change, said):
    with pytest.raises(BadRequest, match=said):
        prepared(preparation(template), **change)
