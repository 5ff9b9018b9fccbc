"""The `openai` package gets what the engine says, in every form in which it can ask."""

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from pace import paced, seconds

from runtime_ref.core.sampling_params import SamplingParams

MODEL = "small"
MANY, FEW, WAIT = paced(40, 10), paced(20, 6), seconds(30)
PLAIN = {"prompt": [5, 6, 7], "max_tokens": FEW, "ignore_eos": True, "seed": 11, "return_token_ids": True, "speculate": False}
MESSAGES = [{"role": "system", "content": "count"}, {"role": "user", "content": "one, zwei, 三"}]


def chat_prompt(tokenizer, messages=MESSAGES):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_greedy_chat_is_the_engines_answer_with_and_without_drafts(client, tokenizer, alone):
    expected = alone(chat_prompt(tokenizer), SamplingParams(max_tokens=MANY))
    for speculate in (True, False):
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=MANY,
                                                extra_body={"return_token_ids": True, "speculate": speculate})
        assert isinstance(answer, ChatCompletion)
        choice = answer.choices[0]
        assert choice.token_ids == expected
        assert answer.prompt_token_ids == chat_prompt(tokenizer)
        assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.usage.completion_tokens == len(expected)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected)


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_stream_adds_up_to_the_whole_answer(client, kind):
    options = {"model": MODEL, "temperature": 1.0, "seed": 5, "max_tokens": MANY, "n": 2}
    if kind == "chat":
        make, piece, whole = client.chat.completions.create, lambda c: c.delta.content or "", lambda c: c.message.content
        options["messages"] = MESSAGES
    else:
        make, piece, whole = client.completions.create, lambda c: c.text, lambda c: c.text
        options["prompt"] = ["first", "the second"]
    expected = make(**options)
    texts, ended, usages = {}, {}, []
    for chunk in make(**options, stream=True, stream_options={"include_usage": True}):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + piece(choice)
            ended[choice.index] = choice.finish_reason
    assert texts == {c.index: whole(c) for c in expected.choices}
    assert ended == {c.index: c.finish_reason for c in expected.choices}
    assert set(usages[:-1]) == {None} and usages[-1] == expected.usage


def test_choice_i_of_n_is_the_answer_of_seed_plus_i(client):
    many = client.completions.create(model=MODEL, prompt="abc", seed=11, n=3, max_tokens=FEW, temperature=1.0)
    each = [client.completions.create(model=MODEL, prompt="abc", seed=11 + i, max_tokens=FEW, temperature=1.0)
            for i in range(3)]
    assert [c.text for c in many.choices] == [e.choices[0].text for e in each]
    assert len({c.text for c in many.choices}) == 3


def test_a_seed_repeats_and_no_seed_does_not(client):
    def ask(**more):
        return client.completions.create(model=MODEL, prompt="abc", max_tokens=FEW, temperature=1.0, **more).choices[0].text

    assert ask(seed=-3) == ask(seed=-3)
    assert len({ask() for _ in range(4)}) > 1


def test_a_prompt_is_the_same_as_text_tokens_and_lists_of_them(client, tokenizer):
    text = "naïve 🙂"
    tokens = tokenizer.encode(text)
    forms = [client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=FEW)
             for p in (text, tokens, [text, text], [tokens, tokens])]
    assert [len(f.choices) for f in forms] == [1, 1, 2, 2]
    assert len({c.text for f in forms for c in f.choices}) == 1
    assert [f.usage.prompt_tokens for f in forms] == [len(tokens)] * 2 + [2 * len(tokens)] * 2


def test_chat_logprobs_hold_the_bytes_of_the_answer_and_are_sorted(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=FEW, logprobs=True,
                                            top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == FEW
    data = bytes(b for token in content for b in token.bytes)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content
    for token in content:
        values = [t.logprob for t in token.top_logprobs]
        assert values == sorted(values, reverse=True) and len(values) == 3
        assert token.logprob == values[0] and token.bytes == token.top_logprobs[0].bytes  # greedy: the best one
        assert token.logprob <= 0


def test_completion_logprobs_are_those_of_the_chat_and_the_same_in_a_stream(client, tokenizer):
    prompt = chat_prompt(tokenizer)
    options = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": FEW, "logprobs": 2}
    whole = client.completions.create(**options).choices[0].logprobs
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=FEW, logprobs=True)
    assert whole.token_logprobs == [t.logprob for t in chat.choices[0].logprobs.content]
    parts = [c.choices[0].logprobs for c in client.completions.create(**options, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for p in parts for x in getattr(p, name)] == getattr(whole, name)


def test_an_answer_ends_before_a_stop_string(client):
    options = {"model": MODEL, "prompt": "q", "temperature": 1.0, "seed": 2, "max_tokens": 60,
               "extra_body": {"ignore_eos": True}}
    full = client.completions.create(**options).choices[0].text
    stop = full[20:23]
    assert len(stop) == 3
    for streamed in (False, True):
        found = client.completions.create(**options, stop=[stop, "never"], stream=streamed)
        text = "".join(c.choices[0].text for c in found) if streamed else found.choices[0].text
        assert text == full[:full.index(stop)]
    assert client.completions.create(**options, stop=stop).choices[0].finish_reason == "stop"


def test_the_end_token_ends_unless_it_is_ignored(client, alone):
    prompts = [[i, 17] for i in range(1, 200)]
    prompt = next(p for p in prompts if 0 in alone(p, SamplingParams(max_tokens=60, temperature=1.0, seed=4, ignore_eos=True)))
    options = {"model": MODEL, "prompt": prompt, "temperature": 1.0, "seed": 4, "max_tokens": 60}
    ended = client.completions.create(**options)
    assert ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens < 60
    going = client.completions.create(**options, extra_body={"ignore_eos": True})
    assert going.choices[0].finish_reason == "length" and going.usage.completion_tokens == 60


def test_max_completion_tokens_is_max_tokens_and_chats_may_fill_the_context(client, tokenizer):
    def length(**limit):
        return client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True},
                                              **limit).usage.completion_tokens

    assert length(max_tokens=7) == length(max_completion_tokens=7) == 7
    assert length() == 256 - len(chat_prompt(tokenizer))


def test_echo_repeats_the_prompt_before_the_answer(client):
    options = {"model": MODEL, "prompt": ["ab", "cd"], "temperature": 0, "max_tokens": 5}
    plain = [c.text for c in client.completions.create(**options).choices]
    assert [c.text for c in client.completions.create(**options, echo=True).choices] == ["ab" + plain[0], "cd" + plain[1]]
    streamed = ["", ""]
    for chunk in client.completions.create(**options, echo=True, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == ["ab" + plain[0], "cd" + plain[1]]


def test_usage_on_every_chunk_counts_up_to_the_whole(client, tokenizer):
    chunks = list(client.completions.create(model=MODEL, prompt="abc", max_tokens=9, stream=True, extra_body={
        "ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 9
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {len(tokenizer.encode("abc"))}


def test_fields_without_effect_are_accepted(client):
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=3, user="me", extra_body={
        "store": False, "metadata": {"a": "b"}, "best_of": 1, "suffix": None, "use_beam_search": False, "length_penalty": 1.0,
        "whatever": None})
    assert answer.usage.completion_tokens == 3


def test_metrics_of_an_answer_agree_with_the_server(client, live):
    live.until_empty()  # of what other tests began
    names = [f"vllm:spec_decode_num_{n}_total" for n in ("drafts", "draft_tokens", "accepted_tokens")]
    before = [live.metric(n) for n in names]
    spoken = live.metric("vllm:generation_tokens_total")
    answer = client.completions.create(model=MODEL, prompt="count", temperature=0, max_tokens=MANY,
                                       extra_body={"adaptive_drafts": False, "ignore_eos": True})
    own = answer.metrics["speculative_decoding"]
    assert own["num_drafts"] > 0
    assert [live.metric(n) - b for n, b in zip(names, before, strict=True)] == [
        own["num_drafts"], own["num_draft_tokens"], own["num_accepted_tokens"]]
    assert live.metric("vllm:generation_tokens_total") - spoken == MANY
    assert live.metric("vllm:spec_decode_num_accepted_tokens_per_pos_total") == live.metric(names[2])


def test_models_are_listed_by_name(client):
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


@pytest.mark.parametrize("change, error, param", [
    ({"model": "gpt"}, openai.NotFoundError, "model"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
    ({"n": 0}, openai.BadRequestError, "n"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "pirate", "content": "x"}]}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "messages"),
    ({"stop": [""]}, openai.BadRequestError, "stop"),
])
def test_a_mistake_is_the_clients_own_error_with_the_field(client, change, error, param):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 4} | change)
    assert caught.value.body["param"] == param
    assert param in caught.value.body["message"] and "\n" not in caught.value.body["message"]


def test_a_request_without_a_temperature_is_sampled_at_one(live, alone):
    found = httpx.post(f"{live.url}/v1/completions", json=PLAIN, timeout=WAIT).json()["choices"][0]["token_ids"]
    assert found == alone([5, 6, 7], SamplingParams(max_tokens=FEW, ignore_eos=True, seed=11, temperature=1.0))
    assert found != alone([5, 6, 7], SamplingParams(max_tokens=FEW, ignore_eos=True))


def test_what_the_checkpoint_recommends_holds_where_a_request_says_nothing(serving, alone):
    server = serving(defaults={"temperature": 0.0, "top_k": 3})

    def tokens(**more):
        return httpx.post(f"{server.url}/v1/completions", json=PLAIN | more, timeout=WAIT).json()["choices"][0]["token_ids"]

    assert tokens() == alone([5, 6, 7], SamplingParams(max_tokens=FEW, ignore_eos=True))
    assert tokens(temperature=1.0) == alone([5, 6, 7], SamplingParams(max_tokens=FEW, ignore_eos=True, seed=11, temperature=1.0,
                                                                      top_k=3))


@pytest.mark.parametrize("content, expected", [
    ('{"temperature": 0.6, "top_p": 0.9, "top_k": -1, "do_sample": false, "eos_token_id": 0}',
     {"temperature": 0.6, "top_p": 0.9, "top_k": 0}),
    ('{"temperature": true, "top_p": null}', {}), ('{"temperature": -1}', ValueError), ("{", ValueError), ("[]", ValueError)])
def test_of_generation_config_only_usable_numbers_are_defaults(tmp_path, content, expected):
    from runtime_ref.serve import sampling_defaults

    (tmp_path / "generation_config.json").write_text(content)
    if expected is ValueError:
        with pytest.raises(ValueError, match="generation_config.json"):
            sampling_defaults(tmp_path)
    else:
        assert sampling_defaults(tmp_path) == expected
