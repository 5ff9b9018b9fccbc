"""Loading mixed-precision checkpoints: decoded values are exact, damage is named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.fp8 import dequantize_fp8
from checkpoint.load import load_model, load_tokenizer
from checkpoint.tensor_files import INDEX
from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
from modeling.names import fused_name, qkv_scale_rows
from mxfp4 import dequantize, quantize


def tiny_config() -> MiMoV2Config:
    return MiMoV2Config(
        vocab_size=96, hidden_size=160, num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1],
        num_attention_heads=4, num_key_value_heads=2, swa_num_key_value_heads=4, head_dim=48, v_head_dim=32,
        intermediate_size=192, moe_intermediate_size=64, n_routed_experts=3, num_experts_per_tok=2, sliding_window=8,
        add_swa_attention_sink_bias=True, attention_projection_layout="fused_qkv", partial_rotary_factor=0.5)


def to_fp8(name, weight, config):
    """An independent 128 x 128 block quantizer whose grid restarts at each row segment."""
    codes, scales = [], []
    start = 0
    for rows in qkv_scale_rows(name, weight.shape[0], config):
        for top in range(start, start + rows, 128):
            band = weight[top:min(top + 128, start + rows)]
            row_scales, row_codes = [], []
            for left in range(0, weight.shape[1], 128):
                block = band[:, left:left + 128]
                scale = (block.abs().max() / 448).clamp_min(1e-12)
                row_scales.append(scale)
                row_codes.append((block / scale).to(torch.float8_e4m3fn))
            scales.append(torch.stack(row_scales))
            codes.append(torch.cat(row_codes, dim=1))
        start += rows
    return torch.cat(codes), torch.stack(scales)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A bf16 folder, the same weights as a native FP8 + MXFP4 folder in two shards, and the exact decoded tensors."""
    torch.manual_seed(0)
    plain, native = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("native")
    config = tiny_config()
    MiMoV2ForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
    tensors, decoded = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if fused_name(name):
            codes, scales = quantize(weight)
            tensors |= {name: codes, name + "_scale": scales}
            decoded[name] = dequantize(codes, scales, dtype=torch.bfloat16)
        elif "qkv_proj" in name or ("mlp" in name and "gate." not in name):
            codes, scales = to_fp8(name, weight.float(), config)
            tensors |= {name: codes, name + "_scale_inv": scales}
            decoded[name] = dequantize_fp8(name, codes, scales, config).to(torch.bfloat16)
            assert (decoded[name].float() - weight.float()).abs().max() < 0.07 * weight.abs().max()
        else:
            tensors[name] = decoded[name] = weight
    tensors["model.mtp.layers.0.eh_proj.weight"] = torch.zeros(2, 2)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({n: tensors[n].contiguous() for n in members}, native / file)
    index = {"metadata": {}, "weight_map": {n: f for f, members in shards.items() for n in members}}
    (native / "model.safetensors.index.json").write_text(json.dumps(index))
    (native / "config.json").write_text((plain / "config.json").read_text())
    return plain, native, decoded


def test_a_native_checkpoint_decodes_exactly(folders):
    plain, native, decoded = folders
    model = load_model(native, dtype=torch.bfloat16)
    from modeling.names import expert_parts

    for key, tensor in model.state_dict().items():
        for part in expert_parts(key, tensor.shape) or [None]:
            name, value = (part.name, tensor[part.expert, part.rows]) if part else (key, tensor)
            assert torch.equal(value.to(decoded[name].dtype), decoded[name]), name


def test_a_loaded_model_runs_and_keeps_its_routing_bias_in_float32(folders):
    model = load_model(folders[1], dtype=torch.bfloat16)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all()


def test_a_decoded_model_is_saved_without_a_promise_of_packed_weights(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    config = json.loads((copy / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (copy / "config.json").write_text(json.dumps(config))
    model = load_model(copy, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = MiMoV2ForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_v2_flash_in_fp8_decodes_by_the_per_head_grid_of_its_keys(tmp_path):
    torch.manual_seed(0)
    config = MiMoV2Config(**tiny_config().to_dict() | {"attention_projection_layout": "split", "head_dim": 192,
                                                       "v_head_dim": 128, "swa_head_dim": 192, "swa_v_head_dim": 128})
    MiMoV2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    codes, scales = to_fp8(name, tensors[name].float(), config)
    assert scales.shape == (4, 2)  # two heads of 192 rows: 128 + 64 each
    save_file(tensors | {name: codes, name + "_scale_inv": scales}, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "mimo_v2_flash", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load_model(tmp_path, dtype=torch.float32).state_dict()[name]
    for head in range(2):
        for top, height, row in ((0, 128, 0), (128, 64, 1)):
            band = slice(head * 192 + top, head * 192 + top + height)
            expected = codes[band].float() * scales[2 * head + row].repeat_interleave(128)[:160]
            assert torch.equal(loaded[band], expected)


def test_a_tied_head_is_the_embedding(tmp_path):
    torch.manual_seed(0)
    saved = MiMoV2ForCausalLM(MiMoV2Config(**tiny_config().to_dict() | {"tie_word_embeddings": True}))
    saved.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, saved.eval()(input_ids=ids).logits)


@pytest.fixture
def foreign(tmp_path):
    """A tiny Qwen3-MoE, and its folder."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=3, num_experts_per_tok=2))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_other_models_load_exactly_through_transformers(foreign):
    model, folder = foreign
    loaded = load_model(folder, dtype=torch.float32).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.norm.weight"), "1 tensor missing, the first model.norm.weight"),
    (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"model\.norm\.weight: shape \[63\], expected \[64\]"),
    (lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"), "cannot be loaded"),
    *((lambda t, prefix=prefix: [t.update({prefix + name: t.pop(name)}) for name in sorted(t)],
       f"names begin with {prefix}: the state of a model under") for prefix in ("_orig_mod.", "module.")),
])
def test_other_models_never_start_from_random_weights(foreign, change, message):
    file = foreign[1] / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        load_model(foreign[1], dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_a_gate_that_transformers_does_not_know_is_one_line_before_weights(foreign):
    file = foreign[1] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "swooshing"}))
    with pytest.raises(ValueError, match="hidden_act 'swooshing': no activation that transformers knows") as error:
        load_model(foreign[1], dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_the_index_of_another_model_is_looked_at_too(foreign):
    folder = foreign[1]
    (folder / INDEX).write_text('{"metadata": {}}')
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="not a safetensors index: expected"):
        load_model(folder, dtype=torch.float32)


def test_a_dtype_that_needs_a_scale_is_not_read_as_plain_numbers(folders, tmp_path):
    def relabel(copy):
        for file in ("a.safetensors", "b.safetensors"):
            rewrite(copy, file, lambda t: t.update({"model.norm.weight": torch.ones(160, dtype=torch.int8)})
                    if "model.norm.weight" in t else None)

    with pytest.raises(ValueError, match=r"model\.norm\.weight: dtype torch\.int8, expected"):
        load_model(damaged(folders, tmp_path, relabel), dtype=torch.bfloat16)


def damaged(folders, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    change(copy)
    return copy


def rewrite(copy, file, change):
    tensors = load_file(copy / file)
    change(tensors)
    save_file(tensors, copy / file)


def drop_from_index(copy, name):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))


def add_tensor(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = "a.safetensors"
    path.write_text(json.dumps(index))


DAMAGE = {
    "missing shard": (lambda c: (c / "b.safetensors").unlink(), "shard b.safetensors is missing"),
    "truncated shard": (lambda c: (c / "a.safetensors").write_bytes((c / "a.safetensors").read_bytes()[:5000]),
                        "not a whole safetensors file"),
    "missing tensor": (lambda c: drop_from_index(c, "model.norm.weight"), "tensor model.norm.weight is missing"),
    "missing scale": (lambda c: drop_from_index(c, "model.layers.1.mlp.experts.2.up_proj.weight_scale"),
                      "experts.2.up_proj.weight_scale is missing"),
    "unknown tensor": (add_tensor, "the index says that tensor model.layers.0.extra.weight is in a.safetensors, and it is not"),
    "no index": (lambda c: (c / "model.safetensors.index.json").unlink(), r"no weights \(model.safetensors"),
    "no config": (lambda c: (c / "config.json").unlink(), "no config.json"),
    "truncated index": (lambda c: (c / INDEX).write_bytes((c / INDEX).read_bytes()[:200]), f"{INDEX}: not valid JSON"),
    "bytes for an index": (lambda c: (c / INDEX).write_bytes(b"\xff\xfe"), f"{INDEX}: not valid JSON"),
    "empty index": (lambda c: (c / INDEX).write_text("{}"), f"{INDEX}: not a safetensors index: expected"),
    "list for an index": (lambda c: (c / INDEX).write_text("[]"), f"{INDEX}: not a safetensors index: expected"),
    "numbers in the index": (lambda c: (c / INDEX).write_text('{"weight_map": {"a": 1}}'), "not a safetensors index"),
    "broken config": (lambda c: (c / "config.json").write_text('{\n "a": \n}'), "config.json:3: not valid JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line(folders, tmp_path, kind):
    change, message = DAMAGE[kind]
    with pytest.raises(ValueError, match=message) as error:
        load_model(damaged(folders, tmp_path, change), dtype=torch.bfloat16)
    assert "\n" not in str(error.value)


def test_a_wrong_shape_names_tensor_and_both_shapes(folders, tmp_path):
    def shrink(copy):
        for file in ("a.safetensors", "b.safetensors"):
            rewrite(copy, file, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()})
                    if "model.norm.weight" in t else None)

    with pytest.raises(ValueError, match=r"model\.norm\.weight: shape \[159\], expected \[160\]"):
        load_model(damaged(folders, tmp_path, shrink), dtype=torch.bfloat16)


def test_a_plain_scale_grid_on_a_fused_qkv_is_refused(folders):
    config = tiny_config()
    weight = torch.zeros(2 * (96 + 48 + 32), 160).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"shape \[3, 2\], expected \[4, 2\]"):
        dequantize_fp8("model.layers.0.self_attn.qkv_proj.weight", weight, torch.ones(3, 2), config)


@pytest.mark.parametrize("load", [lambda p: load_model(p, dtype=torch.bfloat16), load_tokenizer])
def test_a_missing_folder_is_one_line(load):
    with pytest.raises(ValueError, match=r"model\.path: \./nowhere: no such checkpoint folder"):
        load("./nowhere")


@pytest.mark.parametrize("missing, message", [("config.json", "no config.json: not a checkpoint folder"),
                                              ("tokenizer.json", r"no tokenizer \(tokenizer.json, ")])
def test_a_folder_without_config_or_tokenizer_is_told_apart(missing, message, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / missing).unlink()
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "copy")
