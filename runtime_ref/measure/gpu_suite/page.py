"""The GPU suite's report as a page: what was measured, beside its goal, and a picture of the launches in time.

Everything on the page comes out of the JSON, so that it can be written again from it; a number that the report lacks is said
to be not measured.
"""

from __future__ import annotations

import html
from pathlib import Path

from storage.files import write_text

# Goals as stated before anything was measured: microseconds of the expert kernel at eight tokens and of a step with its draft.
EXPERTS_US = {"good": 48.0, "target": 44.8, "stretch": 39.0}
STEP_MS = {"good": 5.1, "target": 4.4}
PEERS, PEERS_UP_TO = 1.3, 16
LAUNCHES, BARRIER_US, COPY_SHARE = 3, 1.5, 0.8
WIDTH, LANE, COLOURS = 960, 26, ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d9d9d")


def page(report: dict, picture: str | None) -> str:
    """Markdown of a report of `gpu_suite.run`. picture: file name of the timeline, if there is one."""
    red = [check for check in report["checks"] if not check["passed"]]
    head = [f"# The kernels on {report['device']}", "",
            f"{report['date'][:10]}, torch {report['torch']}, triton {report['triton']}, Python {report['python']}, revision "
            f"{report['revision']}. Written by", "", f"    {report['command']}", "",
            f"Checks before any speed: {len(report['checks']) - len(red)} of {len(report['checks'])} green."]
    if not report["complete"]:
        head += ["", "**The run did not come to its end**: what is missing here was not measured."]
    if red:
        return "\n".join([*head, "No speed was measured, because these are red:", "",
                          *(f"- {check['name']}: {check['detail']}" for check in red), ""])
    lines = [*head, "", "## Goals", "", "| | measured | goal | |", "|---|---|---|---|",
             *(f"| {what} | {found} | {goal} | {verdict} |" for what, found, goal, verdict in goals(report)), ""]
    lines += _bandwidth(report) + _experts(report) + _sweep(report) + _steps(report) + _engine(report, picture)
    if report["skipped"] or report["refused"]:
        lines += ["## Not measured", "", *(f"- {what}" for what in [*report["skipped"], *report["refused"]]), ""]
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"


def launches(report: dict) -> int | None:
    """Of a step, its draft and its verdict, as counted; None if one of them was not."""
    step = report.get("step", {})
    counted = [(step.get(name) or {}).get("launches") for name in ("walk", "draft", "verify")]
    return None if None in counted else sum(counted)


def goals(report: dict) -> list[tuple[str, str, str, str]]:
    """(what, measured, goal, verdict) of G1 to G5."""
    found = []

    def judged(what: str, value: float | None, shown: str, goal: str, reached: bool | None) -> None:
        verdict = "" if reached is None else "reached" if reached else "**missed**"
        found.append((what, "not measured" if value is None else shown, goal, verdict if value is not None else ""))

    best = min((row["seconds"] for row in report.get("experts", []) if not row["failed"]), default=None)
    micro = None if best is None else 1e6 * best
    step, quantize = report.get("step", {}), report.get("fake_quantize", {})
    both, megakernel = step.get("step_and_draft_seconds"), (step.get("walk") or {}).get("seconds")
    for name, limit in EXPERTS_US.items():
        judged(f"G1 experts, 8 tokens ({name})", micro, f"{micro or 0:.1f} us", f"at most {limit:g} us",
               micro is not None and micro <= limit)
    against = {row["tokens"]: row for row in report.get("against", [])}
    ratio = against[8]["peer_seconds"] / best if 8 in against and best else None
    judged("G1 the faster peer over this kernel", ratio, f"{ratio or 0:.2f}", f"at least {PEERS:g}",
           ratio is not None and ratio >= PEERS)
    worst = min((row["ratio"] for tokens, row in against.items() if tokens <= PEERS_UP_TO), default=None)
    judged(f"G1 the same, worst of 1 to {PEERS_UP_TO} tokens", worst, f"{worst or 0:.2f}", "at least 1",
           worst is not None and worst >= 1)
    for name, limit in STEP_MS.items():
        judged(f"G2 step and draft of one of eight ranks ({name})", both, f"{1e3 * (both or 0):.2f} ms",
               f"at most {limit:g} ms", both is not None and 1e3 * both <= limit)
    count = launches(report)
    judged("G3 launches of a step, its draft and verdict", count, str(count), f"at most {LAUNCHES}", (count or 99) <= LAUNCHES)
    barrier = step.get("barrier_seconds")
    judged("G3 grid barrier", barrier, f"{1e6 * (barrier or 0):.2f} us", f"at most {BARRIER_US:g} us",
           1e6 * (barrier or 1) <= BARRIER_US)
    gain = step["op_by_op"]["seconds"] / megakernel if megakernel and step["op_by_op"] else None
    judged("G3 graphed launches over the megakernel", gain, f"{gain or 0:.2f}", "above 1", (gain or 0) > 1)
    share = quantize.get("share_of_copy")
    judged("G4 fused fake quantization, share of copy bandwidth", share, f"{100 * (share or 0):.0f} %",
           f"at least {100 * COPY_SHARE:.0f} %", (share or 0) >= COPY_SHARE)
    ours = report.get("qat_step", {}).get("ratio", {}).get("ours")
    judged("G4 training step with expert QAT over one without", ours, f"{ours or 0:.2f}", "", None)
    equal = report.get("engine", {}).get("greedy_equal")
    judged("G5 greedy tokens: drafting = plain, " + (" and ".join(equal) if equal else "op by op and as megakernels"),
           1.0 if equal else None, "equal" if equal and all(equal.values()) else "DIFFERENT", "equal",
           bool(equal) and all(equal.values()))
    return found


def _bandwidth(report: dict) -> list[str]:
    rates = report.get("bandwidth")
    if rates is None:
        return []
    return [f"Bandwidth in the same minutes: pure read {rates['read'] / 1e12:.2f} TB/s, copy {rates['copy'] / 1e12:.2f} TB/s.",
            ""]


def _experts(report: dict) -> list[str]:
    if "experts" not in report:
        return []
    rows = sorted(report["experts"], key=lambda row: row["seconds"])
    lines = ["## Experts, 8 tokens, one of eight ranks", "",
             "| us | TB/s | of pure read | pages | launch |", "|---|---|---|---|---|"]
    for row in rows:
        launch = ", ".join(f"{k} {v}" for k, v in row["launch"].items() if k not in ("ptx", "float_dot", "polls"))
        pages = f"{row['page_rows']} rows{', hw_fp4' if row['hw_fp4'] else ''}{', FAILED' if row['failed'] else ''}"
        lines.append(f"| {1e6 * row['seconds']:.1f} | {row['bytes_per_second'] / 1e12:.2f} | "
                     f"{percent(row['share_of_read'])} | {pages} | {launch} |")
    return [*lines, ""]


def _sweep(report: dict) -> list[str]:
    if "sweep" not in report:
        return []
    peers = {name: {row["tokens"]: row for row in peer["sweep"]} for name, peer in report.get("peers", {}).items()
             if peer.get("sweep")}
    lines = ["## Tokens", "",
             "| tokens | distinct experts | us | of pure read | work handed out by |"
             + "".join(f" {name}, us (with its routing) |" for name in peers),
             "|---|---|---|---|---|" + "---|" * len(peers)]
    ways: dict[int, list[str]] = {}
    for row in sorted(report.get("dispatch", []), key=lambda row: row["seconds"]):
        ways.setdefault(row["tokens"], []).append(f"{row['dispatch']} {1e6 * row['seconds']:.1f}")
    for row in report["sweep"]:
        cells = [_peer_cell(times.get(row["tokens"])) for times in peers.values()]
        lines.append(f"| {row['tokens']} | {row['distinct']:.1f} | {1e6 * row['seconds']:.1f} | "
                     f"{percent(row['share_of_read'])} | {', '.join(ways.get(row['tokens'], ['-']))} |"
                     + "".join(f" {cell} |" for cell in cells))
    lines.append("")
    for name, peer in report.get("peers", {}).items():
        said = peer.get("missing") or peer["refused"] or f"{peer['version']}; timed: {peer['timed']}"
        late = ", ".join(map(str, peer.get("skipped", ())))
        lines.append(f"- {name}: {said}{f'; no time for {late} tokens' if late else ''}")
    return [*lines, ""]


def _peer_cell(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{1e6 * row['seconds']:.1f}" + (f" ({1e6 * row['routed']['seconds']:.1f})" if "routed" in row else "")


def _steps(report: dict) -> list[str]:
    if "step" not in report:
        return []
    step = report["step"]
    megakernel, draft, compared = (step[name] or {} for name in ("walk", "draft", "compared"))
    lines = ["## A step of one of eight ranks, full geometry, random weights", "",
             f"{step['weights_bytes'] / 1e9:.1f} GB of weights, {step['position']} tokens in the cache, no communication."]
    if compared:
        where = "of the logits" if compared["layer"] < 0 else f"of layer {compared['layer']}"
        apart = "not finite" if compared["difference"] is None else f"{compared['difference']:.1e}"
        lines += ["", f"Each layer, megakernel and launches from the same input: relative difference of a row at most {apart} "
                      f"({where})" + (f"; {compared['distinct_experts']:.1f} distinct experts per layer."
                                      if compared["distinct_experts"] else ".")]
    rows = [("verification, graphed launches", step["op_by_op"], step["launches_op_by_op"]),
            ("verification, megakernel", step["walk"], megakernel.get("launches")),
            ("drafter's round, megakernel", step["draft"], draft.get("launches")),
            ("verdict", step["verify"], (step["verify"] or {}).get("launches"))]
    lines += ["", "| | ms | launches |", "|---|---|---|", *(_step_row(*row) for row in rows), ""]
    lines += _tuning(step)
    if "bytes_beyond_a_rank" in draft:
        lines += [f"The drafter's round reads {draft['bytes_beyond_a_rank'] / 1e6:.0f} MB more here than on one of eight.", ""]
    if "projected" not in step:
        return lines
    return [*lines, f"Projected, not measured: tokens/s of eight GPUs at an acceptance length of "
                    f"{step['projected']['acceptance']:g} with {step['projected']['reductions']} all-reduces of so many "
                    "microseconds:", "",
            "| " + " | ".join(step["projected"]["tokens_per_second"]) + " |",
            "|" + "---|" * len(step["projected"]["tokens_per_second"]),
            "| " + " | ".join(f"{rate:.0f}" for rate in step["projected"]["tokens_per_second"].values()) + " |", ""]


def _tuning(step: dict) -> list[str]:
    """Grid barriers of both kinds, and the megakernel's switches one by one."""
    lines = []
    barriers = {name: seconds for name, seconds in (step.get("barriers") or {}).items() if seconds is not None}
    if barriers:
        lines += ["Grid barrier: " + ", ".join(f"{name} {1e6 * s:.2f} us" for name, s in barriers.items()) + ".", ""]
    if step.get("tuning"):
        lines += ["| the megakernel's switches, each beside those that were faster before | ms | bits |", "|---|---|---|",
                  f"| none | {1e3 * step['untuned_seconds']:.3f} | |",
                  *(f"| {', '.join(f'{k} {v}' for k, v in row['tuning'].items())} | {1e3 * row['seconds']:.3f} | "
                    f"{'equal' if row['equal'] else '**DIFFERENT**'} |" for row in step["tuning"]), ""]
    return lines


def _step_row(what: str, timed: dict | None, count: int | None) -> str:
    """A row that is wrong says why it has no speed."""
    refused = (timed or {}).get("refused")
    shown = f"{1e3 * timed['seconds']:.3f}" if timed and "seconds" in timed else "not measured"
    return f"| {what}{f' (**WRONG**: {refused})' if refused else ''} | {shown} | {'not counted' if count is None else count} |"


def _engine(report: dict, picture: str | None) -> list[str]:
    if "engine" not in report:
        return []
    engine = report["engine"]
    length, same = engine["acceptance_length"], engine["walked_as_op_by_op"]
    lines = ["## The engine end to end", ""]
    lines += [] if length is None else [f"Acceptance length {length:.2f}.", ""]
    lines += ["| | tokens/s |", "|---|---|",
              *(f"| {name} | {rate:.0f} |" for name, rate in engine["tokens_per_second"].items()), ""]
    lines += [f"Drafting and plain, {way}: {'the same tokens' if equal else '**DIFFERENT** tokens'}."
              for way, equal in engine["greedy_equal"].items()]
    if same is not None:
        lines += [f"Megakernel and op by op, plain: the first {' and '.join(map(str, same))} of {engine['tokens']} tokens of "
                  "the prompts are alike (two orders of sums; fewer than all is no error)."]
    lines += [f"**A wait was given up** by the megakernel of the {name}: its speeds are left out." for name in engine["failed"]]
    return [*lines, "", *([f"![launches in time]({picture})", ""] if picture else [])]


def timeline_picture(spans: dict[str, list[list]]) -> str:
    """SVG of [name, begin, seconds] by engine: one lane each, the longest kernels in colours of their own."""
    spent: dict[str, float] = {}
    for own in spans.values():
        for name, _, seconds in own:
            spent[_kernel(name)] = spent.get(_kernel(name), 0.0) + seconds
    shown = sorted(spent, key=spent.get, reverse=True)[:len(COLOURS) - 1]
    colours = dict(zip(shown, COLOURS, strict=False))
    most = max((begin + seconds for own in spans.values() for _, begin, seconds in own), default=0.0) or 1e-6
    height = (LANE + 22) * len(spans) + 20 * -(-(len(shown) + 1) // 3) + 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11">',
           f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    for i, (lane, own) in enumerate(spans.items()):
        top = 18 + i * (LANE + 22)
        out.append(f'<text x="4" y="{top - 4}">{html.escape(lane)}: {len(own)} activities, {1e3 * most:.2f} ms wide</text>')
        for name, begin, seconds in own:
            left, width = 4 + (WIDTH - 8) * begin / most, max(0.3, (WIDTH - 8) * seconds / most)
            out.append(f'<rect x="{left:.2f}" y="{top}" width="{width:.2f}" height="{LANE}" '
                       f'fill="{colours.get(_kernel(name), COLOURS[-1])}"><title>{html.escape(name)}: {1e6 * seconds:.1f} us'
                       '</title></rect>')
    for i, name in enumerate([*shown, "everything else"]):
        left, top = 4 + i % 3 * (WIDTH // 3), (LANE + 22) * len(spans) + 30 + i // 3 * 20
        share = sum(s for n, s in spent.items() if n not in colours) if name not in colours else spent[name]
        out.append(f'<rect x="{left}" y="{top - 9}" width="10" height="10" fill="{colours.get(name, COLOURS[-1])}"/>'
                   f'<text x="{left + 15}" y="{top}">{html.escape(name)}, {1e3 * share:.2f} ms</text>')
    return "".join([*out, "</svg>\n"])


def _kernel(name: str) -> str:
    """Copies of one kind count as one kernel."""
    return name.split(" ")[0] if name.startswith(("Memcpy", "Memset")) else name


def write_page(report: dict, path: Path) -> None:
    """The page, and beside it the picture, if the report has a timeline."""
    spans = report.get("engine", {}).get("timeline")
    picture = path.with_name(path.stem + "-timeline.svg") if spans else None
    if picture:
        write_text(picture, timeline_picture(spans))
    write_text(path, page(report, picture.name if picture else None))
