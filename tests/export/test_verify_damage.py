"""Every kind of damage to a checkpoint is found, named, and never a crash."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import (
    EXPERT,
    FLOAT,
    change,
    cut,
    flip_bit,
    json_edit,
    mask,
    put,
    remove,
    rename_tensor,
    seal,
    shift_target_layers,
    swap_files,
    swap_nibbles,
    tensor,
)
from jobs import run_alone, run_job

from checkpoint.verify import verify

ROOT = Path(__file__).resolve().parents[2]
# damage -> what a finding must say. With `sealed` the checksums are made to fit afterwards: an exporter's own mistake.
DAMAGE = {
    "flipped bit of codes": (tensor(EXPERT, flip_bit), f"{EXPERT}: bytes changed", False),
    "flipped bit of a float tensor": (tensor(FLOAT, flip_bit), f"{FLOAT}: bytes changed", False),
    "flipped bit of the drafter": (tensor("dflash/fc.weight", flip_bit), "dflash: fc.weight: bytes changed", False),
    "swapped nibbles": (tensor(EXPERT, swap_nibbles), f"{EXPERT}: ", True),
    "codes of another expert": (change(EXPERT, lambda t, n: t.__setitem__(n, t[n].roll(1, 0))), f"{EXPERT}: ", True),
    "scale of 255": (tensor(EXPERT + "_scale", lambda t: put(t, 255)), f"{EXPERT}_scale: 1 scales are 255", True),
    "scale that overflows": (tensor(EXPERT + "_scale", lambda t: put(t, 254)), "overflows bf16", True),
    "scales shifted by one block": (tensor(EXPERT + "_scale", lambda t: t.roll(1, 1)), f"{EXPERT}: ", True),
    "scales one too high": (tensor(EXPERT + "_scale", lambda t: t + 1), "differ from training", True),
    "block below the rule's maximum": (tensor(EXPERT, lambda t: put(t, 0, slice(0, 16)).bitwise_or(
        torch.zeros_like(t).index_fill_(0, torch.tensor([0]), 0x11))), "largest magnitude is below 4 units", True),
    "codes as int8": (tensor(EXPERT, lambda t: t.view(torch.int8)), f"{EXPERT}: dtype I8, expected U8", True),
    "scales as floats": (tensor(EXPERT + "_scale", lambda t: t.float()), f"{EXPERT}_scale: dtype F32, expected U8", True),
    "bf16 stored as float32": (tensor(FLOAT, lambda t: t.float()), f"{FLOAT}: dtype F32, expected BF16", True),
    "transposed matrix": (tensor(FLOAT, lambda t: t.T), f"{FLOAT}: shape", True),
    "rows lost": (tensor(EXPERT, lambda t: t[:-1]), f"{EXPERT}: shape", True),
    "tensor lost": (change(EXPERT, lambda t, n: t.pop(n)), f"{EXPERT}: tensor is missing", True),
    "tensor too many": (change(EXPERT, lambda t, n: t.__setitem__("model.extra", torch.ones(2))), "model.extra: unexpected",
                        True),
    "scale by another name": (change(EXPERT, lambda t, n: t.__setitem__(n + "_scale_inv", t.pop(n + "_scale"))),
                              f"{EXPERT}_scale: tensor is missing", True),
    "not a number": (tensor(FLOAT, lambda t: put(t, float("nan"))), f"{FLOAT}: 1 values are not finite", True),
    "infinite norm": (tensor("model.norm.weight", lambda t: put(t, float("inf"))), "model.norm.weight: 1 values", True),
    "norm of zeros": (tensor("model.norm.weight", torch.zeros_like), "model.norm.weight: a norm", True),
    "file cut short": (cut("model-00002-*.safetensors", -7), "model-00002-of", False),
    "file cut in its header": (cut("model-00002-*.safetensors", 100), "model-00002-of", False),
    "file of no bytes": (cut("model-00002-*.safetensors", 0), "model-00002-of", False),
    "file lost": (lambda f: next(f.glob("model-00003-*")).unlink(), "model-00003-of", False),
    "two files exchanged": (swap_files, "but it is in", True),
    "index lost": (remove("model.safetensors.index.json"), "model.safetensors.index.json", True),
    "index lists too much": (json_edit("model.safetensors.index.json", lambda v: v["weight_map"].__setitem__("ghost", "a")),
                             "lists ghost", True),
    "index lists too little": (json_edit("model.safetensors.index.json", lambda v: v["weight_map"].pop(FLOAT)),
                               f"does not list {FLOAT}", True),
    "wrong total size": (json_edit("model.safetensors.index.json", lambda v: v["metadata"].__setitem__("total_size", 1)),
                         "total_size 1", True),
    "config lost": (remove("config.json"), "config.json", False),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json:1: not valid JSON", True),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "not UTF-8", True),
    "config without quantization": (json_edit("config.json", lambda v: v.pop("quantization_config")), "quant_method=None",
                                    True),
    "other store dtype": (json_edit("config.json", lambda v: v["quantization_config"].__setitem__("store_dtype", "fp8")),
                          "store_dtype='fp8'", True),
    "other block size": (json_edit("config.json", lambda v: v["quantization_config"].__setitem__("mxfp4_block_size", 16)),
                         "mxfp4_block_size=16", True),
    "ignored layer lost": (json_edit("config.json", lambda v: v["quantization_config"]["ignored_layers"].remove(
        "model.layers.2.self_attn.o_proj")), "ignored_layers lacks model.layers.2.self_attn.o_proj", True),
    "impossible geometry": (json_edit("config.json", lambda v: v.__setitem__("num_key_value_heads", 3)), "config.json", True),
    "one expert less": (json_edit("config.json", lambda v: v.__setitem__("n_routed_experts", 4)),
                        "experts.4.down_proj.weight: unexpected tensor", True),
    "code lost": (remove("modeling_mimo_v2.py"), "modeling_mimo_v2.py: missing", True),
    "card lost": (remove("README.md"), "README.md: missing", True),
    "the last line end of the checksums": (cut("checksums.sha256", -1), "checksums.sha256: cut", False),
    "checksums lost": (remove("checksums.sha256"), "checksums.sha256: missing", False),
    "stray file": (lambda f: (f / "model.bin").write_bytes(b"x"), "model.bin: not listed", False),
    "drafter tensor lost": (change("dflash/hidden_norm.weight", lambda t, n: t.pop(n)), "hidden_norm.weight: tensor is missing",
                            True),
    "drafter tensor with a prefix": (change("dflash/fc.weight", rename_tensor), "no model. prefix", True),
    "drafter in float32": (tensor("dflash/fc.weight", lambda t: t.float()), "fc.weight: F32", True),
    "drafter not finite": (tensor("dflash/norm.weight", lambda t: put(t, float("nan"))), "norm.weight: not finite", True),
    "drafter of another training": (tensor("dflash/fc.weight", lambda t: t * 1.5), "other logits than recorded", True),
    "target layers off by one": (json_edit("dflash/config.json", shift_target_layers), "target_layer_ids", True),
    "target layer beyond the last one": (json_edit("dflash/config.json", lambda v: v["dflash_config"].__setitem__(
        "target_layer_ids", [0, 4])), "target_layer_ids=[0, 4]", True),
    "mask token beyond the vocabulary": (json_edit("dflash/config.json", lambda v: v["dflash_config"].__setitem__(
        "mask_token_id", 90)), "mask_token_id=90: expected 0 to 89", True),
    "mask token that differs": (json_edit("dflash/config.json", lambda v: v["dflash_config"].__setitem__("mask_token_id", 5)),
                                "mask_token_id=5, mask_embedding.pt has 89", True),
    "window in one alias only": (json_edit("dflash/config.json", lambda v: v.pop("layer_types")), "layer_types is missing",
                                   True),
    "drafter made causal": (json_edit("dflash/config.json", lambda v: v.__setitem__("is_causal", True)), "is_causal=True",
                            True),
    "mask embedding lost": (remove("dflash/mask_embedding.pt"), "dflash/mask_embedding.pt: missing", True),
    "mask embedding not a torch file": (lambda f: (f / "dflash/mask_embedding.pt").write_bytes(b"junk"), "dflash: cannot",
                                        True),
    "mask embedding of another size": (mask(lambda v: v.__setitem__("embedding", v["embedding"][:5])), "shape [5]", True),
    "mask embedding differs from the vocabulary row": (mask(lambda v: v["embedding"].mul_(2)), "row 89 (mask token)", True),
    "vocabulary row overwritten": (tensor("model.embed_tokens.weight", lambda t: put(t, 9.0, slice(-96, None))),
                                   "row 89 (mask token)", True),
    "reference lost": (remove("dflash/dflash_reference.safetensors"), "dflash_reference.safetensors: missing", True),
    "drafter lost": (lambda f: shutil.rmtree(f / "dflash"), "dflash/config.json", True),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(kind, toy_run, exported, tmp_path):
    damage, needle, sealed = DAMAGE[kind]
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    damage(folder)
    if sealed:
        seal(folder)
    findings = verify(folder, toy_run.parent / "runs/toy/qat/model").findings
    assert any(needle in finding for finding in findings), findings


def test_what_a_hub_and_its_client_add_is_no_damage(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    for name in (".cache/huggingface/.gitignore", ".cache/huggingface/download/model.safetensors.metadata"):
        (folder / name).write_text("x")
    assert verify(folder).findings == []


def test_there_are_at_least_25_kinds_of_damage_and_each_changes_something():
    assert len(DAMAGE) >= 25 and len({id(d[0]) for d in DAMAGE.values()}) == len(DAMAGE)


def test_all_damage_is_reported_in_one_run(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    for kind in ("not a number", "scale of 255", "target layers off by one", "card lost"):
        DAMAGE[kind][0](folder)
    report = tmp_path / "findings.json"
    said = run_job("export/verify.py", folder, "--json", report, expect=1)
    assert "Traceback" not in said
    for needle in (FLOAT, EXPERT + "_scale", "target_layer_ids", "README.md"):
        assert needle in said
    assert len(json.loads(report.read_text())["findings"]) >= 4


def test_a_whole_checkpoint_has_exit_code_0_and_a_missing_one_2(exported, tmp_path):
    run_alone("export/verify.py", exported)
    assert "no such folder" in run_job("export/verify.py", tmp_path / "nowhere", expect=2)
