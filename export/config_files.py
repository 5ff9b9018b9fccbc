"""Everything beside the weights: config.json (its quantization section: `checkpoint.quantization`), code, tokenizer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from checkpoint.contradictions import AUTO_MAP, SPELLINGS
from checkpoint.inventory import is_mimo
from checkpoint.quantization import quantization_config
from checkpoint.tokenizer_files import shipped_bytes, tokenizer_files
from storage.files import write_bytes

ROOT = Path(__file__).resolve().parents[1]
REMOTE_CODE = ("configuration_mimo_v2.py", "modeling_mimo_v2.py", "native_loading.py")
# config.json keys of transformers' own bookkeeping, which would go stale.
_BOOKKEEPING = ("transformers_version", "_name_or_path", "torch_dtype", "quantization_config", "auto_map")


def model_config(base: dict, layout: str, dtypes: dict[str, str]) -> dict:
    """config.json of the exported model.

    Args:
        base: config.json of the trained model.
        dtypes: dtype of every tensor that is written, by name.
    """
    config = {k: v for k, v in base.items() if k not in _BOOKKEEPING} | {"dtype": "bfloat16"}
    if layout != "native" and not (layout == "bf16" and is_mimo(base)):
        if is_mimo(base):
            config = flash_config(config)
        config = both_spellings(config)
        return config if layout == "bf16" else config | {"quantization_config": quantization_config(layout, config, dtypes)}
    split = not any(re.fullmatch(r"model\.layers\.\d+\.self_attn\.qkv_proj\.weight", name) for name in dtypes)  # not MTP's
    config |= {"model_type": "mimo_v2", "architectures": ["MiMoV2ForCausalLM"], "auto_map": AUTO_MAP,
               "attention_projection_layout": "split" if split else "fused_qkv"}
    for key in ("sliding_window_size", "attention_chunk_size"):
        config.setdefault(key, config.get("sliding_window", 128))
    config = both_spellings(config)
    return config if layout == "bf16" else config | {"quantization_config": quantization_config(layout, config, dtypes)}


def both_spellings(config: dict) -> dict:
    """With every key that transformers 5 renamed under its old and its new name.

    A client of either age takes its default, without a word, where it misses its own: 128 experts, a rotary base of 10000.
    """
    config = dict(config)
    for pair in SPELLINGS:
        for name, other in (pair, pair[::-1]):
            if name in config:
                config.setdefault(other, config[name])
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:  # else one for each kind of layer, which no client of before 5 has
        old = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", old)
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    elif rope is None and "rope_theta" in config and config.get("model_type") != "mimo_v2":
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        config["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
    return config


def flash_config(config: dict) -> dict:
    """The same geometry in the keys of transformers' mimo_v2_flash.

    `sliding_window` means there what it means here, keys seen including the query itself; the published
    `sliding_window_size` is left out, because the class would add one to it.
    """
    layers = config["num_hidden_layers"]
    rope = {kind: {"rope_type": "default", "rope_theta": float(config[key]),
                   "partial_rotary_factor": config.get("partial_rotary_factor", 1.0)}
            for kind, key in (("full_attention", "rope_theta"), ("sliding_attention", "swa_rope_theta"))}
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
            "attention_bias", "moe_intermediate_size", "num_experts_per_tok", "n_routed_experts", "n_group", "topk_group",
            "norm_topk_prob", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "v_head_dim", "sliding_window",
            "dtype", "use_cache")
    return {key: config[key] for key in keep if key in config} | {
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "rope_parameters": rope,
        "rms_norm_eps": config.get("layernorm_epsilon", 1e-5), "attention_dropout": 0.0,
        "routed_scaling_factor": config.get("routed_scaling_factor") or 1.0,
        "attention_value_scale": config.get("attention_value_scale"),
        "layer_types": ["sliding_attention" if swa else "full_attention"
                        for swa in config.get("hybrid_layer_pattern") or [0] * layers],
        "mlp_layer_types": ["sparse" if moe else "dense" for moe in config.get("moe_layer_freq") or [0] * layers]}


def is_licence(path: Path) -> bool:
    """Whether a file is a licence's text or a notice that it asks to be handed on."""
    name = re.fullmatch(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].{1,40})?", path.name, re.IGNORECASE)
    return name is not None and path.is_file()


def copy_companions(sources: list[Path], out: Path, *, code: bool) -> list[str]:
    """Remote code (if `code`), tokenizer, generation_config.json and licences; returns the names of what was copied.

    Args:
        sources: folders to look in, the first that has a tokenizer wins.
    """
    copied = []
    if code:
        for name in REMOTE_CODE:
            shutil.copyfile(ROOT / "modeling" / name, out / name)
            copied.append(name)
    def settings(location: Path) -> list[str]:
        return [name for name in ("generation_config.json",) if (location / name).is_file()]

    def licences(location: Path) -> list[str]:
        return sorted(path.name for path in location.iterdir() if is_licence(path))

    for kind in (tokenizer_files, settings, licences):
        location = next((source for source in sources if kind(source)), None)
        for name in kind(location) if location is not None else ():
            write_bytes(out / name, shipped_bytes(location / name))
            copied.append(name)
    return copied
