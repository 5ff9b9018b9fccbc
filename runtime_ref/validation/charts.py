"""Small charts as inline SVG text: lines over positions, errors over layers, time over bytes.

Drawn here, in a hundred lines, because a report must open anywhere without a network, a plotting library would be its largest
dependency, and its pictures do not follow the page's colours. Colours are classes (`s0`, `s1`, ... in the page's style sheet),
so that a chart is readable in light and dark. Sizes are in units of a 420-wide view, which a telephone shows at full width.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 235
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 42
LEGEND_ROW = 15


@dataclass
class Series:
    """A named line; `points` are (x, y) with y finite."""

    name: str
    points: list[tuple[float, float]]
    line: bool = True
    dashed: bool = False
    dots: bool = True


@dataclass
class Axis:
    """One axis.

    Attributes:
        ticks: (value, text). log: decades instead of steps.
    """

    label: str
    low: float
    high: float
    ticks: list[tuple[float, str]] = field(default_factory=list)
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def decades(label: str, values: Sequence[float], unit: str = "") -> Axis:
    """A logarithmic axis of whole powers of ten around positive values."""
    used = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = math.floor(math.log10(min(used))), math.ceil(math.log10(max(used)))
    high = high if high > low else low + 1
    step = max(1, -(-(high - low) // 6))
    return Axis(label, 10.0**low, 10.0**high, [(10.0**e, f"{_power(e)}{unit}") for e in range(low, high + 1, step)], log=True)


def _power(exponent: int) -> str:
    return f"{10**exponent:g}" if -3 <= exponent <= 3 else f"1e{exponent}"


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """The SVG element."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        return LEFT + x.share(px) * (right - LEFT), bottom - y.share(py) * (bottom - TOP)

    legend, rows = _legend(series)
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT + rows * LEGEND_ROW}" role="img" aria-label="{html.escape(title)}">']
    for value, text in y.ticks:
        height = at(x.low, value)[1]
        out.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>'
                   f'<text class="tick" x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{html.escape(text)}</text>')
    for value, text in x.ticks:
        place = at(value, y.low)[0]
        out.append(f'<text class="tick" x="{place:.1f}" y="{bottom + 15}" text-anchor="middle">{html.escape(text)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
               f'<text class="label" x="{(LEFT + right) / 2:.0f}" y="{bottom + 30}" text-anchor="middle">'
               f'{html.escape(x.label)}</text>'
               f'<text class="label" transform="translate(11 {(TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
               f'{html.escape(y.label)}</text>')
    for number, one in enumerate(series):
        out.append(_drawn(one, number, [at(*point) for point in one.points]))
    return "".join([*out, legend, "</svg>"])


def _drawn(one: Series, number: int, places: list[tuple[float, float]]) -> str:
    colour, out = f"s{number % 6}", []
    if one.line and len(places) > 1:
        path = " ".join(f"{'L' if i else 'M'}{px:.1f} {py:.1f}" for i, (px, py) in enumerate(places))
        out.append(f'<path class="line {colour}{" dashed" if one.dashed else ""}" d="{path}"/>')
    if one.dots:
        out += [f'<circle class="dot {colour}" cx="{px:.1f}" cy="{py:.1f}" r="3.4"><title>{html.escape(one.name)}: '
                f'{value[1]:.4g}</title></circle>' for (px, py), value in zip(places, one.points, strict=True)]
    return "".join(out)


def _legend(series: Sequence[Series]) -> tuple[str, int]:
    """Names under the chart, and how many rows they take."""
    out, columns = [], 2 if max((len(s.name) for s in series), default=0) > 18 else 3
    for number, one in enumerate(series):
        px = LEFT - 30 + (number % columns) * ((WIDTH - LEFT + 20) / columns)
        py = HEIGHT + 6 + number // columns * LEGEND_ROW
        out.append(f'<rect class="key s{number % 6}" x="{px:.0f}" y="{py - 8}" width="9" height="9"/>'
                   f'<text class="tick" x="{px + 13:.0f}" y="{py}">{html.escape(one.name)}</text>')
    return "".join(out), -(-len(series) // columns)


def acceptance_by_position(rows: list[list]) -> str:
    """Rows as `check_acceptance` has them: head, then domain and a share per position."""
    count = len(rows[0]) - 1
    x = Axis("position in the drafted block", 0.7, count + 0.3, [(i, str(i)) for i in range(1, count + 1)])
    y = Axis("rounds that accept it", 0, 1, [(v / 4, f"{25 * v} %") for v in range(5)])
    lines = [Series(str(row[0]), [(i, float(v)) for i, v in enumerate(row[1:], 1)]) for row in rows[1:]]
    return chart("share of rounds that accept the draft at each position, by domain", x, y, lines)


def error_by_layer(rows: list[list], limit: float) -> str:
    """Rows as `check_runtime` has them: head (layer, float32, as served), then a layer or "logits" and errors."""
    names, body = rows[0][1:], rows[1:]
    shown = max(1, -(-len(body) // 12))
    ticks = [(i, str(row[0])) for i, row in enumerate(body[:-1]) if i % shown == 0] + [(len(body) - 1, "logits")]
    x = Axis("output of layer", -0.4, len(body) - 0.6, ticks)
    lines = [Series(str(name), [(i, r[k]) for i, r in enumerate(body) if math.isfinite(r[k]) and r[k] > 0])
             for k, name in enumerate(names, 1)]
    values = [v for line in lines for _, v in line.points]
    lines.append(Series("limit of float32", [(-0.4, limit), (len(body) - 0.6, limit)], dashed=True, dots=False))
    y = decades("relative error", [*values, limit])
    return chart("relative error against the independent model, by layer", x, y, lines)


def roofline(points: list[tuple[str, float, float]], lines: list[tuple[str, float]]) -> str:
    """Seconds of a step over the bytes that it reads.

    Args:
        points: (name, bytes, seconds). lines: (name, bytes per second) of memories; below a line no step can be.
    """
    sizes = [b for _, b, _ in points]
    x = decades("bytes of weights that a step reads", [min(sizes) / 2, max(sizes) * 2])
    bounds = [Series(name, [(x.low, x.low / rate), (x.high, x.high / rate)], dots=False) for name, rate in lines]
    times = [s for _, _, s in points] + [b / rate for b in (min(sizes), max(sizes)) for _, rate in lines]
    y = decades("seconds of a step", times)
    for bound, (_, rate) in zip(bounds, lines, strict=True):
        bound.points = _clipped(x, y, rate)
    return chart("time of a step over its bytes, against the bounds of memory", x, y,
                 [*bounds, *(Series(name, [(b, s)], line=False) for name, b, s in points)])


def _clipped(x: Axis, y: Axis, rate: float) -> list[tuple[float, float]]:
    """The line seconds = bytes / rate inside the axes."""
    low, high = max(x.low, y.low * rate), min(x.high, y.high * rate)
    return [(low, low / rate), (high, high / rate)] if low < high else []
