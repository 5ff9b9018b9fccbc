"""Regenerated answers: resumable, shared out, served by an endpoint, never mixed up; features: exact, bounded, checked."""

import io
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jobs import run_job
from tiny_models import write_tokenizer
from tolerance import MODEL_FP32
from transformers import MixtralConfig, MixtralForCausalLM

from dflash_train import answers, endpoint, features
from dflash_train.answers import answer_file, generate_answers, judge_answers, plan_batches, regenerated
from dflash_train.dialogues import pack, read_jsonl
from dflash_train.features import DiskFeatures, OnlineFeatures, cached_features
from dflash_train.reference_decoding import by_length, generate, in_token_batches, plain
from dflash_train.target import (
    TargetFiles,
    choose_target_layers,
    describe_target,
    load_target,
    mask_token_id,
    norm_scale,
    rotary_base,
    target_files,
)
from recipes.command import own_message
from recipes.load import load_recipe
from training import state_cache


def quiet(text):
    pass


class Rank:
    """One of several processes, as far as answers look at it."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count

    def wait_for_everyone(self):
        pass


def test_answers_come_with_provenance_and_are_the_targets_own(loaded, tmp_path):
    recipe, target, _ = loaded
    made = regenerated(recipe, target, tmp_path, say=quiet)
    path = answer_file(recipe, target, tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(made) == len(rows) == 60 and {r["temperature"] for r in rows} == {0.0, 1.0}
    greedy = [r for r in rows if r["temperature"] == 0][3]
    assert plain(target, greedy["prompt_ids"], max_new_tokens=40, temperature=0.0).tokens == greedy["response_ids"]
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["answers"] == 60 and facts["target"]["kind"] == "ptq"
    assert {"git_revision", "seed", "environment"} <= facts.keys()
    assert facts["tokens"] == sum(len(r["response_ids"]) for r in rows)


def counting(recipe, numbers: list[int]):
    """`generate`, which notes the number of each batch."""
    real = answers.generate

    def noted(*args, generator, **settings):
        numbers.append(generator.initial_seed() - (recipe.seed << 32))
        return real(*args, generator=generator, **settings)

    return noted


def test_an_interrupted_run_continues_and_writes_the_same(loaded, tmp_path, monkeypatch):
    recipe, target, _ = loaded
    generate_answers(recipe, target, tmp_path / "whole.jsonl", say=quiet)
    calls = []
    noted = counting(recipe, calls)

    def dies_at_the_fourth_batch(*args, **settings):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return noted(*args, **settings)

    monkeypatch.setattr(answers, "generate", dies_at_the_fourth_batch)
    with pytest.raises(KeyboardInterrupt):
        generate_answers(recipe, target, tmp_path / "parts.jsonl", say=quiet)
    partial = tmp_path / "parts.rank0.partial"
    with partial.open("a") as file:
        file.write('{"prompt_ids": [1, 2')  # killed while writing
    calls.clear()
    monkeypatch.setattr(answers, "generate", noted)
    generate_answers(recipe, target, tmp_path / "parts.jsonl", say=quiet)
    assert calls == [3, 4, 5, 6, 7]
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()


def test_two_processes_write_what_one_does(loaded, tmp_path):
    recipe, target, _ = loaded
    generate_answers(recipe, target, tmp_path / "one.jsonl", say=quiet)

    for rank in (1, 0):  # the main process merges, after the others
        generate_answers(recipe, target, tmp_path / "two.jsonl", accelerator=Rank(rank, 2), say=quiet)
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_another_number_of_processes_continues_and_answers_nothing_twice(loaded, tmp_path, monkeypatch):
    recipe, target, _ = loaded
    generate_answers(recipe, target, tmp_path / "one.jsonl", say=quiet)
    answered = []
    monkeypatch.setattr(answers, "generate", counting(recipe, answered))
    for rank in (2, 1):  # three processes, of which the main one was killed at once
        generate_answers(recipe, target, tmp_path / "more.jsonl", accelerator=Rank(rank, 3), say=quiet)
    with (tmp_path / "more.rank2.partial").open("a") as file:
        file.write('{"prompt_ids": [1, 2')
    again = (tmp_path / "more.rank1.partial").read_text()
    for rank in (1, 0):
        generate_answers(recipe, target, tmp_path / "more.jsonl", accelerator=Rank(rank, 2), say=quiet)
    assert sorted(answered) == list(range(8))
    assert (tmp_path / "more.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    assert not list(tmp_path.glob("more*.partial"))
    (tmp_path / "more.rank5.partial").write_text(again)  # batches that others have too
    generate_answers(recipe, target, tmp_path / "more.jsonl", say=quiet)
    assert (tmp_path / "more.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_whatever_changes_the_answers_changes_their_file(draft_recipe, loaded, tmp_path):
    _, target, _ = loaded
    overrides = ["seed=4", "dflash.regenerate.max_new_tokens=41", "dflash.regenerate.passes=[{temperature: 0.5}]",
                 "dflash.target=base", "dflash.sequence_length=97"]
    names = {answer_file(load_recipe(draft_recipe, [o]), target, tmp_path).name for o in overrides}
    names.add(answer_file(load_recipe(draft_recipe), target, tmp_path).name)
    assert len(names) == len(overrides) + 1
    assert answer_file(load_recipe(draft_recipe, ["dflash.steps=99"]), target, tmp_path).name in names


def test_the_rule_that_rounds_a_target_changes_its_answers_file(draft_recipe, loaded, tmp_path):
    _, target, _ = loaded
    rules = [f"quantization.scale_rule={rule}" for rule in ("floor", "even", "mse")]
    files = {kind: {answer_file(load_recipe(draft_recipe, [o, f"dflash.target={kind}"]), target, tmp_path).name for o in rules}
             for kind in ("ptq", "base")}
    assert len(files["ptq"]) == 3 and len(files["base"]) == 1  # what is not rounded has no rule


def copied(recipe, checkpoint, folder):
    """`recipe` with a target of its own, to be changed."""
    shutil.copytree(checkpoint, folder)
    return load_recipe(recipe, [f"model.path={folder}"])


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "config.json", "model.safetensors"])
def test_whatever_decides_what_the_target_says_is_in_its_fingerprint(file, draft_recipe, tiny_checkpoint, tmp_path):
    recipe = copied(draft_recipe, tiny_checkpoint, tmp_path / "target")
    before = target_files(recipe).fingerprint()
    assert before == target_files(load_recipe(draft_recipe)).fingerprint()  # wherever it lies
    data = bytearray((tmp_path / "target" / file).read_bytes())
    data[-3:-3] = b" "  # before the last brace, or one more byte among the weights
    (tmp_path / "target" / file).write_bytes(data)
    assert target_files(recipe).fingerprint() != before


def test_a_target_without_its_weights_knows_what_the_loaded_one_does(loaded):
    recipe, target, _ = loaded
    files = target_files(recipe)
    assert (files.end_ids, files.target_layers, files.path) == (target.end_ids, target.target_layers, target.path)
    assert describe_target(files, recipe) == describe_target(target, recipe)


def test_a_name_on_the_hub_is_refused_before_anything_is_loaded(draft_recipe):
    with pytest.raises(ValueError, match=r"^model.path: some/model: no such folder; .*hf download[^\n]*$"):
        load_target(load_recipe(draft_recipe, ["model.path=some/model"]))


def test_a_target_of_which_every_token_has_all_experts_runs_them_as_two_products(draft_recipe, tmp_path):
    """As in training: transformers' loop over experts takes twice the time."""
    torch.manual_seed(1)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=262, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=4, max_position_embeddings=64, eos_token_id=0))
    model.save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    target = load_target(load_recipe(draft_recipe, [f"model.path={tmp_path / 'dense'}", "dflash.target=base"]))
    assert target.model.config._experts_implementation == "all_experts"
    ids = torch.randint(262, (2, 9))
    torch.testing.assert_close(target.head(target.run(ids)[1]), model.eval()(input_ids=ids).logits, **MODEL_FP32)


def test_passes_choose_prompts_and_repeat_them(draft_recipe, prompt_files):
    recipe = load_recipe(draft_recipe, [f"dflash.regenerate.prompts=[{prompt_files['heldout']}]",
                                        "dflash.regenerate.passes=[{samples: 3, where: {kind: open}}]"])
    rows = read_jsonl(recipe.dflash.regenerate.prompts, "k")
    batches = plan_batches(recipe, rows, [[1]] * len(rows))
    chosen = [rows[i]["kind"] for b in batches for i in b.prompts]
    assert chosen == ["open"] * 3 * sum(r["kind"] == "open" for r in rows)
    some = load_recipe(draft_recipe, ["dflash.regenerate.passes=[{prompts: 5}]"])
    assert sorted(i for b in plan_batches(some, rows, [[1]] * 12) for i in b.prompts) == [0, 2, 4, 7, 9]
    wrong = load_recipe(draft_recipe, ["dflash.regenerate.passes=[{where: {kind: opne}}]"])
    with pytest.raises(ValueError, match="matches none of 12 prompts"):
        plan_batches(wrong, rows, [[1]] * len(rows))


class Endpoint(BaseHTTPRequestHandler):
    """The completions route of an OpenAI-compatible server, answered by the target; every prompt is turned away once."""

    target, count, met, lock = None, 0, set(), threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            type(self).count += 1
            known = (prompt := tuple(body["prompt"])) in self.met
            self.met.add(prompt)
        if self.path != "/v1/completions":
            return self.reply(404, {"error": {"message": "no such route"}})
        if not known:  # not every third one: who asks again beside others could meet five of those in a row
            return self.reply(429, {"error": {"message": "busy"}})
        with self.lock:
            tokens = plain(self.target, body["prompt"], max_new_tokens=body["max_tokens"],
                           temperature=body["temperature"]).tokens
        ended = tokens[-1] in self.target.end_ids
        return self.reply(200, {"choices": [{"text": "", "token_ids": tokens[:-1] if ended else tokens,
                                             "finish_reason": "stop" if ended else "length"}]})

    def do_GET(self):
        known = self.path == "/v1/models"
        self.reply(200 if known else 404, {"data": [{"id": "the-model"}]} if known else {"error": {"message": "no such route"}})

    def reply(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(loaded, monkeypatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    Endpoint.target, Endpoint.count, Endpoint.met = loaded[1], 0, set()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()
    httpd.server_close()


GREEDY = "dflash.regenerate.passes=[{temperature: 0.0}]"


def test_a_serving_engine_gives_the_same_answers(draft_recipe, loaded, server, tmp_path):
    _, target, _ = loaded
    here = regenerated(load_recipe(draft_recipe, [GREEDY]), target, tmp_path / "a", say=quiet)
    there = regenerated(load_recipe(draft_recipe, [GREEDY, f"dflash.regenerate.endpoint={server}"]), target, tmp_path / "b",
                        say=quiet)
    assert here == there and Endpoint.count > len(here)


def test_a_server_gets_the_next_batchs_prompts_while_one_answer_of_a_batch_is_still_written(draft_recipe, loaded):
    recipe, later = load_recipe(draft_recipe, [GREEDY, "dflash.regenerate.batch_size=2"]), threading.Event()

    def answer(prompt, temperature, limit, seed):
        if prompt == [0] and not later.wait(20):
            raise TimeoutError("the second batch was not asked for")
        if prompt == [2]:
            later.set()
        return [*prompt, limit]

    batches, ids = [answers.Batch(0, 0, [0, 1]), answers.Batch(1, 0, [2, 3])], [[0], [1], [2], [3]]
    found = list(answers._answered(recipe, loaded[1], batches, ids, SimpleNamespace(answer=answer)))
    assert found == [(batches[0], [[0, 40], [1, 40]]), (batches[1], [[2, 40], [3, 40]])]


@pytest.mark.slow
def test_a_serving_engine_spares_regenerate_the_weights(draft_recipe, loaded, server, tmp_path):
    _, target, _ = loaded
    absent = "import checkpoint.load; checkpoint.load.load_model = None"
    run_job("dflash_train/regenerate.py", draft_recipe, GREEDY, f"dflash.regenerate.endpoint={server}", before=absent)
    recipe = load_recipe(draft_recipe, [GREEDY])
    there = answer_file(recipe, target, Path(recipe.output) / recipe.name / "dflash")
    generate_answers(recipe, target, tmp_path / "here.jsonl", say=quiet)
    assert there.read_text() == (tmp_path / "here.jsonl").read_text()


def test_endpoint_errors_are_one_line_and_lose_nothing(draft_recipe, loaded, server, tmp_path):
    _, target, _ = loaded
    wrong = load_recipe(draft_recipe, [GREEDY, f"dflash.regenerate.endpoint={server}/extra"])
    with pytest.raises(OSError, match=r"extra/models: HTTP 404: .*no such route"):
        regenerated(wrong, target, tmp_path, say=quiet)
    dead = load_recipe(draft_recipe, [GREEDY, "dflash.regenerate.endpoint=http://127.0.0.1:9/v1"])
    with pytest.raises(OSError, match="refused.*run again to continue"):
        regenerated(dead, target, tmp_path, say=quiet)


REPLIES = {
    "no choices": ({"choices": []}, "no usable reply"),
    "an error with 200": ({"error": {"message": "x"}}, "no usable reply"),
    "no JSON": (b"<html>", "no usable reply"),
    "null text": ({"choices": [{"text": None, "finish_reason": "length"}]}, "no usable reply"),
    "negative ids": ({"choices": [{"token_ids": [-1]}]}, "token ids outside"),
    "another vocabulary": ({"choices": [{"token_ids": [10**6]}]}, "token ids outside"),
    "nothing": ({"choices": [{"token_ids": [], "finish_reason": "length"}]}, "an answer without tokens"),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_a_reply_that_is_none_is_tried_again_and_then_one_line(kind, loaded, monkeypatch):
    reply, words = REPLIES[kind]
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    tries = []

    def urlopen(request, timeout):
        tries.append(request)
        return io.BytesIO(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    monkeypatch.setattr(endpoint.urllib.request, "urlopen", urlopen)
    settings = loaded[0].dflash.regenerate.model_copy(update={"endpoint": "http://host/v1", "endpoint_model": "m"})
    with pytest.raises(OSError, match=words) as caught:
        endpoint.Endpoint(settings, loaded[1], quiet).answer([1, 2], 0.0, 4, 0)
    assert len(tries) == endpoint.ATTEMPTS and len(str(caught.value).splitlines()) == 1


def test_the_key_is_sent_ids_are_asked_for_and_the_servers_end_token_is_kept(loaded, monkeypatch):
    seen = []

    def urlopen(request, timeout):
        seen.append(request)
        return io.BytesIO(json.dumps({"choices": [{"token_ids": [5], "finish_reason": "stop", "stop_reason": 9}]}).encode())

    monkeypatch.setattr(endpoint.urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    target = TargetFiles(loaded[1].path, loaded[1].tokenizer, [0, 7, 9], [0], 264)
    settings = loaded[0].dflash.regenerate.model_copy(update={"endpoint": "http://host/v1/", "endpoint_model": "m"})
    assert endpoint.Endpoint(settings, target, quiet).answer([1, 2], 0.0, 4, 0) == [5, 9]
    body = json.loads(seen[0].data)
    assert body["return_token_ids"] is True and seen[0].get_header("Authorization") == "Bearer secret"


def test_each_prompt_has_its_own_room_beside_a_long_one(loaded):
    _, target, _ = loaded
    prompts, limits = [[1] * 10, [2] * 90], [40, 3]
    together = generate(target, prompts, max_new_tokens=limits, temperature=0.0)
    alone = [generate(target, [p], max_new_tokens=n, temperature=0.0)[0] for p, n in zip(prompts, limits, strict=True)]
    assert together == alone
    assert len(together[0]) > 3 and len(together[1]) <= 3


def test_mostly_empty_answers_are_refused_and_some_are_said():
    said, row = [], {"response_ids": [0], "ended": True}
    full = {"response_ids": [5, 0], "ended": True}
    judge_answers([row, full, full | {"ended": False}], [0], said.append)
    assert said == ["3 answers: 1 empty, 1 cut at their limit of tokens"]
    with pytest.raises(ValueError, match="2 of 3 answers are empty; .* chat.prompts"):
        judge_answers([row, row, full], [0])


@pytest.fixture
def packed(loaded, tmp_path):
    recipe, target, _ = loaded
    dialogues = regenerated(recipe, target, tmp_path, say=quiet)
    return target, dialogues, pack(dialogues, 96)


@pytest.mark.parametrize(("size", "tokens"), [(4, 50), (1, 50), (100, 50), (3, 1), (100, 10_000)])
def test_forward_passes_are_bounded_and_take_every_dialogue_once(size, tokens):
    lengths = [7, 3, 50, 12, 12, 1, 60, 3, 25]
    batches = list(in_token_batches(by_length(lengths, lambda n: n), lengths, size, tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens


def test_features_are_those_of_each_dialogue_alone(packed):
    target, dialogues, rows = packed
    target_hidden, last = OnlineFeatures(target, dialogues, rows).of_rows([2, 0])
    for b, r in enumerate((2, 0)):
        for i, begin, size in rows.members[r]:
            alone = target.run(torch.tensor([dialogues[i].tokens[:size]]))
            torch.testing.assert_close(target_hidden[b, begin:begin + size], alone[0][0], **MODEL_FP32)
            torch.testing.assert_close(last[b, begin:begin + size], alone[1][0], **MODEL_FP32)


def test_features_on_disk_are_the_rounded_ones_and_are_written_once(packed, tmp_path):
    target, dialogues, rows = packed
    settings = dict(limit_gib=1, batch_size=7, say=quiet)
    cached = cached_features(target, dialogues, rows, tmp_path / "f", **settings)
    online = OnlineFeatures(target, dialogues, rows)
    for got, want in zip(cached.of_rows([1, 3]), online.of_rows([1, 3]), strict=True):
        torch.testing.assert_close(got.float(), want.bfloat16().float(), rtol=2**-7, atol=1e-4)
    written = (tmp_path / "f" / "000000.taps.bf16").stat().st_mtime_ns
    cached_features(target, dialogues, rows, tmp_path / "f", **settings)
    assert (tmp_path / "f" / "000000.taps.bf16").stat().st_mtime_ns == written


def test_online_features_come_from_bounded_passes_and_are_those_of_one(packed, monkeypatch):
    target, dialogues, rows = packed
    online, real, passes = OnlineFeatures(target, dialogues, rows), features.run_dialogues, []

    def run(target, lists):
        passes.append(lists)
        return real(target, lists)

    monkeypatch.setattr(features, "run_dialogues", run)
    whole = online.of_rows([2, 0, 1])
    assert passes == [[dialogues[i].tokens[:size] for r in (2, 0, 1) for i, _, size in rows.members[r]]]
    monkeypatch.setattr(features, "FORWARD_TOKENS", 100)
    parts = online.of_rows([2, 0, 1])
    assert len(passes) > 2 and all(len(p) == 1 or len(p) * max(map(len, p)) <= 100 for p in passes[1:])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, **MODEL_FP32)


def test_a_disk_without_room_is_told_before_the_target_runs(packed, tmp_path, monkeypatch):
    target, dialogues, rows = packed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(features, "run_dialogues", None)
    with pytest.raises(OSError, match="No space left on device: features take .* [kMG]B") as caught:
        cached_features(target, dialogues, rows, tmp_path / "f", limit_gib=1, batch_size=7, say=quiet)
    assert own_message(caught.value, "").startswith(f"{tmp_path}/f: cannot be read or written: No space left on device")


def test_a_cache_that_was_begun_is_gone_on_with(packed, tmp_path, monkeypatch):
    target, dialogues, rows = packed
    monkeypatch.setattr(state_cache, "PIECE_TOKENS", 200)
    settings = dict(limit_gib=1, batch_size=7, say=quiet)
    whole = cached_features(target, dialogues, rows, tmp_path / "whole", **settings)
    real, passes = features.run_dialogues, []

    def run(target, lists):
        passes.append(lists)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return real(target, lists)

    monkeypatch.setattr(features, "run_dialogues", run)
    with pytest.raises(KeyboardInterrupt):
        cached_features(target, dialogues, rows, tmp_path / "f", **settings)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "f").glob("*.json")}
    found = cached_features(target, dialogues, rows, tmp_path / "f", **settings)
    assert kept and all(p.stat().st_mtime_ns == then for p, then in kept.items())
    for a, b in zip(found.of_rows([0, 1, 2]), whole.of_rows([0, 1, 2]), strict=True):
        assert torch.equal(a, b)


def test_too_large_a_cache_is_refused_before_anything_is_written(packed, tmp_path):
    target, dialogues, rows = packed
    with pytest.raises(ValueError, match="dflash.features_gib: 0.0001, but features of"):
        cached_features(target, dialogues, rows, tmp_path / "f", limit_gib=0.0001, batch_size=7, say=quiet)
    assert not (tmp_path / "f").exists()


def test_a_flipped_bit_in_the_cache_is_found(packed, tmp_path):
    target, dialogues, rows = packed
    cached_features(target, dialogues, rows, tmp_path / "f", limit_gib=1, batch_size=7, say=quiet)
    file = tmp_path / "f" / "000000.last.bf16"
    data = bytearray(file.read_bytes())
    data[1001] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match="last.bf16: CRC-32 .* damaged; remove"):
        DiskFeatures(target, rows, tmp_path / "f")


def test_features_are_the_layers_outputs_in_the_recipes_order(loaded):
    _, target, _ = loaded
    ids = torch.randint(0, 200, (2, 9))
    target_hidden, last = target.run(ids)
    hidden = target.model(input_ids=ids, output_hidden_states=True, use_cache=False, aux_layers=target.target_layers)
    assert torch.equal(target_hidden, torch.cat(hidden.aux_hidden_states, dim=-1))
    assert torch.equal(last, hidden.hidden_states[-1])
    assert target.target_layers == [0, 1, 2]


def test_default_target_layers_are_even_and_include_first_and_last():
    assert choose_target_layers(None, 70) == [0, 17, 34, 52, 69]
    assert choose_target_layers(None, 3) == [0, 1, 2] and choose_target_layers(None, 1) == [0]
    assert choose_target_layers([5, 2], 6) == [5, 2]
    with pytest.raises(ValueError, match="layer 6, but the target has layers 0 to 5"):
        choose_target_layers([6], 6)


def test_the_mask_token_must_exist(loaded):
    tokenizer = loaded[1].tokenizer
    assert mask_token_id(263, tokenizer, 264) == 263
    assert mask_token_id(None, tokenizer, 264) == 257 == len(tokenizer)  # the first entry that no token has
    with pytest.raises(ValueError, match="no mask token and uses every entry"):
        mask_token_id(None, tokenizer, 257)
    for setting, words in (("<|nope|>", "not an entry"), (264, "from 0 to 263"),
                           ("<|endoftext|>", "the tokenizer's eos token"), (70, "an ordinary entry of the vocabulary")):
        with pytest.raises(ValueError, match=words):
            mask_token_id(setting, tokenizer, 264)


@pytest.mark.parametrize(("given", "base"), [
    ({"rope_theta": 5e6}, 5e6), ({"rope_parameters": {"rope_theta": 7e5}}, 7e5), ({}, 1e4),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e6}, "sliding_attention": {"rope_theta": 1e4}}}, 5e6),
    ({"rope_parameters": {"sliding_attention": {"rope_theta": 3e5}}}, 3e5)])
def test_the_rotary_base_is_the_targets_wherever_its_configuration_keeps_it(given, base):
    assert rotary_base(SimpleNamespace(**given)) == base


def test_the_final_norm_is_what_the_target_multiplies_by():
    class OnePlus(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(8))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    plain_norm, other = torch.nn.RMSNorm(8, eps=1e-6), OnePlus()
    torch.nn.init.uniform_(plain_norm.weight)
    assert torch.equal(norm_scale(plain_norm), plain_norm.weight)
    assert torch.equal(norm_scale(other), 1 + other.weight)
    assert norm_scale(torch.nn.LayerNorm(8)) is None and norm_scale(None) is None


def test_older_caches_of_features_make_room_within_the_limit(tmp_path):
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "taps.bf16").write_bytes(bytes(1000))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    said: list[str] = []
    state_cache._make_room(tmp_path / "now", 2500, said.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["middle", "newest"] and len(said) == 1 and "oldest" in said[0]
    state_cache._make_room(tmp_path / "now", 100, said.append)
    assert not list(tmp_path.iterdir())
