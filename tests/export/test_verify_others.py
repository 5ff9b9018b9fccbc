"""Folders that this project did not write: releases pass with notes, and what is wrong with one is still found and named."""

import json
import shutil

import pytest
import torch
from damage import change, json_edit, put, remove, tensor
from jobs import run_job
from released_folders import MASK_TOKEN, RELEASES, write_published_drafter, write_release

from checkpoint.verify import verify

FP4 = "V2.5-Pro-FP4-DFlash"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release") / FP4, FP4)


@pytest.mark.parametrize("index", [False, True], ids=["single file", "shards"])
@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_right_and_what_engines_read_differently_is_a_note(name, index, tmp_path):
    found = verify(write_release(tmp_path / "r", name, index=index))
    assert found.findings == [] and found.verdict == "right" and not found.ours
    assert found.layout == ("native" if name == FP4 else "fp8") and found.tensors > 80
    assert any("changed since" in f.text and "could not be checked here, because" in f.text for f in found.unchecked)
    assert bool([f for f in found.notes if f.kind == "dialect"]) == ("drafter" in RELEASES[name])


def test_notes_name_the_engines_that_read_an_alias_otherwise(release):
    notes = [f for f in verify(release).notes if f.kind == "dialect"]
    window = next(f for f in notes if "layer_types" in f.text)
    assert set(window.engines) >= {"vLLM", "SGLang"} and "--speculative-draft-window-size 24" in window.text
    assert any("rope_theta=10000" in f.text and "5000000" in f.text and "vLLM" in f.engines for f in notes)


def test_a_vocabulary_row_without_the_mask_embedding_is_a_note_where_the_file_is_there(release):
    assert any(f"row {MASK_TOKEN}" in f.text for f in verify(release).notes if f.kind == "mask")


@pytest.mark.parametrize("which", ["V2.5", "V2.5-Pro"])
def test_a_drafter_is_judged_without_its_target(which, tmp_path):
    write_published_drafter(tmp_path, which)
    found = verify(tmp_path)
    assert found.findings == [] and found.layout == "drafter"
    assert any("no target in this folder" in f.text for f in found.unchecked)
    (tmp_path / "mask_embedding.pt").write_bytes(b"junk")
    assert verify(tmp_path).verdict == "wrong"


def test_a_drafter_whose_mask_is_the_targets_row_is_right(release, tmp_path):
    folder = shutil.copytree(release, tmp_path / "copy")
    (folder / "dflash/mask_embedding.pt").unlink()
    found = verify(folder)
    assert found.findings == [] and any("mask_embedding.pt: not there" in f.text for f in found.notes)


def bf16_expert(folder):
    change(EXPERT, lambda t, n: t.update({n: torch.zeros(t[n].shape[0], t[n].shape[1] * 2).bfloat16()}))(folder)


# damage -> (kind of the finding, what it says)
WRONG = {
    "scale of 255": (tensor(EXPERT + "_scale", lambda t: put(t, 255)), "scales", "1 scales are 255"),
    "codes as int8": (tensor(EXPERT, lambda t: t.view(torch.int8)), "dtype", "dtype I8, expected U8"),
    "an expert in bf16": (bf16_expert, "shape", "shape"),
    "a tensor lost": (change(EXPERT, lambda t, n: t.pop(n)), "missing", f"{EXPERT}: tensor is missing"),
    "a tensor too many": (change(EXPERT, lambda t, n: t.__setitem__("model.x", torch.ones(2))), "unexpected", "model.x"),
    "a plain grid on a fused qkv": (tensor(QKV + "_scale_inv", lambda t: t[:-1]), "shape", "restarts with each chunk"),
    "FP8 without scales": (change(QKV, lambda t, n: t.pop(n + "_scale_inv")), "missing", f"{QKV}_scale_inv"),
    "not a number": (tensor("model.norm.weight", lambda t: put(t, float("nan"))), "values", "not finite"),
    "a bf16 matrix that engines build as FP8": (json_edit("config.json", lambda v: v["quantization_config"][
        "ignored_layers"].remove("model.layers.2.self_attn.o_proj")), "config", "ignored_layers lacks model.layers.2"),
    "an FP8 matrix that engines build as bf16": (json_edit("config.json", lambda v: v["quantization_config"][
        "ignored_layers"].append("model.layers.2.self_attn.qkv_proj")), "config", "which is FP8"),
    "another number of experts": (json_edit("config.json", lambda v: v.__setitem__("n_routed_experts", 5)), "unexpected",
                                  "experts.5."),
    "a file cut short": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "file",
                         "model.safetensors: cannot be opened"),
    "layers beyond the target's": (json_edit("dflash/config.json", lambda v: v["dflash_config"].__setitem__(
        "target_layer_ids", [0, 2, 4])), "drafter", "expected layers from 0 to 3"),
    "a drafter of another target": (json_edit("dflash/config.json", lambda v: v.__setitem__("num_target_layers", 70)),
                                    "drafter", "num_target_layers=70"),
    "a drafter's tensor lost": (change("dflash/fc.weight", lambda t, n: t.pop(n)), "missing", "dflash: fc.weight"),
    "a mask of another id": (json_edit("dflash/config.json", lambda v: v["dflash_config"].__setitem__("mask_token_id", 7)),
                             "mask", "mask_embedding.pt has 261"),
    "no config": (remove("config.json"), "config", "config.json"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_release_is_found(kind, release, tmp_path):
    damage, expected, words = WRONG[kind]
    folder = shutil.copytree(release, tmp_path / "copy")
    damage(folder)
    found = verify(folder)
    assert any(f.kind == expected and words in f.text for f in found.wrong), (found.findings, found.notes)


def test_a_hubs_snapshot_of_links_is_verified_as_the_files_are(exported, tmp_path):
    """models--x/blobs/<name> and snapshots/<revision>/* that point there."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for number, path in enumerate(sorted(p for p in exported.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(exported)
        link.parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        shutil.copyfile(path, blobs / f"{number:040x}")
        link.symlink_to(blobs / f"{number:040x}")
    found = verify(snapshot)
    assert found.findings == [] and found.ours and not found.unchecked


def test_the_command_says_all_three_and_ends_with_0(release, tmp_path):
    said = run_job("export/verify.py", release, "--json", tmp_path / "found.json")
    assert "not checked  " in said and "note  dflash: " in said and "FOUND" not in said and ": whole, " in said
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["verdict"] == "right" and report["findings"] == [] and report["unchecked"]
    assert any(note["engines"] for note in report["notes"])
