"""How a step reaches the device, and the record of why."""

from __future__ import annotations

from dataclasses import dataclass, field

# op by op; op by op recorded as a CUDA graph; a whole step in one launch; the fastest of them that has the bits of "ops"
LAUNCHES = ("auto", "persistent", "graph", "ops")


class WaitGivenUp(RuntimeError):
    """A program or rank gave up waiting inside a launch: what the launch left is worthless, and nothing of it may be used."""


@dataclass
class LaunchReport:
    """What was chosen for the target and the drafter ("target", "drafter"), and what it was chosen by.

    Attributes:
        chosen: way by part. seconds: of the compared steps together, by part and way.
        compared: steps whose bits were compared, by part. sequences: of the largest of them.
        refused: why a way is not taken, by part and way: one line each. different: those of them that computed something else.
    """

    chosen: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    sequences: int = 0
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    different: list[tuple[str, str]] = field(default_factory=list)

    def line(self) -> str:
        """Everything in one line."""
        parts = []
        for part, way in self.chosen.items():
            others = [f"{name} {1e3 * s:.1f} ms" for name, s in self.seconds.get(part, {}).items()]
            others += [f"{name} refused: {why}" for (of, name), why in self.refused.items() if of == part]
            parts.append(f"{part} {way}" + (f" ({'; '.join(others)})" if others else ""))
        steps = sum(self.compared.values())
        equal = f"; bit for bit alike in {steps} steps of 1 to {self.sequences} sequences" if steps else ""
        return f"launch: {', '.join(parts)}{equal}"
