"""Stock clients load what is exported: experts bit for bit, logits as our model's."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tolerance import MODEL_FP32
from toy_export import export, gpt_oss_run, make_run, qwen3_run, toy_config
from transformers import AutoModelForCausalLM

from checkpoint.fp8 import dequantize_fp8
from checkpoint.load import load_model
from modeling.names import qkv_scale_rows
from modeling.native_loading import decode_fp8, decode_mxfp4, scale_segments
from mxfp4 import dequantize

IDS = (torch.arange(45)[None] * 7) % 89


def stock(folder, **options):
    """Loads with AutoModelForCausalLM and demands that every key fits."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def assert_same_experts(model, reference):
    ours = reference.state_dict()
    names = [n for n in ours if ".experts." in n and ours[n].ndim == 3]
    assert names
    theirs = model.state_dict()
    for name in names:
        assert torch.equal(theirs[name].view(torch.int16), ours[name].view(torch.int16)), name


def assert_same_logits(model, reference):
    """In float32, where another order of sums is all that may differ; the input crosses the window's edge."""
    torch.nn.Module.float(model)  # transformers' own method refuses models that were packed on disk
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, reference.float()(input_ids=IDS).logits, **MODEL_FP32)


@pytest.fixture
def trained(toy_run):
    return load_model(toy_run.parent / "runs/toy/qat/model", dtype=torch.bfloat16)


@pytest.fixture
def without_drafter(tmp_path):
    return make_run(tmp_path, drafter=False)


def test_the_shipped_decoder_equals_the_codec_on_every_code_and_scale():
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[:, :256].contiguous()  # every pair of codes under every byte
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16).contiguous()
    for dtype in (torch.bfloat16, torch.float32):
        ours, theirs = decode_mxfp4(codes, scales, dtype), dequantize(codes, scales, dtype=dtype)
        bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
        assert torch.equal(ours[:255].view(bits), theirs[:255].view(bits))
        assert ours[255].isnan().all() and theirs[255].isnan().all()


@pytest.mark.parametrize("name, rows", [("model.layers.1.self_attn.qkv_proj.weight", 448),
                                        ("model.layers.0.self_attn.qkv_proj.weight", 320),
                                        ("model.layers.1.self_attn.k_proj.weight", 768),
                                        ("model.layers.0.mlp.up_proj.weight", 200)])
def test_the_shipped_fp8_decoder_equals_the_loaders(name, rows):
    config = toy_config()
    torch.manual_seed(0)
    weight = torch.randn(rows, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(sum(-(-n // 128) for n in qkv_scale_rows(name, rows, config)), 2)
    ours = decode_fp8(weight, scales, scale_segments(name, config), torch.float32)
    assert torch.equal(ours, dequantize_fp8(name, weight, scales, config))


def test_transformers_loads_the_native_layout_by_its_shipped_code(exported, trained, toy_run):
    model = stock(exported, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    assert_same_experts(model, trained)
    trained.model.embed_tokens.weight.data[89] = model.model.embed_tokens.weight.data[89]  # the mask token's row
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, load_model(exported, dtype=torch.bfloat16)(input_ids=IDS).logits)
    assert_same_logits(model, trained)


def test_transformers_decodes_the_grids_of_a_fused_fp8_qkv(toy_run, tmp_path):
    out = export(toy_run, "export.dense=fp8", out=tmp_path / "out")
    model, ours = stock(out, trust_remote_code=True), load_model(out, dtype=torch.bfloat16)
    for (name, a), b in zip(model.state_dict().items(), ours.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_a_model_loaded_by_the_shipped_code_promises_nothing_and_saves_plain_weights(exported, tmp_path):
    model = stock(exported, trust_remote_code=True)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    saved = load_file(tmp_path / "model.safetensors")
    again = load_model(tmp_path, dtype=torch.bfloat16).state_dict()
    assert {t.dtype for t in saved.values()} <= {torch.bfloat16, torch.float32}
    assert all(torch.equal(a, again[n]) for n, a in model.state_dict().items())


def test_the_shipped_code_generates(exported):
    model = stock(exported, trust_remote_code=True)
    text = model.generate(IDS[:, :12], max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        greedy = IDS[:, :12]
        for _ in range(12):
            greedy = torch.cat((greedy, model(input_ids=greedy, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
            if greedy[0, -1] == 3:
                break
    assert text[0, :greedy.shape[1]].tolist() == greedy[0].tolist()


def test_transformers_loads_hf_fp8_into_its_own_class(without_drafter):
    out = export(without_drafter, "export.layout=hf-fp8")
    model = stock(out)
    assert type(model).__name__ == "MiMoV2FlashForCausalLM"
    trained = load_model(without_drafter.parent / "runs/toy/qat/model", dtype=torch.bfloat16)
    assert_same_experts(model, trained)
    assert_same_logits(model, trained)


def test_transformers_own_class_cannot_read_the_native_bytes(exported, tmp_path):
    """Why the code is shipped: if this begins to load, the shipped loader can go."""
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    from export.config_files import flash_config

    (folder / "config.json").write_text(json.dumps(flash_config(config) | {
        "quantization_config": config["quantization_config"]}))
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", ["mimo", "qwen3"])
def test_compressed_tensors_loads_its_layout(family, tmp_path):
    if family == "mimo":
        recipe = make_run(tmp_path, drafter=False)
        trained = load_model(tmp_path / "runs/toy/qat/model", dtype=torch.bfloat16)
    else:
        recipe, trained = qwen3_run(tmp_path)
    model = stock(export(recipe, "export.layout=compressed-tensors"))
    assert_same_experts(model, trained)
    assert_same_logits(model, trained)


def test_our_packing_is_that_of_compressed_tensors():
    from compressed_tensors.compressors import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    from mxfp4 import quantize

    torch.manual_seed(0)
    codes, scales = quantize(torch.randn(40, 96).bfloat16())
    weight = dequantize(codes, scales, dtype=torch.bfloat16)
    scheme: QuantizationScheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    given = {"weight": weight, "weight_scale": (scales.float() - 127).exp2().bfloat16()}
    packed = MXFP4PackedCompressor.compress(given, scheme)
    # A quantizer may write a negative zero or a positive one: compare what the nibbles say.
    assert torch.equal(dequantize(packed["weight_packed"], packed["weight_scale"], dtype=torch.float32),
                       dequantize(codes, scales, dtype=torch.float32))
    assert torch.equal(packed["weight_scale"], scales)


def test_transformers_loads_the_gpt_oss_layout(tmp_path):
    from transformers import Mxfp4Config

    recipe, trained = gpt_oss_run(tmp_path)
    out = export(recipe, "export.layout=gpt-oss")
    for options in ({"quantization_config": Mxfp4Config(dequantize=True)}, {}):
        model = stock(out, **options)
        assert_same_experts(model, trained)
    assert_same_logits(model, trained)


def test_the_drafters_config_survives_transformers(exported, toy_run):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(exported / "dflash")
    assert type(config).__name__ == "Qwen3Config" and config.sliding_window == 16
    assert config.layer_types == ["sliding_attention"] * 2 and config.dflash_config["target_layer_ids"] == [0, 2]
    assert config.rope_parameters["rope_theta"] == 1e5 and config.rope_parameters["partial_rotary_factor"] == 0.5


def test_the_shipped_drafter_loads_by_auto_model_and_gives_the_recorded_logits(exported):
    from transformers import AutoModel

    from checkpoint.drafter_folder import draft_round, read_reference

    drafter, info = AutoModel.from_pretrained(exported / "dflash", trust_remote_code=True, dtype=torch.float32,
                                              output_loading_info=True)
    assert not info["unexpected_keys"] and set(info["missing_keys"]) <= {"mask_embedding"}
    mask = torch.load(exported / "dflash/mask_embedding.pt", weights_only=True)
    drafter.mask_embedding.data.copy_(mask["embedding"].float())
    tensors, facts = read_reference(exported / "dflash/dflash_reference.safetensors")
    assert facts["features"] == "target"
    files = {n: t for f in exported.glob("model-*.safetensors") for n, t in load_file(f).items()}
    with torch.no_grad():
        hidden = draft_round(drafter.eval(), tensors["taps"], tensors["input_ids"], files["model.embed_tokens.weight"].float())
    logits = hidden[:, 1:] @ files["lm_head.weight"].float().T
    torch.testing.assert_close(logits, tensors["draft_logits"], **MODEL_FP32)
