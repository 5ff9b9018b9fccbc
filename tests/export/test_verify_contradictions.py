"""Damage that leaves every part whole by itself: parts that contradict each other or the training, sealed to fit.

The pair of folders has a tokenizer and a chat template on both sides, so that losing or changing them can be told.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from damage import EXPERT, FLOAT, change, cut, holder, json_edit, put, remove, seal, tensor
from safetensors.torch import load_file, save_file

from checkpoint.verify import verify
from modeling.drafter import save_drafter

NORM, ROUTER, TABLE = "model.norm.weight", "model.layers.2.mlp.gate.weight", "model.embed_tokens.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 89}, "merges": []}, "added_tokens": [{"id": 3, "content": "<e>"}]}


@pytest.fixture(scope="module")
def pair(toy_run, exported, tmp_path_factory) -> tuple[Path, Path]:
    """(exported, trained), both with the same companions; must not be changed."""
    root = tmp_path_factory.mktemp("pair")
    folder, trained = shutil.copytree(exported, root / "folder"), root / "trained"
    shutil.copytree(toy_run.parent / "runs/toy/qat/model", trained)
    for home in (folder, trained):
        (home / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (home / "chat_template.jinja").write_text("{{ messages }}")
        (home / "generation_config.json").write_text('{"eos_token_id": [3]}')
    seal(folder)
    return folder, trained


def exchange(a, b):
    """Two tensors, each under the other's name (they may be in different files)."""

    def damage(folder):
        first, second = holder(folder, a), holder(folder, b)
        x, y = load_file(first)[a], load_file(second)[b]
        for path, name, value in ((first, a, y), (second, b, x)):
            tensors = load_file(path)
            save_file(tensors | {name: value.clone()}, path, metadata={"format": "pt"})

    return damage


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def sibling(expert: int, part: str) -> str:
    return EXPERT.replace("experts.0.gate", f"experts.{expert}.{part}")


def exchange_experts(a, b):
    return both(exchange(a, b), exchange(a + "_scale", b + "_scale"))


def duplicate(folder):
    """The tensor's file keeps it, another file has it too, with other values."""
    home = holder(folder, FLOAT)
    other = next(p for p in sorted(folder.glob("model-*.safetensors")) if p != home)
    save_file(load_file(other) | {FLOAT: load_file(home)[FLOAT] * 2}, other, metadata={"format": "pt"})


def negative_zeros(t):
    low = (t & 0xF) == 0
    assert bool(low.any())
    return torch.where(low, t | 8, t)


def another_drafter(folder):
    """The drafter of another run: the right geometry, its own mask embedding, index and weights."""
    from toy_export import toy_config, toy_drafter

    model = toy_drafter(toy_config())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1.5)
    aside = folder.parent / "another"
    save_drafter(model, aside)
    for weights in aside.glob("*.safetensors"):
        shutil.copy(weights, folder / "dflash/dflash_draft_model.safetensors")
    shutil.copy(aside / "mask_embedding.pt", folder / "dflash/mask_embedding.pt")


def config_key(key, value):
    return json_edit("config.json", lambda v: v.__setitem__(key, value))


def more_bytes(folder):
    with next(folder.glob("model-00002-*")).open("ab") as file:
        file.write(b"\0" * 64)


# damage -> what a finding must say; all sealed.
DAMAGE = {
    "two experts exchanged": (exchange_experts(EXPERT, sibling(2, "gate")), f"{EXPERT}: .* weights differ from training"),
    "gate and up exchanged": (exchange_experts(EXPERT, sibling(0, "up")), f"{sibling(0, 'up')}: .* weights differ from"),
    "scale rows in another order": (tensor(EXPERT + "_scale", lambda t: t.flip(0)), f"{EXPERT}: "),
    "scales of another expert": (exchange(EXPERT + "_scale", sibling(3, "gate") + "_scale"),
        f"{EXPERT}: .* differ from training"),
    "zeros that lost their sign": (tensor(EXPERT, negative_zeros), rf"{EXPERT}: .* \(contract C2\)"),
    "one code changed by one": (tensor(EXPERT, lambda t: put(t, int(t.view(-1)[7]) ^ 0x10, 7)),
        f"{EXPERT}: 1 of .* differ|{EXPERT}: "),
    "a tensor in two files": (duplicate, f"{FLOAT}: in two files, model-"),
    "index points to another file": (json_edit("model.safetensors.index.json", lambda v: v["weight_map"].__setitem__(
        FLOAT, next(n for n in v["weight_map"].values() if n != v["weight_map"][FLOAT]))), f"{FLOAT} in model-.* but it is in"),
    "index of another kind": (lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "index.json: cannot be checked|index: cannot be checked"),
    "index map that is a list": (json_edit("model.safetensors.index.json", lambda v: v.__setitem__("weight_map", [1])),
        "cannot be"),
    "norm of another training": (tensor(NORM, lambda t: t * 1.5), f"{NORM}: 96 of 96 values differ from training"),
    "router of another training": (tensor(ROUTER, lambda t: t.flip(0)), f"{ROUTER}: .* values differ from training"),
    "one value of the attention": (tensor(FLOAT, lambda t: put(t, 0.5, 9)),
        f"{FLOAT}: 1 of .* differ from training, the first at"),
    "queries and keys exchanged in part": (tensor("model.layers.1.self_attn.q_proj.weight", lambda t: t.roll(1, 0)),
                                           "model.layers.1.self_attn.q_proj.weight: .* differ from training"),
    "head and embedding exchanged": (exchange("lm_head.weight", TABLE), f"{TABLE}: .* differ from training"),
    "vocabulary rows in another order": (tensor(TABLE, lambda t: torch.cat([t[:-1].flip(0), t[-1:]])),
        f"{TABLE}: .* differ from"),
    "not a number in a norm": (tensor("model.layers.3.input_layernorm.weight", lambda t: put(t, float("nan"))),
                               "model.layers.3.input_layernorm.weight: 1 values are not finite"),
    "infinite correction bias": (tensor("model.layers.2.mlp.gate.e_score_correction_bias", lambda t: put(t, float("inf"))),
                                 "e_score_correction_bias: 1 values are not finite"),
    "infinite sink": (tensor("model.layers.1.self_attn.attention_sink_bias", lambda t: put(t, float("-inf"))),
                      "attention_sink_bias: 1 values are not finite"),
    "smaller vocabulary": (config_key("vocab_size", 80), rf"{TABLE}: shape \[90, 96\], expected \[80, 96\]"),
    "one layer less": (json_edit("config.json", lambda v: v.update(
        num_hidden_layers=3, hybrid_layer_pattern=[0, 1, 1], moe_layer_freq=[0, 1, 1], layer_types=None)),
        "model.layers.3.*: unexpected tensor|config.json"),
    "a window layer called full": (json_edit("config.json", lambda v: v["hybrid_layer_pattern"].__setitem__(1, 0)),
                                   "model.layers.1.self_attn|config.json"),
    "tied embeddings": (config_key("tie_word_embeddings", True), "tie_word_embeddings=true, but lm_head.weight has values"),
    "other rotary base": (config_key("rope_theta", 5e5), "rope_theta=500000.0, trained with 100000.0"),
    "other epsilon": (config_key("layernorm_epsilon", 1e-2), "layernorm_epsilon=0.01, trained with"),
    "other number of experts a token": (config_key("num_experts_per_tok", 3), "num_experts_per_tok=3, trained with 2"),
    "more experts a token than experts": (config_key("num_experts_per_tok", 9), "num_experts_per_tok=9: only 5 experts"),
    "other window": (json_edit("config.json",
        lambda v: v.update(sliding_window=4, sliding_window_size=4, attention_chunk_size=4)),
                     "sliding_window=4, trained with 8"),
    "two windows": (config_key("sliding_window_size", 128), "sliding_window_size=128 differs from sliding_window=8"),
    "two windows in other words": (config_key("attention_chunk_size", 128),
        "attention_chunk_size=128 differs from sliding_window=8"),
    "other dtype": (config_key("dtype", "float16"), "dtype='float16', the weights are bfloat16"),
    "number as text": (config_key("num_hidden_layers", "4"), "config.json"),
    "a billion experts": (config_key("n_routed_experts", 10**9), "describes 4 layers of 1,000,000,000 experts"),
    "end of text beyond the vocabulary": (config_key("eos_token_id", 90), "config.json: eos_token_id=90: expected a row"),
    "generation stops at another token": (json_edit("generation_config.json", lambda v: v.__setitem__("eos_token_id", [5])),
                                          "generation_config.json: differs from the trained checkpoint's"),
    "generation stops at no token": (json_edit("generation_config.json", lambda v: v.__setitem__("eos_token_id", [3, 400])),
                                     "generation_config.json: eos_token_id=400"),
    "chat template lost": (remove("chat_template.jinja"), "chat_template.jinja: missing, the trained checkpoint has it"),
    "chat template of another model": (lambda f: (f / "chat_template.jinja").write_text("{{ x }}"),
        "chat_template.jinja: differs"),
    "tokenizer larger than the embedding": (json_edit("tokenizer.json", lambda v: v["model"]["vocab"].__setitem__("z", 90)),
                                            "tokenizer.json: has the token id 90, the embedding has 90 rows"),
    "added token beyond the embedding": (json_edit("tokenizer.json", lambda v: v["added_tokens"].append({"id": 7000})),
        "id 7000"),
    "tokenizer list": (json_edit("tokenizer.json", lambda v: v["model"].__setitem__("vocab", [["a", 0.0]] * 91)),
        "token id 90"),
    "drafter of another run": (another_drafter, r"row 89 \(mask token\) is not the vector of dflash/mask_embedding.pt"),
    "drafter index lists too little": (json_edit("dflash/model.safetensors.index.json",
        lambda v: v["weight_map"].pop("fc.weight")),
                                       "dflash/model.safetensors.index.json: does not list fc.weight"),
    "drafter index names a lost file": (json_edit("dflash/model.safetensors.index.json", lambda v: v["weight_map"].__setitem__(
        "fc.weight", "gone.safetensors")), "dflash: .* says that fc.weight is in gone.safetensors, and it is not"),
    "drafter denied": (json_edit("export.json", lambda v: v.__setitem__("drafter", False)),
        "says there is no drafter, but dflash/"),
    "another class": (config_key("architectures", ["LlamaForCausalLM"]), r"architectures=\['LlamaForCausalLM'\], expected"),
    "code under another name": (json_edit("config.json", lambda v: v["auto_map"].__setitem__("AutoConfig", "x.Y")),
                                "config.json: auto_map=.*'x.Y'"),
    "code cut short": (cut("modeling_mimo_v2.py", 20001),
                       "modeling_mimo_v2.py: has no class MiMoV2ForCausalLM|modeling_mimo_v2.py: not"),
    "drafter's code cut short": (lambda f: (f / "dflash/dflash.py").write_text("def f(:"),
                                 "dflash/dflash.py: not Python, line 1"),
    "card without front matter": (lambda f: (f / "README.md").write_text("# a model"), "README.md: .*no front matter"),
    "front matter that is no YAML": (lambda f: (f / "README.md").write_text("---\na: [1\n---\n"),
                                     "README.md: .*front matter is not YAML"),
    "an empty file that hides the index": (lambda f: save_file({}, f / "model.safetensors"),
        "model.safetensors: model.safetensors.index.json does not name it"),
    "other rotary share": (config_key("partial_rotary_factor", 0.25), "partial_rotary_factor=0.25, trained with 0.5"),
    "other window base": (config_key("swa_rope_theta", 7e4), "swa_rope_theta=70000.0, trained with"),
    "a key lost": (json_edit("config.json", lambda v: v.pop("attention_value_scale")),
                   "attention_value_scale is missing, trained with 0.612"),
    "drafter of another class": (json_edit("dflash/config.json", lambda v: v.__setitem__("architectures", ["Qwen3Model"])),
                                 r"dflash: architectures=\['Qwen3Model'\]"),
    "drafter with full attention below": (json_edit("dflash/config.json", lambda v: v.__setitem__("max_window_layers", 2)),
                                          "dflash: max_window_layers=2, expected 0"),
    "drafter with two rotary bases": (json_edit("dflash/config.json", lambda v: v.__setitem__("rope_theta", 1e4)),
                                      "dflash: rope_theta=10000.0 contradicts dflash_config"),
    "drafter with a third rotary base": (json_edit("dflash/config.json", lambda v: v["dflash_config"].__setitem__(
        "backbone_rotary_base", 1e4)), "contradicts dflash_config.backbone_rotary_base, which has 10000.0"),
    "bytes after the last tensor": (more_bytes, "model-00002-.*: cannot be opened"),
    "a folder in place of the card": (lambda f: ((f / "README.md").unlink(), (f / "README.md").mkdir()), "README.md: missing"),
}


def test_the_pair_is_whole(pair):
    assert verify(*pair).findings == []


@pytest.mark.parametrize("kind", DAMAGE)
def test_contradictions_are_found_and_named(kind, pair, tmp_path):
    damage, pattern = DAMAGE[kind]
    folder = tmp_path / "copy"
    shutil.copytree(pair[0], folder)
    damage(folder)
    if kind != "bytes after the last tensor":  # no longer a file that can be read for a seal
        seal(folder)
    findings = verify(folder, pair[1]).findings
    assert any(re.search(pattern, finding) for finding in findings), findings


def test_sums_of_an_earlier_export_are_named(pair, tmp_path):
    """checksums.json left over: lists a tensor that is gone; checksums.sha256 left over: every changed file."""
    folder = tmp_path / "copy"
    shutil.copytree(pair[0], folder)
    change(FLOAT, lambda t, n: t.__setitem__("model.layers.2.self_attn.o_proj.old", t.pop(n)))(folder)
    findings = verify(folder, pair[1]).findings
    assert f"checksums.json: lists {FLOAT}, which is in no file" in findings
    assert any("bytes changed since the export (SHA-256 differs)" in f for f in findings)
    assert any(f.endswith("o_proj.old: no checksum in checksums.json") for f in findings)


LAYOUTS = {
    "compressed-tensors": ("config_groups", lambda v: v["config_groups"]["group_0"]["weights"].__setitem__("group_size", 16)),
    "hf-fp8": ("modules_to_not_convert", lambda v: v["modules_to_not_convert"].remove("lm_head")),
    "gpt-oss": ("modules_to_not_convert", lambda v: v.__setitem__("modules_to_not_convert", [])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_layout_promises_its_client_is_checked(layout, toy_run, tmp_path):
    from toy_export import export, gpt_oss_run

    recipe = gpt_oss_run(tmp_path)[0] if layout == "gpt-oss" else toy_run
    folder = export(recipe, f"export.layout={layout}", out=tmp_path / "out")
    key, edit = LAYOUTS[layout]
    json_edit("config.json", lambda v: edit(v["quantization_config"]))(folder)
    seal(folder)
    findings = verify(folder).findings
    assert any(f"config.json: quantization_config.{key}=" in finding for finding in findings), findings


@pytest.mark.parametrize("damage", [tensor(QKV + "_scale_inv", lambda t: t.flip(0)), tensor(QKV, lambda t: t.roll(1, 0)),
                                    tensor(QKV + "_scale_inv", lambda t: t * 2)])
def test_fp8_matrices_are_the_trained_ones_within_half_a_step(damage, toy_run, tmp_path):
    from toy_export import export

    folder, trained = export(toy_run, "export.dense=fp8", out=tmp_path / "out"), toy_run.parent / "runs/toy/qat/model"
    assert verify(folder, trained).findings == []
    damage(folder)
    seal(folder)
    findings = verify(folder, trained).findings
    assert any(f"{QKV}: " in f and "are not the trained ones rounded to FP8" in f for f in findings), findings
