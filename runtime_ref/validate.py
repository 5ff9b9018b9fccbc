"""Is this exported checkpoint right, and does the runtime serve it right? One command, one verdict.

    python runtime_ref/validate.py CHECKPOINT_DIR [--prompts FILE] [--json FILE] [--html FILE]
    torchrun --nproc-per-node 8 runtime_ref/validate.py CHECKPOINT_DIR …

Checks, in order: files beside the weights, 1 folder, 2 reference outputs and layers, 3 ops, text, 4 greedy with = without
drafting, 5 sampling, 6 acceptance, 7 cost; for each that fails, the likely cause in one line. Exit code 0: all passed; 1: a
check failed; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

# Launched by path, Python would look for modules beside this script first.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from storage.reading import first_line, strange_files
from storage.terminal import printable, printable_line

CHECKSUM_GIB = 4.0
MODEL = (("reference", "stored reference outputs against the folder's model"),
         ("logits", "logits and layers against the independent model (float32)"),
         ("ops", "every op of each backend against its float64 twin"))
LATER = (("text", "the model expects the text that its tokenizer makes"),
         ("lossless", "greedy with the drafter = without, alone = batched"), ("sampling", "sampled tokens with the drafter"),
         ("acceptance", "acceptance length by domain"), ("cost", "experts touched, bytes and time of a step"))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="runtime_ref/validate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="CHECKPOINT_DIR", type=Path)
    parser.add_argument("--prompts", type=Path, help="JSONL file: prompt (text) or messages, and domain")
    parser.add_argument("--trained", type=Path, help="summary.json of the drafter's training, to compare acceptance with")
    parser.add_argument("--original", type=Path, metavar="DIR",
                        help="the trained checkpoint that was exported: compare the folder's model with it, layer by layer")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (%(default)s)")
    parser.add_argument("--prompts-per-domain", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what is served (%(default)s)")
    parser.add_argument("--backend", default="auto", help="what runs the steps, as in serve.py (%(default)s)")
    parser.add_argument("--launch", choices=("auto", "persistent", "graph", "ops"), default="auto",
                        help="how steps reach the device, as in serve.py (%(default)s)")
    parser.add_argument("--reference-gib", type=float, default=16.0, metavar="GIB",
                        help="run float32 references of models up to this size (%(default)s)")
    parser.add_argument("--checksums", action=argparse.BooleanOptionalAction, default=None,
                        help=f"compare every file with checksums.sha256 (default: in folders of up to {CHECKSUM_GIB:g} GiB)")
    parser.add_argument("--all", action="store_true", help="decode although an earlier check failed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--html", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    for name in ("tokens", "prompts_per_domain"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)}, expected 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    from runtime_ref.core.tensor_parallel import RankLost, leave, ranks_from_environment

    try:
        ranks = ranks_from_environment()
    except ValueError as error:
        print(printable(f"runtime_ref/validate.py: {error}"), file=sys.stderr)
        return 2
    try:
        if not options.folder.is_dir():
            raise ValueError(f"{options.folder}: no such folder, expected an exported checkpoint")
        if options.prompts is not None and not options.prompts.is_file():
            raise ValueError(f"--prompts: {options.prompts}: no such file")
        if options.original is not None and not (options.original / "config.json").is_file():
            raise ValueError(f"--original: {options.original}: no config.json there, expected the trained checkpoint")
        trained = read_trained(options)
        verdict = run(options, ranks, trained)
    except ValueError as error:
        if ranks.rank == 0:
            print(printable(f"runtime_ref/validate.py: {error}"), file=sys.stderr)
        leave(ranks)
        return 2
    except RankLost as error:
        print(printable(f"runtime_ref/validate.py: {error}"), file=sys.stderr, flush=True)
        return 1
    passed = ranks.broadcast(verdict.passed)
    code = 0 if passed else 1
    if ranks.rank == 0:
        try:
            report(options, verdict)
        except OSError as error:
            print(f"runtime_ref/validate.py: {error.filename}: {error.strerror}", file=sys.stderr)
            code = 2
    leave(ranks)
    return code


def read_trained(options: argparse.Namespace) -> dict | None:
    """Acceptance lengths by domain that the trainer stored: of --trained, or of the folder's export.json."""
    file = options.trained or options.folder / "export.json"
    if not file.is_file():
        if options.trained:
            raise ValueError(f"--trained: {file}: no such file")
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("acceptance")
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError):
        if options.trained is None:
            return None  # told by the check of the files
        raise ValueError(f"{file}: not a JSON object") from None
    if options.trained and not isinstance(found, dict):
        raise ValueError(f"--trained: {file}: no 'acceptance', expected the summary.json of dflash_train/train.py")
    return found if isinstance(found, dict) else None


def run(options: argparse.Namespace, ranks, trained: dict | None):
    """All checks of a folder, on all ranks alike (references run on rank 0)."""
    import time

    from runtime_ref.validation.checks.files import check_files
    from runtime_ref.validation.checks.folder import check_folder
    from runtime_ref.validation.context import Facts
    from runtime_ref.validation.result import Check, Verdict

    began = time.monotonic()
    if strange := strange_files(options.folder):  # to open a pipe is to wait for ever
        check = Check("files", "files beside the weights")
        for path in strange:
            check.fail(f"{path.relative_to(options.folder)}: neither a file nor a folder", "the folder is not a plain one")
        return Verdict(str(options.folder), [check], environment(options, ranks))
    folder_check, facts = guarded(lambda: check_folder(options.folder), lambda broken: (broken, Facts(
        options.folder, loadable=False)), "folder", "the folder is whole")
    checksums = options.checksums if options.checksums is not None else folder_gib(options.folder) <= CHECKSUM_GIB
    special = facts.drafter_config.get("dflash_config")
    files_check = guarded(lambda: check_files(options.folder, facts.raw, special if isinstance(special, dict) else {},
                                              checksums=checksums and ranks.rank == 0), lambda broken: broken, "files",
                          "files beside the weights")
    checks = [files_check, folder_check]
    if facts.loadable and ranks.count > 1:  # a rank that stops early would leave the others waiting for it
        checks += model_checks(options, ranks, facts, trained, checks)
    elif facts.loadable:
        checks += guarded(lambda: model_checks(options, ranks, facts, trained, checks), lambda broken: [broken], "model",
                          "the model can be run")
    else:
        checks += [Check(name, title).skip("the folder cannot be loaded") for name, title in (*MODEL, *LATER)]
    return Verdict(str(options.folder), checks, environment(options, ranks) | {"seconds": round(time.monotonic() - began, 1)})


def guarded(check: Callable, instead: Callable, name: str, title: str):
    """What `check` returns; or, whatever it raised about a folder by anybody, `instead` of a check that failed with it."""
    from runtime_ref.validation.result import Check

    try:
        return check()
    except Exception as error:
        broken = Check(name, title)
        broken.fail(f"{type(error).__name__}: {first_line(error)[:500]}", "the folder holds what cannot be read or run")
        return instead(broken)


def folder_gib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30


def model_checks(options: argparse.Namespace, ranks, facts, trained: dict | None, earlier: list) -> list:
    """Checks 2 to 7."""
    import warnings

    import torch

    from runtime_ref.backends.torch.backend import TorchBackend
    from runtime_ref.core.kv_cache import PAGE
    from runtime_ref.engine.engine import Engine, EngineOptions
    from runtime_ref.validation.checks.reference import check_reference
    from runtime_ref.validation.checks.runtime_ops import OpErrors, check_kernels, check_ops, check_runtime, outputs_of
    from runtime_ref.validation.result import Check

    probe, why = load_probe(options, ranks, facts)
    if probe is None:
        broken = Check(*MODEL[0])
        broken.fail(why, "the weights cannot be decoded")
        return [broken, *(Check(name, title).skip("the weights cannot be decoded") for name, title in (*MODEL[1:], *LATER))]
    checks: list[Check] = [check_reference(facts, probe, options.original)]
    served = torch.float32 if options.dtype == "float32" else torch.bfloat16
    context = min(facts.config.max_position_embeddings, 1024)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine = Engine.from_folder(options.folder, ranks=ranks, dtype=served, drafter=facts.drafter_loadable,
                                    backend=options.backend, launch=options.launch,
                                    options=EngineOptions(max_context=context))
    pages = {kind: max(16, -(-len(probe.ids) // PAGE) + 2) for kind in ("full", "window")}
    weights = engine.backend.weights
    own = [type(engine.backend)] if engine.backend.capabilities.float32 else []
    kinds = [*own, *([TorchBackend] if TorchBackend not in own else [])]
    backends = [kind(weights, dtype=torch.float32, pages=pages) for kind in kinds]
    exact = backends[0]
    drafter = None
    if facts.drafter_loadable:
        drafter = exact.load_drafter(options.folder / "dflash", max(24, pages["full"] + 2), context)
    ops = [OpErrors(backend, probe.ids) for backend in backends]
    outputs = None if served == torch.float32 else outputs_of(engine.backend, probe)
    checks.append(check_runtime(facts, probe, exact, outputs, drafter, ops[0]))
    kernels = [] if engine.backend.capabilities.float32 else [OpErrors(engine.backend, probe.ids, exact)]
    checks.append(check_ops([*ops, *kernels]))
    for judged in kernels:
        check_kernels(checks[-1], facts, probe, judged, outputs, engine.drafter)
    if engine.launch.compared:
        checks[-1].notes.append(engine.launch.line())
    for part, way in engine.launch.different:
        checks[-1].fail(f"{part}, launch {way}: {engine.launch.refused[part, way]}",
                        "this launch computes something else than ops")
    checks[-1].notes += dict.fromkeys(str(w.message) for w in warned if "compiled ops" in str(w.message))
    failed = ranks.broadcast(any(check.status == "failed" for check in [*earlier, *checks]))  # references are rank 0's alone
    if failed and not options.all:
        return checks + [Check(name, title).skip("an earlier check failed (--all runs it anyway)") for name, title in LATER]
    return checks + decoding_checks(options, facts, engine, trained)


def load_probe(options: argparse.Namespace, ranks, facts) -> tuple[object | None, str]:
    """The probe; or None and why the folder's weights cannot be decoded, on all ranks alike."""
    from runtime_ref.validation.checks.reference import probe_for

    try:
        probe, why = probe_for(facts, rank=ranks.rank, limit_gib=options.reference_gib), ""
    except (ValueError, OSError) as error:
        probe, why = None, str(error).splitlines()[0]
    why = ranks.broadcast(why)
    return (None, why) if why else (probe, "")


def decoding_checks(options: argparse.Namespace, facts, engine, trained: dict | None) -> list:
    """Checks 4 to 7."""
    from runtime_ref.validation.checks import decoding

    vocabulary = facts.config.vocab_size
    longest = max(1, engine.options.max_context - options.tokens - 8)
    prompts = decoding.read_prompts(options.prompts, tokenizer_of(options), vocabulary,
                                    per_domain=options.prompts_per_domain, longest=longest)
    lossless, answers = decoding.check_lossless(engine, prompts, min(options.tokens, engine.options.max_context // 2))
    acceptance = decoding.check_acceptance(engine, prompts, options.tokens, trained)
    measured = [row[1] for row in acceptance.tables.get("acceptance length (1 to block size, bonus token included)", [])[1:]]
    cost = decoding.check_cost(engine, answers, prompts, sum(measured) / len(measured) if measured else None)
    text = decoding.check_text(engine, prompts, trained)
    return [text, lossless, decoding.check_sampler(engine, prompts), acceptance, cost]


def tokenizer_of(options: argparse.Namespace):
    """The folder's tokenizer if prompts have to be read, else None."""
    if options.prompts is None:
        return None
    from checkpoint.load import load_tokenizer

    return load_tokenizer(options.folder)


def environment(options: argparse.Namespace, ranks) -> dict:
    import platform

    import torch
    import transformers

    return {"ranks": ranks.count, "dtype": options.dtype, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "threads": torch.get_num_threads()}


def report(options: argparse.Namespace, verdict) -> None:
    from runtime_ref.validation.output import write_html, write_json

    print("\n".join(map(printable_line, verdict.lines())), flush=True)
    if options.json:
        write_json(verdict, options.json)
    if options.html:
        write_html(verdict, options.html)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("runtime_ref/validate.py: interrupted, no verdict", file=sys.stderr, flush=True)
        sys.exit(1)
