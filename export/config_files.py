"""Everything beside the weights: config.json, remote code, tokenizer, the drafter's folder, checksums.

`quantization_config` of the native layout keeps the method name "fp8"; `store_dtype: mxfp4` alone marks the experts, as
released. Modules that are not FP8 are named in `ignored_layers`, each under every name by which an engine may ask for it
(engines join q/k/v and gate/up and look the parts up): a module that is missing there is built as FP8 and would read bf16
bytes wrongly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storage.reading import read_json

ROOT = Path(__file__).resolve().parents[1]
REMOTE_CODE = ("configuration_mimo_v2.py", "modeling_mimo_v2.py", "native_loading.py")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
AUTO_MAP = {"AutoConfig": "configuration_mimo_v2.MiMoV2Config", "AutoModel": "modeling_mimo_v2.MiMoV2Model",
            "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM"}
CHECKSUMS = "checksums.sha256"
TENSOR_SUMS = "checksums.json"
# config.json keys of transformers' own bookkeeping, which would go stale.
_BOOKKEEPING = ("transformers_version", "_name_or_path", "torch_dtype", "quantization_config", "auto_map")


def model_config(base: dict, layout: str, dtypes: dict[str, str]) -> dict:
    """config.json of the exported model.

    Args:
        base: config.json of the trained model.
        dtypes: dtype of every tensor that is written, by name.
    """
    config = {k: v for k, v in base.items() if k not in _BOOKKEEPING} | {"dtype": "bfloat16"}
    if layout != "native":
        if config.get("model_type") in ("mimo_v2", "mimo_v2_flash"):
            config = flash_config(config)
        return config | {"quantization_config": quantization_config(layout, config, dtypes)}
    split = not any(re.fullmatch(r"model\.layers\.\d+\.self_attn\.qkv_proj\.weight", name) for name in dtypes)  # not MTP's
    config |= {"model_type": "mimo_v2", "architectures": ["MiMoV2ForCausalLM"], "auto_map": AUTO_MAP,
               "attention_projection_layout": "split" if split else "fused_qkv"}
    for key in ("sliding_window_size", "attention_chunk_size"):
        config.setdefault(key, config.get("sliding_window", 128))
    return config | {"quantization_config": quantization_config(layout, config, dtypes)}


def quantization_config(layout: str, config: dict, dtypes: dict[str, str]) -> dict:
    """The section of config.json by which a client knows what it finds; arguments as in `model_config`."""
    if layout == "gpt-oss":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                                    "model.embed_tokens", "lm_head"]}
    if layout == "compressed-tensors":
        return compressed_config()
    if layout == "hf-fp8":
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "expert_dtype": "fp4",
                "modules_to_not_convert": sorted({n.removesuffix(".weight") for n in dtypes
                                                  if n.endswith(".weight") and ".mlp.experts." not in n})}
    return {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "store_dtype": "mxfp4", "mxfp4_block_size": 32, "ignored_layers": ignored_layers(config, dtypes)}


def ignored_layers(config: dict, dtypes: dict[str, str]) -> list[str]:
    """Linear layers that are not FP8, by module path, in the decoder's order; then those of MTP layers.

    MTP layers go by two names: `model.decoder` for all of them (SGLang, and the published list), or each as its tensors (vLLM).
    """
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(config["num_hidden_layers"])]
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        held = [dtypes[n] for n in (f"{attention}.qkv_proj.weight", f"{attention}.q_proj.weight") if n in dtypes]
        if held[0] != "F8_E4M3":
            names += [f"{attention}.{part}_proj" for part in ("q", "k", "v", "qkv")]
        if dtypes.get(f"{mlp}.gate_proj.weight", "F8_E4M3") != "F8_E4M3":
            names += [f"{mlp}.{part}_proj" for part in ("gate", "up", "gate_up", "down")]
    plain = dict.fromkeys([*names, "model.decoder.self_attn.o_proj"])
    for name in sorted(n for n, dtype in dtypes.items() if n.startswith("model.mtp.layers.") and dtype != "F8_E4M3"):
        match = re.fullmatch(r"(model\.mtp\.layers\.\d+)\.(self_attn|mlp)\.(qkv|[qkv]|gate|up|down)_proj\.weight", name)
        if match:
            parts = ("q", "k", "v", "qkv", "o") if match[2] == "self_attn" else ("gate", "up", "gate_up", "down")
            plain |= dict.fromkeys(f"{home}.{match[2]}.{part}_proj" for home in ("model.decoder", match[1]) for part in parts)
    return list(plain)


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


def compressed_config() -> dict:
    """quantization_config of compressed-tensors: weight-only MXFP4 of the experts, everything else ignored."""
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False,
               "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["re:.*mlp\\.experts\\..*_proj$"], "weights": weights,
                                          "input_activations": None, "output_activations": None,
                                          "format": "mxfp4-pack-quantized"}},
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$", "re:.*mlp\\.(gate|up|down)_proj$"]}


def write_json(path: Path, value: dict) -> None:
    """Sorted, indented, ended by a newline."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a small file under a temporary name and renames it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(data)
    os.replace(aside, path)


def copy_companions(sources: list[Path], out: Path, layout: str) -> list[str]:
    """Remote code (native), tokenizer and generation_config.json; returns the names of what was copied.

    Args:
        sources: folders to look in, the first that has a tokenizer wins.
    """
    copied = []
    if layout == "native":
        for name in REMOTE_CODE:
            shutil.copyfile(ROOT / "modeling" / name, out / name)
            copied.append(name)
    for names in (TOKENIZER, ("generation_config.json",)):
        home = next((s for s in sources if any((s / n).is_file() for n in names)), None)
        for name in names:
            if home is not None and (home / name).is_file():
                shutil.copyfile(home / name, out / name)
                copied.append(name)
    return copied


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_files(folder: Path) -> list[Path]:
    """All files of a checkpoint but the checksums, as relative paths, sorted.

    Hidden ones are not part of it: hubs and their clients add .gitattributes and .cache/.
    """
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return [p for p in paths if not any(part.startswith(".") or part == "__pycache__" for part in p.parts)]


def internal(path: Path) -> bool:
    """Files of a running export that are not part of the checkpoint."""
    return path.name == "plan.json" or path.suffix == ".sums"


def write_checksums(folder: Path, sums: dict[str, str], *, skip: Callable[[Path], bool] = lambda path: False) -> None:
    """checksums.json (CRC-32 of every tensor) and checksums.sha256 (every file; `sha256sum -c` reads it)."""
    write_json(folder / TENSOR_SUMS, {"tensors_crc32": sums})
    paths = [path for path in checkpoint_files(folder) if not skip(path)]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(sha256, (folder / path for path in paths))
        text = "".join(f"{digest}  {path.as_posix()}\n" for digest, path in zip(digests, paths, strict=True))
    write_bytes(folder / CHECKSUMS, text.encode())


def read_checksums(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(SHA-256 by file, CRC-32 by tensor) that a checkpoint declares; empty where it has none."""
    files: dict[str, str] = {}
    if (folder / CHECKSUMS).is_file():
        for line in (folder / CHECKSUMS).read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            files[name] = digest
    sums = read_json(folder / TENSOR_SUMS).get("tensors_crc32", {}) if (folder / TENSOR_SUMS).is_file() else {}
    return files, sums
