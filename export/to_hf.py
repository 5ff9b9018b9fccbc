#!/usr/bin/env python
"""Exports an FP4 checkpoint: `python export/to_hf.py recipes/tiny.yaml [section.key=value ...]`.

    --layout native|hf-fp8|compressed-tensors|gpt-oss    names and containers for a client (default: the recipe's)
    --from BASE          round the experts of an untrained checkpoint instead (the baseline of training)
    --decode             with --from: only make the checkpoint readable, in bf16; nothing is rounded (to train from, sharded)
    --weights DIR        these trained weights instead of the run's result: any checkpoint folder
    --processes N        N writers side by side (or start this script by torchrun); the bytes are the same
    --plan               tensors, bytes, files and memory, without weights
    --push REPO          afterwards upload the verified folder to a hub repository; nothing leaves the machine without it

Exit code: 0 done and verified; 2 a mistake in arguments, recipe or input files; 1 the result did not verify, or the job broke;
130 interrupted.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

# Launched by path, Python puts this script's folder first on sys.path, where export/'s files would shadow real packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.command import run_command
from recipes.own_lines import own_lines_only
from recipes.schema import Export as ExportSection
from recipes.schema import Recipe

PARENT = "FP4_EXPORT_PARENT"  # set for the writers that an export starts itself
LAYOUTS = get_args(ExportSection.model_fields["layout"].annotation)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export/to_hf.py", description="Write and verify an FP4 Hugging Face checkpoint.",
                                     epilog="example: python export/to_hf.py recipes/tiny.yaml --layout native",
                                     allow_abbrev=False)
    parser.add_argument("recipe", help="YAML recipe, e.g. recipes/tiny.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replace a value of the recipe")
    parser.add_argument("--layout", choices=LAYOUTS, help="client to write for (export.layout)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="result (default: <output>/<name>/export/model, or the "
                        "layout's name for another one; with --from, -ptq is added)")
    parser.add_argument("--from", dest="base", type=Path, metavar="BASE", help="round this untrained checkpoint")
    parser.add_argument("--decode", action="store_true", help="with --from: every tensor in plain bf16, nothing rounded "
                        "to MXFP4: what a sharded run trains from")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="trained weights (default: the run's model/)")
    parser.add_argument("--processes", type=int, metavar="N", help="writers side by side (export.processes)")
    parser.add_argument("--plan", action="store_true", help="print what would be written; write nothing")
    parser.add_argument("--push", metavar="REPO", help="upload the verified folder to this hub repository (private)")
    args = parser.parse_intermixed_args(argv)
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes {args.processes}: expected a positive number")
    if args.base is not None and args.weights is not None:
        parser.error("--from and --weights exclude each other: weights are either untrained or trained")
    if args.decode and (args.base is None or args.layout not in (None, "bf16")):
        parser.error("--decode: writes --from BASE in plain bf16, expected --from BASE and no --layout")
    if args.decode:
        args.overrides += ["export.layout=bf16", "export.dense=base"]
    if args.layout is not None:
        args.overrides.append(f"export.layout={args.layout}")
    if args.processes is not None:
        args.overrides.append(f"export.processes={args.processes}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)

    def job(recipe: Recipe) -> int:
        if args.plan:
            from checkpoint.detect_format import local_folder
            from export import plan

            return plan.run(recipe, local_folder(str(args.base)) if args.base else args.weights)
        return _export(recipe, args, argv)

    return run_command(args.recipe, args.overrides, job, "files that are written stay, the same command goes on from there")


def _export(recipe: Recipe, args: argparse.Namespace, argv: list[str]) -> int:
    if args.push:
        from export.push import check

        check(args.push)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    helpers: list[subprocess.Popen] = []
    if world == 1 and recipe.export.processes > 1:
        world = recipe.export.processes
        helpers = [subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *argv],
                                    env=os.environ | {"RANK": str(r), "WORLD_SIZE": str(world), PARENT: str(os.getpid())})
                   for r in range(1, world)]
    parent = os.environ.get(PARENT)

    def alive() -> None:
        if parent is not None and os.getppid() != int(parent):  # or it would write beside the export that continues this one
            raise OSError("the process that started this writer is gone")
        for r, helper in enumerate(helpers, start=1):
            if helper.poll() not in (None, 0):
                raise OSError(f"writer {r} of {world} ended with code {helper.returncode}")

    from export import job

    try:
        code = job.run(recipe, job.Request(args.out, args.base, args.weights, args.decode, rank, world, args.push), alive)
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
            helper.wait()
    if code == 0 and rank == 0 and args.push:
        from export.push import push

        out = args.out or job.Export(recipe, job.Request(args.out, args.base, args.weights, args.decode)).out
        push(out, args.push)
    return code


if __name__ == "__main__":
    own_lines_only()
    sys.exit(main(sys.argv[1:]))
