"""Methods of quantization-aware training against each other: KL gap closed, agreement, perplexity, flips, dead zone, time.

    python benchmarks/qat_variants.py [--recipe recipes/tiny.yaml] [--variants demo,plain-rceil] [--seeds 0,1,2]
        [--out runs-variants] [--json FILE] [--page FILE] [--chart FILE] [section.key=value ...]

Each variant is a set of recipe overrides, run through `qat/train.py` like any user's run, one after the other. Finished runs
are read, not repeated, and an interrupted one is resumed, so an interrupted table goes on. Writes the runs as JSON, and if
asked a page with a table and a chart of held-out KL against tokens (of runs with qat.heldout_every).
Intervals are Student's at 95 % over seeds; with one seed, of the gap, over held-out rows. Each variant's KL beside the first
variant's is paired: the same held-out rows at the last measurement while training (qat.heldout_every), means over the seeds,
bootstrap over rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from recipes.command import run_command
from training.intervals import ratio_interval
from training.report import mean, read_metrics

# The recipe without what it adds to plain quantization-aware distillation.
PLAIN = ["qat.warm_start.method=none", "qat.oscillation.method=none", "qat.average_last=0.0", "qat.loss.hidden=0.0",
         "qat.scales.method=rule", "qat.optimizer.name=adamw", "qat.optimizer.relative=false",
         "qat.optimizer.learning_rate=2e-4"]
START = ["qat.steps=1", "qat.optimizer.learning_rate=1e-9"]
VARIANTS: dict[str, list[str]] = {
    "demo": [],
    "plain-rceil": [*PLAIN, "quantization.scale_rule=rceil"],
    "plain-even": [*PLAIN],
    "no-start": ["qat.warm_start.method=none"],
    "start": [*START],
    "start-gptq": [*START, "qat.warm_start.method=gptq"],
    "start-searched": [*START, "qat.scales.method=searched"],
    "start-behind": [*START, "qat.warm_start.layers_together=1"],
    "start-behind-searched": [*START, "qat.warm_start.layers_together=1", "qat.scales.method=searched"],
    "searched": ["qat.scales.method=searched"],
    "learned": ["qat.scales.method=learned"],
    "cage": ["qat.grid_pull.strength=30.0"],
    "reset": ["qat.oscillation.method=reset"],
    "ema": ["qat.oscillation.method=ema", "qat.oscillation.ema_decay=0.9"],
    "freeze": ["qat.oscillation.method=freeze", "qat.oscillation.freeze_flips=4"],
    "soft": ["qat.soft_rounding.method=annealed"],
    "hidden-kl": ["qat.loss.hidden_kl=0.3"],
    "muon": ["qat.optimizer.name=muon", "qat.optimizer.learning_rate=3e-4"],
    "relative": ["qat.optimizer.relative=true", "qat.optimizer.learning_rate=5e-4"],
    "one-rate": ["qat.optimizer.relative=false", "qat.optimizer.learning_rate=1e-4"],
    "all": ["qat.train=all"],
    "long": ["qat.steps=450"],
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def run(recipe: str, variant: str, seed: int, out: Path, extra: list[str]) -> dict:
    """Summary of one run, made if it is not there yet, with flips and dead zone of its last health report.

    Raises:
        SystemExit: the run failed; names its log (exit code 1).
    """
    folder = out / f"{variant}-{seed}" / "qat"
    if not (folder / "summary.json").is_file():
        command = [sys.executable, "qat/train.py", recipe, f"name={variant}-{seed}", f"output={out}", f"seed={seed}",
                   *VARIANTS[variant], *extra, "--resume"]
        print("$", " ".join(command[1:]), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{variant}-{seed}.log").open("w") as log:
            if subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
                raise SystemExit(f"error: {variant}, seed {seed}: {last_line(Path(log.name))} (see {log.name})")
    metrics = read_metrics(folder / "metrics.jsonl")
    found = held_out(metrics)
    return json.loads((folder / "summary.json").read_text()) | health(metrics) | {
        "curve": [(r["tokens"], r["kl"]) for r in found], "row_kl": found[-1].get("row_kl") if found else None}


def last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]


def health(metrics: list[dict]) -> dict[str, float]:
    """Mean and largest share per expert of codes that changed (summed over reports) and of weights rounded to zero."""
    records = [r for r in metrics if r["kind"] == "health"]
    last = max((r["step"] for r in records), default=0)
    flips: dict[tuple[str, int], float] = {}
    for record in records:
        for expert, share in enumerate(record["flipped"]):
            flips[record["tensor"], expert] = flips.get((record["tensor"], expert), 0.0) + (share or 0.0)
    dead = [share or 0.0 for r in records if r["step"] == last for share in r["zeroed"]]
    return {"flipped_mean": mean(flips.values()), "flipped_max": max(flips.values(), default=math.nan),
            "dead_zone_mean": mean(dead), "dead_zone_max": max(dead, default=math.nan)}


def held_out(metrics: list[dict]) -> list[dict]:
    """The measurements on held-out text, each with the tokens trained on until then."""
    tokens = {r["step"]: r["tokens"] for r in metrics if r["kind"] == "train"}
    each = next((t / s for s, t in tokens.items()), 0)
    return [r | {"tokens": r["step"] * each} for r in metrics if r["kind"] == "heldout"]


def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half width of its 95 % interval), the latter None for a single value."""
    if len(values) < 2:
        return values[0], None
    return statistics.mean(values), STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def show(values: list[float], digits: int = 3, factor: float = 1.0) -> str:
    middle, half = interval([factor * v for v in values])
    return f"{middle:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def beside(runs: list[dict], first: list[dict]) -> str:
    """KL over that of the runs of `first`, by rows of held-out text, with its interval; "" if that is not the same."""
    sides = [[run.get("row_kl") for run in of] for of in (runs, first)]
    text = [(run.get("heldout"), {name: len(of) for name, of in (run.get("row_kl") or {}).items()}) for run in (*runs, *first)]
    if runs is first or not text[0][1] or any(of != text[0] for of in text):
        return ""
    own, others = ([[mean(values) for values in zip(*(rows[name] for rows in side), strict=True)] for name in side[0]]
                   for side in (sides[0], sides[1]))
    groups = [list(zip(a, b, strict=True)) for a, b in zip(own, others, strict=True)]
    low, high = ratio_interval(groups)
    return f"{sum(map(sum, own)) / sum(map(sum, others)):.3f} ({low:.3f} to {high:.3f})"


COLUMNS = ("variant", "KL gap closed", "KL", "KL / first's (95 %)", "top-1 agreement, %", "perplexity",
           "codes flipped, % (largest expert)", "dead zone, % (largest)", "tokens", "minutes")


def gap(runs: list[dict]) -> str:
    if len(runs) == 1 and "kl_gap_closed_interval" in runs[0]:
        return "{:.3f} ({:.3f} to {:.3f})".format(runs[0]["kl_gap_closed"], *runs[0]["kl_gap_closed_interval"])
    return show([r["kl_gap_closed"] for r in runs])


def row(variant: str, runs: list[dict], first: list[dict]) -> list[str]:
    return [variant, gap(runs), show([r["qat"]["kl"] for r in runs], 5), beside(runs, first),
            show([r["qat"]["top1_agreement"] for r in runs], 1, 100), show([math.exp(r["qat"]["loss"]) for r in runs], 3),
            f"{100 * mean(r['flipped_mean'] for r in runs):.2f} ({100 * max(r['flipped_max'] for r in runs):.2f})",
            f"{100 * mean(r['dead_zone_mean'] for r in runs):.1f} ({100 * max(r['dead_zone_max'] for r in runs):.1f})",
            f"{runs[0]['tokens']:,}", f"{mean(r['seconds'] for r in runs) / 60:.1f}"]


def table(variants: dict) -> str:
    """The variants as a Markdown table, after the rows of the original and of plain rounding."""
    first = next(iter(variants.values()))["runs"][0]
    rows = [[name, gap, f"{first[key]['kl']:.5f}", "", f"{100 * first[key]['top1_agreement']:.1f}",
             f"{math.exp(first[key]['loss']):.3f}", "", "", "", ""]
            for name, key, gap in (("original (bf16)", "bf16", "1"), ("plain rounding", "ptq", "0"))]
    runs = [entry["runs"] for entry in variants.values()]
    rows += [row(name, of, runs[0]) for name, of in zip(variants, runs, strict=True)]
    return "\n".join("| " + " | ".join(r) + " |" for r in ([*COLUMNS], ["---"] * len(COLUMNS), *rows))


def draw(variants: dict, picture: Path) -> None:
    """Held-out KL against training tokens, a line per variant (mean over seeds)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, entry in variants.items():
        curves = [r["curve"] for r in entry["runs"] if len(r["curve"]) > 1]
        if curves:
            points = list(zip(*curves, strict=False))
            axes.plot([p[0][0] for p in points], [mean(kl for _, kl in p) for p in points], marker=".", label=name)
    plain = next(iter(variants.values()))["runs"][0]["ptq"]["kl"]
    axes.axhline(plain, color="grey", linestyle=":", label="plain rounding (final evaluation)")
    axes.set(xlabel="training tokens", ylabel="KL to the original, nats per token (held out)", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/tiny.yaml")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs-variants"))
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/qat.json")
    parser.add_argument("--page", type=Path, help="Markdown file for the table")
    parser.add_argument("--chart", type=Path, help="PNG of held-out KL against tokens")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="applied to every variant, after its own")
    args = parser.parse_intermixed_args(argv)
    unknown = set(args.variants.split(",")) - VARIANTS.keys()
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")

    def job(_) -> int:
        variants: dict[str, dict] = {}
        for variant in args.variants.split(","):
            runs = [run(args.recipe, variant, int(seed), args.out, args.overrides) for seed in args.seeds.split(",")]
            variants[variant] = {"overrides": [*VARIANTS[variant], *args.overrides], "runs": runs}
            print(" | ".join(row(variant, runs, next(iter(variants.values()))["runs"])), flush=True)
            record = {"command": " ".join(["python benchmarks/qat_variants.py", *argv]), "variants": variants}
            args.json.write_text(json.dumps(record, indent=1))  # after each variant: an interrupted table is one too
        if args.page:
            args.page.write_text(table(variants) + "\n")
        if args.chart:
            draw(variants, args.chart)
        return 0

    # Recipe and overrides are checked before the first run.
    return run_command(args.recipe, args.overrides, job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
