"""Published names, shapes and counts of the released models, and the two-way expert table."""

from collections import Counter

import pytest
import torch
from tolerance import MODEL_FP32

from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
from modeling.names import expert_parts, fused_name, published_tensors, split_qkv
from modeling.published_geometries import MTP_LAYERS, released_config


def elements(config, **options) -> Counter:
    count = Counter()
    for tensor in published_tensors(config, mtp_layers=MTP_LAYERS, **options):
        count[tensor.dtype] += tensor.elements
    return count


PRO = MiMoV2Config(**released_config("MiMo-V2.5-Pro"))


def test_the_fp8_base_has_the_published_number_of_tensors():
    assert sum(1 for _ in published_tensors(PRO, experts="fp8", mtp_layers=MTP_LAYERS)) == 159_581


def test_the_fp4_release_has_the_published_element_counts():
    count = elements(PRO, router="BF16")
    assert count["U8"] == 531_351_207_936
    assert count["F8_E4M3"] == 13_378_781_184
    assert count["F32"] == 857_088
    assert round(sum(count.values()) / 1e9) == 554


def test_the_fp4_release_has_the_published_number_of_packed_matrices():
    packed = [t for t in published_tensors(PRO) if t.dtype == "U8" and not t.name.endswith("_scale")]
    assert len(packed) == 79_488 == 69 * 384 * 3


@pytest.mark.parametrize(("name", "shape", "dtype"), [
    ("model.layers.0.self_attn.qkv_proj.weight", (27136, 6144), "F8_E4M3"),
    ("model.layers.0.self_attn.qkv_proj.weight_scale_inv", (216, 48), "F32"),
    ("model.layers.5.self_attn.o_proj.weight", (6144, 16384), "BF16"),
    ("model.layers.1.self_attn.attention_sink_bias", (128,), "BF16"),
    ("model.layers.0.mlp.down_proj.weight_scale_inv", (48, 128), "F32"),
    ("model.layers.69.mlp.experts.383.down_proj.weight", (6144, 1024), "U8"),
    ("model.layers.69.mlp.experts.383.up_proj.weight_scale", (2048, 192), "U8"),
    ("model.layers.3.mlp.gate.e_score_correction_bias", (384,), "F32"),
    ("model.mtp.layers.2.eh_proj.weight", (6144, 12288), "BF16"),
])
def test_published_tensors_of_the_pro_release(name, shape, dtype):
    tensor = next(t for t in published_tensors(PRO, mtp_layers=MTP_LAYERS) if t.name == name)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)


@pytest.mark.parametrize(("layer", "rows", "scale_rows"), [(0, 13568, 108), (1, 14848, 116)])
def test_fused_qkv_scale_grids_of_v2_5_restart_per_chunk(layer, rows, scale_rows):
    config = MiMoV2Config(**released_config("MiMo-V2.5"))
    shapes = {t.name: t.shape for t in published_tensors(config)}
    prefix = f"model.layers.{layer}.self_attn.qkv_proj.weight"
    assert shapes[prefix] == (rows, 4096) and shapes[prefix + "_scale_inv"] == (scale_rows, 32)


def test_split_key_grid_of_v2_flash_restarts_per_head():
    shapes = {t.name: t.shape for t in published_tensors(MiMoV2Config(**released_config("MiMo-V2-Flash")))}
    assert shapes["model.layers.0.self_attn.k_proj.weight_scale_inv"] == (8, 32)


@pytest.mark.parametrize(("name", "billions"), [("MiMo-V2-Flash", 309), ("MiMo-V2.5", 309), ("MiMo-V2.5-Pro", 1020)])
def test_released_models_construct_on_the_meta_device_with_the_published_tensors(name, billions):
    config = MiMoV2Config(**released_config(name))
    with torch.device("meta"):
        model = MiMoV2ForCausalLM(config)
    shapes = {}
    for key, tensor in model.state_dict().items():
        for part in expert_parts(key, tensor.shape) or [None]:
            shapes[part.name if part else key] = tuple(tensor[part.expert, part.rows].shape if part else tensor.shape)
    assert shapes == {t.name: t.shape for t in published_tensors(config, experts="bf16", dense="bf16")}
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("leaf", ["gate_up_proj", "down_proj"])
def test_expert_names_are_a_two_way_table_that_covers_the_fused_tensor_once(leaf):
    fused, shape = f"model.layers.7.mlp.experts.{leaf}", (3, 8, 4)
    covered = torch.zeros(shape)
    for part in expert_parts(fused, shape):
        covered[part.expert, part.rows] += 1
        name, expert, kind = fused_name(part.name)
        assert (name, expert) == (fused, part.expert) and kind in ("gate", "up", "down")
    assert (covered == 1).all()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"])
def test_other_tensors_keep_their_names(name):
    assert expert_parts(name, (4, 4)) is None and fused_name(name) is None


QKV = MiMoV2Config(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, hybrid_layer_pattern=[0, 1], num_attention_heads=8,
    num_key_value_heads=2, swa_num_key_value_heads=4, head_dim=24, v_head_dim=16, intermediate_size=64, sliding_window=5,
    partial_rotary_factor=0.5, attention_projection_layout="fused_qkv")


def test_split_and_fused_projections_are_the_same_model():
    torch.manual_seed(0)
    fused = MiMoV2ForCausalLM(QKV).eval()
    settings = QKV.to_dict() | {"attention_projection_layout": "split"}
    split = MiMoV2ForCausalLM(MiMoV2Config(**settings)).eval()
    weights = fused.state_dict()
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        projections = split_qkv(weights.pop(f"{prefix}.qkv_proj.weight"), QKV, layer)
        weights |= {f"{prefix}.{p}_proj.weight": w for p, w in zip("qkv", projections, strict=True)}
    split.load_state_dict(weights)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(split(input_ids=ids).logits, fused(input_ids=ids).logits, **MODEL_FP32)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_splitting_takes_every_row_of_its_chunks_in_order(layer, shape):
    rows = 8 * 24 + (2, 4)[layer] * (24 + 16)
    fused = torch.randn(rows, *shape)
    heads = [part.chunk(QKV.num_key_value_heads) for part in split_qkv(fused, QKV, layer)]
    assert torch.equal(torch.cat([rows for chunk in zip(*heads, strict=True) for rows in chunk]), fused)
    with pytest.raises(ValueError, match=f"layer {layer}: fused qkv of {rows - 1} rows, expected {rows}"):
        split_qkv(fused[:-1], QKV, layer)


def test_an_unknown_release_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean MiMo-V2.5-Pro"):
        released_config("MiMo-V2.5-Por")
