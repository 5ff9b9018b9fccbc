"""The section `quantization_config` of config.json, by which a client knows what it finds.

The native layout keeps the method name "fp8"; `store_dtype: mxfp4` alone marks the experts, as released. Modules that are not
FP8 are named in `ignored_layers`, each under every name by which an engine may ask for it (engines join q/k/v and gate/up and
look the parts up): a module that is missing there is built as FP8 and would read bf16 bytes wrongly.
"""

from __future__ import annotations

import re


def quantization_config(layout: str, config: dict, dtypes: dict[str, str]) -> dict:
    """The section of config.json by which a client knows what it finds; arguments as in `model_config`."""
    if layout == "gpt-oss":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                                    "model.embed_tokens", "lm_head"]}
    if layout == "compressed-tensors":
        return compressed_config(dtypes)
    if layout == "hf-fp8":
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "expert_dtype": "fp4",
                "modules_to_not_convert": sorted({n.removesuffix(".weight") for n in dtypes
                                                  if n.endswith(".weight") and ".mlp.experts." not in n})}
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "store_dtype": "mxfp4", "mxfp4_block_size": 32, "ignored_layers": ignored_layers(config, dtypes)}


def ignored_layers(config: dict, dtypes: dict[str, str]) -> list[str]:
    """Linear layers that are not FP8, by module path, in the decoder's order; then those of MTP layers."""
    return list(dict.fromkeys(name for names, is_fp8 in module_names(config, dtypes) if not is_fp8 for name in names))


def module_names(config: dict, dtypes: dict[str, str]) -> list[tuple[tuple[str, ...], bool]]:
    """(the names by which engines ask for one linear layer or its joined parts, whether it is FP8) of MiMo-V2.

    MTP layers go by two names: `model.decoder` for all of them (SGLang, and the published list), or each as its tensors (vLLM).
    """
    layers = range(config["num_hidden_layers"])
    found = [((f"model.layers.{i}.self_attn.o_proj",), False) for i in layers]
    for i in layers:
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for module, parts, first in ((attention, ("q", "k", "v", "qkv"), ("qkv", "q")),
                                     (mlp, ("gate", "up", "gate_up", "down"), ("gate",))):
            held = next((dtypes[n] for part in first if (n := f"{module}.{part}_proj.weight") in dtypes), None)
            if held is not None:
                found.append((tuple(f"{module}.{part}_proj" for part in parts), held == "F8_E4M3"))
    found.append((("model.decoder.self_attn.o_proj",), False))
    for name in sorted(n for n, dtype in dtypes.items() if n.startswith("model.mtp.layers.") and dtype != "F8_E4M3"):
        match = re.fullmatch(r"(model\.mtp\.layers\.\d+)\.(self_attn|mlp)\.(qkv|[qkv]|gate|up|down)_proj\.weight", name)
        if match:
            parts = ("q", "k", "v", "qkv", "o") if match[2] == "self_attn" else ("gate", "up", "gate_up", "down")
            found.append((tuple(f"{prefix}.{match[2]}.{part}_proj" for prefix in ("model.decoder", match[1]) for part in parts),
                          False))
    return found


def compressed_config(dtypes: dict[str, str]) -> dict:
    """quantization_config of compressed-tensors: weight-only MXFP4 of the experts, everything else ignored."""
    packed = sorted({n.split(".")[-2] for n in dtypes if n.endswith(".weight_packed")})
    targets, ignore = "re:.*mlp\\.experts\\..*_proj$", ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$",
                                                       "re:.*mlp\\.(gate|up|down)_proj$"]
    if not all(re.search(r"mlp\.experts\..*_proj\.weight_", n) for n in dtypes if n.endswith(".weight_packed")):
        targets = f"re:.*\\.experts\\.\\d+\\.({'|'.join(packed)})$"
        modules = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(n.removesuffix(".weight")))
                   for n in dtypes if n.endswith(".weight") and n != "lm_head.weight"}
        ignore = ["lm_head", *sorted(f"re:{module}$" for module in modules)]
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
               "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": [targets], "weights": weights,
                                          "input_activations": None, "output_activations": None,
                                          "format": "mxfp4-pack-quantized"}},
            "ignore": ignore}
