"""Drafters beside any layout: z-lab's form that vLLM and SGLang load, the format of speculators, and drafters of others in."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy_export import export, gpt_oss_run, make_run, plain_drafter, published_drafter, qwen3_run, toy_config

from checkpoint.drafter_folder import grouping_note, speculators_config
from checkpoint.verify import verify
from modeling.drafter import config_json, drafter_config, load_drafter, save_drafter


def run_of(family, root):
    """(recipe, target's layers) of a run with a drafter."""
    if family == "mimo":
        recipe, layers = make_run(root, drafter=False), 4
    else:
        recipe, layers = (qwen3_run if family == "qwen3" else gpt_oss_run)(root)[0], 2
    save_drafter(plain_drafter(96, layers), root / "runs/toy/dflash/model")
    return recipe


@pytest.mark.parametrize("family, layout", [("mimo", "native"), ("mimo", "hf-fp8"), ("mimo", "compressed-tensors"),
                                            ("mimo", "bf16"), ("qwen3", "compressed-tensors"), ("qwen3", "bf16"),
                                            ("gpt-oss", "gpt-oss"), ("gpt-oss", "bf16")])
def test_a_drafter_is_written_beside_every_layout_with_a_reference_of_its_target(family, layout, tmp_path):
    out = export(run_of(family, tmp_path), f"export.layout={layout}", "export.speculators=true")
    found = verify(out, tmp_path / "runs/toy/qat/model")
    assert found.findings == [] and found.unchecked == []
    # One full and one window layer: vLLM has no room for two of a drafter in one group of its cache.
    assert [note.engines for note in found.notes] == ([("vLLM",)] if family == "gpt-oss" else [])
    drafter = load_drafter(out / "dflash")
    trained = load_drafter(tmp_path / "runs/toy/dflash/model")
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), trained.parameters(), strict=True))
    reference = load_file(out / "dflash/dflash_reference.safetensors")
    assert reference["target_logits"].shape[-1] == 90 and torch.isfinite(reference["taps"]).all()
    config = json.loads((out / "dflash/config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["dflash_config"]["mask_token_id"] == 89
    ours = json.loads((out / "dflash-speculators/config.json").read_text())
    layers = config["dflash_config"]["target_layer_ids"]
    assert ours["aux_hidden_state_layer_ids"] == [i + 1 for i in layers] and ours["sliding_window_non_causal"]
    assert load_file(out / "dflash-speculators/model.safetensors").keys() == load_file(
        out / "dflash/dflash_draft_model.safetensors").keys()


def test_a_tied_target_keeps_its_row_and_the_mask_has_its_file(tmp_path):
    recipe = make_run(tmp_path, config=toy_config(tie_word_embeddings=True))
    out = export(recipe)
    found = verify(out, tmp_path / "runs/toy/qat/model")
    assert found.findings == [] and any("tied" in f.text and f.kind == "mask" for f in found.notes)


@pytest.mark.parametrize("pattern, layers, window, runs", [
    ([0, 1, 1, 1, 0], 2, 16, True), ([0, 1, 1, 1, 0], 3, 16, False),  # as run: tests/export/test_vllm_client.py
    ([0] * 10 + [1] * 60, 5, 16, True), ([0] * 10 + [1] * 60, 11, 16, False), ([0, 1, 0, 1, 0, 1], 4, 16, True),
    ([0, 0], 3, 16, False), ([0, 0], 2, 16, True), ([0, 0], 3, None, True),
    # Its layers are as the target's full ones are.
    ([0] * 10 + [1] * 60, 5, None, True), ([0] * 10 + [1] * 4, 5, None, False), ([0, 1] * 12, 5, None, True)])
def test_a_drafter_that_vllm_cannot_group_is_told_with_the_depth_that_it_can(pattern, layers, window, runs):
    target = SimpleNamespace(hybrid_layer_pattern=pattern, num_hidden_layers=len(pattern), hidden_size=96,
                             num_attention_heads=4, num_key_value_heads=2, swa_num_key_value_heads=4, sliding_window=8)
    config = config_json(plain_drafter(96, len(pattern), num_hidden_layers=layers, window=window).config)
    note = grouping_note(config, target)
    assert (note is None) == runs
    if not runs:
        most = int(re.search("at most ([0-9]+) layers", note)[1])
        assert most < layers and grouping_note(config | {"num_hidden_layers": most}, target) is None


@pytest.mark.parametrize("change, name", [({"attention_sink_bias": True}, "attention_sink_bias"),
                                          ({"attention_value_scale": 0.5}, "attention_value_scale"),
                                          ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
                                          ({"markov_rank": 4}, "markov_rank"),
                                          ({"causal": True, "window": None}, "causal")])
def test_what_the_format_of_speculators_cannot_say_is_refused_by_name(change, name):
    with pytest.raises(ValueError, match=f"export.speculators: the drafter has {name}"):
        speculators_config(config_json(plain_drafter(96, 4, **change).config), "..", None)


@pytest.mark.parametrize("overrides, pushed, named", [
    ([], None, ".."), ([], "Some-Org/Pushed", "Some-Org/Pushed"),
    (["export.speculators_target=Some-Org/Named"], "Some-Org/Pushed", "Some-Org/Named")])
def test_the_target_that_speculators_looks_up_is_the_named_one_or_the_one_pushed_to(overrides, pushed, named, tmp_path):
    out = export(run_of("qwen3", tmp_path), "export.speculators=true", *overrides, push=pushed)
    config = json.loads((out / "dflash-speculators/config.json").read_text())
    assert config["speculators_config"]["verifier"] == {"name_or_path": named, "architectures": ["Qwen3MoeForCausalLM"]}


@pytest.mark.clients
@pytest.mark.parametrize("inside", [True, False], ids=["from within the folder", "from anywhere"])
def test_speculators_loads_what_we_write(inside, tmp_path, monkeypatch):
    """Its own classes: the configuration, and the model with every tensor in its place, the target's too."""
    speculators = pytest.importorskip("speculators", reason="speculators is not on the path: make test-clients")
    own = [] if inside else [f"export.speculators_target={tmp_path / 'out'}"]
    out = export(run_of("qwen3", tmp_path), "export.speculators=true", *own)
    folder = out / "dflash-speculators"
    config = speculators.SpeculatorModelConfig.from_pretrained(str(folder))
    assert config.block_size == 8 and config.aux_hidden_state_layer_ids == [1, 2]
    layer = config.transformer_layer_config
    assert layer.sliding_window == 16 and set(layer.layer_types) == {"sliding_attention"}
    monkeypatch.chdir(folder if inside else tmp_path)
    loaded = speculators.SpeculatorModel.from_pretrained("." if inside else str(folder)).state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(loaded[name].to(tensor.dtype), tensor), name
    assert {n for n in loaded if n.startswith("layers.")} <= load_file(folder / "model.safetensors").keys()
    target = {n: t for file in out.glob("model*.safetensors") for n, t in load_file(file).items()}
    assert torch.equal(loaded["embed_tokens.weight"].to(torch.bfloat16), target["model.embed_tokens.weight"])
    assert torch.equal(loaded["lm_head.weight"].to(torch.bfloat16), target["lm_head.weight"])


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3"])
def test_the_card_has_the_drafter_in_vllms_command_where_vllm_can_group_its_layers(family, tmp_path):
    card = (export(run_of(family, tmp_path)) / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("vllm serve"))
    assert "--speculative-draft-model-path PATH/dflash" in card  # SGLang's
    assert command.endswith("\\") == (family == "qwen3") == ('"method": "dflash"' in card)
    assert ("at most 1 layers runs there" in card) == (family == "gpt-oss")


@pytest.fixture
def other(tmp_path):
    from dflash_train.target import _earlier_drafter

    table = torch.randn(90, 96)
    expected = drafter_config(hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=24, vocab_size=90, target_layer_ids=[0, 3], num_target_layers=4,
                            mask_token_id=89, rotary_base=1e5, window=None, attention_sink_bias=False)
    return lambda folder: (_earlier_drafter(folder, expected, table), table)


def test_a_published_drafter_without_a_sidecar_is_started_from_with_the_targets_row(other, tmp_path):
    folder, model = published_drafter(tmp_path / "z-lab")
    found, table = other(folder)
    assert torch.equal(found.mask_embedding, table[89])
    assert torch.equal(found.fc.weight, model.fc.weight.bfloat16().float())
    assert found.config.dflash_config["causal"] is False  # saved again, it says everything in every spelling
    assert verify(folder).verdict == "right"


@pytest.mark.parametrize("edit, words", [
    (lambda c: c["dflash_config"].__setitem__("new_trick", True), "dflash_config.new_trick: a flag that is not known here"),
    (lambda c: c.__setitem__("layer_types", ["sliding_attention", "full_attention"]), "expected one kind in all layers"),
    (lambda c: c["dflash_config"].__setitem__("mask_token_id", 5), "mask_token_id is 5, the recipe's drafter has 89"),
    (lambda c: c.__setitem__("rope_theta", 1e4), "rotary base is 10000.0, the recipe's drafter has 100000.0"),
])
def test_what_differs_or_is_not_known_of_a_published_drafter_is_named(edit, words, other, tmp_path):
    folder, _ = published_drafter(tmp_path / "z-lab")
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"dflash.start_from: .*{words}"):
        other(folder)
