"""The exported bytes: equal to training, independent of who writes them, continued after a kill."""

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from damage import change, seal
from jobs import run_job
from safetensors.torch import load_file, save_file
from toy_export import (
    export,
    gpt_oss_run,
    make_run,
    put_on_grid,
    qwen3_run,
    toy_config,
    toy_model,
    toy_weights,
)

from checkpoint.detect_format import open_source
from checkpoint.fp8 import dequantize_fp8
from checkpoint.load import load_model
from checkpoint.trained import expert_values
from checkpoint.verify import verify
from export.job import Request, run
from export.layouts import quantize_fp8
from export.shards import plan_shards, write_shard
from modeling.names import expert_parts, fused_name
from mxfp4 import dequantize, fake_quantize, quantize
from recipes.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "export" / "to_hf.py")]


def same_folder(a: Path, b: Path) -> bool:
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    return names == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()) and all(
        filecmp.cmp(a / n, b / n, shallow=False) for n in names)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_exported_experts_decode_to_the_trained_weights_and_the_rest_is_the_base(toy_run, exported):
    trained = load_file(toy_run.parent / "runs/toy/qat/model/model.safetensors")
    written = tensors(exported)
    model = load_model(exported, dtype=torch.bfloat16).state_dict()
    for name, tensor in trained.items():
        if fused_name(name):
            assert written[name].dtype == written[name + "_scale"].dtype == torch.uint8
            decoded = dequantize(written[name], written[name + "_scale"], dtype=torch.bfloat16)
            assert torch.equal(decoded.view(torch.int16), tensor.view(torch.int16)), name
        elif "qkv_proj" in name:
            for part in "qkv":
                assert name.replace("qkv", part) in written and name not in written
        elif name == "model.embed_tokens.weight":
            assert torch.equal(written[name][:-1], tensor[:-1])  # the last row is the mask token's
        else:
            assert torch.equal(written[name], tensor), name
    for key, value in model.items():
        for part in expert_parts(key, value.shape) or []:
            assert torch.equal(value[part.expert, part.rows], trained[part.name])


@pytest.mark.slow
def test_two_processes_and_repeated_runs_write_the_same_bytes(toy_run, exported, tmp_path):
    for i, processes in enumerate(("1", "2")):
        out = tmp_path / str(i)
        done = subprocess.run([*COMMAND, str(toy_run), "export.shard_bytes=100000", "--out", str(out), "--processes",
                               processes], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert same_folder(exported, out)


def test_the_index_counts_what_is_in_the_files(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    written = tensors(exported)
    assert index["weight_map"].keys() == written.keys() and len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    for file in set(index["weight_map"].values()):
        assert sum(written[n].nbytes for n, f in index["weight_map"].items() if f == file) <= 100000


def test_a_killed_export_is_continued_and_equals_an_uninterrupted_one(toy_run, exported, tmp_path):
    out = tmp_path / "out"
    command = [*COMMAND, str(toy_run), "export.shard_bytes=100000", "--out", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    partial = out.with_name("out.partial")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and first.poll() is None and len(list(partial.glob("*.safetensors"))) < 2:
        time.sleep(0.001)
    first.send_signal(signal.SIGKILL)
    first.wait()
    if out.exists():  # it was faster than the signal: nothing was interrupted, leave the second file half written by hand
        out.rename(partial)
    assert not out.exists() and len(list(partial.glob("*.safetensors"))) >= 2
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert same_folder(exported, out) and not partial.exists()


def test_files_of_a_killed_export_are_not_written_again(toy_run, tmp_path):
    recipe = load_recipe(toy_run, ["export.shard_bytes=100000"])
    from export.job import Export

    job = Export(recipe, Request(out=tmp_path / "out"))
    job.prepare()
    write_shard(job.shards[0], job.partial)
    (job.partial / f"{job.shards[1].name}.partial").write_bytes(b"half")
    before = (job.partial / job.shards[0].name).stat().st_mtime_ns
    again = Export(recipe, Request(out=tmp_path / "out"))
    again.prepare()
    again.write()
    assert (again.partial / job.shards[0].name).stat().st_mtime_ns == before


def test_a_change_of_the_sources_starts_over(tmp_path):
    path = make_run(tmp_path, drafter=False)
    from export.job import Export

    job = Export(load_recipe(path), Request(out=tmp_path / "out"))
    job.prepare()
    job.write()
    model = tmp_path / "runs/toy/qat/model/model.safetensors"
    os.utime(model, ns=(1, 1))
    Export(load_recipe(path), Request(out=tmp_path / "out")).prepare()
    assert not list(job.partial.glob("*.safetensors"))


def test_an_earlier_export_is_set_aside(toy_run, tmp_path):
    first = export(toy_run, out=tmp_path / "out")
    shutil.copytree(first, tmp_path / "first")
    export(toy_run, out=tmp_path / "out")  # the same bytes: a second copy would be of no use
    assert same_folder(tmp_path / "first", tmp_path / "out") and not (tmp_path / "out.1").exists()
    export(toy_run, "export.shard_bytes=100000", out=tmp_path / "out")
    assert same_folder(tmp_path / "first", tmp_path / "out.1")


def test_a_second_writers_mistake_is_named_and_ends_the_export(tmp_path):
    path = make_run(tmp_path, drafter=False)
    file = tmp_path / "runs/toy/qat/model/model.safetensors"
    state = load_file(file)
    recipe = load_recipe(path, ["export.shard_bytes=100000"])
    from export.job import Export

    seconds = Export(recipe, Request(out=tmp_path / "out")).shards[1::2]
    name = next(t.name for shard in seconds for t in shard.tensors if fused_name(t.name))
    state[name][0, :2] = torch.tensor([1.0, 1.0078125])
    save_file(state, file, metadata={"format": "pt"})
    done = subprocess.run([*COMMAND, str(path), "export.shard_bytes=100000", "--out", str(tmp_path / "out"), "--processes",
                           "2"], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 1 and f"{name}: " in done.stderr and "not on the MXFP4 grid" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def fused_state():
    """A model's state dict as training holds it: experts fused."""
    return {n: t.contiguous() for n, t in put_on_grid(toy_model(toy_config())).state_dict().items()}


def accelerate_checkpoint(state, folder):
    save_file(state, folder / "model.safetensors")


def distributed_checkpoint(state, folder):
    from torch.distributed import checkpoint

    checkpoint.save({"model": state}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"), no_dist=True)


def torch_checkpoint(state, folder):
    names = sorted(state)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, members in parts.items():
        torch.save({n: state[n] for n in members}, folder / file)
    index = {"weight_map": {n: f for f, members in parts.items() for n in members}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("save", [accelerate_checkpoint, distributed_checkpoint, torch_checkpoint])
def test_every_kind_of_training_checkpoint_gives_the_same_files(save, fused_state, toy_run, exported, tmp_path):
    (tmp_path / "weights").mkdir()
    save(fused_state, tmp_path / "weights")
    out = export(toy_run, "export.shard_bytes=100000", out=tmp_path / "out", weights=tmp_path / "weights")
    for file in exported.glob("*.safetensors"):
        assert filecmp.cmp(file, out / file.name, shallow=False)


def test_reading_a_fused_checkpoint_never_holds_a_whole_fused_tensor(fused_state, tmp_path, monkeypatch):
    accelerate_checkpoint(fused_state, tmp_path)
    source = open_source(tmp_path)
    monkeypatch.setattr(source, "read", lambda name: pytest.fail(f"{name} was read whole"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert torch.equal(expert_values(toy_weights(source), name), fused_state["model.layers.1.mlp.experts.gate_up_proj"][3, 64:])


def test_untrained_experts_are_not_taken_for_trained_ones(toy_run, tmp_path):
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight: .* not on the MXFP4 grid, .*expert 0"):
        run(load_recipe(toy_run), Request(out=tmp_path / "out", weights=toy_run.parent / "base"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "mse"])
def test_export_without_training_rounds_by_the_recipes_rule(rule, toy_run, tmp_path):
    out = export(toy_run, f"quantization.scale_rule={rule}", out=tmp_path / "out", base=toy_run.parent / "base")
    base, written = tensors(toy_run.parent / "base"), tensors(out)
    for name in filter(fused_name, base):
        codes, scales = quantize(base[name], scale_rule=rule)
        assert torch.equal(written[name], codes) and torch.equal(written[name + "_scale"], scales)
    assert not (out / "dflash").exists() and "no drafter" in (out / "README.md").read_text()


def fp8_base(root: Path) -> Path:
    """The run's base as a release: FP8 in blocks, float32 router, MTP tensors; trained weights are its decoded values."""
    path = make_run(root, drafter=False)
    config = toy_config()
    base, released, decoded = load_file(root / "base/model.safetensors"), {}, {}
    for name, w in base.items():
        if "qkv_proj" in name or ("mlp" in name and ".gate.weight" not in name and "bias" not in name):
            codes, scales = quantize_fp8(name, w, config)
            released |= {name: codes, name + "_scale_inv": scales}
            decoded[name] = dequantize_fp8(name, codes, scales, config).bfloat16()
        elif name.endswith("mlp.gate.weight"):
            released[name] = w.float() * (1 + 2.0**-12)
            decoded[name] = released[name].bfloat16()
        else:
            released[name] = decoded[name] = w
        if fused_name(name):
            decoded[name] = fake_quantize(decoded[name])
    released["model.mtp.layers.0.eh_proj.weight"] = torch.randn(96, 192).bfloat16()
    save_file(released, root / "base/model.safetensors")
    save_file(decoded, root / "runs/toy/qat/model/model.safetensors", metadata={"format": "pt"})
    return path


def test_what_training_left_alone_is_copied_byte_for_byte_from_an_fp8_base(tmp_path):
    path = fp8_base(tmp_path)
    base, written = tensors(tmp_path / "base"), tensors(export(path))
    kept = [n for n in base if "experts" not in n]
    assert any(base[n].dtype == torch.float8_e4m3fn for n in kept) and any("mtp" in n for n in kept)
    for name in kept:
        assert base[name].dtype == written[name].dtype
        assert torch.equal(base[name].view(torch.uint8), written[name].view(torch.uint8)), name
    layers = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignored_layers"]
    assert layers == [f"model.layers.{i}.self_attn.o_proj" for i in range(4)] + ["model.decoder.self_attn.o_proj"]


def test_plain_mtp_matrices_are_listed_under_the_names_that_engines_ask_for(tmp_path):
    """What is not listed is built as FP8; MTP layers are `model.decoder` for one engine, for another what the tensors say."""
    path, file = make_run(tmp_path, drafter=False), tmp_path / "base/model.safetensors"
    mtp = {f"model.mtp.layers.{i}.{module}.weight": torch.randn(8, 8).bfloat16() for i in range(2)
           for module in ("eh_proj", "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    save_file(load_file(file) | mtp, file, metadata={"format": "pt"})
    out = export(path)
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["ignored_layers"]
    homes = ("model.decoder", "model.mtp.layers.0", "model.mtp.layers.1")
    parts = [f"self_attn.{p}_proj" for p in ("q", "k", "v", "qkv", "o")] + [f"mlp.{p}_proj" for p in ("gate", "up", "gate_up",
                                                                                                     "down")]
    assert {n for n in layers if n.startswith(homes)} == {f"{home}.{part}" for home in homes for part in parts}
    assert len(layers) == len(set(layers))


@pytest.mark.parametrize("family, layout", [("qwen3", "compressed-tensors"), ("gpt-oss", "gpt-oss"), ("mimo", "native"),
                                            ("mimo", "hf-fp8")])
def test_a_run_in_float32_is_published_in_the_precision_that_its_config_promises(family, layout, tmp_path):
    path = {"qwen3": qwen3_run, "gpt-oss": gpt_oss_run, "mimo": lambda root: (make_run(root, drafter=False), None)}[family](
        tmp_path)[0]
    narrow = export(path, f"export.layout={layout}", out=tmp_path / "narrow")
    for file in (tmp_path / "base/model.safetensors", tmp_path / "runs/toy/qat/model/model.safetensors"):
        save_file({n: t.float() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    out = export(path, f"export.layout={layout}", out=tmp_path / "wide")
    expected, written = tensors(narrow), tensors(out)
    router = (".mlp.gate.weight",) if layout == "native" else ()  # may be float32 there, as released
    for name, tensor in written.items():
        assert torch.equal(tensor.to(expected[name].dtype), expected[name])
        assert tensor.dtype == (torch.float32 if name.endswith(router) else expected[name].dtype), name
    assert written.keys() == expected.keys()
    name = next(n for n in written if n.endswith("input_layernorm.weight"))
    change(name, lambda held, n: held.__setitem__(n, held[n].float()))(out)
    seal(out)
    assert f"{name}: dtype F32, expected BF16" in verify(out).findings


def test_a_base_that_training_did_not_start_from_is_refused(tmp_path):
    path = fp8_base(tmp_path)
    base = load_file(tmp_path / "base/model.safetensors")
    base["model.layers.1.mlp.gate.weight"] += 1
    save_file(base, tmp_path / "base/model.safetensors")
    with pytest.raises(ValueError, match="layers.1.mlp.gate.weight: differs from"):
        export(path)


def test_dense_weights_in_fp8_follow_the_published_grids_and_are_said_to_be_rounded(toy_run, tmp_path):
    out = export(toy_run, "export.dense=fp8", out=tmp_path / "out")
    written = tensors(out)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert written[name].dtype == torch.float8_e4m3fn
    assert written[name + "_scale_inv"].shape == (4, 1)  # 2 chunks of 160 rows; 320 rows without a restart would have 3
    trained = load_file(toy_run.parent / "runs/toy/qat/model/model.safetensors")[name].float()
    decoded = dequantize_fp8(name, written[name], written[name + "_scale_inv"], toy_config())
    assert float((decoded - trained).abs().max()) <= float(trained.abs().max()) * 2.0**-4
    assert "also rounded, to FP8" in (out / "README.md").read_text()


def test_no_unit_is_split_and_a_large_one_has_its_own_file():
    from export.layouts import Unit
    from modeling.names import PublishedTensor

    units = [Unit((PublishedTensor(f"{i}.weight", (n,), "U8"), PublishedTensor(f"{i}.scale", (1,), "F32")), list)
             for i, n in enumerate([10, 10, 100, 10])]
    shards = plan_shards(units, 30)
    assert [[t.name[0] for t in s.tensors if "weight" in t.name] for s in shards] == [["0", "1"], ["2"], ["3"]]


@pytest.mark.parametrize("arguments, needle", [
    (["--from", "nowhere"], "nowhere: no such checkpoint folder"),
    (["--layout", "gpt-oss"], "its layout is native"),
    (["export.layuot=native"], "did you mean export.layout"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, needle, toy_run):
    said = run_job("export/to_hf.py", toy_run, *arguments, expect=2)
    assert needle in said and len(said.strip().splitlines()) == 1


def test_geometries_that_the_flash_class_cannot_hold_are_refused_with_the_reason(tmp_path):
    config = toy_config(swa_num_key_value_heads=2)
    path = make_run(tmp_path, drafter=False, config=config)
    with pytest.raises(ValueError, match="twice the key heads"):
        export(path, "export.layout=hf-fp8")


def test_every_export_verifies_from_disk_and_against_training(toy_run, exported):
    found = verify(exported, toy_run.parent / "runs/toy/qat/model")
    assert found.findings == [] and found.verdict == "right" and found.tensors > 100 and not found.unchecked and not found.notes


def test_the_checksum_file_is_one_that_sha256sum_reads(exported):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    done = subprocess.run(["sha256sum", "--quiet", "-c", "checksums.sha256"], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
