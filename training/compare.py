#!/usr/bin/env python
"""What two runs or more were measured at, side by side: `python training/compare.py RUN RUN [...]`.

A leaf. RUN is a run's folder (runs/NAME), a job's (runs/NAME/qat, runs/NAME/dflash, one that was set aside) or a summary.json.
Prints a table for each job that at least two of them have, with the recipe keys in which they differ, and says where numbers
are of different text or models and so no comparison. Exit code: 0; 2 for a folder without results.
"""

import argparse
import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where training/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml

from storage.reading import read_json, read_text
from storage.terminal import printable

NO_COMPARISON = "no comparison"
JOBS = {"qat": "quantization-aware training", "dflash": "drafter"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="training/compare.py", description="Results of several runs, side by side.",
                                     epilog="example: python training/compare.py runs/one runs/two")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a job, or a summary.json")
    args = parser.parse_args(argv)
    try:
        if len(args.runs) < 2:
            raise ValueError("expected two runs or more")
        found = [(path, results(path)) for path in args.runs]
        shared = [job for job in JOBS if sum(job in of for _, of in found) > 1]
        if not shared:
            raise ValueError("no two of them are results of the same job")
    except ValueError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    for job in shared:
        show(job, [(str(path), of[job]) for path, of in found if job in of])
    return 0


def results(path: Path) -> dict[str, Path]:
    """summary.json by job of what the user named. Raises ValueError: there is none."""
    places = [path] if path.is_file() else [path / "summary.json", *(path / job / "summary.json" for job in JOBS)]
    found = {("qat" if "qat" in read_json(place) else "dflash"): place for place in places if place.is_file()}
    if not found:
        raise ValueError(f"{path}: no finished run there (no summary.json); expected a folder such as runs/NAME")
    return found


def show(job: str, runs: list[tuple[str, Path]]) -> None:
    from rich.console import Console
    from rich.table import Table

    summaries = [read_json(place) for _, place in runs]
    lines = doubts(job, summaries)
    comparable = not any(line.startswith(NO_COMPARISON) for line in lines)
    table = Table(title=JOBS[job])
    table.add_column("")
    for name, _ in runs:
        table.add_column(printable(name), justify="right", overflow="fold")
    for label, values, better in figures(job, summaries):
        known = [v for v in values if v is not None]
        best = better(known) if better and comparable and len(set(known)) > 1 else None
        table.add_row(label, *("-" if v is None else f"[bold]{shown(v)}[/] *" if v == best else shown(v) for v in values))
    table.add_section()
    for key, values in differing_keys([place.with_name("resolved.yaml") for _, place in runs]):
        table.add_row(printable(key), *(printable(str(v)) for v in values))
    Console().print(table)
    for line in lines:
        print(line)


def figures(job: str, summaries: list[dict]) -> list[tuple]:
    """(label, values, which of them is best: min, max or None) of a table's rows."""
    rows = []

    def row(label: str, better, *keys: str) -> None:
        values = [_at(summary, *keys) for summary in summaries]
        if any(v is not None for v in values):
            rows.append((label, values, better))

    if job == "qat":
        row("KL gap closed", max, "kl_gap_closed")
        for variant, label in (("ptq", "plain rounding"), ("qat", "trained")):
            row(f"KL, {label}", min if variant == "qat" else None, variant, "kl")
            row(f"loss, {label} (nats/token)", min if variant == "qat" else None, variant, "loss")
        row("top-1 agreement, trained", max, "qat", "top1_agreement")
        for domain in _keys(summaries, "qat", "domains"):
            row(f"KL, trained, {domain}", min, "qat", "domains", domain, "kl")
    else:
        for domain in _keys(summaries, "acceptance"):
            for kind, label in (("task_t0", "greedy"), ("open_t1", "temperature 1")):
                row(f"acceptance length, {domain}, {label}", max, "acceptance", domain, kind)
    for label, *keys in (("steps", "steps"), ("result of step", "result_of_step"), ("tokens", "tokens"),
                         ("response tokens", "response_tokens"), ("parameters", "parameters"), ("seed", "seed"),
                         ("seconds of training", "seconds"), ("revision", "environment", "git_revision"),
                         ("date", "environment", "date")):
        row(label, None, *keys)
    return rows


def _at(value, *keys: str):
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _keys(summaries: list[dict], *keys: str) -> list[str]:
    return list(dict.fromkeys(name for summary in summaries for name in _at(summary, *keys) or {}))


def shown(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else printable(str(value))


def differing_keys(recipes: list[Path]) -> list[tuple[str, list]]:
    """(dotted key, value of each run) of what the runs' recipes do not have in common; names and paths of outputs aside."""
    leaves = [dict(_leaves(yaml.safe_load(read_text(path)))) if path.is_file() else {} for path in recipes]
    keys = dict.fromkeys(key for of in leaves for key in of)
    rows = [(key, [of.get(key) for of in leaves]) for key in keys if key not in ("name", "output")]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _leaves(value, prefix: str = ""):
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def doubts(job: str, summaries: list[dict]) -> list[str]:
    """Why the numbers may not be compared, a line each."""
    lines = []
    reasons = {"qat": {("heldout",): "measured on different text", ("inputs", "base weights"): "of different base models"},
               "dflash": {("target", "weights"): "measured on different targets, which say different things"}}
    for keys, reason in reasons[job].items():
        if any(_at(summary, *keys) != _at(summaries[0], *keys) for summary in summaries):
            lines.append(f"{NO_COMPARISON}: these runs are {reason}")
    lines += [f"run {number}: training did not help: plain rounding is better" for number, summary in enumerate(summaries, 1)
              if summary.get("helped") is False]
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
