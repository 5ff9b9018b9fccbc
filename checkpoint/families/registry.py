"""Model types to families, and which layouts a model can be written in."""

from __future__ import annotations

from checkpoint.families.base import Family
from checkpoint.families.glm4_moe import Glm4Moe
from checkpoint.families.gpt_oss import GptOss
from checkpoint.families.mimo_v2 import MiMoV2
from checkpoint.families.mixtral import Mixtral
from checkpoint.families.qwen3_moe import Qwen3Moe

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MiMoV2(), Qwen3Moe(), Glm4Moe(), GptOss(), Mixtral())}


def family_of(config) -> Family:
    """The family of a configuration object: one with something of its own, or what every model type of transformers gets."""
    return FAMILIES.get(config.model_type) or Family(config.model_type)


def resolve_layout(layout: str, config) -> str:
    """`layout`, or for "auto" the usual one of the family that its clients can hold.

    Raises:
        ValueError: none of them can, with the reason of the last.
    """
    if layout != "auto":
        return layout
    family, reason = family_of(config), None
    for candidate in family.layouts:
        try:
            family.refuse(candidate, config)
            return candidate
        except ValueError as error:
            reason = error
    raise reason


def refuse_layout(layout: str, config, dense: str = "base") -> None:
    """ValueError with the reason if the client of `layout` cannot hold a model of this configuration."""
    family = family_of(config)
    if layout not in family.layouts:
        holders = [name for name, other in FAMILIES.items() if layout in other.layouts]
        more = " or any other whose experts are published one by one" if layout == "compressed-tensors" else ""
        raise ValueError(f"export.layout={layout}: holds {' or '.join(holders)}{more}, and this model is {family.model_type}; "
                         f"its layout is {family.layouts[0]}")
    if dense == "fp8" and layout != "native":
        raise ValueError(f"export.dense=fp8: layout {layout} stores everything but experts in bf16, expected base")
    family.refuse(layout, config)
