"""Runs the suites of `--eval` and makes their report: `validate_eval`."""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoint.load import load_model, load_tokenizer
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.validation import evaluation
from runtime_ref.validation.checks.decoding import Prompts, prompt_logits
from runtime_ref.validation.checks.endpoint import Served, check_tools
from runtime_ref.validation.checks.reference import load_hf
from runtime_ref.validation.context import ValidationContext, own_object
from runtime_ref.validation.endpoint_client import Endpoint, Refused
from runtime_ref.validation.guard import UserMistake, guarded
from runtime_ref.validation.provenance import environment, model_facts
from runtime_ref.validation.result import Check, ValidationReport

TITLES = {"quick": "perplexity, and divergence from the original on text", "tasks": "tasks through lm-eval, original and FP4",
          "tools": "tool calls fit their schema"}
SERVE = Path(__file__).resolve().parents[1] / "serve.py"



def validate_eval(options: argparse.Namespace) -> ValidationReport:
    """The suites of `options.eval` on a folder (and `--endpoint`, or a server of the folder that is started for them).

    Raises:
        ValueError: a mistake of the user.
    """
    began = time.monotonic()
    runs = {"quick": _quick, "tasks": _tasks, "tools": _tools}
    found = []
    for name in options.eval:
        check = Check(name, TITLES[name])
        guarded(check, lambda c, run=runs[name]: run(c, options))
        found.append(check)
    raw = own_object(options.folder / "config.json")
    where = environment(1, options.dtype) | {"seconds": round(time.monotonic() - began, 1)}
    return ValidationReport(str(options.folder), found, where, model_facts(ValidationContext(options.folder, raw=raw)))


def _original(options: argparse.Namespace) -> torch.nn.Module | None:
    if options.original is None:
        return None
    try:
        kind = own_object(options.original / "config.json").get("model_type")
        model = load_model(options.original, dtype=torch.float32) if kind == "mimo_v2" else load_hf(options.original)
    except ValueError as error:
        raise UserMistake(f"--original: {error}") from None
    return model.eval()


def _quick(check: Check, options: argparse.Namespace) -> None:
    file = options.eval_text or options.prompts
    if file is None:
        raise UserMistake("--eval quick: no text, expected --eval-text FILE (.txt, or .jsonl with text)")
    texts = evaluation.read_texts(file, load_tokenizer(options.folder))
    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    engine = Engine.from_folder(options.folder, dtype=dtype, drafter=False, backend=options.backend,
                                options=EngineOptions(max_running=1, max_context=2 * evaluation.WINDOW))
    evaluation.check_quick(check, lambda ids: prompt_logits(engine, ids), _original(options), texts)


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[Endpoint]:
    """`--endpoint`, or a server of the folder that ends with the suite."""
    if options.endpoint is not None:
        yield Endpoint(options.endpoint, options.model)
        return
    command = [sys.executable, str(SERVE), str(options.folder), "--port", "0", "--quiet", "--dtype", options.dtype,
               "--backend", options.backend]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        address = re.search(r"serving .* on (http\S+)", line)
        if address is None:
            said = process.stderr.read().strip().splitlines() or [line]
            raise UserMistake(f"the folder cannot be served: {said[-1][:200]}")
        yield Endpoint(address[1])
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _lm_eval_arguments(server: Endpoint, tokenizer: Path, chat: bool) -> tuple[str, dict]:
    """lm-eval's backend for a server, and its arguments."""
    path, backend = ("chat/completions", "local-chat-completions") if chat else ("completions", "local-completions")
    return backend, {"model": server.model, "base_url": f"{server.root}/v1/{path}", "num_concurrent": 4, "max_retries": 3,
                     "tokenizer": str(tokenizer), "tokenizer_backend": None if chat else "huggingface",
                     "tokenized_requests": False, "timeout": 1800}


def _tasks(check: Check, options: argparse.Namespace) -> None:
    if not options.eval_tasks:
        raise UserMistake("--eval tasks: no tasks, expected --eval-tasks FILE.jsonl (prompt, answer) or lm-eval's task names")
    tasks = [evaluation.local_task(Path(t)) if t.endswith(".jsonl") else t for t in options.eval_tasks]
    chat, limit, folder = options.eval_chat, options.eval_limit, options.eval_folder
    with _server(options) as server:
        own = evaluation.run_lm_eval(*_lm_eval_arguments(server, options.folder, chat), tasks, folder, limit, chat)
    base = None
    if options.original_endpoint is not None:
        server = Endpoint(options.original_endpoint)
        base = evaluation.run_lm_eval(*_lm_eval_arguments(server, options.folder, chat), tasks, folder, limit, chat)
    elif options.original is not None:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(pretrained=_original(options), tokenizer=load_tokenizer(options.folder), batch_size=1)
        base = evaluation.run_lm_eval(model, None, tasks, folder, limit, chat)
    evaluation.check_tasks(check, own, base)


def _tools(check: Check, options: argparse.Namespace) -> None:
    with _server(options) as server:
        try:
            check_tools(check, Served(server, Prompts({}), None, None, "", [], 0))
        except Refused as error:
            check.leave_out(str(error))


def card_section(report: ValidationReport) -> str:
    """The report as a section of a model card, in Markdown: what was measured, when, where, by which command."""
    where = report.environment
    lines = ["## Evaluation", "", f"{where.get('date')}, {where.get('processor')}, revision {where.get('revision')}, "
             f"`{where.get('command')}`.", ""]
    for check in report.checks:
        if check.status in ("unchecked", "not applicable"):
            continue
        lines += [f"### {check.title[:1].upper()}{check.title[1:]}", ""]
        if check.numbers:
            lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in check.numbers.items()), ""]
        for title, rows in check.tables.items():
            lines += [f"{title[:1].upper()}{title[1:]}:", "", *_markdown(rows), ""]
        lines += [f"- {line}" for line in (*check.findings, *check.notes)] + [""] * bool(check.findings or check.notes)
    return "\n".join(lines).rstrip() + "\n"


def _markdown(rows: list[list]) -> list[str]:
    head, *body = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
