"""What was judged, when, where and by what: the head of a report."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from runtime_ref.validation.context import ValidationContext, own_object
from storage.revision import git_revision


def model_facts(context: ValidationContext) -> dict:
    """Model, base, layout, sizes and drafter of a folder, as far as the folder says; {} where it says nothing."""
    raw, export = context.raw, own_object(context.folder / "export.json")
    found = {"architecture": (raw.get("architectures") or [raw.get("model_type")])[0], "layers": raw.get("num_hidden_layers"),
             "hidden size": raw.get("hidden_size"), "base": export.get("base"), "layout": export.get("layout"),
             "written by": "this project's exporter" if context.ours else "somebody else's exporter",
             "exported at": export.get("date"), "bytes on disk": _size(context.folder)}
    drafter = context.drafter_config
    if drafter:
        special = drafter.get("dflash_config") if isinstance(drafter.get("dflash_config"), dict) else {}
        found["drafter"] = (f"layers: {drafter.get('num_hidden_layers')}, block {special.get('block_size')}, features of "
                            f"layers {special.get('target_layer_ids')}")
    return {key: value for key, value in found.items() if value is not None}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def environment(ranks: int, dtype: str) -> dict:
    """When, on which machine, with which versions, by which command."""
    import torch
    import transformers

    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "processor": _processor(), "cores": os.cpu_count(),
            "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none", "ranks": ranks,
            "dtype": dtype, "revision": git_revision(), "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        name = None
    return name or platform.processor() or platform.machine()
