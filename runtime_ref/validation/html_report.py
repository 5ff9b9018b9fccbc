"""The validation as one HTML page that needs nothing else: verdict first, then each check with its evidence.

Written to be read by somebody who has one question, "can I use this folder?", and then, if not, "what is wrong with it?": what
was judged and when, the verdict and the likely causes come before any number, what could not be checked says why, and details
are folded in. No script, no font, no link leaves the page. The text is `report.html.j2`, the pictures are `charts`.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from runtime_ref.validation.quantities import PROJECTED, Number, Table
from runtime_ref.validation.result import STATUSES, Check, ValidationReport

# What a passed check says for itself in the overview: the number that matters.
HEADLINES = {"files": Number.FILES_COMPARED, "folder": Number.TENSORS, "reference": Number.FEATURE_ERROR,
             "logits": Number.LOGITS_ERROR, "ops": Number.WORST_OP, "lossless": Number.PROMPTS, "cost": Number.BOUND_SHARE,
             "sampling": Number.CHI_SQUARE, "acceptance": Number.ACCEPTANCE, "quick": Number.KL_MEAN,
             "greedy": Number.MEAN_LOGPROB, "speed": Number.SPEED_SERVED}
OPEN = ("acceptance", "lossless", "greedy", "quick", "tasks")


def page(report: ValidationReport) -> str:
    """The HTML text."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    name = Path(report.folder).resolve().name if report.folder in (".", "") else Path(report.folder).name
    counts = {s: sum(c.status == s for c in report.checks) for s in STATUSES}
    return environment.get_template("report.html.j2").render(
        report=report, name=name, state="passed" if report.passed else "failed", projected=PROJECTED, open_details=OPEN,
        counts=", ".join(f"{n} {s}" for s, n in counts.items() if n), headlines={c.name: headline(c) for c in report.checks},
        figures={c.name: figures(c) for c in report.checks})


def headline(check: Check) -> str:
    if check.status == "failed":
        return check.findings[0] if check.findings else ""
    if check.status in ("unchecked", "not applicable"):
        return check.reason
    key = HEADLINES.get(check.name)
    if key in check.numbers:
        limit = f" (limit {number(check.limits[key])})" if key in check.limits else ""
        return f"{key}: {number(check.numbers[key])}{limit}"
    return check.notes[0] if check.notes else ""


def figures(check: Check) -> list[tuple[str, str]]:
    """(caption, SVG) of a check's measurements."""
    from runtime_ref.validation import charts

    if len(check.tables.get(Table.POSITIONS, [])) > 1:
        return [("Share of rounds in which the draft at a position, and all before it, were accepted.",
                 charts.acceptance_by_position(check.tables[Table.POSITIONS]))]
    if Table.LAYERS in check.tables:
        return [("The runtime against an independent model in float32. The float32 runtime must stay under the limit; the "
                 "served dtype rounds, which is measured and not judged.",
                 charts.error_by_layer(check.tables[Table.LAYERS], check.limits[Number.LOGITS_ERROR]))]
    if Number.STEP_8 in check.numbers:
        return [_roofline(check.numbers)]
    return []


def _roofline(numbers: dict) -> tuple[str, str]:
    from runtime_ref.validation import charts

    points = [("8 tokens, measured", numbers[Number.STEP_HELD], numbers[Number.STEP_8] / 1e3)]
    bounds = [("this memory", numbers[Number.BANDWIDTH])]
    if Number.PROJECTED_STEP in numbers:
        points.append(("node, projected", numbers[Number.STEP_STORED], numbers[Number.PROJECTED_STEP] / 1e3))
        bounds.append(("8 x H200, 100 %", numbers[Number.NODE_BANDWIDTH]))
    return ("Lines: the least time in which memory can deliver the bytes of a step of 8 tokens. The point of this machine is "
            "measured; the point of the node is a projection by the formula in the table."), charts.roofline(points, bounds)


def number(value, share: bool = False) -> str:
    """A value as the page shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if share:
            return f"{value:.1%}"
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10000 else str(value)
