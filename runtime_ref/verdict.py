"""The result of a validation: checks with their numbers, as JSON and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

STATUSES = ("passed", "failed", "skipped")


@dataclass
class Check:
    """One check.

    Attributes:
        findings: what is wrong, a line each. causes: the likely causes, a line each. numbers: what was measured.
        tables: title -> rows (the first row is the head).
    """

    name: str
    title: str
    status: str = "passed"
    reason: str = ""
    findings: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)
    tables: dict[str, list[list]] = field(default_factory=dict)

    def fail(self, finding: str, cause: str | None = None) -> None:
        self.status = "failed"
        self.findings.append(finding)
        if cause and cause not in self.causes:
            self.causes.append(cause)

    def skip(self, reason: str) -> Check:
        self.status, self.reason = "skipped", reason
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
        marks = {"passed": "ok  ", "failed": "FAIL", "skipped": "-   "}
        out = [f"{marks[c.status]} {c.title}{': ' + c.reason if c.reason else ''}" for c in self.checks]
        for check in self.checks:
            out += [f"     {check.name}: {finding}" for finding in check.findings[:6]]
        out += [f"likely cause: {cause}" for cause in self.causes]
        return [*out, f"verdict: {'passed' if self.passed else 'failed'}"]


def write_json(verdict: Verdict, path: Path) -> None:
    _write(path, json.dumps(verdict.as_dict(), indent=2, default=str) + "\n")


def write_html(verdict: Verdict, path: Path) -> None:
    """Tables, and a bar beside every number between 0 and 1 of the tables marked with "%"."""
    _write(path, page(verdict))


def page(verdict: Verdict) -> str:
    """The HTML text."""
    colour = {"passed": "#1a7f37", "failed": "#b42318", "skipped": "#6e7781"}
    parts = [_HEAD, f"<h1>{html.escape(Path(verdict.folder).name)}: "
             f"<span style='color:{colour['passed' if verdict.passed else 'failed']}'>"
             f"{'passed' if verdict.passed else 'failed'}</span></h1>"]
    if verdict.causes:
        parts.append("<h2>Likely causes</h2><ul>" + "".join(f"<li>{html.escape(c)}</li>" for c in verdict.causes) + "</ul>")
    for check in verdict.checks:
        parts.append(f"<h2><span style='color:{colour[check.status]}'>{check.status}</span> {html.escape(check.title)}</h2>")
        if check.reason:
            parts.append(f"<p>{html.escape(check.reason)}</p>")
        if check.findings:
            parts.append("<ul>" + "".join(f"<li>{html.escape(f)}</li>" for f in check.findings) + "</ul>")
        if check.numbers:
            parts.append(_table([["", ""], *([k.replace("_", " "), _number(v)] for k, v in check.numbers.items())], head=False))
        for title, rows in check.tables.items():
            parts.append(f"<h3>{html.escape(title)}</h3>" + _table(rows, bars="%" in title))
    environment = ", ".join(f"{k} {v}" for k, v in verdict.environment.items())
    return "\n".join([*parts, f"<footer>{html.escape(environment)}</footer>"])


def _table(rows: list[list], *, head: bool = True, bars: bool = False) -> str:
    out = ["<table>"]
    for i, row in enumerate(rows if head else rows[1:]):
        tag = "th" if head and i == 0 else "td"
        out.append("<tr>" + "".join(f"<{tag}>{_cell(v, bars and tag == 'td')}</{tag}>" for v in row) + "</tr>")
    return "".join([*out, "</table>"])


def _cell(value, bar: bool) -> str:
    text = html.escape(_number(value))
    if bar and isinstance(value, float) and 0 <= value <= 1:
        return f"<i style='width:{value * 90:.0f}px'></i>{text}"
    return text


def _number(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


_HEAD = """<!doctype html><meta charset="utf-8"><title>validation</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
h1{font-size:1.6rem}h2{font-size:1.1rem;margin-top:2rem}h3{font-size:.95rem}
table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.15rem .7rem;border-bottom:1px solid #d0d7de;text-align:left;
font-variant-numeric:tabular-nums}td i{display:inline-block;height:.7em;background:#54aeff;margin-right:.4em}
footer{margin-top:3rem;color:#6e7781;font-size:.85rem}</style>"""
