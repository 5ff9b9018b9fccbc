"""The command line that the training jobs share: recipe, overrides, --resume, --plan, --max-steps; errors in one line.

Exit code: 0 done; 2 a mistake in arguments, recipe or input files; 1 the job broke; 3 a plan was printed, of a run that would
be refused; 128 + signal when stopped by one.
Imports no torch: arguments and recipe are judged before anything heavy is loaded.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from recipes.load import load_recipe
from recipes.schema import Recipe
from storage.reading import first_line
from storage.terminal import printable

# What a disk, its owner or a path refuses: no defect of ours, wherever in a library it is raised.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
            errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}

_PACKAGES = ("storage", "mxfp4", "modeling", "recipes", "checkpoint", "training", "qat", "dflash_train", "export",
             "runtime_ref")


def job_parser(program: str, description: str, example: str) -> argparse.ArgumentParser:
    """Parser of a training job; parse with `parse_job`."""
    parser = argparse.ArgumentParser(prog=program, description=description, epilog=f"example: accelerate launch {example}",
                                     allow_abbrev=False)  # a misspelt option is a mistake, as a misspelt key is
    parser.add_argument("recipe", help="YAML recipe, e.g. recipes/tiny.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replace a value of the recipe")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint, bit for bit")
    parser.add_argument("--other-processes", action="store_true", help="with --resume: also from a checkpoint of another "
                        "number of processes, from the same weights and moments but not bit for bit")
    parser.add_argument("--plan", action="store_true", help="print what would be trained, memory, bytes; run nothing "
                        "(exit code 3: the run would be refused)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop (with a checkpoint) after optimizer step N")
    return parser


def parse_job(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    args = parser.parse_intermixed_args(argv)
    if args.other_processes and not args.resume:
        parser.error("--other-processes goes with --resume")
    if args.max_steps is not None and args.max_steps < 1:
        parser.error(f"--max-steps {args.max_steps}: expected a positive number of steps")
    return args


def first_rank() -> bool:
    """Whether this is the first process of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run_command(recipe: str, overrides: list[str], job: Callable[[Recipe], int],
                interrupted: str = "finished files and checkpoints stay, --resume goes on from the newest") -> int:
    """Loads the recipe and runs `job` on it; mistakes become one line on stderr and an exit code.

    Every process says its own (a full disk may be one machine's); all but the first put their rank before it.

    interrupted: what is said after Ctrl-C, by the first process alone.
    """
    where = "a file"
    try:
        loaded = load_recipe(recipe, overrides)
        where = f"a file below {Path(loaded.output) / loaded.name}"
        return job(loaded)
    except KeyboardInterrupt:
        if first_rank():
            print(f"interrupted; {interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT
    except ValueError as error:  # RecipeError included
        code, text = 2, own_message(error, where)
    except (OSError, ArithmeticError) as error:
        code, text = 1, own_message(error, where)
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error):
            raise
        code, text = 1, f"not enough memory: {first_line(error)}; --plan says what a job needs"
    print(printable(f"error: {text}" if first_rank() else f"rank {os.environ['RANK']}: error: {text}"), file=sys.stderr)
    return code


def _no_memory(error: BaseException) -> bool:
    """Python's own error, and those of torch on a CPU and on a GPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def own_message(error: Exception, where: str) -> str:
    """The text of an error raised on purpose, or of a refusal by the disk; the rest are defects and keep their traceback."""
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename or where}: cannot be read or written: {error.strerror}"
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    origin = Path(frame.tb_frame.f_code.co_filename).resolve()
    root = Path(__file__).resolve().parents[1]  # the clone, or site-packages
    if not origin.is_relative_to(root) or origin.relative_to(root).parts[0] not in _PACKAGES:
        raise error
    return str(error)
