"""Bases as they are published: whatever holds their weights, they are loaded exactly, trained, saved and exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_models import equal_weights, random_model, stock, train_a_step, write_recipe
from safetensors.torch import load_file, save_file
from tolerance import MODEL_FP32
from toy_export import export, gpt_oss_run, make_run, toy_config

from checkpoint.containers import container
from checkpoint.detect_format import open_source
from checkpoint.inventory import require_exportable
from checkpoint.load import load_model
from checkpoint.verify import verify
from export.job import Request, run
from modeling.fused_experts import fused_experts
from mxfp4 import dequantize, fake_quantize, quantize
from recipes.load import load_recipe
from tools.family_configs import tiny


def fp8_blocks(weight):
    """An independent quantizer: (codes, scales, what they decode to) in blocks of 128 x 128."""
    rows, columns = weight.shape
    codes, scales = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(-(-rows // 128), -(-columns // 128))
    decoded = torch.empty(rows, columns)
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            block = weight[i:i + 128, j:j + 128].float()
            scale = block.abs().max() / 448
            codes[i:i + 128, j:j + 128] = (block / scale).to(torch.float8_e4m3fn)
            scales[i // 128, j // 128] = scale
            decoded[i:i + 128, j:j + 128] = codes[i:i + 128, j:j + 128].float() * scale
    return codes, scales, decoded


def edit_config(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def to_fp8(folder, tensors):
    packed, decoded = {}, {}
    for name, t in tensors.items():
        if t.ndim == 2 and "embed" not in name and "lm_head" not in name and "mlp.gate.weight" not in name:
            packed[name], packed[name + "_scale_inv"], decoded[name] = fp8_blocks(t)
        else:
            packed[name] = decoded[name] = t
    edit_config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic",
                                             "weight_block_size": [128, 128]})
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    return decoded


def to_compressed(folder, tensors):
    packed, decoded = {}, {}
    for name, t in tensors.items():
        if ".experts." in name:
            codes, scales = quantize(t)
            packed |= {name + "_packed": codes, name + "_scale": scales}
            decoded[name] = dequantize(codes, scales, dtype=torch.bfloat16)
        else:
            packed[name] = decoded[name] = t
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"})
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    return decoded


def to_dtype(dtype):
    def change(folder, tensors):
        save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        edit_config(folder, dtype=str(dtype).removeprefix("torch."))
        return {n: t.to(dtype) for n, t in tensors.items()}

    return change


def to_bin(folder, tensors):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return tensors


def to_bins_with_stale_copies(folder, tensors):
    """Two pickles that both hold some tensors, and an index."""
    parts, where = halves_with_stale_copies(folder, "pytorch_model-0000{}-of-00002.bin")
    for name, part in parts.items():
        torch.save(part, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def with_a_stale_bin(folder, tensors):
    """Both forms, as older hub repositories have them: clients take the safetensors."""
    torch.save({n: torch.zeros_like(t) for n, t in tensors.items()}, folder / "pytorch_model.bin")
    return tensors


def with_the_tied_head(folder, tensors):
    """The head stored beside the embedding that it is."""
    file = folder / "model.safetensors"
    assert "lm_head.weight" not in load_file(file)
    save_file(load_file(file) | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file, {"format": "pt"})
    return tensors


def to_snapshot(folder, tensors):
    for path in list(folder.iterdir()):
        blob = folder.parent / f"blob-{path.name}"
        shutil.move(path, blob)
        path.symlink_to(blob)
    return tensors


def to_shards_with_stale_copies(folder, tensors):
    """Two shards that both hold some tensors; the index names the right one, which comes first."""
    parts, where = halves_with_stale_copies(folder, "model-0000{}-of-00002.safetensors")
    for name, part in parts.items():
        save_file(part, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def halves_with_stale_copies(folder, pattern):
    """Takes model.safetensors apart: (file -> its tensors, tensor -> the file that is right)."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    first, second = names[:len(names) // 2], names[len(names) // 2:]
    stale = {n: torch.zeros_like(stored[n]) for n in first[::3]}
    parts = {pattern.format(1): {n: stored[n] for n in first}, pattern.format(2): {n: stored[n] for n in second} | stale}
    return parts, {n: pattern.format(1 + (n in second)) for n in names}


def one_after_another(*changes):
    def change(folder, tensors):
        for one in changes:
            tensors = one(folder, tensors)
        return tensors

    return change


FORMS = {"fp8 blocks": to_fp8, "compressed-tensors": to_compressed, "float16": to_dtype(torch.float16),
         "float32": to_dtype(torch.float32), "bin": to_bin, "snapshot of links": to_snapshot,
         "stale copies in another shard": to_shards_with_stale_copies,
         "tied, float16 in bin": one_after_another(to_dtype(torch.float16), to_bin),
         "tied, float32 in bins with stale copies": one_after_another(to_dtype(torch.float32), to_bins_with_stale_copies),
         "tied, the head is stored too": with_the_tied_head, "a stale bin beside": with_a_stale_bin,
         "tied, fp8 blocks in links to shards with stale copies":
             one_after_another(to_fp8, to_shards_with_stale_copies, to_snapshot),
         "compressed-tensors in links to shards with stale copies":
             one_after_another(to_compressed, to_shards_with_stale_copies, to_snapshot)}


def based(tmp_path, form, **changes):
    """(folder, the model that it means in bf16)."""
    changes |= {"tie_word_embeddings": True} if "tied" in form else {}
    model = random_model("qwen3_moe", hidden_size=192, moe_intermediate_size=96, head_dim=48, **changes)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    meant = FORMS[form](folder, {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()})
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({n: t.to(torch.bfloat16) for n, t in meant.items()}, plain / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(plain)
    return folder, stock(plain)


@pytest.mark.parametrize("form", FORMS)
def test_a_base_is_loaded_as_it_is_meant_trained_saved_and_exported(form, tmp_path):
    folder, meant = based(tmp_path, form)
    model = load_model(folder, dtype=torch.bfloat16)
    equal_weights(model, meant)
    train_a_step(model)
    model.save_pretrained(tmp_path / "runs/toy/qat/model")
    equal_weights(load_model(tmp_path / "runs/toy/qat/model", dtype=torch.bfloat16), model)
    assert "quantization_config" not in json.loads((tmp_path / "runs/toy/qat/model/config.json").read_text())
    assert run(load_recipe(write_recipe(tmp_path)), Request(out=tmp_path / "out")) == 0
    equal_weights(stock(tmp_path / "out"), model)


@pytest.mark.parametrize("form", FORMS)
def test_a_base_is_exported_without_training_and_packed_experts_are_copied(form, tmp_path):
    folder, meant = based(tmp_path, form)
    recipe = load_recipe(write_recipe(tmp_path))
    assert run(recipe, Request(out=tmp_path / "out", base=folder)) == 0
    axes = {n: axis for n, _, axis in fused_experts(meant)}
    for name, value in stock(tmp_path / "out").state_dict().items():
        expected = meant.state_dict()[name]
        assert torch.equal(value, fake_quantize(expected, axis=axes[name]) if name in axes else expected), name
    manifest = json.loads((tmp_path / "out/export.json").read_text())
    assert manifest["experts"] == ("copied" if form.startswith("compressed-tensors") else "rounded")


@pytest.mark.parametrize("form", ["fp8 blocks", "compressed-tensors"])
def test_a_base_is_decoded_without_rounding_anything(form, tmp_path):
    """What a sharded run trains from: the numbers that an unsharded one would decode while it loads."""
    folder, meant = based(tmp_path, form)
    recipe = load_recipe(write_recipe(tmp_path))
    assert run(recipe, Request(base=folder, decode=True)) == 0
    out = tmp_path / "runs/toy/export/decoded"
    equal_weights(stock(out), meant)
    axes = {n: axis for n, _, axis in fused_experts(meant)}
    rounded = all(torch.equal(meant.state_dict()[n], fake_quantize(meant.state_dict()[n], axis=axes[n])) for n in axes)
    assert rounded == (form == "compressed-tensors")  # a base of FP8 is not on the grid: rounding would have shown
    assert verify(out, folder).findings == [] and "mxfp4" not in (out / "README.md").read_text()
    assert json.loads((out / "export.json").read_text())["experts"] == "decoded"


def test_the_packed_release_of_gpt_oss_is_trained_and_exported_and_its_bytes_are_copied(tmp_path):
    recipe, model = gpt_oss_run(tmp_path)
    release = export(recipe, "export.layout=gpt-oss", out=tmp_path / "release")
    for name in ("export.json", "checksums.sha256", "checksums.json", "resolved.yaml", "README.md"):
        (release / name).unlink()
    loaded = load_model(release, dtype=torch.bfloat16)
    equal_weights(loaded, model)
    train_a_step(loaded)
    saved = tmp_path / "runs/toy/qat/model"
    shutil.rmtree(saved)
    loaded.save_pretrained(saved)
    assert not [n for n in load_file(saved / "model.safetensors") if n.endswith(("_blocks", "_scales"))]
    equal_weights(load_model(saved, dtype=torch.bfloat16), loaded)
    equal_weights(stock(export(recipe, out=tmp_path / "again")), loaded)
    copied = open_source(export(recipe, "export.layout=gpt-oss", out=tmp_path / "copied", base=release))
    for name, (shape, dtype) in open_source(release).infos.items():
        assert copied.infos[name] == (shape, dtype) and torch.equal(copied.read(name), open_source(release).read(name)), name
    equal_weights(stock(export(recipe, "export.layout=bf16", out=tmp_path / "plain", base=release)), model)


def test_blocks_rounded_by_another_rule_are_copied_without_a_finding(tmp_path):
    """OpenAI's own scale rule is not ours: what a base was rounded by is nobody's promise here."""
    recipe, _ = gpt_oss_run(tmp_path)
    release = export(recipe, "export.layout=gpt-oss", out=tmp_path / "release")
    tensors = load_file(release / "model-00001-of-00001.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj_blocks"))
    tensors[name] = (tensors[name] & 0x88) | 0x11  # largest magnitude half a unit
    save_file(tensors, release / "model-00001-of-00001.safetensors", {"format": "pt"})
    out = export(recipe, "export.layout=gpt-oss", out=tmp_path / "out", base=release)
    assert verify(out).findings == [] and any(f.kind == "blocks" for f in verify(out).notes)


@pytest.mark.parametrize("layout", ["native", "hf-fp8", "compressed-tensors", "bf16"])
def test_a_tied_mimo_is_exported_in_every_layout(layout, tmp_path):
    recipe = make_run(tmp_path, drafter=False, config=toy_config(tie_word_embeddings=True))
    out = export(recipe, f"export.layout={layout}")
    assert "lm_head.weight" not in open_source(out).infos
    trained = load_model(tmp_path / "runs/toy/qat/model", dtype=torch.bfloat16)
    ids = torch.arange(24)[None] * 7 % 90
    loaded = load_model(out, dtype=torch.float32) if layout in ("native", "bf16") else torch.nn.Module.float(stock(out))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trained.float()(input_ids=ids).logits, **MODEL_FP32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_mimo_base_in_another_float_is_published_in_bfloat16(dtype, tmp_path):
    recipe = make_run(tmp_path, drafter=False)
    file = tmp_path / "base/model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, {"format": "pt"})
    out = export(recipe, "export.layout=native", base=tmp_path / "base")
    assert {d for n, (_, d) in open_source(out).infos.items() if "gate." not in n} <= {"BF16", "U8"}


def test_a_mimo_base_in_bin_form_is_loaded(tmp_path):
    make_run(tmp_path, drafter=False)
    before = load_model(tmp_path / "base", dtype=torch.bfloat16)
    torch.save(load_file(tmp_path / "base/model.safetensors"), tmp_path / "base/pytorch_model.bin")
    (tmp_path / "base/model.safetensors").unlink()
    equal_weights(load_model(tmp_path / "base", dtype=torch.bfloat16), before)


def test_the_packed_release_of_gpt_oss_is_read_through_links_to_shards_with_stale_copies(tmp_path):
    recipe, model = gpt_oss_run(tmp_path)
    release = export(recipe, "export.layout=gpt-oss", out=tmp_path / "release")
    (release / "model.safetensors.index.json").unlink()
    (release / "model-00001-of-00001.safetensors").rename(release / "model.safetensors")
    one_after_another(to_shards_with_stale_copies, to_snapshot)(release, {})
    equal_weights(load_model(release, dtype=torch.bfloat16), model)
    equal_weights(stock(export(recipe, "export.layout=bf16", out=tmp_path / "plain", base=release)), model)


def test_codes_of_another_format_are_refused_before_training(tmp_path):
    model = random_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors |= {name + "_packed": torch.zeros(32, 8, dtype=torch.int32), name + "_scale": torch.ones(32, 2)}
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}_packed: I32 codes of another format than MXFP4"):
        load_model(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("model_type, layout, reason", [
    ("qwen3_moe", "native", "holds mimo_v2, and this model is qwen3_moe; its layout is compressed-tensors"),
    ("mixtral", "gpt-oss", "its layout is compressed-tensors"),
    ("granitemoe", "compressed-tensors", "published with fused experts .* its layout is bf16"),
    ("kimi_linear", "compressed-tensors", "drops what it joins but experts; its layout is bf16"),
    ("inkling2_text", "auto", "not known here"),
])
def test_a_base_that_no_layout_of_the_recipe_holds_is_refused_before_training(model_type, layout, reason, tmp_path):
    tiny(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        require_exportable(tmp_path, layout, "base")
    for fits in ("auto", "bf16") if model_type != "inkling2_text" else ():
        require_exportable(tmp_path, fits, "base")


def test_a_tensor_says_itself_how_it_is_stored(tmp_path):
    folder, _ = based(tmp_path, "fp8 blocks")
    source = open_source(folder)
    assert container(source, "model.layers.0.self_attn.q_proj.weight") == "fp8"
    assert container(source, "model.norm.weight") == "plain" and container(source, "nothing") is None
