"""Initial codes that are kept (`qat.warm_start.folder`): runs that differ in what comes after the start share it.

A file of float32 masters and shifts is named by a digest of everything that they follow from: base weights, calibration rows,
the start's settings, the kind of scales, the seed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = load_file(path)
        for name, tensor in _tensors(quantizer).items():
            tensor.copy_(kept[name])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not the initial codes of this model ({first_line(error)}); remove it, and they are chosen "
                         "anew") from None
    quantizer.requantize()


def keep_start(path: Path, quantizer: ExpertQuantizer) -> None:
    """Writes masters and shifts. Raises OSError: it cannot be written."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous() for name, tensor in _tensors(quantizer).items()}))


def _tensors(quantizer: ExpertQuantizer) -> dict[str, torch.Tensor]:
    """By name; there are no shifts where scales are the rule's."""
    kinds = {"master": quantizer.masters, "shift": getattr(quantizer, "shifts", [])}
    return {f"{kind}.{quantizer.tensors[i].name}": value.data
            for kind, values in kinds.items() for i, value in enumerate(values)}
