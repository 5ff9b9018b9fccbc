"""Answers under a grammar, and log-probabilities of prompts: exact with drafts and without."""

import json
import random

import pytest
import torch
from pace import paced

from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine
from runtime_ref.engine.speculative import Proposal, accept

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install -e '.[structured]'")
from runtime_ref.engine.grammar import Constraint, Grammars, json_grammar  # noqa: E402

MANY = 300  # random weights like to say spaces, of which twenty may stand between two words
SCHEMAS = [{"type": "object", "properties": {"a": {"enum": ["x", "yy", 3, None]}, "b": {"type": "boolean"}},
            "required": ["a", "b"], "additionalProperties": False},
           {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 3},
           {"type": "string", "pattern": "^(ab|ba){2,4}$"}, {"const": "naïve 🙂"}]


@pytest.fixture(scope="module")
def speaking(folder):
    """An engine with a tokenizer and a drafter."""
    from checkpoint.load import load_tokenizer
    from tests.runtime_ref.conftest import BACKEND

    return Engine.from_folder(folder, tokenizer=load_tokenizer(folder), **BACKEND)


def texts(engine, params, count=1):
    prompts = [[5, 6, 7 + i] for i in range(count)]
    answers = engine.generate(prompts, [params] * count if not isinstance(params, list) else params)
    return answers, [engine.tokenizer.decode(a, skip_special_tokens=True) for a in answers]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2}],
                         ids=str)
def test_every_answer_fits_and_drafts_change_nothing(speaking, schema, sampling):
    grammar = json_grammar(json.dumps(schema))
    found = {}
    for drafts in (0, None):
        params = [SamplingParams(max_tokens=MANY, seed=i, grammar=grammar, drafts=drafts, **sampling) for i in range(4)]
        found[drafts], said = texts(speaking, params, 4)
        for text in said:
            check(schema, json.loads(text))
    assert found[0] == found[None]


def check(schema, value):
    if "const" in schema:
        assert value == schema["const"]
    elif schema["type"] == "object":
        assert list(value) == ["a", "b"] and value["a"] in ("x", "yy", 3, None) and type(value["b"]) is bool
    elif schema["type"] == "array":
        assert 1 <= len(value) <= 3 and all(type(v) is int and 0 <= v <= 99 for v in value)
    else:
        assert len(value) in (4, 6, 8) and set(value[i:i + 2] for i in range(0, len(value), 2)) <= {"ab", "ba"}


def test_sequences_with_and_without_a_grammar_do_not_touch_each_other(speaking):
    free = SamplingParams(max_tokens=paced(20, 6), ignore_eos=True)
    bound = SamplingParams(max_tokens=MANY, grammar=json_grammar(json.dumps(SCHEMAS[0])))
    alone = [texts(speaking, free)[0][0], texts(speaking, bound)[0][0]]
    together = speaking.generate([[5, 6, 7], [5, 6, 7]], [free, bound])
    assert together == alone


class Known(Constraint):
    """Allows even tokens, then 3, and then nothing."""

    def __init__(self, length):
        self.length, self.taken, self.ended, self.error = length, [], False, ""

    def masked(self, logits):
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[[3] if len(self.taken) >= self.length else slice(0, None, 2)] = True
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token):
        self.taken.append(token)
        self.ended = token == 3


@pytest.mark.parametrize("rule", ["equality", "rejection"])
def test_a_round_under_a_grammar_has_the_constrained_targets_distribution(rule):
    """Chi-square on eight tokens: first and second token of a round, drafts from a distribution that knows no grammar."""
    generator = torch.Generator().manual_seed(3)
    logits, q = torch.randn(3, 8, generator=generator), torch.randn(2, 8, generator=generator).double().softmax(-1)
    rng, counts, n = random.Random(1), torch.zeros(2, 8), 4000
    seconds = 0
    for seed in range(n):
        drafts = [rng.choices(range(8), q[i].tolist())[0] for i in range(2)]
        params = SamplingParams(temperature=1.0, seed=seed, rule=rule, grammar="x")
        tokens = accept(logits, Proposal(drafts, q if rule == "rejection" else None), params, seed, [], [], Known(9)).tokens
        counts[0, tokens[0]] += 1
        if len(tokens) > 1:
            seconds += 1
            counts[1, tokens[1]] += 1
    for row, total in ((0, n), (1, seconds)):
        p = logits[row].double().masked_fill(torch.arange(8) % 2 == 1, -torch.inf).softmax(-1)
        assert counts[row][1::2].sum() == 0
        expected = p[::2] * total
        assert float(((counts[row][::2] - expected) ** 2 / expected).sum()) < 16.3  # 0.1 % of three degrees of freedom


def test_a_round_ends_where_the_grammar_does():
    logits = torch.zeros(8, 8)
    logits[:, 0] = 5.0
    state = Known(2)
    result = accept(logits, Proposal([0, 0, 3, 3, 0, 0, 0]), SamplingParams(grammar="x"), 4, [], [], state)
    assert result.tokens == [0, 0, 3] and state.taken == [0, 0, 3] and result.accepted == 2


def test_a_grammar_that_is_none_is_refused_and_leaves_nothing(speaking):
    for grammar in ("", "{", "start: %", json.dumps({"grammars": [{"json_schema": {"type": "nonsense"}}]})):
        with pytest.raises(ValueError, match="grammar: "):
            speaking.add([5], SamplingParams(grammar=grammar))
    for schema in ('{"type":"nonsense"}', '{"pattern":"("}', "[]", "{", '{"$ref":"http://a/b"}', "5", ""):
        with pytest.raises(ValueError):
            json_grammar(schema)
    assert not speaking.busy


def test_a_grammar_whose_limits_are_reached_ends_its_own_answer_with_an_error(speaking, monkeypatch):
    constraint = Grammars(speaking.tokenizer, speaking.backend.config.vocab_size, speaking.end_ids).begin(json_grammar("{}"))

    class Broken:
        def __init__(self, matcher):
            self.matcher, self.steps = matcher, 0

        def __getattr__(self, name):
            return getattr(self.matcher, name)

        def consume_token(self, token):
            self.steps += 1
            return self.matcher.consume_token(token if self.steps < 3 else 0 if token else 1)

    request = speaking.add([5, 6], SamplingParams(max_tokens=30, grammar=json_grammar('{"const": "a long enough text"}')))
    other = speaking.add([5, 6], SamplingParams(max_tokens=8, ignore_eos=True))
    sequence = speaking._sequences[request]
    sequence.constraint._matcher = Broken(sequence.constraint._matcher)
    finishes = {}
    while speaking.busy:
        finishes |= {o.id: o.finish for o in speaking.step() if o.finish}
    assert finishes == {request: "error", other: "length"} and constraint.error == ""


@pytest.mark.parametrize("length", [1, 2, 63, 64, 100])
@pytest.mark.parametrize("rows", [64, 256])
def test_log_probabilities_of_a_prompt_are_those_that_its_tokens_had_as_answers(make_engine, rows, length):
    """In whatever pieces the prompt is read, and though another sequence has put its beginning into the prefix cache."""
    engine = make_engine(rows=rows)
    answer = paced(length, min(length, 20))
    params = SamplingParams(max_tokens=answer, ignore_eos=True, logprobs=3, temperature=1.0, seed=5)
    known, answers = {}, []
    first = engine.add([5, 6, 7], params)
    while engine.busy:
        for output in engine.step():
            answers += output.tokens
            known |= {len(known) + i: lp for i, lp in enumerate(output.logprobs)}
    assert first is not None and len(known) == answer
    scoring = engine.add([5, 6, 7, *answers], SamplingParams(max_tokens=0, prompt_logprobs=3))
    others = engine.add([9] * 40, SamplingParams(max_tokens=5))
    found = []
    while engine.busy:
        found += [(o.id, o.prompt_logprobs, o.tokens, o.finish) for o in engine.step() if o.id == scoring]
    assert others != scoring and len(found) == 1
    _, logprobs, tokens, finish = found[0]
    assert tokens == [] and finish == "length" and len(logprobs) == 2 + answer
    assert [lp.token for lp in logprobs] == [6, 7, *answers]
    assert logprobs[2:] == [known[i] for i in range(answer)]


def test_a_prompt_of_one_token_has_nothing_to_score(make_engine):
    engine = make_engine()
    engine.add([5], SamplingParams(max_tokens=0, prompt_logprobs=1))
    outputs = engine.step()
    assert [o.finish for o in outputs] == ["length"] and outputs[0].prompt_logprobs == [] and not engine.busy


def test_scoring_goes_on_after_a_preemption(make_engine):
    """Cache for hardly more than one of them at a time."""
    lengths = paced((200, 180, 190), (70, 60, 66))
    whole = make_engine()
    params = SamplingParams(max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    prompts = [[(7 * i * j) % 250 + 1 for j in range(n)] for i, n in enumerate(lengths, 1)]

    def run(engine):
        ids, found = [engine.add(p, params) for p in prompts], {}
        while engine.busy:
            for output in engine.step():
                found.setdefault(output.id, []).extend(output.prompt_logprobs)
        return [found[i] for i in ids]

    pages = {kind: max(2, -(-max(lengths) // 64) + 2) for kind in whole.cache.pools}
    small = make_engine(pages=pages, prefix_pages=0, rows=64)
    assert run(small) == run(whole)


def test_max_tokens_0_needs_something_to_return():
    with pytest.raises(ValueError, match="max_tokens"):
        SamplingParams(max_tokens=0)
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0
