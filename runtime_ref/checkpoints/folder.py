"""A checkpoint folder: configuration, checksums, drafter, end tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError

from checkpoint.families.geometry import NotHeld
from checkpoint.families.registry import FAMILIES
from checkpoint.tensor_files import TensorFiles
from modeling.configuration_mimo_v2 import MiMoV2Config
from storage.reading import first_line, read_json


def end_ids(folder: str | Path, config: dict) -> list[int]:
    """Tokens that end an answer: of generation_config.json, else of config.json."""
    file = Path(folder) / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    listed = [i for i in (found if isinstance(found, list) else [found]) if i is not None]
    wrong = next((i for i in listed if type(i) is not int or not 0 <= i < 1 << 31), None)
    if wrong is not None:
        raise ValueError(f"{folder}: eos_token_id: {str(wrong)[:50]!r}, expected token ids")
    return listed


def read_config(folder: str | Path) -> tuple[MiMoV2Config, dict]:
    """(configuration, the raw config.json) of an exported folder.

    Raises:
        ValueError: no folder or config.json, another model type, a geometry that cannot be.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        what = "no config.json" if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder}: {what}, expected an exported checkpoint")
    raw = read_json(file)
    if raw.get("model_type") != "mimo_v2":
        raise ValueError(f"{file}: model_type: {raw.get('model_type')!r}, expected 'mimo_v2' (the native layout)")
    drop = ("quantization_config", "model_type", "dtype", "torch_dtype")
    try:
        config = MiMoV2Config.from_dict({k: v for k, v in raw.items() if k not in drop})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {first_line(error)}") from None
    if config.attention_bias:
        raise ValueError(f"{file}: attention_bias: true, expected false (no release has it)")
    return config, raw


def read_geometry(folder: str | Path) -> tuple[object, dict]:
    """(configuration or geometry, the raw config.json) of an exported folder of any held model.

    Raises:
        ValueError: no folder or config.json. NotHeld: a model or an option that this runtime does not run.
    """
    file = Path(folder) / "config.json"
    if file.is_file():
        raw = read_json(file)
        kind = raw.get("model_type")
        if isinstance(kind, str) and kind in FAMILIES and FAMILIES[kind].runtime_layout not in (None, "native"):
            return FAMILIES[kind].geometry(file, raw), raw
        if kind != "mimo_v2" and raw.get("kv_lora_rank"):
            raise NotHeld(f"{file}: model_type: {kind!r}: this runtime does not run multi-head latent attention (kv_lora_rank "
                          f"{raw['kv_lora_rank']}); serve the folder with another engine and judge that: "
                          f"runtime_ref/validate.py {file.parent} --endpoint URL")
        if kind != "mimo_v2":
            held = [f"{f.model_type} ({f.runtime_layout} layout)" for f in FAMILIES.values() if f.runtime_layout]
            raise NotHeld(f"{file}: model_type: {kind!r}, expected one of {', '.join(held)}{_nearest(raw)}")
        if raw.get("quantization_config") is None and _unpacked(Path(folder)):
            raise NotHeld(f"{file}: no quantization_config, and the experts are not packed as MXFP4: a trained checkpoint; "
                          "export/to_hf.py RECIPE writes a folder that this runtime runs")
    return read_config(folder)


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


def verify_checksums(folder: str | Path) -> None:
    """Compares every file that checksums.sha256 lists.

    Raises:
        ValueError: no list, a missing file, or one whose bytes differ.
    """
    folder = Path(folder)
    if not (folder / CHECKSUM_FILE).is_file():
        raise ValueError(f"{folder}: no {CHECKSUM_FILE}, nothing to compare with")
    for line in (folder / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name.strip().lstrip("*")
        if not path.is_file():
            raise ValueError(f"{folder}: {name} is missing, {CHECKSUM_FILE} lists it")
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise ValueError(f"{path}: sha256 {found[:16]}..., expected {expected[:16]}...: the file is damaged")


def drafter_folder(folder: str | Path) -> Path | None:
    """The `dflash/` sub-folder, if the checkpoint has a drafter."""
    found = Path(folder) / "dflash"
    return found if (found / "config.json").is_file() else None


CHECKSUM_FILE = "checksums.sha256"
