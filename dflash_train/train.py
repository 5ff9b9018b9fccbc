#!/usr/bin/env python
"""Drafter training: `accelerate launch dflash_train/train.py recipes/tiny.yaml`.

An entry script: reads arguments and the recipe, answers mistakes at once (no torch import before the recipe is known to be
right), and hands over to `dflash_train.plan` or `dflash_train.trainer`. Exit codes: see `recipes.command`.
"""

import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where dflash_train/'s files would shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.command import first_rank, job_parser, parse_job, run_command
from recipes.own_lines import own_lines_only
from recipes.schema import Recipe
from training.preflight import require_ready


def main(argv: list[str]) -> int:
    args = parse_job(job_parser("dflash_train/train.py", "Trains a DFlash drafter on the quantized target's own answers.",
                                "dflash_train/train.py recipes/tiny.yaml dflash.steps=200"), argv)

    def job(recipe: Recipe) -> int:
        if args.plan and not first_rank():  # one plan, however many processes were launched
            return 0
        if args.plan:
            from dflash_train import plan

            return plan.run(recipe)
        require_ready(recipe, "dflash")  # names of files, before seconds of imports; the rest when the model is known
        from dflash_train import trainer

        return trainer.run(recipe, resume=args.resume, max_steps=args.max_steps,
                           other_processes=args.other_processes)

    return run_command(args.recipe, args.overrides, job)


if __name__ == "__main__":
    own_lines_only()
    sys.exit(main(sys.argv[1:]))
