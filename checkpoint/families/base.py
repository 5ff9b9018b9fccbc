"""What a model family is: one object, known by the exporter, the verifier and the runtime.

A family says under which layouts it can be written and why not under others, how its tensors are called on disk, and, if the
runtime runs it, its geometry and what its layers have. `registry.py` lists the families that have something of their own; every
other model type of transformers is a plain `Family`, whose names are asked of transformers (`published_names.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.families import published_names
from checkpoint.families.published_names import Published
from mxfp4.format import BLOCK_SIZE


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: of config.json. architecture: the class that engines choose by `architectures`; None: whatever stands there.
        layouts: that an export can have, the usual one first.
        runtime_layout: the one that the runtime runs; None: it does not run this family. kernels: also on its GPU kernels.
        router: how the runtime weighs the chosen experts: "sigmoid", "softmax" or "softmax of the chosen".
        sinks: the name of the attention's sink logits within self_attn, or None.
        moe, gate, parts: how the mixture of experts is called within a layer, its router within that, and an expert's gate, up
            and down matrices.
    """

    model_type: str
    architecture: str | None = None
    layouts: tuple[str, ...] = ("compressed-tensors", "bf16")
    runtime_layout: str | None = None
    kernels: bool = False
    router: str = "softmax"
    sinks: str | None = None
    moe: str = "mlp"
    gate: str = "gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def published(self, config) -> Published:
        """Names and shapes on disk in plain numbers."""
        return _published(config.to_json_string(), config)

    def geometry(self, file: Path, raw: dict):
        """What the runtime needs of a config.json; NotHeld for what it does not run."""
        raise NotImplementedError(f"{self.model_type}: not run by the runtime")

    def refuse(self, layout: str, config) -> None:
        """ValueError with the reason if a client of `layout` cannot hold this configuration."""
        names = self.published(config)
        if not names.experts and not names.fused:
            raise ValueError(f"export.layout={layout}: {self.model_type} has no fused experts in this configuration: nothing "
                             "to store in MXFP4")
        if layout == "compressed-tensors" and not names.experts:
            raise ValueError(f"export.layout=compressed-tensors: {self.model_type} is published with fused experts "
                             f"({next(iter(names.fused))}), of which its clients know no packed form; its layout is bf16")
        joined = next((n for n, origin in names.origin.items() if n.endswith(".weight") and n != origin
                       and sum(other == origin for other in names.origin.values()) > 1), None)
        if layout == "compressed-tensors" and joined:
            raise ValueError(f"export.layout=compressed-tensors: transformers joins {joined} with others while it loads, and "
                             "its loader of this layout drops what it joins but experts; its layout is bf16")
        for name in names.experts:
            if names.shapes[name][-1] % BLOCK_SIZE:
                raise ValueError(f"{name}: {names.shapes[name][-1]} columns, expected a multiple of the MXFP4 block size "
                                 f"{BLOCK_SIZE}")

    def expert_name(self, prefix: str, expert: int, part: str) -> str:
        """Published name of an expert's weight within the mixture of experts at `prefix`; part: gate, up or down."""
        return f"{prefix}.experts.{expert}.{self.parts[('gate', 'up', 'down').index(part)]}.weight"


_known: dict[str, Published] = {}  # of the last few configurations


def _published(text: str, config) -> Published:
    if text not in _known:
        while len(_known) > 3:
            del _known[next(iter(_known))]
        _known[text] = published_names.of_transformers(config)
    return _known[text]
