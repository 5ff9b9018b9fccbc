"""The state of a QAT run, as checkpoints hold it beside weights, optimizer, schedule and generators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qat.expert_quantizer import ExpertQuantizer
from qat.methods import MethodQuantizer
from qat.oscillation import OscillationControl
from qat.quant_stats import Health


@dataclass
class TrainingState:
    """`step` counts finished updates; `batches` those of one process."""

    quantizer: ExpertQuantizer
    oscillation: OscillationControl
    health: Health
    step: int = 0
    batches: int = 0
    averaged_steps: int = 0
    average: list[torch.Tensor] = field(default_factory=list)
    best: dict | None = None  # of the measurements on held-out text, the one with the least KL: its "step" and "kl"
    measured_since: int = 0  # measurements after it

    def state_dict(self) -> dict:
        return {"step": self.step, "batches": self.batches, "masters": [m.data for m in self.quantizer.masters],
                "oscillation": self.oscillation.state_dict(), "health": self.health.state_dict(),
                "averaged_steps": self.averaged_steps, "average": self.average, "heldout": self.heldout(),
                "methods": self.quantizer.state_dict() if isinstance(self.quantizer, MethodQuantizer) else None}

    def heldout(self) -> dict:
        return {"best": self.best, "measured_since": self.measured_since}

    def load_heldout(self, state: dict | None) -> None:
        """state: None in checkpoints of versions that did not keep it."""
        self.best, self.measured_since = (state or {}).get("best"), (state or {}).get("measured_since", 0)

    def load_state_dict(self, state: dict) -> None:
        for tensor, master, saved in zip(self.quantizer.tensors, self.quantizer.masters, state["masters"], strict=True):
            if master.shape != saved.shape:
                raise RuntimeError(f"{tensor.name}: shape {list(saved.shape)} in the checkpoint, {list(master.shape)} here")
            master.data.copy_(saved)
        self.step, self.batches = state["step"], state["batches"]
        self.load_heldout(state.get("heldout"))
        # Accelerate reads checkpoints to the CPU.
        self.averaged_steps = state["averaged_steps"]
        self.average = [a.to(m.device) for a, m in zip(state["average"], self.quantizer.masters, strict=False)]
        self.oscillation.load_state_dict(state["oscillation"])
        self.health.load_state_dict(state["health"])
        if isinstance(self.quantizer, MethodQuantizer):
            self.quantizer.load_state_dict(state["methods"])
            self.quantizer.set_step(self.step)
