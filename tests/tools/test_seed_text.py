"""Properties of the seed's frozen files: text, split, licences, prompts, tokenizer."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tools.seed import build_tokenizer, tasks
from tools.seed.corpus import (
    CODE_SOURCES,
    DOMAINS,
    GENERATED_LICENCE,
    PROSE_SOURCES,
    is_heldout,
    read_frozen,
    strip_licence_header,
)
from tools.seed.more_prompts import more_prompts
from tools.seed.packing import chat_text, read_prompts

SEED = Path(__file__).resolve().parents[2] / "recipes" / "seed"
SIDES = ("train", "heldout")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SEED / "model" / "tokenizer.json"))


def test_the_seed_folder_stays_under_24_megabytes_and_its_drafter_under_7():
    for folder, most in ((SEED, 24_000_000), (SEED.parent / "seed-drafter", 7_000_000)):
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts) <= most


def test_one_to_two_megabytes_of_text_are_frozen():
    total = sum(len(d["text"].encode()) for domain in DOMAINS for side in SIDES for d in read_frozen(domain, side))
    assert 1_000_000 <= total <= 2_000_000


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_document_lies_on_its_side_and_names_source_and_licence(domain, side):
    licences = {"code": CODE_SOURCES, "prose": PROSE_SOURCES}.get(domain, {"generated": GENERATED_LICENCE})
    for document in read_frozen(domain, side):
        assert is_heldout(document["source"]) == (side == "heldout")
        assert document["licence"] == licences[document["source"].split("/")[0]]
        assert document["text"].strip() and not any(s in document["text"] for s in build_tokenizer.SPECIALS)


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_document_is_frozen_twice(domain):
    texts = [d["text"] for side in SIDES for d in read_frozen(domain, side)]
    assert len(texts) == len(set(texts))


def test_the_split_is_a_function_of_the_name_alone():
    names = [f"package/file_{i}.py" for i in range(2000)]
    held = [is_heldout(n) for n in names]
    assert held == [is_heldout(n) for n in names]
    assert 0.02 < sum(held) / len(held) < 0.06


def test_only_a_licence_header_is_cut():
    assert strip_licence_header("# Copyright X\n# Licensed under Y\n\nimport os\n") == "import os\n"
    assert strip_licence_header("# What this does.\nimport os\n") == "# What this does.\nimport os\n"
    assert strip_licence_header("import os  # licence\n") == "import os  # licence\n"


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200))
def test_the_tokenizer_gives_back_every_text(text):
    tokenizer = Tokenizer.from_file(str(SEED / "model" / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    if not any(s in text for s in build_tokenizer.SPECIALS):
        assert min(ids, default=9) >= len(build_tokenizer.SPECIALS)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_first_ids_and_the_vocabulary_2048_entries(tokenizer):
    assert [tokenizer.token_to_id(s) for s in build_tokenizer.SPECIALS] == list(range(6))
    assert tokenizer.get_vocab_size() == build_tokenizer.VOCAB_SIZE


def test_every_digit_is_its_own_token(tokenizer):
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    assert not [p for p in pieces if any(c in string.digits for c in p) and len(p) > 1]


def test_the_mask_token_is_in_no_frozen_text_and_no_prompt(tokenizer):
    texts = [d["text"] for domain in DOMAINS for side in SIDES for d in read_frozen(domain, side)]
    texts += [p["prompt"] for p in read_prompts()]
    mask = tokenizer.token_to_id(build_tokenizer.MASK)
    assert not any(mask in encoding.ids for encoding in tokenizer.encode_batch(texts))


def test_the_chat_template_renders_what_pretraining_saw(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(SEED / "model")
    assert (loaded.eos_token, loaded.pad_token, loaded.mask_token) == build_tokenizer.SPECIALS[:3]
    turns = [{"role": "user", "content": "Compute 1 + 1."}, {"role": "assistant", "content": "2"}]
    assert loaded.apply_chat_template(turns, tokenize=False) == chat_text("Compute 1 + 1.", "2")
    prompt = next(p for p in read_prompts() if p["kind"] == "task")
    user = [{"role": "user", "content": prompt["instruction"]}]
    assert loaded.apply_chat_template(user, tokenize=False, add_generation_prompt=True) == prompt["prompt"]
    ids = loaded.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(prompt["prompt"]).ids


def test_the_chat_template_refuses_an_unknown_role():
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    with pytest.raises(TemplateError, match="unknown role: oracle"):
        AutoTokenizer.from_pretrained(SEED / "model").apply_chat_template([{"role": "oracle", "content": "x"}])


def test_there_are_at_least_64_open_and_100_task_prompts_per_domain():
    for domain in DOMAINS:
        kinds = [p["kind"] for p in read_prompts() if p["domain"] == domain]
        assert kinds.count("open") >= 64 and kinds.count("task") >= 100


def test_heldout_prompts_are_not_among_the_training_prompts():
    heldout, train = read_prompts(), read_prompts("prompts.train.jsonl")
    assert not {p["prompt"] for p in heldout} & {p["prompt"] for p in train}
    assert len({p["id"] for p in heldout + train}) == len(heldout) + len(train)


def test_drawn_prompts_are_new_tasks_and_training_text_and_the_same_each_time():
    drawn, heldout = more_prompts(50, 20, seed=0), {p["prompt"] for p in read_prompts()}
    assert len(drawn) == len(DOMAINS) * 70 and len({p["id"] for p in drawn}) == len(drawn)
    assert not heldout & {p["prompt"] for p in drawn}
    texts = {domain: "\0".join(d["text"] for d in read_frozen(domain, "train")) for domain in DOMAINS}
    for prompt in drawn:
        assert prompt["kind"] == "task" or prompt["prompt"] in texts[prompt["domain"]]
    assert drawn == more_prompts(50, 20, seed=0) != more_prompts(50, 20, seed=1)


def test_open_heldout_prompts_are_cut_from_heldout_documents():
    texts = {d["source"]: d["text"] for domain in DOMAINS for d in read_frozen(domain, "heldout")}
    for prompt in (p for p in read_prompts() if p["kind"] == "open"):
        assert prompt["prompt"] + prompt["reference"] in texts[prompt["source"]]


def test_task_answers_fit_in_the_window_and_follow_the_prompt(tokenizer):
    for prompt in (p for p in read_prompts() if p["kind"] == "task"):
        assert prompt["prompt"] == f"{build_tokenizer.USER}{prompt['instruction']}{build_tokenizer.ASSISTANT}"
        assert 0 < len(tokenizer.encode(prompt["answer"]).ids) < 128


def test_frozen_answers_are_right_by_independent_arithmetic_and_parsing():
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for prompt in (p for p in read_prompts() if p["kind"] == "task" and p["domain"] == "math"):
        if prompt["task"] == "json":
            lines = (line.split(": ", 1) for line in prompt["instruction"].split("\n")[1:])
            assert {k: str(v) for k, v in json.loads(prompt["answer"]).items()} == dict(lines)
        else:
            for line in prompt["answer"].split("\n")[-1:]:
                a, sign, b, _, result = line.split(" ")
                assert operations[sign](int(a), int(b)) == int(result)


def test_rename_and_constant_answers_change_nothing_else():
    for prompt in (p for p in read_prompts() if p["kind"] == "task" and p["domain"] == "code"):
        head, function = prompt["instruction"].split("\n", 1)
        words = head.rstrip(".").replace("`", "").split(" ")
        old, new = (words[1], words[3]) if prompt["task"] == "rename" else (words[3], words[5])
        assert prompt["answer"].replace(new, old) == function.replace(new, old) and prompt["answer"] != function


def test_a_string_seed_reproduces_a_document_and_seeds_differ():
    assert tasks.math_document("a") == tasks.math_document("a") != tasks.math_document("b")


@settings(max_examples=100, deadline=None)
@given(a=st.integers(0, 99999), b=st.integers(0, 99999), digit=st.integers(0, 9))
def test_worked_arithmetic_is_column_arithmetic(a, b, digit):
    high, low = max(a, b), min(a, b)
    for text, result in ((tasks.add_steps(a, b), a + b), (tasks.subtract_steps(high, low), high - low),
                         (tasks.multiply_steps(a, digit), a * digit)):
        *steps, last = text.split("\n")
        digits = "".join(step[-1] for step in reversed(steps))
        carry = steps[-1].split(" = ")[1][:-1] if "-" not in last else ""
        assert int(carry + digits) == result == int(last.split(" = ")[1])


def test_short_functions_are_whole_functions_without_docstrings():
    source = 'class A:\n    def f(self, x):\n        return x\n\n    def g(self):\n        """Doc."""\n        return 1\n'
    assert tasks.short_functions(source) == ["def f(self, x):\n    return x"]
    assert tasks.short_functions("def broken(:\n") == []


def test_the_licence_text_of_every_source_lies_beside_the_text():
    names = {"stdlib": "python", "python3.11": "python"}
    for domain in ("code", "prose"):
        for document in (d for side in SIDES for d in read_frozen(domain, side)):
            source = document["source"].split("/")[0]
            package = names.get(source, source.removeprefix("python-").removesuffix("-doc"))
            assert (SEED / "text" / "licences" / f"{package}.txt").stat().st_size > 500, source
