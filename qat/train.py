#!/usr/bin/env python
"""Quantization-aware training of the MoE experts: `accelerate launch qat/train.py recipes/tiny.yaml`.

An entry script: reads arguments and the recipe, answers mistakes at once (no torch import before the recipe is known to be
right), and hands over to `qat.plan` or `qat.trainer`. Exit codes: see `recipes.command`.
"""

import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where qat/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.command import first_rank, job_parser, parse_job, run_command
from recipes.own_lines import own_lines_only
from recipes.schema import Recipe
from training.preflight import require_ready


def main(argv: list[str]) -> int:
    parser = job_parser("qat/train.py", "Quantization-aware training of the routed experts of an MoE model to MXFP4.",
                        "qat/train.py recipes/tiny.yaml qat.steps=50 qat.optimizer.learning_rate=1e-4")
    layouts = parser.add_argument_group("with --plan: the cheapest layout of so many GPUs, with hours and price")
    layouts.add_argument("--gpus", type=int, metavar="N", help="GPUs to be had")
    layouts.add_argument("--gpu-memory", type=float, metavar="GIB", default=80.0, help="memory of one (default: 80)")
    layouts.add_argument("--price", type=float, default=2.5, help="of one GPU-hour (default: 2.5)")
    layouts.add_argument("--mfu", type=float, default=0.08, help="assumed share of the peak (default: 0.08)")
    layouts.add_argument("--peak-tflops", type=float, default=989.0, help="bf16 peak of one GPU (default: 989, of an H100)")
    args = parse_job(parser, argv)
    if args.gpus is not None and (not args.plan or args.gpus < 1):
        parser.error("--gpus goes with --plan and is at least 1")

    def job(recipe: Recipe) -> int:
        if args.plan and not first_rank():  # one plan, however many processes were launched
            return 0
        if args.plan:
            from qat import plan

            if args.gpus is not None:
                return plan.propose(recipe, gpus=args.gpus, gpu_memory=args.gpu_memory, price=args.price, mfu=args.mfu,
                                    peak_tflops=args.peak_tflops)
            return plan.run(recipe)
        require_ready(recipe, "qat")  # names of files, before seconds of imports; the rest when the model is known
        from qat import trainer

        return trainer.run(recipe, resume=args.resume, max_steps=args.max_steps,
                           other_processes=args.other_processes)

    return run_command(args.recipe, args.overrides, job)


if __name__ == "__main__":
    own_lines_only()
    sys.exit(main(sys.argv[1:]))
