#!/usr/bin/env python
"""The target answers the recipe's prompts: `accelerate launch dflash_train/regenerate.py recipes/tiny.yaml`.

An entry script, for doing this step alone (on other machines, or through a serving engine with
`dflash.regenerate.endpoint=http://127.0.0.1:8000/v1`); `dflash_train/train.py` does it by itself when the answers are
not there. Resumable: run it again after an interruption.
"""

import argparse
import sys
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path, where dflash_train/'s files would shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.command import run_command
from recipes.own_lines import own_lines_only
from recipes.schema import Recipe


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dflash_train/regenerate.py", description="Answers of the target to the recipe's "
                                     "prompts: the drafter's training data.")
    parser.add_argument("recipe", help="YAML recipe, e.g. recipes/tiny.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replace a value of the recipe")
    args = parser.parse_args(argv)

    def job(recipe: Recipe) -> int:
        from dflash_train import answers, trainer
        from dflash_train.target import load_target, target_files
        from storage.locks import Lock
        from training.accelerator import from_first, make_accelerator

        trainer.require_sections(recipe)
        accelerator = make_accelerator()
        served = recipe.dflash.regenerate.endpoint is not None
        target = target_files(recipe) if served else load_target(recipe, accelerator.device, accelerator.num_processes)
        folder = trainer.run_folder(recipe)
        held = Lock(folder)
        from_first(accelerator, lambda: held.__enter__() and None)
        target.agree_on_fingerprint(accelerator)
        answers.regenerated(recipe, target, folder, accelerator=accelerator, say=accelerator.print)
        accelerator.print(f"written: {answers.answer_file(recipe, target, folder)}")
        return 0

    return run_command(args.recipe, args.overrides, job)


if __name__ == "__main__":
    own_lines_only()
    sys.exit(main(sys.argv[1:]))
