"""Initial codes that are kept (`qat.warm_start.folder`): runs that differ in what comes after the start share it.

A file of float32 masters and shifts is named by a digest of everything that they follow from: base weights, calibration rows,
the start's settings, the kind of scales, the seed.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qat.expert_quantizer import ExpertQuantizer
from recipes.schema import Recipe
from storage.digests import json_digest
from storage.files import write_bytes
from storage.reading import first_line


def start_file(recipe: Recipe, base: dict, rows: torch.Tensor) -> Path:
    """Where the start of this recipe is or will be.

    Args:
        base: digests of the base weights; rows: int64 [sequences, T] calibration text.
    """
    settings = recipe.qat.warm_start
    facts = {"settings": settings.model_dump(exclude={"folder", "moments_gib"}), "base": base, "dtype": recipe.model.dtype,
             "rows": hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest(), "shape": list(rows.shape),
             "scale_rule": recipe.quantization.scale_rule, "seed": recipe.seed,
             "shifts": recipe.qat.scales.method != "rule"}  # searched and learned ones start alike
    return Path(settings.folder) / f"start-{json_digest(facts)[:16]}.safetensors"


@torch.no_grad()
def take_start(path: Path, quantizer: ExpertQuantizer) -> None:
    """Sets masters and shifts to those of the file, and requantizes.

    Raises:
        ValueError: a damaged file; it says what to remove.
    """
    tensors = _tensors(quantizer)
    try:
        with safe_open(str(path), framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in tensors}
            if (file.metadata() or {}).get("crc32") != _sum(kept):
                raise ValueError("its CRC-32 differs from what was written")
        for name, tensor in tensors.items():
            tensor.copy_(kept[name])
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not the initial codes of this model ({first_line(error)}); remove it, and they are chosen "
                         "anew") from None
    quantizer.requantize()


def keep_start(path: Path, quantizer: ExpertQuantizer) -> None:
    """Writes masters and shifts. Raises OSError: it cannot be written."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(quantizer).items()}
    write_bytes(path, save(tensors, metadata={"crc32": _sum(tensors)}))


def _sum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 over the bytes of all tensors."""
    value = 0
    for tensor in tensors.values():
        value = zlib.crc32(tensor.numpy(), value)
    return str(value)


def _tensors(quantizer: ExpertQuantizer) -> dict[str, torch.Tensor]:
    """By name; there are no shifts where scales are the rule's."""
    kinds = {"master": quantizer.masters, "shift": getattr(quantizer, "shifts", [])}
    return {f"{kind}.{quantizer.tensors[i].name}": value.data
            for kind, values in kinds.items() for i, value in enumerate(values)}
