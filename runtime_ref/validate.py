"""Is this checkpoint right, and does the runtime (or a server of it) serve it right? One command, one verdict.

    python runtime_ref/validate.py CHECKPOINT_DIR [--prompts FILE] [--json FILE] [--html FILE]
    torchrun --nproc-per-node 8 runtime_ref/validate.py CHECKPOINT_DIR …
    python runtime_ref/validate.py CHECKPOINT_DIR --endpoint URL     # a running server of it, whatever engine that is
    python runtime_ref/validate.py CHECKPOINT_DIR --eval quick,tasks --original DIR …    # what quantization cost

Checks of a folder, in order: files beside the weights, 1 folder, 2 reference outputs and layers, 3 ops, text, 4 greedy with =
without drafting, 5 sampling, 6 acceptance, 7 cost. Each is right, wrong (with the likely cause in one line), or could not be
checked here, because something is missing. Exit code 0: nothing is wrong; 1: something is; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Launched by path, Python would look for modules beside this script first.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.own_lines import own_lines_only
from storage.terminal import printable, printable_line

NAME = "runtime_ref/validate.py"
CHECKSUM_GIB = 4.0
SUITES = ("quick", "tasks", "tools")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="CHECKPOINT_DIR", type=Path, nargs="?",
                        help="exported folder (with --endpoint: the reference; may be left out)")
    parser.add_argument("--endpoint", metavar="URL", help="judge this OpenAI-compatible server of the checkpoint (its key: "
                        "OPENAI_API_KEY)")
    parser.add_argument("--model", metavar="NAME", help="the model's name at --endpoint (default: its first)")
    parser.add_argument("--prompts", type=Path, help="JSONL file: prompt (text) or messages, and domain")
    parser.add_argument("--trained", type=Path, help="summary.json of the drafter's training, to compare acceptance with")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="the trained checkpoint that was exported: compare the folder's model with it, layer by layer")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (%(default)s)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="answers of 16 tokens that --endpoint samples "
                        "(%(default)s); 1500 show a bias of three points")
    parser.add_argument("--prompts-per-domain", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what is served (%(default)s)")
    parser.add_argument("--backend", default="auto", help="what runs the steps, as in serve.py (%(default)s)")
    parser.add_argument("--launch", choices=("auto", "persistent", "graph", "ops"), default="auto",
                        help="how steps reach the device, as in serve.py (%(default)s)")
    parser.add_argument("--reference-gib", type=float, default=16.0, metavar="GIB",
                        help="run float32 references of models up to this size (%(default)s)")
    parser.add_argument("--checksums", action=argparse.BooleanOptionalAction, default=None,
                        help=f"compare every file with checksums.sha256 (default: in folders of up to {CHECKSUM_GIB:g} GiB)")
    parser.add_argument("--node-hour", type=float, metavar="PRICE", help="price of an hour of this machine (and of the "
                        "projected node), for prices per million tokens")
    suites = parser.add_argument_group("evaluation (instead of the checks)")
    suites.add_argument("--eval", metavar="SUITE", help=f"{', '.join(SUITES)}: one or more, separated by commas")
    suites.add_argument("--eval-text", type=Path, metavar="FILE", help="text of quick: .txt, or .jsonl with text (default: "
                        "--prompts)")
    suites.add_argument("--eval-tasks", metavar="TASKS", help="of tasks: JSONL files (prompt, answer) and lm-eval's task "
                        "names, separated by commas")
    suites.add_argument("--eval-folder", type=Path, metavar="DIR", help="YAML files of further lm-eval tasks")
    suites.add_argument("--eval-limit", type=int, metavar="N", help="questions of each task (default: all)")
    suites.add_argument("--eval-chat", action="store_true", help="ask through the chat template (local-chat-completions)")
    suites.add_argument("--original-endpoint", metavar="URL", help="a server of the original, for tasks")
    suites.add_argument("--card", type=Path, metavar="FILE", help="write the results as a section of a model card")
    parser.add_argument("--all", action="store_true", help="decode although an earlier check failed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--html", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    for name in ("tokens", "prompts_per_domain", "samples"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)}, expected 1 or more")
    if options.node_hour is not None and not options.node_hour > 0:
        parser.error(f"--node-hour: {options.node_hour}, expected a price above 0")
    if options.folder is None and options.endpoint is None:
        parser.error("CHECKPOINT_DIR is missing (only --endpoint URL does without)")
    _read_suites(parser, options)
    if options.checksums is None and options.folder is not None and options.folder.is_dir():
        options.checksums = folder_gib(options.folder) <= CHECKSUM_GIB
    return options


def _read_suites(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.eval = [] if options.eval is None else options.eval.split(",")
    options.eval_tasks = [task for task in (options.eval_tasks or "").split(",") if task]
    for suite in options.eval:
        if suite not in SUITES:
            parser.error(f"--eval: {suite!r}, expected {', '.join(SUITES)}")
    if options.eval and options.folder is None:
        parser.error("--eval: CHECKPOINT_DIR is missing (its tokenizer is needed)")
    if options.eval_limit is not None and options.eval_limit < 1:
        parser.error(f"--eval-limit: {options.eval_limit}, expected 1 or more")
    for task in options.eval_tasks:
        if task.endswith(".jsonl") and not Path(task).is_file():
            parser.error(f"--eval-tasks: {task}: no such file")


def folder_gib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    from runtime_ref.core.tensor_parallel import RankLost, leave, ranks_from_environment

    try:
        ranks = ranks_from_environment()
    except ValueError as error:
        return mistake(error)
    try:
        look_at_arguments(options)
        report = judge(options, ranks)
    except ValueError as error:
        if ranks.rank == 0:
            mistake(error)
        leave(ranks)
        return 2
    except RankLost as error:
        print(printable(f"{NAME}: {error}"), file=sys.stderr, flush=True)
        return 1
    passed = ranks.broadcast(report.passed)
    code = 0 if passed else 1
    if ranks.rank == 0:
        code = write(options, report) or code
    leave(ranks)
    return code


def judge(options: argparse.Namespace, ranks):
    """The report of a folder, or of a server.

    Raises:
        ValueError: a mistake of the user.
    """
    trained = read_trained(options)
    if options.eval:
        from runtime_ref.validation.eval_run import validate_eval

        return validate_eval(options)
    if options.endpoint is not None:
        from runtime_ref.validation.endpoint_run import validate_endpoint

        return validate_endpoint(options, trained)
    from runtime_ref.validation.folder_run import validate_folder

    return validate_folder(options, ranks, trained)


def mistake(error: object) -> int:
    print(printable(f"{NAME}: {error}"), file=sys.stderr)
    return 2


def look_at_arguments(options: argparse.Namespace) -> None:
    """Refuses files and folders that are not there, before the long work.

    Raises:
        ValueError.
    """
    if options.folder is not None and not options.folder.is_dir():
        raise ValueError(f"{options.folder}: no such folder, expected an exported checkpoint")
    if options.prompts is not None and not options.prompts.is_file():
        raise ValueError(f"--prompts: {options.prompts}: no such file")
    if options.eval_text is not None and not options.eval_text.is_file():
        raise ValueError(f"--eval-text: {options.eval_text}: no such file")
    if options.original is not None and not (options.original / "config.json").is_file():
        raise ValueError(f"--original: {options.original}: no config.json there, expected the trained checkpoint")


def read_trained(options: argparse.Namespace) -> dict | None:
    """Acceptance lengths by domain that the trainer stored: of --trained, or of the folder's export.json."""
    file = options.trained or (options.folder / "export.json" if options.folder else None)
    if file is None or not file.is_file():
        if options.trained:
            raise ValueError(f"--trained: {file}: no such file")
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("acceptance")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError, RecursionError):
        if options.trained is None:
            return None  # said by the check of the files
        raise ValueError(f"{file}: not a JSON object") from None
    if options.trained and not isinstance(found, dict):
        raise ValueError(f"--trained: {file}: no 'acceptance', expected the summary.json of dflash_train/train.py")
    return found if isinstance(found, dict) else None


def write(options: argparse.Namespace, report) -> int:
    """Prints the report and writes its files; 2 if one cannot be written, else 0."""
    from runtime_ref.validation.output import write_card, write_html, write_json

    print("\n".join(map(printable_line, report.lines())), flush=True)
    try:
        if options.json:
            write_json(report, options.json)
        if options.html:
            write_html(report, options.html)
        if options.card:
            write_card(report, options.card)
    except OSError as error:
        return mistake(f"{error.filename}: {error.strerror}")
    return 0


if __name__ == "__main__":
    own_lines_only()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted, no verdict", file=sys.stderr, flush=True)
        sys.exit(130)
