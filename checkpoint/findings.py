"""What a verifier says about a folder: findings of three kinds, and how they are added."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from storage.reading import first_line

# Whatever a check of a folder by anybody raises is a finding about the folder, not the end of the inspection.
DAMAGE = Exception


@contextlib.contextmanager
def one_line(folder: Path, what: str = "cannot be read", passed: tuple = ()) -> Iterator[None]:
    """Around the reading of a folder by anybody: what goes wrong is one line (a ValueError), with the cause chained to it.

    Args:
        passed: exceptions that say nothing about the folder, as a missing package does not.
    """
    try:
        yield
    except (ValueError, ImportError, *passed):
        raise
    except DAMAGE as error:
        raise ValueError(f"{folder}: {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]} "
                         f"(python export/verify.py {folder} looks for the reason)") from error


MANY = 10_000  # tensors too many that are still named one by one
LONGEST = 2000  # letters of a finding: names of a hostile folder may have millions
ENGINES = ("vLLM", "SGLang", "transformers")


@dataclass(frozen=True)
class Finding:
    """One line about a folder. `engines`: those that its text names."""

    kind: str
    text: str

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(name for name in ENGINES if name in self.text)

    def __str__(self) -> str:
        return self.text


@dataclass
class Verification:
    """What was found in a folder.

    Attributes:
        ours: written by this project's exporter.
        layout: native, fp8, hf-fp8, compressed-tensors, gpt-oss, bf16, drafter, or None if config.json says nothing known.
    """

    folder: Path
    wrong: list[Finding] = field(default_factory=list)
    unchecked: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    ours: bool = False
    layout: str | None = None
    tensors: int = 0
    bytes: int = 0

    @property
    def verdict(self) -> str:
        return "wrong" if self.wrong else "right"

    @property
    def findings(self) -> list[str]:
        """The lines of what is wrong."""
        return [finding.text for finding in self.wrong]


class Reporter:
    """Adds findings to `found`."""

    def __init__(self, folder: Path):
        self.folder, self.found = folder, Verification(folder)

    @property
    def ours(self) -> bool:
        return self.found.ours

    def wrong(self, kind: str, text: str) -> None:
        self.found.wrong.append(Finding(kind, text[:LONGEST]))

    def note(self, kind: str, text: str) -> None:
        self.found.notes.append(Finding(kind, text[:LONGEST]))

    def unchecked(self, kind: str, what: str, reason: str) -> None:
        self.found.unchecked.append(Finding(kind, f"{what}: could not be checked here, because {reason}"))

    def promised(self, kind: str, text: str) -> None:
        """Wrong in an export of ours; a note about anybody else's folder."""
        (self.wrong if self.ours else self.note)(kind, text)

    def guard(self, kind: str, what: str, check) -> None:
        """Runs a check; what is too broken for it is a finding."""
        try:
            check()
        except DAMAGE as error:
            self.wrong(kind, f"{what}: cannot be checked: {first_line(error)[:500]}")
