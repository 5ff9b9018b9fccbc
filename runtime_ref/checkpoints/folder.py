"""A checkpoint folder: configuration, checksums, drafter, end tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from modeling.configuration_mimo_v2 import MiMoV2Config


def end_ids(folder: str | Path, config: dict) -> list[int]:
    """Tokens that end an answer: of generation_config.json, else of config.json."""
    import json

    file = Path(folder) / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = generation.get("eos_token_id", config.get("eos_token_id"))
    return [int(i) for i in (found if isinstance(found, list) else [found]) if i is not None]


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
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    if raw.get("model_type") != "mimo_v2":
        raise ValueError(f"{file}: model_type: {raw.get('model_type')!r}, expected 'mimo_v2' (the native layout)")
    drop = ("quantization_config", "model_type", "dtype", "torch_dtype")
    try:
        config = MiMoV2Config.from_dict({k: v for k, v in raw.items() if k not in drop})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None
    if config.attention_bias:
        raise ValueError(f"{file}: attention_bias: true, expected false (no release has it)")
    return config, raw


def verify_checksums(folder: str | Path) -> None:
    """Compares every file that checksums.sha256 lists.

    Raises:
        ValueError: no list, a missing file, or one whose bytes differ.
    """
    folder = Path(folder)
    if not (folder / CHECKSUM_FILE).is_file():
        raise ValueError(f"{folder}: no {CHECKSUM_FILE}, nothing to compare with")
    for line in (folder / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        path = folder / name.strip().lstrip("*")
        if not path.is_file():
            raise ValueError(f"{folder}: {name} is missing, {CHECKSUM_FILE} lists it")
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != wanted:
            raise ValueError(f"{path}: sha256 {found[:16]}..., expected {wanted[:16]}...: the file is damaged")


def drafter_folder(folder: str | Path) -> Path | None:
    """The `dflash/` sub-folder, if the checkpoint has a drafter."""
    found = Path(folder) / "dflash"
    return found if (found / "config.json").is_file() else None


CHECKSUM_FILE = "checksums.sha256"
