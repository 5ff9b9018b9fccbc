"""The result of a validation: checks with their numbers, as text, JSON and (`report_page.py`) one HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

STATUSES = ("passed", "failed", "skipped", "not applicable")


@dataclass
class Check:
    """One check.

    Attributes:
        findings: what is wrong, a line each. causes: the likely causes, a line each. notes: what is odd or was
            left out, but fails nothing. numbers: what was measured.
        tables: title -> rows (the first row is the head).
    """

    name: str
    title: str
    status: str = "passed"
    reason: str = ""
    findings: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    tables: dict[str, list[list]] = field(default_factory=dict)

    def fail(self, finding: str, cause: str | None = None) -> None:
        self.status = "failed"
        self.findings.append(finding)
        if cause and cause not in self.causes:
            self.causes.append(cause)

    def skip(self, reason: str) -> Check:
        """Not run: something is missing that the user can give, or an earlier check failed."""
        self.status, self.reason = "skipped", reason
        return self

    def not_applicable(self, reason: str) -> Check:
        """Nothing to check: the folder has no such part."""
        self.status, self.reason = "not applicable", reason
        return self


@dataclass
class Verdict:
    """All checks of a folder."""

    folder: str
    checks: list[Check]
    environment: dict

    @property
    def passed(self) -> bool:
        return not any(check.status == "failed" for check in self.checks)

    @property
    def causes(self) -> list[str]:
        return list(dict.fromkeys(cause for check in self.checks for cause in check.causes))

    def as_dict(self) -> dict:
        return {"folder": self.folder, "verdict": "passed" if self.passed else "failed", "causes": self.causes,
                "checks": [asdict(check) for check in self.checks], "environment": self.environment}

    def lines(self) -> list[str]:
        """For the terminal: a line per check, then what failed and why."""
        marks = {"passed": "ok  ", "failed": "FAIL", "skipped": "-   ", "not applicable": "n/a "}
        out = [f"{marks[c.status]} {c.title}{': ' + c.reason if c.reason else ''}" for c in self.checks]
        for check in self.checks:
            out += [f"     {check.name}: {finding}" for finding in check.findings[:6]]
            out += [f"     {check.name}: and {len(check.findings) - 6} more"] if len(check.findings) > 6 else []
            out += [f"     {check.name}: note: {note}" for note in check.notes]
        out += [f"likely cause: {cause}" for cause in self.causes]
        return [*out, f"verdict: {'passed' if self.passed else 'failed'}"]


