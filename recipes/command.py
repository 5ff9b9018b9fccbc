"""The command line that the training jobs share: recipe, overrides, --resume, --plan, --max-steps; errors in one line.

Exit code: 0 done; 2 a mistake in arguments, recipe or input files; 1 the job broke; 128 + signal when stopped by one.
Imports no torch: arguments and recipe are judged before anything heavy is loaded.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from recipes.load import load_recipe
from recipes.schema import Recipe


def job_parser(program: str, description: str, example: str) -> argparse.ArgumentParser:
    """Parser of a training job; parse with `parse_job`."""
    parser = argparse.ArgumentParser(prog=program, description=description, epilog=f"example: accelerate launch {example}")
    parser.add_argument("recipe", help="YAML recipe, e.g. recipes/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint, bit for bit")
    parser.add_argument("--plan", action="store_true", help="print what would be trained, memory, bytes; run nothing")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop (with a checkpoint) after optimizer step N")
    return parser


def parse_job(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    args = parser.parse_intermixed_args(argv)
    if args.max_steps is not None and args.max_steps < 1:
        parser.error(f"--max-steps {args.max_steps}: expected a positive number of steps")
    return args


def run_command(recipe: str, overrides: list[str], job: Callable[[Recipe], int]) -> int:
    """Loads the recipe and runs `job` on it; mistakes become one line on stderr (of the first process) and an exit code."""
    try:
        return job(load_recipe(recipe, overrides))
    except ValueError as error:  # RecipeError included
        code, text = 2, own_message(error)
    except (OSError, ArithmeticError) as error:
        code, text = 1, own_message(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {text}", file=sys.stderr)
    return code


def own_message(error: Exception) -> str:
    """The text of an error that this project raised on purpose; anything else is a defect and keeps its traceback."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    origin = Path(frame.tb_frame.f_code.co_filename).resolve()
    root = Path(__file__).resolve().parents[1]
    if not origin.is_relative_to(root) or "site-packages" in origin.parts:
        raise error
    return str(error)
