"""validate.py on folders that exporters, downloads and configurations get wrong: found, and named where it can be known."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from pace import KERNELS
from safetensors.torch import load_file
from wrong_folders import (
    config,
    drafter,
    drafter_file,
    edit,
    edit_json,
    faults,
    judged,
    mask_of,
    target,
    without_effect,
    write_reference,
)

from runtime_ref import validate
from runtime_ref.validation.diagnosis.fault_table import drafter_faults, target_faults
from runtime_ref.validation.diagnosis.faults import matching_faults
from runtime_ref.validation.diagnosis.model_view import view_of

ROOT = Path(__file__).resolve().parents[3]


def exchanged(pairs):
    def change(tensors):
        for one, other in pairs:
            for name in [n for n in tensors if one in n]:
                partner = name.replace(one, other)
                tensors[name], tensors[partner] = tensors[partner], tensors[name]

    return target(change)


def experts(order, layers=None):
    def change(tensors):
        old = dict(tensors)
        for layer in layers or sorted({int(n.split(".")[2]) for n in old if ".mlp.experts." in n}):
            for e, place in enumerate(order):
                for name in [n for n in old if f"layers.{layer}.mlp.experts.{e}." in n]:
                    tensors[name] = old[name.replace(f"experts.{e}.", f"experts.{place}.")]

    return target(change)


def ones(name):
    return target(lambda t: t[name].fill_(1))


def rolled(name):
    return target(lambda t: t.update({name: t[name].roll(1, 0)}))


def sinks_elsewhere(tensors):
    last = max(int(n.split(".")[2]) for n in tensors if ".layers." in n)  # a full layer, which has none
    for name in [n for n in tensors if "layers.2." in n and "sink" in n]:
        tensors[name.replace("layers.2.", f"layers.{last}.")] = tensors.pop(name)


def norms_on_a_grid(tensors):
    """Norms of which one can be taken without rounding."""
    for name in [n for n in tensors if "norm" in n]:
        tensors[name] = (tensors[name].float() * 256).round().div(256).to(tensors[name].dtype)


def target_layers_exchanged(folder):
    edit_json(folder / "dflash" / "config.json", lambda raw: raw["dflash_config"].update(
        target_layer_ids=[raw["dflash_config"]["target_layer_ids"][i] for i in (1, 0)]
        + raw["dflash_config"]["target_layer_ids"][2:]))


def half(tensors):
    for name in [n for n in tensors if tensors[n].dtype == torch.bfloat16]:
        tensors[name] = tensors[name].half()


def narrow_bias(tensors):
    for name in [n for n in tensors if "correction" in n]:
        tensors[name] = tensors[name].bfloat16()


def shuffled(tensors):
    for name in [n for n in tensors if tensors[n].ndim == 2]:
        tensors[name] = tensors[name].flip(0)


def one_expert_for_all(tensors):
    for name in [n for n in tensors if ".experts.5." in n]:
        tensors[name] = tensors[name.replace(".experts.5.", ".experts.2.")].clone()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def both(*changes):
    def apply(folder):
        for change in changes:
            change(folder)

    return apply


def generation(**values):
    return lambda folder: edit_json(folder / "generation_config.json", lambda raw: raw.update(values))


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


WRONG = {
    "gate and up of one layer": (exchanged([(f"layers.2.mlp.experts.{e}.gate_proj", f"layers.2.mlp.experts.{e}.up_proj")
                                            for e in range(8)]), "gate and up projections of the experts are exchanged (in"),
    "experts reversed": (experts([7, 6, 5, 4, 3, 2, 1, 0]), "experts are in another order"),
    "two experts of a layer": (experts([0, 1, 2, 6, 4, 5, 3, 7], (3,)), "(3 and 6 are exchanged)"),
    "an expert under two names": (target(one_expert_for_all), "copies of each other"),
    "epsilon of the norms": (config(layernorm_epsilon=1e-4), "wrong epsilon of the norms"),
    "norms exchanged": (exchanged([("input_layernorm", "post_attention_layernorm")]), "input_layernorm and post"),
    "norms as differences from one": (both(target(norms_on_a_grid), write_reference, target(
        lambda t: [t[n].sub_(1) for n in t if "norm" in n])), "differences from 1"),
    "layers exchanged": (exchanged([("layers.1.", "layers.2.")]), "layers 1 and 2 are exchanged"),
    "experts per token": (config(num_experts_per_tok=3), "num_experts_per_tok"),
    "factor of the experts": (config(routed_scaling_factor=2.5), "routed_scaling_factor"),
    "correction bias in bfloat16": (target(narrow_bias), "correction bias was rounded"),
    "half precision": (target(half), "another dtype than published"),
    "tied by configuration": (config(tie_word_embeddings=True), "tie_word_embeddings is true"),
    "final norm": (ones("model.norm.weight"), "final norm of the target"),
    "head off by a row": (rolled("lm_head.weight"), "rows of the head are off by one"),
    "embedding off by a row": (rolled("model.embed_tokens.weight"), "rows of the embedding are off by one"),
    "sinks on another layer": (target(sinks_elsewhere), "sinks are on other layers"),
    "a weight that is not finite": (target(lambda t: t["lm_head.weight"].view(-1)[5:6].fill_(float("nan"))), "not finite"),
    "a drafter's weight that is not": (drafter_file(lambda t: t["fc.weight"][:1].fill_(float("inf"))), "not finite"),
    "scales of 16": (target(lambda t: t.update({n: t[n].repeat_interleave(2, 1) for n in t if n.endswith("_scale")})), "NVFP4"),
    "truncated": (truncated, "damaged or truncated"),
    "another drafter": (drafter_file(shuffled), "another drafter's"),
    "a drafter of another depth": (drafter({"num_target_layers": 48}), "made for another target"),
    "target layers in another order": (target_layers_exchanged, "in another order"),
    "block size in all aliases": (drafter({"block_size": 4}, {"block_size": 4}), "block size"),
    "mask id off by one": (both(drafter(special={"mask_token_id": 261}), mask_of(lambda s: s | {"mask_token_id": 261})),
                           "the mask token's id is off"),
    "end token out of range": (generation(eos_token_id=9999), "end at the wrong token"),
    "temperature below zero": (generation(temperature=-1), "generation_config.json cannot be used"),
    "template of another family": (template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"),
                                   "chat template is not"),
    "template that fails": (template("{{ messages[0].a.b }}"), "cannot be rendered"),
    "another layout": (config(model_type="gpt_oss", quantization_config={"quant_method": "mxfp4"}), "another layout"),
}


@pytest.mark.parametrize("bug", faults(WRONG, {"gate and up of one layer", "target layers in another order", "another layout",
                                               "a drafter's weight that is not"}))
def test_a_wrong_folder_is_found_and_named(copied, tmp_path, capsys, bug):
    inject, cause = WRONG[bug]
    inject(copied)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1
    assert any(cause in c for c in verdict["causes"]), verdict["causes"]


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


UNREADABLE = {
    "config is a list": text("config.json", b"[]"), "config is no text": text("config.json", b"\xff\xfe\x00"),
    "config is deep": text("config.json", b"[" * 100_000), "no config": lambda f: (f / "config.json").unlink(),
    "heads in quotes": config(num_attention_heads="8"), "quantization is a list": config(quantization_config=[1]),
    "index is a number": text("model.safetensors.index.json", b'{"weight_map": 3}'),
    "index is empty": text("model.safetensors.index.json", b"{}"),
    "index of another export": text("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors"}}'),
    "index names a lost shard": text("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'),
    "weights are empty": text("model.safetensors", b""), "drafter's config is a list": text("dflash/config.json", b"[]"),
    "drafter's config is no JSON": text("dflash/config.json", b"x"),
    "target layers are text": drafter(special={"target_layer_ids": "a"}),
    "no mask token": drafter(special={"mask_token_id": None}), "no heads": drafter({"num_attention_heads": 0}),
    "sidecar is no pickle": text("dflash/mask_embedding.pt", b"x"),
    "sidecar is a tensor": lambda f: torch.save(torch.zeros(64), f / "dflash" / "mask_embedding.pt"),
    "reference is empty": text("dflash/dflash_reference.safetensors", b""),
    "generation is no JSON": text("generation_config.json", b"{"), "tokenizer is no JSON": text("tokenizer.json", b"{"),
    "drafter without config": lambda f: (f / "dflash" / "config.json").unlink(),
}


@pytest.mark.parametrize("bug", UNREADABLE)
def test_an_unreadable_folder_fails_with_a_cause_and_without_a_traceback(copied, tmp_path, capsys, bug):
    UNREADABLE[bug](copied)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1 and verdict["causes"]


@pytest.mark.long
def test_every_failed_check_has_a_cause_and_every_skipped_one_a_reason(copied, tmp_path, capsys):
    edit(copied / "model.safetensors", shuffled_values)
    _, verdict = judged(copied, tmp_path, capsys)
    for check in verdict["checks"]:
        assert check["causes"] if check["status"] == "failed" else check["status"] == "passed" or check["reason"]


def shuffled_values(tensors):
    for name in [n for n in tensors if "layers.2." in n and n.endswith("down_proj.weight")]:
        tensors[name] = tensors[name].flip(0)


@pytest.mark.long
def test_a_file_that_was_changed_after_the_export_is_named(copied, tmp_path, capsys):
    sums = {str(f.relative_to(copied)): hashlib.sha256(f.read_bytes()).hexdigest() for f in copied.rglob("*") if f.is_file()}
    (copied / "checksums.sha256").write_text("".join(f"{s}  {n}\n" for n, s in sums.items()))
    assert judged(copied, tmp_path, capsys)[0] == 0
    raw = bytearray((copied / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copied / "model.safetensors").write_bytes(raw)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1 and "model.safetensors" in verdict["checks"][0]["findings"][0]
    assert any("not the one that was exported" in c for c in verdict["causes"])


def exchange_tokens(raw):
    """Every token but the special ones gets another one's id."""
    vocabulary, special = raw["model"]["vocab"], {token["content"] for token in raw["added_tokens"]}
    names = [name for name in vocabulary if name not in special]
    ids = [vocabulary[name] for name in names]
    vocabulary.update(zip(names, ids[len(ids) // 2:] + ids[:len(ids) // 2], strict=True))


def test_a_tokenizer_of_another_model_is_found_by_what_the_model_expects(copied, tmp_path, capsys):
    prompts, trained = tmp_path / "p.jsonl", tmp_path / "summary.json"
    prompts.write_text(json.dumps({"prompt": "def f(x):\n    return x + 1\n" * 3}))
    trained.write_text(json.dumps({"acceptance": {}}))
    if KERNELS:  # the embedded model expects text, but not with its tokens exchanged; random weights expect none
        edit_json(copied / "tokenizer.json", exchange_tokens)
    code, verdict = judged(copied, tmp_path, capsys, "--prompts", str(prompts), "--trained", str(trained))
    assert code == 1 and any("tokenizer is not this model's" in c for c in verdict["causes"])


@pytest.mark.parametrize("content, said", [
    (b"", "no prompts"), (b"\xff\xfe", "not UTF-8"), (b"{", "not valid JSON"), (b"[1]", "expected an object"),
    (b'{"prompt": ""}', "empty prompt"), (b'{"prompt": 5}', "neither"), (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"messages": [{"role": 3}]}', "messages")])
def test_a_bad_file_of_prompts_is_one_line_and_code_2(exported, tmp_path, capsys, content, said):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    assert validate.main([str(exported), "--prompts", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and str(file) in error and "Traceback" not in error


def test_long_and_foreign_prompts_are_cut_and_answered(exported, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p}) for p in ("word " * 5000, "\u6771\u4eac \U0001f600", "\u0000\u200f")))
    code, verdict = judged(exported, tmp_path, capsys, "--prompts", str(file), "--prompts-per-domain", "3")
    lossless = next(c for c in verdict["checks"] if c["name"] == "lossless")
    assert code == 0 and lossless["numbers"]["prompts"] == 3 and "1 prompt cut" in lossless["notes"][0]


@pytest.mark.load
@pytest.mark.skipif(os.environ.get("FP4_LOAD") != "1", reason="starts two ranks: make test-load")
def test_several_ranks_check_their_own_shares(exported, tmp_path):
    file = tmp_path / "v.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, ROOT / "runtime_ref/validate.py", exported, "--tokens", "8", "--prompts-per-domain", "2",
         "--json", file], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    ops = next(c for c in json.loads(file.read_text())["checks"] if c["name"] == "ops")
    assert ops["status"] == "passed" and ops["numbers"]["ranks"] == 2
    assert {"project_full", "attend_window", "experts", "add_parts", "head"} <= {row[1] for row in ops["tables"]["ops"]}


def test_the_page_has_a_figure_for_each_measurement_and_needs_nothing_else(exported, tmp_path, capsys):
    judged(exported, tmp_path, capsys)
    page = (tmp_path / "v.html").read_text()
    figures = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    assert len(figures) == 3
    for figure in figures:
        drawn = ElementTree.fromstring(figure)
        assert sum(e.tag == "path" for e in drawn.iter()) > 10 and "nan" not in figure.lower()
    assert not any(mark in page for mark in ("http", "src=", "<script", "@import"))
    assert not re.search(r"url\((?!#)|href=\"(?!#)", page)
    assert "limit" in page and "projected" in page and "UTC" in page


def test_what_a_folder_says_is_escaped_on_the_page():
    from runtime_ref.validation.html_report import page
    from runtime_ref.validation.result import Check, ValidationReport

    check = Check("folder", "<i>title</i>")
    check.fail("<script>alert(1)</script>", "<b>cause</b>")
    check.tables["a table with %"] = [["name", "share"], ["<u>", 0.25]]
    text = page(ValidationReport("<img>", [check], {"date": "<s>"}, {"base": "<q>"}))
    assert not any(mark in text for mark in ("<script", "<i>", "<b>cause", "<u>", "<img>", "<s>", "<q>")) and "25.0%" in text


@pytest.mark.skipif(KERNELS, reason="of the faults and a random model: no backend runs")
def test_every_fault_can_be_tried_and_changes_what_it_says(exported):
    from checkpoint.load import load_model
    from modeling.drafter import load_drafter

    model = load_model(exported, dtype=torch.float32)
    assert set(without_effect(model, target_faults(model.config), 1e4, 1e3, 1e-5, 1.0, 8)) <= {"swiglu clamp"}
    drafter = load_drafter(exported / "dflash", torch.float32)
    names = [s.name for s in (*target_faults(model.config), *drafter_faults(drafter, drafter.mask_embedding))]
    assert len(names) == len(set(names))


@pytest.mark.skipif(KERNELS, reason="of the faults and a random model: no backend runs")
@pytest.mark.parametrize("key, wrong", [("rope_theta", 37_000.0), ("layernorm_epsilon", 3e-3), ("attention_value_scale", 0.83),
                                        ("sliding_window", 11), ("num_experts_per_tok", 5)])
def test_a_number_that_no_list_has_is_searched_for_and_told(exported, key, wrong):
    """Of a model whose configuration has another number, seen through its logits alone."""
    from checkpoint.load import load_model

    right, other = load_model(exported, dtype=torch.float32), load_model(exported, dtype=torch.float32)
    ids = torch.randint(0, 260, (1, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        set_number(view_of(other), key, wrong)
        observed = other(input_ids=ids).logits[0]
    found = matching_faults(right, target_faults(right.config), lambda m: m(input_ids=ids).logits[0], observed)
    assert len(found) == 1 and key in found[0].cause
    assert float(found[0].name.rpartition("=")[2]) == pytest.approx(wrong, rel=1e-2)


def set_number(view, key, value):
    {"rope_theta": view.rotary_base, "layernorm_epsilon": view.epsilon, "attention_value_scale": view.value_scale,
     "sliding_window": lambda n: view.windows(lambda _: n), "num_experts_per_tok": view.choose}[key](value)


def test_the_reference_of_the_test_is_whole(exported):
    assert "target_logits" in load_file(exported / "dflash" / "dflash_reference.safetensors")
