"""Dialogues become the tokens that transformers' own rendering gives, in every form in which people keep them."""

import pytest
from transformers import AutoTokenizer

from modeling.dialogue_tokens import (
    Rendering,
    answered_turns,
    dialogue_tokens,
    flat_content,
    normal_messages,
    prompt_tokens,
    row_messages,
    said_by_assistant,
)

# The form of the templates of Qwen3, gpt-oss, GLM, DeepSeek and MiMo: begin tokens, roles, tools, an opened thought, a line
# break after the end token.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "begins": "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[U]' + m.content }}{% else %}"
              "{{ '[A]' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '[A]' }}{% endif %}",
    "thinks": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{{ '<|im_end|>\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not "
              "enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}",
    "tools": "{% if tools %}{{ tools | length }}{{ tools[0].function.name }}{% endif %}{% for m in messages %}"
             "{{ '<|im_start|>' + m.role + m.content }}{% if m.tool_calls %}"
             "{{ m.tool_calls[0].function.name }}{% endif %}{{ '<|im_end|>' }}"
             "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
    # Thoughts are kept after the last question alone, and an opened answer holds an empty one.
    "forgets": "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
               "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
               "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
               "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}"
               "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think></think>' }}{% endif %}",
    "strict": "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
              "{{ raise_exception('no call') }}{% endif %}{{ '<|im_start|>' + m.role + m.content }}{% if m.tool_calls %}"
              "{{ m.tool_calls[0].function.name }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"},
         {"role": "assistant", "content": "See you"}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    from tiny_models import write_tokenizer
    from tokenizers import AddedToken

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)

    def make(template: str | None, **options):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, special=True) for t in (
            "<|im_start|>", "<|im_end|>", "<s>")], "eos_token": "<|im_end|>"})
        tokenizer.chat_template = TEMPLATES.get(template)
        return tokenizer

    return make


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_what_transformers_renders(template, tokenizers):
    tokenizer = tokenizers(template)
    expected = tokenizer.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt_tokens({"messages": TURNS[:3]}, tokenizer) == expected


@pytest.mark.parametrize("row", [
    {"messages": TURNS}, {"conversations": TURNS},
    {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS]},
    {"prompt": TURNS[:3], "completion": TURNS[3:]}, {"prompt": TURNS[:3], "response": "See you"}])
def test_every_form_of_a_dialogue_is_the_same_dialogue(row, tokenizers):
    tokenizer = tokenizers("chatml")
    whole = tokenizer.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    assert dialogue_tokens(row, tokenizer) == whole
    assert answered_turns(row, tokenizer, [tokenizer.eos_token_id]) == answered_turns({"messages": TURNS}, tokenizer,
                                                                                      [tokenizer.eos_token_id])


def test_finished_answers_at_the_end_of_a_prompt_are_cut(tokenizers):
    tokenizer = tokenizers("chatml")
    assert prompt_tokens({"messages": TURNS}, tokenizer) == prompt_tokens({"messages": TURNS[:3]}, tokenizer)
    with pytest.raises(ValueError, match="nothing but assistant turns"):
        prompt_tokens({"messages": TURNS[1:2]}, tokenizer)


@pytest.mark.parametrize("template", ["chatml", "begins", "thinks"])
def test_each_turn_of_the_assistant_is_an_answer_that_ends_once(template, tokenizers):
    tokenizer, options = tokenizers(template), {"enable_thinking": False} if template == "thinks" else {}
    end = tokenizer.eos_token_id
    turns = answered_turns({"messages": TURNS}, tokenizer, [end], rendering=Rendering(template_options=options))
    assert [tokenizer.decode(answer[:-1]) for _, answer in turns] == ["Hello", "See you"]
    for number, (prompt, answer) in enumerate(turns):
        assert answer[-1] == end and answer.count(end) == 1
        assert prompt == tokenizer.apply_chat_template(TURNS[:2 * number + 1], add_generation_prompt=True, return_dict=True,
                                                       **options)["input_ids"]


def test_an_end_that_is_written_is_not_written_twice(tokenizers):
    tokenizer = tokenizers(None)
    end = tokenizer.eos_token_id
    for response in ("bla", "bla<|im_end|>"):
        (prompt, answer), = answered_turns({"prompt": "a", "response": response}, tokenizer, [0, end])
        assert answer[-1] == end and answer.count(end) == 1, response


def test_a_prompt_that_is_text_is_a_user_turn_where_there_is_a_template_and_it_is_none_yet(tokenizers):
    tokenizer, bare = tokenizers("chatml"), tokenizers(None)
    chat = prompt_tokens({"messages": TURNS[:1]}, tokenizer)
    text = tokenizer(["Hi"], add_special_tokens=False)["input_ids"][0]
    assert prompt_tokens({"prompt": "Hi"}, tokenizer) == chat
    assert prompt_tokens({"prompt": "Hi", "kind": "open"}, tokenizer) == text == prompt_tokens({"prompt": "Hi"}, bare)
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_tokens({"prompt": rendered}, tokenizer) == chat
    assert prompt_tokens({"prompt": "Hi"}, tokenizer, rendering=Rendering("text")) == text
    with pytest.raises(ValueError, match="no chat template"):
        prompt_tokens({"prompt": "Hi"}, bare, rendering=Rendering("chat"))


def test_tools_options_and_calls_reach_the_template(tokenizers):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    tokenizer = tokenizers("tools")
    row = {"messages": [TURNS[0], call, {"role": "tool", "content": "3"}], "tools": tools}
    text = tokenizer.decode(prompt_tokens(row, tokenizer))
    assert text.startswith("1add") and "assistantadd" in text and "None" not in text
    thinking = tokenizers("thinks")
    off = prompt_tokens({"messages": TURNS[:1]}, thinking, rendering=Rendering(template_options={"enable_thinking": False}))
    assert thinking.decode(off).endswith("<think></think>")


def test_developer_is_system_for_templates_that_do_not_know_it(tokenizers):
    developer = [{"role": "developer", "content": "Be short"}, TURNS[0]]
    assert "<|im_start|>system" in tokenizers("chatml").decode(prompt_tokens({"messages": developer}, tokenizers("chatml")))


@pytest.mark.parametrize(("content", "text"), [
    ("a", "a"), (None, ""), ([{"type": "text", "text": "a"}, "b"], "a\nb"), ([], "")])
def test_content_is_flattened_by_one_rule(content, text):
    assert flat_content(content) == text


@pytest.mark.parametrize(("messages", "words"), [
    ([], "one message or more"), ("Hi", "one message or more"), ([{"content": "x"}], "message 0 is not an object with a role"),
    ([TURNS[0], {"role": "user", "content": [{"type": "image_url"}]}], "message 1: content holds a part of type 'image_url'"),
    ([{"role": "user", "content": 3}], "message 0: content is int")])
def test_messages_that_are_none_are_named(messages, words):
    with pytest.raises(ValueError, match=words):
        normal_messages(messages)


def test_a_speaker_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="from: 'alien', expected one of human"):
        row_messages({"conversations": [{"from": "alien", "value": "x"}]})


def said(row, tokenizer) -> list[str]:
    """The runs of tokens that count as the assistant's, as text."""
    ids = dialogue_tokens(row, tokenizer)
    mask = said_by_assistant(row, ids, tokenizer)
    assert len(mask) == len(ids)
    runs, before = [], False
    for token, here in zip(ids, mask, strict=True):
        if here and not before:
            runs.append([])
        if here:
            runs[-1].append(token)
        before = here
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", ["chatml", "begins", "thinks", "tools"])
def test_what_the_assistant_says_is_its_turns_with_their_ends(template, tokenizers):
    assert said({"messages": TURNS}, tokenizers(template)) == ["Hello<|im_end|>", "See you<|im_end|>"]
    assert said({"messages": TURNS[:3]}, tokenizers(template)) == ["Hello<|im_end|>"]
    assert said({"messages": TURNS[:1]}, tokenizers(template)) == []


def test_thoughts_that_a_template_drops_from_history_are_not_looked_for_there(tokenizers):
    turns = [*TURNS[:3], {"role": "assistant", "content": "See you", "reasoning_content": "polite"}]
    assert said({"messages": turns}, tokenizers("forgets")) == ["Hello<|im_end|>", "polite</think>See you<|im_end|>"]


def test_results_of_tools_are_not_said_where_a_template_drops_the_thoughts_before_them(tokenizers):
    turns = [TURNS[0], {"role": "assistant", "content": "look", "reasoning_content": "first"}, {"role": "tool", "content": "4"},
             {"role": "assistant", "content": "It is 4", "reasoning_content": "second"}, *TURNS[2:]]
    assert said({"messages": turns}, tokenizers("forgets")) == ["look<|im_end|>", "It is 4<|im_end|>", "See you<|im_end|>"]


@pytest.mark.parametrize("template", ["tools", "strict"])
def test_calls_of_tools_are_said_and_their_results_are_not(template, tokenizers):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    turns = [TURNS[0], call, {"role": "tool", "content": "4"}, TURNS[3]]
    assert said({"messages": turns}, tokenizers(template)) == ["add<|im_end|>", "See you<|im_end|>"]


@pytest.mark.parametrize("answer", ["\ue000", "A\u0100", "x", "", "one one"])
def test_any_text_may_be_said(answer, tokenizers):
    turns = [TURNS[0], {"role": "assistant", "content": answer}, TURNS[2], {"role": "assistant", "content": answer}]
    assert said({"messages": turns}, tokenizers("chatml")) == [answer + "<|im_end|>"] * 2


def test_an_answer_to_a_text_is_all_that_follows_it(tokenizers):
    tokenizer = tokenizers(None)
    assert said({"prompt": "2 + 2 =", "completion": " 4"}, tokenizer) == [" 4"]
