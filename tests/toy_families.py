"""Toy models of the families that are trained, and bases made of them in the ways that releases are stored."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FAMILIES = ("qwen3", "mixtral", "gpt_oss", "mimo")
COMMON = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 256, "tie_word_embeddings": False}


def toy(family: str, experts: int, **changes):
    """A small model with `experts` experts in every layer, float32, of random weights."""
    from tiny_models import tiny_config
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    common = COMMON | changes
    if family == "mimo":
        return MiMoV2ForCausalLM(MiMoV2Config(**tiny_config().to_diff_dict() | {"n_routed_experts": experts} | changes))
    if family == "qwen3":
        own = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": experts, "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**own | common))
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**{"intermediate_size": 32, "num_local_experts": experts} | common))
    return GptOssForCausalLM(GptOssConfig(**{"intermediate_size": 64, "num_local_experts": experts, "sliding_window": 16,
                                             "pad_token_id": 0} | common))


def write_base(folder: Path, family: str, experts: int, **changes) -> Path:
    """A bf16 base of weights wide enough that rounding the experts is felt."""
    from tiny_models import write_tokenizer

    torch.manual_seed(0)
    model = toy(family, experts, **changes).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15 if "experts" in name else 0.08)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def pack(folder: Path, form: str) -> Path:
    """Stores a base of `write_base` as releases are: "fp8" (128 x 128 blocks), "mxfp4" (gpt-oss's own form of its experts) or
    "compressed-tensors" (MXFP4 experts)."""
    from checkpoint.fp8 import quantize_fp8
    from modeling.configuration_mimo_v2 import MiMoV2Config
    from mxfp4 import quantize

    tensors, packed = load_file(folder / "model.safetensors"), {}
    config = json.loads((folder / "config.json").read_text())
    grids = MiMoV2Config.from_dict(config) if config["model_type"] == "mimo_v2" else None  # scales begin anew with each head
    for name, t in tensors.items():
        if form == "fp8" and t.ndim == 2 and name.endswith("proj.weight"):
            packed[name], packed[name + "_scale_inv"] = quantize_fp8(name, t, grids)
        elif form == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")) and t.ndim == 3:
            pairs = [quantize(expert.T.float().contiguous()) for expert in t]
            packed[name + "_blocks"] = torch.stack([c.unflatten(-1, (-1, 16)) for c, _ in pairs])
            packed[name + "_scales"] = torch.stack([s for _, s in pairs])
        elif form == "compressed-tensors" and ".experts." in name:
            codes, scales = quantize(t.float())
            packed[name.replace(".weight", ".weight_packed")], packed[name.replace(".weight", ".weight_scale")] = codes, scales
        else:
            packed[name] = t
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    methods = {"fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "mxfp4": {"quant_method": "mxfp4"},
               "compressed-tensors": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": methods[form]}))
    return folder
