"""What a client sends reaches the template, or is refused; the prompt is transformers' own."""

import json

import pytest

from runtime_ref.server.chat_template import render
from runtime_ref.server.openai_requests import BadRequest, ChatRequest, check_names, validate

# In the manner of the families that this runtime serves: what they read, not how they word it.
TOOLS = """{%- if tools %}<|system|># Tools
{%- for tool in tools %}
{{ tool | tojson }}{%- endfor %}
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|user|><tool_response>{{ message.content }}</tool_response>
{%- else %}<|{{ message.role }}|>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments":
{{- call.function.arguments | tojson }}}</tool_call>{% endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}"""
CHANNELS = """{%- for message in messages %}<|start|>{{ message.role }}{% if message.name %} ({{ message.name }}){% endif %}
{%- if message.thinking %}<|channel|>analysis<|message|>{{ message.thinking }}{% endif %}<|message|>{{ message.content }}<|end|>
{%- endfor %}{% if add_generation_prompt %}<|start|>assistant (effort {{ reasoning_effort or 'medium' }}){% endif %}"""
FUNCTION = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Köln", "n": 2}'}}
HISTORY = [{"role": "user", "content": "w?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
           {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "rain"}, {"role": "user", "content": "so?"}]


@pytest.fixture
def with_template(tokenizer, monkeypatch):
    def make(template):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return make


def asked(messages, **more):
    return validate(ChatRequest, {"messages": messages, **more})


def prompt(tokenizer, messages, **more):
    return render(tokenizer, asked(messages).messages, **more)


def test_calls_and_their_results_reach_the_template_as_transformers_wants_them(with_template):
    tokenizer = with_template(TOOLS)
    plain = json.loads(json.dumps(HISTORY))
    plain[1]["content"] = ""
    plain[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Köln", "n": 2}
    expected = tokenizer.apply_chat_template(plain, tools=[FUNCTION], tokenize=False, add_generation_prompt=True)
    found = prompt(tokenizer, HISTORY, tools=[FUNCTION])
    assert found == expected
    assert '"arguments":{"city": "Köln", "n": 2}' in found and "<tool_response>rain" in found and "None" not in found


def test_what_a_template_does_not_read_is_refused_by_name(tokenizer):
    for message, name in (({"role": "assistant", "content": "", "tool_calls": [CALL]}, "tool_calls"),
                          ({"role": "assistant", "content": "a", "reasoning_content": "hm"}, "reasoning_content"),
                          ({"role": "assistant", "content": "a", "reasoning": "hm"}, "reasoning_content"),
                          ({"role": "user", "content": "a", "name": "bob"}, "name"),
                          ({"role": "tool", "content": "a", "tool_call_id": "c"}, "role: 'tool'")):
        with pytest.raises(BadRequest, match=r"messages\[1\]\..*does not read it") as caught:
            prompt(tokenizer, [{"role": "user", "content": "x"}, message])
        assert name in str(caught.value) and caught.value.param == "messages"
    with pytest.raises(BadRequest, match="tools: .* does not read"):
        prompt(tokenizer, [{"role": "user", "content": "x"}], tools=[FUNCTION])


def test_reasoning_goes_under_the_name_that_the_template_reads(with_template):
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "because"}]
    assert "<think>because</think>a" in prompt(with_template(TOOLS), turn)
    assert "analysis<|message|>because" in prompt(with_template(CHANNELS), turn)
    assert "(bob)" in prompt(with_template(CHANNELS), [{"role": "user", "content": "q", "name": "bob"}])


@pytest.mark.parametrize("arguments, said", [("{", "not valid JSON"), ("[1]", "list, expected a JSON object"),
                                             ('"x"', "str, expected"), ("[" * 9999, "not valid JSON")])
def test_arguments_that_are_no_object_are_refused(with_template, arguments, said):
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(BadRequest, match=said):
        prompt(with_template(TOOLS), [turn])


def test_the_developer_is_the_system_where_a_template_does_not_know_one(tokenizer, with_template):
    turn = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "x"}]
    assert prompt(tokenizer, turn) == "<|system|>be brief<|user|>x<|assistant|>"
    assert prompt(with_template(TOOLS + "{# developer #}"), turn).startswith("<|developer|>be brief")


def test_an_open_turn_is_continued_and_not_closed(tokenizer):
    turn = [{"role": "user", "content": "2 + 0?"}, {"role": "assistant", "content": "2 + 0"}]
    assert prompt(tokenizer, turn, add_generation_prompt=False, continue_final_message=True).endswith("<|assistant|>2 + 0")
    assert prompt(tokenizer, turn, add_generation_prompt=False).endswith("2 + 0<|endoftext|>")
    with pytest.raises(BadRequest, match="not together"):
        prompt(tokenizer, turn, continue_final_message=True)
    with pytest.raises(BadRequest, match="the user's, expected the assistant's"):
        prompt(tokenizer, turn[:1], add_generation_prompt=False, continue_final_message=True)


def test_switches_of_the_template_work_and_others_are_refused(with_template):
    tokenizer, turn = with_template(TOOLS), [{"role": "user", "content": "x"}]
    assert prompt(tokenizer, turn, variables={"enable_thinking": False}).endswith("<think></think>")
    for wrong in ({"enable_thinkin": False}, {"tokenize": True}, {"chat_template": "x"}, {"a b": 1}, {"messages": []}):
        with pytest.raises(BadRequest, match="is no variable of this checkpoint's chat template"):
            prompt(tokenizer, turn, variables=wrong)
    assert "effort high" in prompt(with_template(CHANNELS), turn, variables={"reasoning_effort": "high"})


def test_parts_stand_on_lines_of_their_own_and_null_is_empty(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt(tokenizer, [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]) == (
        "<|user|>a\nb<|assistant|><|endoftext|><|assistant|>")


def test_several_templates_are_told_apart(with_template):
    tokenizer = with_template({"default": "plain {{ messages[0].content }}", "tool_use": "{{ tools|length }} tools"})
    assert prompt(tokenizer, [{"role": "user", "content": "x"}]) == "plain x"
    assert prompt(tokenizer, [{"role": "user", "content": "x"}], tools=[FUNCTION]) == "1 tools"


REFUSED = [{"best_of": 3}, {"use_beam_search": True}, {"guided_json": {}}, {"structured_outputs": {"json": {}}},
           {"bad_words": ["a"]}, {"allowed_token_ids": [1]}, {"include_stop_str_in_output": True},
           {"truncate_prompt_tokens": 5}, {"prompt_embeds": "x"},
           {"thinking": {"type": "enabled"}}, {"prompt_logprobs": 0}, {"functions": [{}]}, {"function_call": "auto"},
           {"length_penalty": 0.5}, {"logits_processors": ["x"]}, {"web_search_options": {}}, {"modalities": ["audio"]},
           {"chat_template": "{{ x }}"}, {"documents": [{}]}, {"return_tokens_as_token_ids": True}, {"typical_p": 0.9},
           # nobody knows these, or they are misspelled
           {"temprature": 0}, {"mirostat": 2}, {"grammar": "x"}, {"top-p": 0.5}, {"n_predict": 5}, {"": 1}, {"x" * 5000: 1},
           {"messages": [{"role": "user", "content": "x", "contnet": "y"}]}, {"stream_options": {"include": True}},
           {"tools": [FUNCTION | {"functon": 1}]}, {"response_format": {"type": "text", "scheme": {"a": 1}}},
           {"messages": [{"role": "assistant", "tool_calls": [CALL | {"args": {"a": 1}}]}]}]


@pytest.mark.parametrize("field", REFUSED, ids=lambda f: next(iter(f))[:30])
def test_a_field_that_could_change_the_answer_is_refused_by_name(field):
    name, value = next(iter(field.items()))
    with pytest.raises(BadRequest) as caught:
        validate(ChatRequest, {"messages": [{"role": "user", "content": "x"}], **field})
    assert name[:20] in str(caught.value) and len(str(caught.value)) < 300
    assert caught.value.code in ("unsupported_parameter", "unknown_parameter")
    if caught.value.code == "unknown_parameter":
        check_names(ChatRequest, {"messages": [], **field}, unknown=True)  # --ignore-unknown-fields


ACCEPTED = [{"best_of": 1}, {"best_of": None}, {"use_beam_search": False}, {"suffix": ""}, {"length_penalty": 1.0},
            {"user": "u"},
            {"metadata": {"a": "b"}}, {"store": True}, {"logit_bias": {"5": -100}}, {"functions": []}, {"max_tokens": 16.0},
            {"seed": 1.0}, {"modalities": ["text"]}, {"n": 1.0},
            {"stream": True, "stream_options": {"include_obfuscation": False}},
            {"messages": [{"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None,
                           "function_call": None, "tool_calls": None}]}]


@pytest.mark.parametrize("field", ACCEPTED, ids=str)
def test_a_field_that_asks_for_nothing_is_accepted(field):
    validate(ChatRequest, {"messages": [{"role": "user", "content": "x"}], **field})


def test_numbers_with_a_fraction_are_no_whole_numbers():
    for field in ({"max_tokens": 16.5}, {"seed": 1e300}, {"n": 1.0000001}, {"max_tokens": True}, {"logit_bias": {"5": "1"}}):
        with pytest.raises(BadRequest):
            validate(ChatRequest, {"messages": [{"role": "user", "content": "x"}], **field})
