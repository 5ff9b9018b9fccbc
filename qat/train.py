#!/usr/bin/env python
"""Quantization-aware training of the MoE experts: `accelerate launch qat/train.py recipes/tiny.yaml`.

A leaf: reads arguments and the recipe, answers mistakes at once (no torch import before the recipe is known to be
right), and hands over to `qat.plan` or `qat.trainer`.

Exit code: 0 done; 2 a mistake in arguments, recipe or input files; 1 the job broke; 128 + signal when stopped by one.
"""

import argparse
import os
import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where qat/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.load import RecipeError, load_recipe


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat/train.py", description="Quantization-aware training of the routed experts of an MoE model to MXFP4.",
        epilog="example: accelerate launch qat/train.py recipes/tiny.yaml qat.steps=50 qat.optimizer.learning_rate=1e-4")
    parser.add_argument("recipe", help="YAML recipe, e.g. recipes/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint, bit for bit")
    parser.add_argument("--plan", action="store_true", help="print what would be quantized, memory, bytes; run nothing")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop (with a checkpoint) after optimizer step N")
    args = parser.parse_intermixed_args(argv)
    if args.max_steps is not None and args.max_steps < 1:
        parser.error(f"--max-steps {args.max_steps}: expected a positive number of steps")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.plan:
            from qat import plan

            return plan.run(recipe)
        from qat import trainer

        return trainer.run(recipe, resume=args.resume, max_steps=args.max_steps)
    except (RecipeError, ValueError) as error:
        code, text = 2, _own_message(error)
    except (OSError, ArithmeticError) as error:
        code, text = 1, _own_message(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {text}", file=sys.stderr)
    return code


def _own_message(error: Exception) -> str:
    """The text of an error that this project raised on purpose; anything else is a defect and keeps its traceback."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    origin = Path(frame.tb_frame.f_code.co_filename).resolve()
    if not origin.is_relative_to(sys.path[0]) or "site-packages" in origin.parts:
        raise error
    return str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
