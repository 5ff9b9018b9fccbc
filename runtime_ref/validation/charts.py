"""The report's pictures, drawn by matplotlib as SVG text that stands inside the page and needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.4, 3.1  # inches
# Of the page's style sheet: lines and text take the page's colours, in light and in dark.
INK = "#888888"


def _figure(title: str) -> tuple[Figure, object]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.title.set_fontsize(9)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    for spine in ("left", "bottom"):
        axes.spines[spine].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    return figure, axes


def _svg(figure: Figure, axes) -> str:
    """The SVG element, without what would point out of the page (namespaces, metadata)."""
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    legend = axes.legend(fontsize=7, frameon=False, labelcolor=INK, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    legend.set_in_layout(True)
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True,
                   metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"), None))
    text = out.getvalue()
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return re.sub(r'\s(xmlns(:\w+)?)="[^"]*"', "", text).replace("xlink:href", "href")


def acceptance_by_position(rows: list[list]) -> str:
    """Rows as the check of acceptance has them: head, then domain and a share per position."""
    figure, axes = _figure("drafts accepted by position, by domain")
    for name, *shares in rows[1:]:
        axes.plot(range(1, len(shares) + 1), shares, marker="o", markersize=4, label=str(name))
    axes.set(xlabel="position in the drafted block", ylabel="share of rounds", ylim=(0, 1.02),
             xticks=range(1, len(rows[0])))
    return _svg(figure, axes)


def error_by_layer(rows: list[list], limit: float) -> str:
    """Rows as the check of the logits has them: head (layer, float32, as served), then a layer or "logits" and errors."""
    figure, axes = _figure("relative error against the independent model")
    places = range(len(rows) - 1)
    for column, name in enumerate(rows[0][1:], 1):
        points = [(i, row[column]) for i, row in zip(places, rows[1:], strict=True)
                  if math.isfinite(row[column]) and row[column] > 0]
        axes.plot([i for i, _ in points], [v for _, v in points], marker="o", markersize=4, label=str(name))
    axes.axhline(limit, linestyle="--", color=INK, label="limit of float32")
    shown = [i for i in places if i % max(1, len(places) // 12) == 0 or i == len(places) - 1]
    axes.set(xlabel="output of layer", ylabel="relative error", yscale="log", xticks=shown,
             xticklabels=[str(rows[1 + i][0]) for i in shown])
    return _svg(figure, axes)


def roofline(points: Sequence[tuple[str, float, float]], bounds: Sequence[tuple[str, float]]) -> str:
    """Seconds of a step over the bytes that it reads.

    Args:
        points: (name, bytes, seconds). bounds: (name, bytes per second) of memories; below a line no step can be.
    """
    figure, axes = _figure("time of a step over its bytes")
    sizes = [size for _, size, _ in points]
    ends = min(sizes) / 2, max(sizes) * 2
    for name, rate in bounds:
        axes.plot(ends, [size / rate for size in ends], label=f"least time: {name}")
    for name, size, seconds in points:
        axes.plot([size], [seconds], marker="o", linestyle="", label=name)
    axes.set(xlabel="bytes of weights that a step reads", ylabel="seconds", xscale="log", yscale="log")
    return _svg(figure, axes)
