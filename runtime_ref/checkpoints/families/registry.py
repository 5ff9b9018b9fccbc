"""Model types to families, and how a folder is opened."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from checkpoint.tensor_files import TensorFiles
from runtime_ref.checkpoints.families.base import NotHeld
from runtime_ref.checkpoints.families.gpt_oss import GptOssReader, gpt_oss_geometry
from runtime_ref.checkpoints.families.mixtral import MixtralReader, mixtral_geometry
from runtime_ref.checkpoints.families.qwen3_moe import Qwen3Reader, qwen3_geometry
from runtime_ref.checkpoints.folder import read_config
from runtime_ref.checkpoints.host_weights import Reader


def read_geometry(folder: str | Path) -> tuple[object, dict]:
    """(configuration or geometry, the raw config.json) of an exported folder of any held model.

    Raises:
        ValueError: no folder or config.json. NotHeld: a model or an option that this runtime does not run.
    """
    file = Path(folder) / "config.json"
    if file.is_file():
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            return read_config(folder)
        if not isinstance(raw, dict):
            raise ValueError(f"{file}: {type(raw).__name__}, expected an object")
        kind = raw.get("model_type")
        if kind in _FAMILIES:
            return _FAMILIES[kind][0](file, raw), raw
        if kind != "mimo_v2":
            held = ["mimo_v2 (native layout)", *(f"{kind} ({layout} layout)" for kind, (_, _, layout) in _FAMILIES.items())]
            raise NotHeld(f"{file}: model_type: {kind!r}, expected one of {', '.join(held)}{_nearest(raw)}")
        if raw.get("quantization_config") is None and _unpacked(Path(folder)):
            raise NotHeld(f"{file}: no quantization_config, and the experts are not packed as MXFP4: a trained checkpoint; "
                          "export/to_hf.py RECIPE writes a folder that this runtime runs")
    return read_config(folder)


def open_folder(folder: str | Path) -> tuple[object, type[Reader]]:
    """Configuration and reader of an exported folder."""
    config, raw = read_geometry(folder)
    return config, Reader if raw["model_type"] == "mimo_v2" else _FAMILIES[raw["model_type"]][1]


def _unpacked(folder: Path) -> bool:
    """Whether a folder has experts and no scales of them."""
    try:
        names = [str(name) for name in TensorFiles(folder)]
    except (ValueError, OSError, KeyError, TypeError, SafetensorError):
        return False  # what is wrong with the files is for their reader to say
    return any(".mlp.experts." in n for n in names) and not any(n.endswith("weight_scale") for n in names)


def _nearest(raw: dict) -> str:
    """What to do with a folder of a known model in a layout that is not held."""
    if raw.get("model_type") != "mimo_v2_flash":
        return ""
    section = raw.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    layout = {"compressed-tensors": "the compressed-tensors", "fp8": "the hf-fp8"}.get(method, "an unpacked")
    return (f"; this is MiMo-V2 in {layout} layout, which transformers runs: export it with --layout native, which holds "
            "the same expert bytes")


_FAMILIES = {"qwen3_moe": (qwen3_geometry, Qwen3Reader, "compressed-tensors"),
             "mixtral": (mixtral_geometry, MixtralReader, "compressed-tensors"),
             "gpt_oss": (gpt_oss_geometry, GptOssReader, "gpt-oss")}
