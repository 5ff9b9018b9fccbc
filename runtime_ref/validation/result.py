"""The result of a validation: checks with their numbers, as text, JSON and (`html_report.py`) one HTML page.

Three verdicts, of each check and of its parts: right; wrong, and how; could not be checked here, because something is missing.
What is merely odd, or is read differently by engines, is a note: it fails nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from runtime_ref.validation.quantities import PROJECTED, Number, Table
from storage.terminal import counted

STATUSES = ("passed", "failed", "unchecked", "not applicable")


@dataclass
class Check:
    """One check.

    Attributes:
        status: of `STATUSES`. reason: why it is "unchecked" or "not applicable".
        findings: what is wrong, a line each. causes: the likely causes, a line each.
        unchecked: parts that could not be checked here, and why. notes: what is odd, but fails nothing.
        numbers: what was measured; limits: what a number may be, where there is a limit.
        tables: rows by caption (the first row is the head).
    """

    name: str
    title: str
    status: str = "passed"
    reason: str = ""
    findings: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[Number, float | int | str] = field(default_factory=dict)
    limits: dict[Number, float] = field(default_factory=dict)
    tables: dict[Table, list[list]] = field(default_factory=dict)

    def fail(self, finding: str, cause: str | None = None) -> None:
        self.status = "failed"
        self.findings.append(finding)
        if cause and cause not in self.causes:
            self.causes.append(cause)

    def measure(self, number: Number, value, limit: float | None = None) -> None:
        """Records a number, and what it may be."""
        self.numbers[number] = value
        if limit is not None:
            self.limits[number] = limit

    def leave_out(self, reason: str) -> Check:
        """Nothing of it could be checked here: something is missing, or an earlier check failed."""
        self.status, self.reason = "unchecked", reason
        return self

    def not_applicable(self, reason: str) -> Check:
        """Nothing to check: the folder has no such part."""
        self.status, self.reason = "not applicable", reason
        return self


@dataclass
class ValidationReport:
    """All checks of a folder or of a server; `model` says what was judged, `environment` when, where and by what."""

    folder: str
    checks: list[Check]
    environment: dict
    model: dict = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not any(check.status == "failed" for check in self.checks)

    @property
    def causes(self) -> list[str]:
        return list(dict.fromkeys(cause for check in self.checks for cause in check.causes))

    @property
    def unchecked(self) -> list[str]:
        """What could not be checked here, and why."""
        whole = [f"{c.title}: {c.reason}" for c in self.checks if c.status == "unchecked"]
        return whole + [f"{c.name}: {part}" for c in self.checks for part in c.unchecked]

    def as_dict(self) -> dict:
        return {"folder": self.folder, "verdict": "passed" if self.passed else "failed", "causes": self.causes,
                "unchecked": self.unchecked, "model": self.model, "checks": [asdict(check) for check in self.checks],
                "projected": sorted(PROJECTED), "environment": self.environment}

    def lines(self) -> list[str]:
        """For the terminal: a line per check, then what is wrong and why, and what could not be checked."""
        marks = {"passed": "ok  ", "failed": "FAIL", "unchecked": "?   ", "not applicable": "n/a "}
        out = []
        for c in self.checks:
            why = f": could not be checked here, because {c.reason}" if c.status == "unchecked" else f": {c.reason}"
            out.append(f"{marks[c.status]} {c.title}{why if c.reason else ''}")
        for check in self.checks:
            out += [f"     {check.name}: {finding}" for finding in check.findings[:6]]
            out += [f"     {check.name}: and {len(check.findings) - 6} more"] if len(check.findings) > 6 else []
            out += [f"     {check.name}: could not be checked here: {part}" for part in check.unchecked]
            out += [f"     {check.name}: note: {note}" for note in check.notes]
        out += [f"likely cause: {cause}" for cause in self.causes]
        open_parts = f" ({counted(len(self.unchecked), 'thing')} could not be checked here)" if self.unchecked else ""
        return [*out, f"verdict: {'passed' if self.passed else 'failed'}{open_parts}"]
