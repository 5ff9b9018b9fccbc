"""Acceptance lengths of a recipe's drafter and of what it was chosen against, on one quantized target.

    python benchmarks/drafter_variants.py [--recipe recipes/tiny.yaml] [--variants demo,corpus] [--seeds 0,1,2]
        [dflash.steps=150 ...]

The tables of docs/results/drafter.md and real-language.md. Needs the recipe's target (`qat/train.py RECIPE`).
Every variant is a set of recipe overrides, trained from fresh weights for the same number of steps and measured on the
same held-out prompts with the quantized target, whatever it was trained with. Finished runs are read, not repeated, so
an interrupted table goes on. All seeds share the target's answers (those of `dflash_train/regenerate.py RECIPE`, if it
ran): a seed changes first weights, order of rows and anchors. With --same-text variants with another target learn from the
quantized target's answers, too: what differs is then the states and distributions that they are shown. Differences to the
first variant are paired: the same texts, bootstrap over texts.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from recipes.command import run_command
from training.intervals import ratio_interval

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
    "dflash2": ["drafter.convolution_rank=32", "drafter.markov_rank=64", "drafter.selector_top_k=8"],
    "mxfp4": [],  # the first variant's drafter, its matrices rounded by the codec and not trained again
}
TINY = "recipes/tiny.yaml"


class Bench:
    """What all runs share: the served target, its held-out answers, and the answers that drafters learn from."""

    def __init__(self, args: argparse.Namespace):
        from recipes.load import load_recipe

        self.args, self.answered = args, {}
        self.always = [*(FRESH if args.recipe == TINY else []), "dflash.acceptance.timed_prompts=0", *args.overrides]
        self.served = load_recipe(ROOT / args.recipe, self.always)

    @functools.cached_property
    def target(self):
        from dflash_train.target import load_target

        return load_target(self.served)

    def trained(self, variant: str, seed: int):
        """(drafter in float32, seconds, steps) of a run, which is made now; seconds are None for one that was at hand."""
        from modeling.drafter import load_drafter
        from recipes.load import load_recipe

        recipe = load_recipe(ROOT / self.args.recipe, [*self.always, f"seed={seed}", *VARIANTS[variant]])
        first = self.args.variants.split(",")[0]
        given = self.args.have.get(variant)
        if variant == "mxfp4" and given is None:
            given = self.args.have.get(first, self.args.out / f"{first}-{seed}")
        if given is not None:
            import torch

            drafter = load_drafter(given, torch.float32)
            if variant == "mxfp4":
                round_matrices(drafter)
            return drafter, None, recipe.dflash.steps
        job = VariantTrainer(recipe, self)
        began = time.perf_counter()
        try:
            if stopped_by := job.train(None):
                sys.exit(128 + stopped_by)
        finally:
            job.close()
        return job.drafter, time.perf_counter() - began, recipe.dflash.steps


def round_matrices(drafter) -> None:
    """Every matrix to its nearest MXFP4 values, in place; says how many bytes that saves."""
    from mxfp4 import fake_quantize_
    from mxfp4.format import BLOCK_SIZE
    from storage.terminal import readable_size

    weights = {name: p.data for name, p in drafter.named_parameters()}
    matrices = [w for w in weights.values() if w.ndim == 2 and w.shape[1] % BLOCK_SIZE == 0]
    for w in matrices:
        fake_quantize_(w, w)
    whole, rounded = sum(w.numel() for w in weights.values()), sum(w.numel() for w in matrices)
    packed = 2 * (whole - rounded) + rounded * (4 + 8 / BLOCK_SIZE) / 8
    print(f"{len(matrices)} matrices rounded: {readable_size(2 * whole)} in bf16 would be {readable_size(packed)}", flush=True)


def run(variant: str, seed: int, bench: Bench) -> dict:
    """Result of one run, made if it is not there yet; its drafter is written beside it."""
    from dflash_train import acceptance
    from modeling.drafter import save_drafter
    from storage.files import write_text
    from training.report import environment

    result = bench.args.out / f"{variant}-{seed}.json"
    settings = [*VARIANTS[variant], *bench.args.overrides]
    if result.is_file() and json.loads(result.read_text())["overrides"] == settings:
        return json.loads(result.read_text())
    drafter, seconds, steps = bench.trained(variant, seed)
    if seconds is not None:
        save_drafter(drafter, bench.args.out / f"{variant}-{seed}")
    drafter = drafter.eval().to(bench.target.head.weight.dtype)
    measured = acceptance.measure(bench.served, bench.target, drafter, answered=bench.answered)
    record = {"variant": variant, "seed": seed, "overrides": settings, "seconds": seconds, "steps": steps,
              "acceptance": measured["acceptance"], "detail": measured["detail"], "environment": environment()}
    write_text(result, json.dumps(record))
    return record


def VariantTrainer(recipe, bench: Bench):
    """A trainer that keeps no records of its own and whose answers and features lie in the bench's folder."""
    from dflash_train.answers import answer_file
    from dflash_train.trainer import Trainer, run_folder
    from training.run import BackgroundSave

    class Quiet(Trainer):
        def set_earlier_aside(self, keep=()):
            pass

        def _load_data(self):
            own, self.folder = self.recipe, bench.args.out / "shared"
            self.recipe = own.model_copy(update={"seed": 0})
            if not own.dflash.data:
                mine = answer_file(self.recipe, self.target, self.folder)
                given = self.recipe, self.target
                if bench.args.same_text:
                    given = bench.served.model_copy(update={"seed": 0}), bench.target
                for file in (answer_file(*given, self.folder), answer_file(*given, run_folder(own))):  # or of regenerate.py
                    if file.is_file() and not mine.is_file():
                        mine.parent.mkdir(parents=True, exist_ok=True)
                        mine.write_bytes(file.read_bytes())
            super()._load_data()
            self.recipe = own

        def open_records(self, resumed, name):
            self.saver = BackgroundSave(self.accelerator, used=False)

        def record(self, values, seconds, bar):
            pass

        def save(self):
            pass

    return Quiet(recipe, resume=False)


def kinds_of(records: list[dict]) -> list[tuple[str, str]]:
    """(domain, kind) of the columns: tasks first."""
    return [(d, k) for k in ("task_t0", "open_t1") for d in records[0]["acceptance"] if k in records[0]["acceptance"][d]]


def row(records: list[dict]) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard deviation over seeds of each figure."""
    found = {}
    for domain, kind in kinds_of(records):
        values = [r["acceptance"][domain][kind] for r in records]
        found[domain, kind] = (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
    return found


def paired(first: dict, other: dict) -> dict[str, list[float]]:
    """Per column (ratio of acceptance lengths other / first, 2.5 % and 97.5 % of its bootstrap over texts) of two runs."""
    found = {}
    for domain, kind in kinds_of([first]):
        texts = [r["detail"][domain][kind]["drafter"]["of_texts"] for r in (first, other)]
        rounds = [(a[1], b[1]) for a, b in zip(*texts, strict=True)]
        found[f"{domain} {kind}"] = [sum(a for a, _ in rounds) / sum(b for _, b in rounds), *ratio_interval([rounds])]
    return found


def draw(table: dict[str, list[dict]], picture: Path) -> None:
    """One group of bars per figure, one bar per variant, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.85 / len(table)
    kinds = [(d, k) for d, k in kinds_of(next(iter(table.values()))) if not d.startswith("context ")]
    for i, (variant, records) in enumerate(table.items()):
        cells = row(records)
        axis.bar([x + i * width for x in range(len(kinds))], [cells[k][0] for k in kinds], width, label=variant,
                 yerr=[cells[k][1] for k in kinds])
    axis.set_xticks([x + 0.4 for x in range(len(kinds))], [f"{d}\n{k}" for d, k in kinds])
    axis.set(ylabel="acceptance length", title="drafter variants at equal steps (error bars: seeds)", ylim=(1, None))
    axis.legend(fontsize=7, ncols=3)
    figure.savefig(picture, dpi=110)


def draw_details(table: dict[str, list[dict]], picture: Path) -> None:
    """Of each variant's first seed: acceptance by position in the first domain, and by length of context.

    The second from domains that are named "context N" (tokens of the prompt), where there are any.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = 2 if any(d.startswith("context ") for records in table.values() for d in records[0]["detail"]) else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4), layout="constrained", squeeze=False)
    left, right = axes[0][0], axes[0][-1]
    for number, (variant, (record, *_)) in enumerate(table.items()):
        domain, kinds = next(iter(record["detail"].items()))
        for kind, line in (("task_t0", "-"), ("open_t1", "--")):
            if kind in kinds:
                reached = kinds[kind]["per_position"]
                left.plot(range(1, len(reached) + 1), reached, line, color=f"C{number}", marker=".",
                          label=f"{variant}, T={kind[-1]}")
        lengths = sorted(int(d.split()[1]) for d in record["detail"] if d.startswith("context "))
        for who in ("drafter", "lookup")[:1 if number else 2] if lengths else ():
            rows = [record["detail"][f"context {n}"]["task_t0"][who] for n in lengths]
            spread = [[abs(r["interval"][side] - r["length"]) for r in rows] for side in (0, 1)]
            right.errorbar(lengths, [r["length"] for r in rows], spread, marker=".", capsize=3,
                           color=f"C{number}" if who == "drafter" else "grey", label=variant if who == "drafter" else who)
    left.set(title=f"{domain}: P(drafts 1..k all accepted)", xlabel="k", ylim=(0, 1))
    left.legend(fontsize=8)
    if panels == 2:
        right.set(title="acceptance length, T=0 (95 % over texts)", xlabel="tokens of the prompt", ylim=(1, None))
        right.legend(fontsize=8)
        right.set_xscale("log", base=2)
    figure.savefig(picture, dpi=110)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=TINY)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--same-text", action="store_true", help="all learn from the quantized target's answers")
    parser.add_argument("--have", nargs="*", default=[], metavar="VARIANT=FOLDER", help="drafters trained already (one seed)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs-variants/drafter")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/drafter-variants.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="applied to every variant")
    args = parser.parse_intermixed_args(argv)
    args.have = dict(pair.split("=", 1) for pair in args.have)
    unknown = set(args.variants.split(",")) - VARIANTS.keys()
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; known: {', '.join(VARIANTS)}")
    os.chdir(ROOT)
    args.out.mkdir(parents=True, exist_ok=True)
    return run_command(args.recipe, args.overrides, lambda _: compare(args, argv),
                       interrupted="finished variants are read the next time")


def compare(args: argparse.Namespace, argv: list[str]) -> int:
    """Trains and measures what is not there yet; prints the table and writes it."""
    table: dict[str, list[dict]] = {}
    against: dict[str, dict] = {}
    bench = Bench(args)
    for variant in args.variants.split(","):
        table[variant] = [run(variant, int(seed), bench) for seed in args.seeds.split(",")]
        first, cells = next(iter(table.values())), row(table[variant])
        if len(table) == 1:
            print(f"{'variant':20}" + "".join(f"{d + ' ' + k:>18}" for d, k in cells))
            lookup = first[0]["acceptance"]
            print(f"{'prompt lookup':20}" + "".join(f"{lookup[d]['lookup_' + k]:11.2f}       " for d, k in cells))
        else:
            against[variant] = paired(first[0], table[variant][0])
        print(f"{variant:20}" + "".join(f"{mean:11.2f} +-{spread:4.2f}" for mean, spread in cells.values()), flush=True)
        print(f"{'':20}" + "".join(f"{r:6.2f} [{low:.2f}-{high:.2f}]" for r, low, high in against.get(variant, {}).values()),
              flush=True)
    args.json.write_text(json.dumps({"command": " ".join(["python benchmarks/drafter_variants.py", *argv]),
                                     "against_the_first": against, "variants": table}, indent=1))
    draw(table, args.json.with_suffix(".png"))
    draw_details(table, args.json.with_name(f"{args.json.stem}-detail.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
