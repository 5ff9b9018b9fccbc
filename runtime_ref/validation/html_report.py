"""The validation as one HTML page that needs nothing else: verdict first, then each check with its evidence.

Written to be read by somebody who has one question, "can I use this folder?", and then, if not, "what is wrong with it?": the
verdict and the likely causes come before any number, what was skipped says why, and details are folded in. No script, no font,
no link leaves the page. A template engine was rejected: the page is a dozen joined strings.
"""

from __future__ import annotations

import html
from pathlib import Path

from runtime_ref.validation.charts import acceptance_by_position, error_by_layer, roofline
from runtime_ref.validation.diagnosis.faults import SAME
from runtime_ref.validation.result import STATUSES, Check, ValidationReport

# What a passed check says for itself in the overview: the number that matters.
HEADLINES = {"files": "files compared with their checksums", "folder": "tensors", "reference": "worst feature error",
             "logits": "logits error", "lossless": "prompts", "cost": "share of the bound",
             "sampling": "entropy of the distribution (nats)"}
POSITIONS = "% of rounds that accept the draft at position 1, 2, ..."
SAID = {"skipped": "Skipped: ", "not applicable": "Not applicable: "}
ESCAPE = html.escape


def page(verdict: ValidationReport) -> str:
    """The HTML text."""
    state = "passed" if verdict.passed else "failed"
    name = ESCAPE(Path(verdict.folder).resolve().name if verdict.folder in (".", "") else Path(verdict.folder).name)
    counts = {s: sum(c.status == s for c in verdict.checks) for s in STATUSES}
    told = ", ".join(f"{n} {s}" for s, n in counts.items() if n)
    parts = [_HEAD.replace("TITLE", f"{name}: {state}"), f"<header class='{state}'><p class='what'>Validation of {name}</p>"
             f"<h1>{'Passed' if verdict.passed else 'Failed'}</h1><p>{told} of {len(verdict.checks)} checks</p></header>"]
    if verdict.causes:
        parts.append("<section class='causes'><h2>Likely cause" + ("s" if len(verdict.causes) > 1 else "") + "</h2><ul>"
                     + "".join(f"<li>{ESCAPE(c)}</li>" for c in verdict.causes) + "</ul></section>")
    parts.append(_overview(verdict.checks))
    parts += [_section(check) for check in verdict.checks]
    environment = " · ".join(f"{ESCAPE(k)} {ESCAPE(str(v))}" for k, v in verdict.environment.items())
    return "\n".join([*parts, f"<footer>{environment}<br>{ESCAPE(verdict.folder)}</footer></main></body></html>\n"])


def _overview(checks: list[Check]) -> str:
    rows = "".join(f"<tr><td>{_badge(c.status)}</td><td><a href='#{c.name}'>{ESCAPE(_capital(c.title))}</a></td>"
                   f"<td class='say'>{ESCAPE(_headline(c))}</td></tr>" for c in checks)
    return f"<div class='scroll'><table class='overview'>{rows}</table></div>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _badge(status: str) -> str:
    return f"<span class='badge {status.replace(' ', '-')}'>{status}</span>"


def _headline(check: Check) -> str:
    if check.status == "failed":
        return check.findings[0] if check.findings else ""
    if check.status in ("skipped", "not applicable"):
        return check.reason
    if check.name == "acceptance":
        rows = next(iter(check.tables.values()), [[]])[1:]
        return ", ".join(f"{row[0]} {number(row[1])}" for row in rows)
    if check.name == "text":
        rows = next(iter(check.tables.values()), [[]])[1:]
        return ", ".join(f"{row[0]} {number(row[1])} nats" for row in rows)
    if check.name == "ops":
        errors = [row[2] for row in check.tables.get("ops", [[]])[1:]]
        return f"worst relative error: {number(max(errors))} ({check.numbers.get('backends')})" if errors else ""
    key = HEADLINES.get(check.name)
    if key in check.numbers:
        return f"{key}: {number(check.numbers[key])}"
    return check.notes[0] if check.notes else ""


def _section(check: Check) -> str:
    out = [f"<section id='{check.name}'><h2>{_badge(check.status)} {ESCAPE(_capital(check.title))}</h2>"]
    if check.reason:
        out.append(f"<p class='reason'>{SAID.get(check.status, '')}{ESCAPE(check.reason)}</p>")
    out += [f"<p class='cause'><b>Likely cause</b> {ESCAPE(cause)}</p>" for cause in check.causes]
    if check.findings:
        out.append("<ul class='findings'>" + "".join(f"<li>{ESCAPE(f)}</li>" for f in check.findings[:20]) + "</ul>")
        if len(check.findings) > 20:
            out.append(f"<p class='reason'>and {len(check.findings) - 20} more</p>")
    if check.notes:
        out.append("<ul class='notes'>" + "".join(f"<li>{ESCAPE(n)}</li>" for n in check.notes) + "</ul>")
    out += [f"<figure>{svg}<figcaption>{ESCAPE(caption)}</figcaption></figure>" for caption, svg in figures(check)]
    details = [_numbers(check.numbers)] if check.numbers else []
    details += [f"<h3>{ESCAPE(title)}</h3>{_table(rows, share='%' in title)}" for title, rows in check.tables.items()]
    if details:
        opened = " open" if check.status == "failed" or check.name in ("acceptance", "lossless") else ""
        out.append(f"<details{opened}><summary>Numbers</summary>{''.join(details)}</details>")
    return "".join([*out, "</section>"])


def figures(check: Check) -> list[tuple[str, str]]:
    """(caption, SVG) of a check's measurements."""
    if check.name == "acceptance" and len(check.tables.get(POSITIONS, [])) > 1:
        return [("Share of rounds in which the draft at a position, and all before it, were accepted.",
                 acceptance_by_position(check.tables[POSITIONS]))]
    if check.name == "logits" and "relative error by layer" in check.tables:
        return [("The runtime against an independent model in float32. The float32 runtime must stay under the limit; the "
                 "served dtype rounds, which is measured and not judged.",
                 error_by_layer(check.tables["relative error by layer"], SAME))]
    if check.name == "cost" and "measured step of 8 tokens (ms)" in check.numbers:
        return [_roofline(check.numbers)]
    return []


def _roofline(n: dict) -> tuple[str, str]:
    stored, held = n["bytes of a step, as stored"], n["bytes of a step, as this backend holds them"]
    points = [("8 tokens, measured", held, n["measured step of 8 tokens (ms)"] / 1e3),
              ("1 token, measured", held, n["measured step of 1 token (ms)"] / 1e3)]
    lines = [("this memory", n["memory bandwidth of this machine (bytes/s)"])]
    if "projected step (ms)" in n:
        points.append(("node, projected", stored, n["projected step (ms)"] / 1e3))
        lines.append(("8 x H200, 100 %", n["bytes/s of 8 x H200"]))
    caption = ("Lines: the least time in which memory can deliver the bytes. The points of this machine are measured; the "
               "point of the node is a projection by the formula in the table. One token reads fewer experts than eight: its "
               "true bytes lie a little to the left.")
    return caption, roofline(points, lines)


def number(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10000 else str(value)


def _numbers(numbers: dict) -> str:
    rows = "".join(f"<tr><td>{ESCAPE(k)}</td><td class='n'>{ESCAPE(number(v))}</td></tr>" for k, v in numbers.items())
    return f"<div class='scroll'><table>{rows}</table></div>"


def _table(rows: list[list], *, share: bool = False) -> str:
    out = ["<div class='scroll'><table>"]
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = []
        for value in row:
            text = f"{value:.1%}" if share and i and isinstance(value, float) else number(value)
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            cells.append(f"<{tag}{' class=n' if numeric else ''}>{ESCAPE(text)}</{tag}>")
        out.append(f"<tr>{''.join(cells)}</tr>")
    return "".join([*out, "</table></div>"])


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root{--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--back:#fff;--box:#f6f8fa;--ok:#1a7f37;--bad:#b42318;--skip:#6e7781;
--s0:#0969da;--s1:#bc4c00;--s2:#1a7f37;--s3:#8250df;--s4:#9a6700;--s5:#cf222e}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--back:#0d1117;--box:#151b23;--ok:#3fb950;
--bad:#f85149;--skip:#9198a1;--s0:#4493f8;--s1:#f0883e;--s2:#3fb950;--s3:#ab7df8;--s4:#d29922;--s5:#f85149}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:54rem;margin:0 auto;padding:1.5rem 1rem 3rem}header{border-left:.4rem solid;padding:.2rem 0 .2rem 1rem}
header.passed{border-color:var(--ok)}header.failed{border-color:var(--bad)}header p{margin:0;color:var(--soft)}
header.passed h1{color:var(--ok)}header.failed h1{color:var(--bad)}header .what{overflow-wrap:anywhere}
h1{font-size:2rem;line-height:1.2;margin:0}h2{font-size:1.1rem;margin:0 0 .5rem}h3{font-size:.9rem;margin:1rem 0 .2rem}
section{border-top:1px solid var(--line);padding:1.2rem 0 .4rem;margin-top:1rem}
.causes{background:var(--box);border:1px solid var(--bad);border-radius:.4rem;padding:.8rem 1rem;margin-top:1rem}
.causes ul,.findings,.notes{margin:.3rem 0;padding-left:1.2rem}li{overflow-wrap:anywhere}
.notes,.reason{color:var(--soft)}.cause{margin:.3rem 0}.cause b{color:var(--bad);margin-right:.3rem}
.badge{display:inline-block;font-size:.75rem;font-weight:600;padding:.05rem .5rem;border-radius:1rem;border:1px solid;
vertical-align:.1em}.badge.passed{color:var(--ok)}.badge.failed{color:var(--bad)}.badge.skipped,
.badge.not-applicable{color:var(--skip)}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.4rem 0;font-variant-numeric:tabular-nums;font-size:.88rem}
td,th{padding:.22rem .8rem .22rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.n{text-align:right;white-space:nowrap}.overview{width:100%;margin-top:1.2rem}.overview .say{color:var(--soft)}
a{color:inherit}summary{cursor:pointer;color:var(--soft);font-size:.9rem}
figure{margin:.6rem 0;max-width:34rem}svg{display:block;width:100%;height:auto;font:10.5px system-ui,sans-serif}
figcaption{color:var(--soft);font-size:.82rem}footer{border-top:1px solid var(--line);margin-top:2rem;padding-top:.8rem;
color:var(--soft);font-size:.8rem;overflow-wrap:anywhere}
svg .tick,svg .label{fill:var(--soft)}svg .grid{stroke:var(--line);stroke-width:.6}svg .axis{stroke:var(--soft)}
svg .line{fill:none;stroke-width:1.8}svg .dashed{stroke-dasharray:5 4}
svg .line.s0{stroke:var(--s0)}svg .line.s1{stroke:var(--s1)}svg .line.s2{stroke:var(--s2)}svg .line.s3{stroke:var(--s3)}
svg .line.s4{stroke:var(--s4)}svg .line.s5{stroke:var(--s5)}svg .dot.s0,svg .key.s0{fill:var(--s0)}
svg .dot.s1,svg .key.s1{fill:var(--s1)}svg .dot.s2,svg .key.s2{fill:var(--s2)}svg .dot.s3,svg .key.s3{fill:var(--s3)}
svg .dot.s4,svg .key.s4{fill:var(--s4)}svg .dot.s5,svg .key.s5{fill:var(--s5)}
@media(max-width:34rem){main{padding:1rem .8rem}.overview .say{display:none}h1{font-size:1.6rem}}
</style></head><body><main>"""
