"""KL gap closed on the embedded seed by the tiny recipe and by what it was chosen against: the table of docs/results/qat.md.

    python benchmarks/qat_variants.py [--variants demo,plain-rceil] [--seeds 0,1,2] [--out runs-variants]

Each variant is a set of recipe overrides, run through `qat/train.py` like any user's run, one after the other. Finished
runs are read, not repeated, so an interrupted table goes on. Writes docs/results/qat.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The recipe without what it adds to plain quantization-aware distillation.
PLAIN = ["qat.warm_start.method=none", "qat.oscillation.method=none", "qat.average_last=0.0", "qat.loss.hidden=0.0",
         "qat.optimizer.name=adamw", "qat.optimizer.learning_rate=2e-4"]
VARIANTS: dict[str, list[str]] = {
    "demo": [],
    "plain-rceil": [*PLAIN, "quantization.scale_rule=rceil"],
    "plain-even": [*PLAIN],
    "no-gptq": ["qat.warm_start.method=none"],
    "gptq-only": ["qat.steps=1", "qat.optimizer.learning_rate=1e-9"],
    "muon": ["qat.optimizer.name=muon", "qat.optimizer.learning_rate=3e-4"],
    "ema": ["qat.oscillation.method=ema", "qat.oscillation.ema_decay=0.9"],
    "freeze": ["qat.oscillation.method=freeze", "qat.oscillation.freeze_flips=4"],
    "long": ["qat.steps=450"],
}


def run(variant: str, seed: int, out: Path, extra: list[str]) -> dict:
    """Summary of one run, made if it is not there yet."""
    name = f"{variant}-{seed}"
    summary = out / name / "qat" / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "qat/train.py", "recipes/tiny.yaml", f"name={name}", f"output={out}", f"seed={seed}",
                   *VARIANTS[variant], *extra, "--resume"]
        print("$", " ".join(command[1:]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(summary.read_text())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs-variants"))
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/qat.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="applied to every variant")
    args = parser.parse_intermixed_args(argv)
    unknown = set(args.variants.split(",")) - VARIANTS.keys()
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")
    table = {}
    for variant in args.variants.split(","):
        runs = [run(variant, int(seed), args.out, args.overrides) for seed in args.seeds.split(",")]
        table[variant] = {"overrides": [*VARIANTS[variant], *args.overrides], "runs": runs}
        gaps = [r["kl_gap_closed"] for r in runs]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        print(f"{variant:24} gap closed {statistics.mean(gaps):.3f} +- {spread:.3f}   KL "
              f"{statistics.mean(r['qat']['kl'] for r in runs):.6f} (plain rounding {runs[0]['ptq']['kl']:.6f})   "
              f"{runs[0]['tokens']:,} tokens, {statistics.mean(r['seconds'] for r in runs):.0f} s", flush=True)
    record = {"command": " ".join(["python benchmarks/qat_variants.py", *argv]), "variants": table}
    args.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
