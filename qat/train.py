#!/usr/bin/env python
"""Quantization-aware training of the MoE experts: `accelerate launch qat/train.py recipes/tiny.yaml`.

A leaf: reads arguments and the recipe, answers mistakes at once (no torch import before the recipe is known to be
right), and hands over to `qat.plan` or `qat.trainer`. Exit codes: see `recipes.command`.
"""

import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where qat/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.command import job_parser, parse_job, run_command
from recipes.own_lines import own_lines_only
from recipes.schema import Recipe


def main(argv: list[str]) -> int:
    args = parse_job(job_parser("qat/train.py", "Quantization-aware training of the routed experts of an MoE model to MXFP4.",
                                "qat/train.py recipes/tiny.yaml qat.steps=50 qat.optimizer.learning_rate=1e-4"), argv)

    def job(recipe: Recipe) -> int:
        if args.plan:
            from qat import plan

            return plan.run(recipe)
        from qat import trainer

        return trainer.run(recipe, resume=args.resume, max_steps=args.max_steps)

    return run_command(args.recipe, args.overrides, job)


if __name__ == "__main__":
    own_lines_only()
    sys.exit(main(sys.argv[1:]))
