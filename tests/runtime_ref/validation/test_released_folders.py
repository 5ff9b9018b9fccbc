"""validate.py on folders that this project did not write, in the format of the published release: right, with notes only."""

import json
import os
import shutil

import pytest
import torch
from pace import KERNELS
from released_folders import HIDDEN, write_release
from wrong_folders import config, drafter, edit, edit_json, judged

from runtime_ref import validate

pytestmark = pytest.mark.skipif(KERNELS, reason="of the judgement, not of a backend")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release") / "model", "V2.5-Pro-FP4-DFlash")


@pytest.fixture
def copied(release, tmp_path):
    return shutil.copytree(release, tmp_path / "copy")


@pytest.mark.parametrize("index", [False, True])
def test_a_published_folder_is_right_with_notes_that_name_the_engines(tmp_path, capsys, index):
    folder = write_release(tmp_path / "model", "V2.5-Pro-FP4-DFlash", index=index)
    code, verdict = judged(folder, tmp_path, capsys)
    checks = {c["name"]: c for c in verdict["checks"]}
    assert code == 0 and verdict["verdict"] == "passed" and verdict["causes"] == []
    assert all(c["status"] == "passed" for n, c in checks.items() if n not in ("reference", "text"))
    notes = " ".join(checks["folder"]["notes"])
    assert "layer_types is missing" in notes and "is_causal is missing" in notes and "backbone_rotary_base" in notes
    assert "vLLM" in notes and "SGLang" in notes and "--speculative-draft-window-size 24" in notes
    assert any("checksums" in part for part in verdict["unchecked"])
    assert checks["reference"]["status"] == "unchecked" and "--original" in checks["reference"]["reason"]


def test_a_drafter_that_attends_to_everything_is_right(copied, tmp_path, capsys):
    drafter({"sliding_window": None}, {"use_swa": False})(copied)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 0 and not any("window-size 24" in n for c in verdict["checks"] for n in c["notes"])


def test_what_is_wrong_in_a_published_folder_is_still_found(copied, tmp_path, capsys):
    edit(copied / "model.safetensors", lambda t: t["model.layers.1.mlp.experts.0.up_proj.weight_scale"].fill_(255))
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1 and any("not finite when it was exported" in c for c in verdict["causes"])


def test_only_exports_of_this_project_owe_checksums(copied, tmp_path, capsys):
    (copied / "export.json").write_text(json.dumps({"layout": "native", "drafter": True}))
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1 and any("checksums.sha256 is missing" in f for f in verdict["checks"][0]["findings"])


def test_odd_values_without_a_reference_are_notes(copied, tmp_path, capsys):
    edit(copied / "model.safetensors", lambda t: [t[n].zero_() for n in t if "sink" in n])
    code, verdict = judged(copied, tmp_path, capsys)
    reference = next(c for c in verdict["checks"] if c["name"] == "reference")
    assert code == 0 and any("sinks of the target are zero" in n and "nothing here tells" in n for n in reference["notes"])


@pytest.mark.parametrize("change, named", [
    (drafter({"max_position_embeddings": 64}), "beyond its trained length"),
    (drafter({"layer_types": ["full_attention"] * 2}), "layer_types=['full_attention'"),
])
def test_what_engines_read_differently_is_a_note(copied, tmp_path, capsys, change, named):
    change(copied)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 0 and any(named in n for c in verdict["checks"] for n in c["notes"])


HOSTILE = {
    "a billion layers": config(num_hidden_layers=10**9),
    "a billion experts": config(n_routed_experts=10**9),
    "a billion layers of the drafter": drafter({"num_hidden_layers": 10**9}),
    "more layers of the drafter": drafter({"num_hidden_layers": 7}),
    "a rotary share without bounds": config(partial_rotary_factor=1e308),
    "rope is a number": drafter({"rope_parameters": 5}),
    "rope is a number, scaled": drafter({"rope_scaling": 5}),
    "sizes in words": drafter({"hidden_size": "128", "head_dim": "x"}),
    "a mask embedding that unpacks to 64 MiB": lambda f: torch.save(
        {"mask_token_id": 261, "embedding": torch.zeros(1 << 24)}, f / "dflash" / "mask_embedding.pt"),
    "a pipe for weights": lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")),
    "deep JSON of the drafter": lambda f: (f / "dflash" / "config.json").write_text("[" * 100_000),
    "null bytes": lambda f: (f / "generation_config.json").write_bytes(b"\x00" * 100),
    "an end token of text": lambda f: edit_json(f / "generation_config.json", lambda raw: raw.update(eos_token_id="x")),
    "no tensors": lambda f: edit(f / "model.safetensors", lambda t: t.clear()),
    "empty tensors": lambda f: edit(f / "model.safetensors", lambda t: t.update({f"e{i}": t["lm_head.weight"][:0]
                                                                                 for i in range(5000)})),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_folder_ends_in_findings(copied, tmp_path, capsys, case):
    HOSTILE[case](copied)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1 and verdict["causes"]


TEMPLATES = {
    "does not end": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
    "takes all memory": ("{{ 'a' * 20000000000 }}", "does not end, or takes all memory"),
    "adds text to a number": ("{{ 1 + 'a' }}", "cannot be rendered"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered"),
    "leaves messages out": ("{{ messages[0].content }}", "chat template is not"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_bad_template_is_named_and_hangs_nothing(copied, tmp_path, capsys, monkeypatch, case):
    from runtime_ref.validation.checks import chat_template

    text, named = TEMPLATES[case]
    if "does not end" in named:
        monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    (copied / "chat_template.jinja").write_text(text)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1 and any(named in c for c in verdict["causes"]), verdict["causes"]


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
THINKS = PLAIN + "{% if add_generation_prompt and enable_thinking | default(true) %}<think>{% endif %}"


def test_thinking_that_training_had_off_is_named(copied, tmp_path, capsys):
    (copied / "chat_template.jinja").write_text(THINKS)
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 0 and any("enable_thinking is on" in n for n in verdict["checks"][0]["notes"])
    (copied / "resolved.yaml").write_text("dflash: {regenerate: {template: {enable_thinking: false}}}\n")
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 1 and any("thinking is on when served and was off in training" in c for c in verdict["causes"])
    (copied / "resolved.yaml").write_text("chat: {prompts: auto, template_options: {}}\n")  # the template's own default
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 0 and not any("enable_thinking" in n for n in verdict["checks"][0]["notes"])


def test_a_template_that_rewrites_earlier_turns_is_named(copied, tmp_path, capsys):
    (copied / "chat_template.jinja").write_text(PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ loop.length }}"))
    code, verdict = judged(copied, tmp_path, capsys)
    assert code == 0 and any("masks of the answers come out empty" in n for n in verdict["checks"][0]["notes"])


def test_a_check_that_breaks_is_a_finding(release, tmp_path, capsys, monkeypatch):
    from runtime_ref.validation import folder_run

    def broken(*arguments):
        raise RuntimeError("something\nelse")

    monkeypatch.setattr(folder_run, "check_sampler", broken)
    code, verdict = judged(release, tmp_path, capsys)
    sampling = next(c for c in verdict["checks"] if c["name"] == "sampling")
    assert code == 1 and sampling["findings"] == ["the check broke off: RuntimeError: something"]
    assert next(c for c in verdict["checks"] if c["name"] == "cost")["status"] == "passed"


def test_few_tokens_decide_nothing_about_a_tokenizer(release, tmp_path, capsys):
    prompts, trained = tmp_path / "p.jsonl", tmp_path / "summary.json"
    prompts.write_text(json.dumps({"prompt": "Hi"}))
    trained.write_text(json.dumps({"acceptance": {}}))
    code, verdict = judged(release, tmp_path, capsys, "--prompts", str(prompts), "--trained", str(trained))
    assert code == 0 and next(c for c in verdict["checks"] if c["name"] == "text")["status"] == "passed"


def test_titles_say_what_was_tested(release, copied, tmp_path, capsys):
    shutil.rmtree(copied / "dflash")
    titles = [c["title"] for c in judged(copied, tmp_path, capsys)[1]["checks"]]
    assert not any("drafter" in t for t in titles)
    titles = [c["title"] for c in judged(release, tmp_path, capsys)[1]["checks"]]
    assert any("with the drafter" in t for t in titles)


def test_the_report_says_what_was_judged_when_and_where(release, tmp_path, capsys):
    _, verdict = judged(release, tmp_path, capsys, "--node-hour", "24")
    assert verdict["model"]["architecture"] == "MiMoV2ForCausalLM" and verdict["model"]["hidden size"] == HIDDEN
    assert verdict["environment"]["date"].endswith("UTC") and verdict["environment"]["processor"]
    checks = {c["name"]: c for c in verdict["checks"]}
    assert checks["logits"]["limits"]["logits error"] == 1e-4
    prices = {k: v for k, v in checks["cost"]["numbers"].items() if k.startswith(("price", "projected price"))}
    speed = checks["lossless"]["numbers"]["tokens/s without drafts, one sequence"]
    assert prices["price per million tokens without drafts"] == pytest.approx(24 / 3600 / speed * 1e6)
    assert len(prices) == 3 and "projected tokens/s of 8 x H200" in verdict["projected"]


@pytest.mark.parametrize("wrong", ["0", "-1", "x"])
def test_a_price_must_be_a_price(release, capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        validate.main([str(release), "--node-hour", wrong])
    assert ended.value.code == 2 and "--node-hour" in capsys.readouterr().err
