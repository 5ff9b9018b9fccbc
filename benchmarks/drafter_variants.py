"""Acceptance lengths on the embedded seed by the tiny recipe's drafter and by what it was chosen against.

    python benchmarks/drafter_variants.py [--variants demo,corpus] [--seeds 0,1,2] [dflash.steps=150 ...]

The table and figure of docs/results/drafter.md. Needs the target of the tiny recipe (`qat/train.py recipes/tiny.yaml`).
Every variant is a set of recipe overrides, trained from fresh weights for the same number of steps and measured on the
same held-out prompts with the quantized target, whatever it was trained with. Finished runs are read, not repeated, so
an interrupted table goes on. All seeds share the target's answers: a seed changes first weights, order of rows and
anchors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

ADAMW_RATES = ("3e-4", "1e-3", "2e-3", "4e-3", "8e-3")
# The tiny recipe goes on from the seed's drafter; these runs begin at the beginning, at a beginner's rate.
FRESH = ["dflash.start_from=null", "dflash.optimizer.learning_rate=1e-2", "dflash.optimizer.adamw_learning_rate=1e-2",
         "dflash.regenerate.passes=[{temperature: 0.0, where: {kind: task}}, {temperature: 1.0, where: {kind: open}}]"]
VARIANTS: dict[str, list[str]] = {
    "demo": [],
    **{f"adamw-{rate}": ["dflash.optimizer.name=adamw", f"dflash.optimizer.learning_rate={rate}",
                         f"dflash.optimizer.adamw_learning_rate={rate}", "dflash.optimizer.betas=[0.9, 0.95]"]
       for rate in ADAMW_RATES},
    "corpus": ["dflash.data=[recipes/seed/text/*.train.jsonl]"],
    "ce": ["dflash.loss.kl=0.0", "dflash.loss.weighting=decay", "dflash.loss.decay_gamma=4.0"],
    "ce-dpace": ["dflash.loss.kl=0.0"],
    "kl": ["dflash.loss.cross_entropy=0.0"],
    "bf16-target": ["dflash.target=base"],
    "full-attention": ["drafter.window=null"],
    "window-64": ["drafter.window=64"],
    "causal": ["drafter.causal=true"],
    "convolution": ["drafter.convolution_rank=32"],
    "markov": ["drafter.markov_rank=64"],
    "markov-selector": ["drafter.markov_rank=64", "drafter.selector_top_k=8"],
}
KINDS = [(domain, kind) for kind in ("task_t0", "open_t1") for domain in ("code", "prose", "math")]


def run(variant: str, seed: int, out: Path, extra: list[str]) -> dict:
    """Result of one run, made if it is not there yet."""
    from dflash_train import acceptance
    from dflash_train.target import load_target
    from recipes.load import load_recipe
    from storage.files import write_text
    from training.report import environment

    result = out / f"{variant}-{seed}.json"
    settings = [*VARIANTS[variant], *extra]
    if result.is_file() and json.loads(result.read_text())["overrides"] == settings:
        return json.loads(result.read_text())
    always = [*FRESH, "dflash.acceptance.timed_prompts=0", *extra]
    served = load_recipe(ROOT / "recipes/tiny.yaml", always)
    recipe = load_recipe(ROOT / "recipes/tiny.yaml", [*always, f"seed={seed}", *VARIANTS[variant]])
    job = VariantTrainer(recipe, out)
    began = time.perf_counter()
    if stopped_by := job.train(None):
        sys.exit(128 + stopped_by)
    seconds = time.perf_counter() - began
    target = load_target(served)
    drafter = job.drafter.eval().to(target.head.weight.dtype)
    measured = acceptance.measure(served, target, drafter, say=lambda text: None)
    record = {"variant": variant, "seed": seed, "overrides": settings, "seconds": seconds, "steps": recipe.dflash.steps,
              "acceptance": measured["acceptance"], "detail": measured["detail"], "environment": environment()}
    write_text(result, json.dumps(record))
    return record


def VariantTrainer(recipe, out: Path):
    """A trainer that keeps no records of its own and whose answers and features lie in `out`."""
    from dflash_train.trainer import Trainer

    class Quiet(Trainer):
        def set_earlier_aside(self, keep=()):
            pass

        def _load_data(self):
            own, self.folder = self.recipe, out / "shared"
            self.recipe = own.model_copy(update={"seed": 0})
            super()._load_data()
            self.recipe = own

        def open_records(self, resumed, name):
            pass

        def record(self, values, seconds, bar):
            pass

        def save(self):
            pass

    return Quiet(recipe, resume=False)


def row(records: list[dict]) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard deviation over seeds of each figure."""
    found = {}
    for domain, kind in KINDS:
        values = [r["acceptance"][domain][kind] for r in records]
        found[domain, kind] = (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
    return found


def draw(table: dict[str, list[dict]], picture: Path) -> None:
    """One group of bars per figure, one bar per variant, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.85 / len(table)
    for i, (variant, records) in enumerate(table.items()):
        cells = row(records)
        axis.bar([x + i * width for x in range(len(KINDS))], [cells[k][0] for k in KINDS], width, label=variant,
                 yerr=[cells[k][1] for k in KINDS])
    axis.set_xticks([x + 0.4 for x in range(len(KINDS))], [f"{d}\n{k}" for d, k in KINDS])
    axis.set(ylabel="acceptance length", title="drafter variants at equal steps (error bars: seeds)", ylim=(1, None))
    axis.legend(fontsize=7, ncols=3)
    figure.savefig(picture, dpi=110)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=ROOT / "runs-variants/drafter")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/drafter-variants.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="applied to every variant")
    args = parser.parse_intermixed_args(argv)
    unknown = set(args.variants.split(",")) - VARIANTS.keys()
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")
    os.chdir(ROOT)
    args.out.mkdir(parents=True, exist_ok=True)
    table: dict[str, list[dict]] = {}
    print(f"{'variant':20}" + "".join(f"{d + ' ' + k:>18}" for d, k in KINDS), flush=True)
    for variant in args.variants.split(","):
        table[variant] = [run(variant, int(seed), args.out, args.overrides) for seed in args.seeds.split(",")]
        cells = row(table[variant])
        print(f"{variant:20}" + "".join(f"{cells[k][0]:11.2f} +-{cells[k][1]:4.2f}" for k in KINDS), flush=True)
    lookup = table[next(iter(table))][0]["acceptance"]
    print(f"{'prompt lookup':20}" + "".join(f"{lookup[d]['lookup_' + k]:11.2f}       " for d, k in KINDS))
    for records in table.values():
        for record in records:
            record.pop("detail", None)
    args.json.write_text(json.dumps({"command": " ".join(["python benchmarks/drafter_variants.py", *argv]), "variants": table},
                                    indent=1))
    draw(table, args.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
