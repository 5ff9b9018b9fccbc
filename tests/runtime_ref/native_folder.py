"""Writes a small exported folder (native layout) for the runtime's tests, from a model in memory.

Independent of the exporter on purpose: names and bytes follow the format, so a mistake that exporter and runtime share
would show here.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling.names import expert_parts
from mxfp4 import quantize

E2M1_FP8_MAX = 448.0


def tensors_of(model) -> dict[str, torch.Tensor]:
    """Published tensors of a MiMoV2ForCausalLM: experts packed, the rest BF16, correction bias F32."""
    out = {}
    for name, value in model.state_dict().items():
        parts = expert_parts(name, value.shape)
        if parts is None:
            keep = name.endswith("e_score_correction_bias")
            out[name] = value.float() if keep else value.to(torch.bfloat16)
            continue
        for part in parts:
            codes, scales = quantize(value[part.expert, part.rows].to(torch.bfloat16))
            out[part.name], out[part.name + "_scale"] = codes, scales
    return {name: t.contiguous().clone() for name, t in out.items()}


def write_native(folder: Path, model, drafter=None, tokenizer: Path | None = None) -> Path:
    """config.json, model.safetensors, and dflash/ and tokenizer files if given."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config |= {"architectures": ["MiMoV2ForCausalLM"], "torch_dtype": "bfloat16", "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "store_dtype": "mxfp4", "mxfp4_block_size": 32,
        "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(model.config.num_hidden_layers)]}}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
    save_file(tensors_of(model), folder / "model.safetensors", metadata={"format": "pt"})
    if drafter is not None:
        from modeling.drafter import save_drafter

        save_drafter(drafter, folder / "dflash")
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
            if (tokenizer / name).is_file():
                (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder
