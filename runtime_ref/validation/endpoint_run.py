"""All checks of a running server: `validate_endpoint` gives the report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from checkpoint.load import load_model, load_tokenizer
from runtime_ref.checkpoints.folder import end_ids
from runtime_ref.validation.checks import endpoint as checks
from runtime_ref.validation.checks.decoding import read_prompts
from runtime_ref.validation.checks.reference import decoded_gib, load_hf
from runtime_ref.validation.context import ValidationContext, own_object
from runtime_ref.validation.endpoint_client import Endpoint, Refused
from runtime_ref.validation.guard import guarded
from runtime_ref.validation.provenance import environment, model_facts
from runtime_ref.validation.result import Check, ValidationReport

TITLES = {
    "identity": "the server's checkpoint is this folder",
    "counts": "prompts become the checkpoint's tokens",
    "greedy": "greedy tokens and log-probabilities against the reference (float32)",
    "sampling": "sampled tokens have the reference's distribution",
    "acceptance": "acceptance length from the server's counters",
    "ends": "answers end where they should, and say why",
    "tools": "tool calls fit their schema",
    "speed": "tokens/s and price, measured at the server",
}


def validate_endpoint(options: argparse.Namespace, trained: dict | None) -> ValidationReport:
    """All checks of a server; the reference is the checkpoint's folder, or --original.

    Raises:
        ValueError: no server there, or a mistake in the arguments.
    """
    began = time.monotonic()
    server = Endpoint(options.endpoint, options.model)
    folder = options.folder or options.original
    served = _served(options, server, folder)
    found: list[Check] = []
    runs = {"identity": lambda c: checks.check_identity(c, server, options.folder),
            "counts": lambda c: checks.check_counts(c, served), "greedy": lambda c: checks.check_greedy(c, served),
            "sampling": lambda c: checks.check_samples(c, served),
            "acceptance": lambda c: checks.check_acceptance_of(c, served, trained),
            "ends": lambda c: checks.check_ends(c, served), "tools": lambda c: checks.check_tools(c, served),
            "speed": lambda c: checks.check_speed(c, served, options.node_hour)}
    for name, run in runs.items():
        check = Check(name, TITLES[name])
        guarded(check, lambda c, run=run: _answered(c, run))
        found.append(check)
    where = environment(1, "as served") | {"endpoint": server.root, "seconds": round(time.monotonic() - began, 1)}
    context = ValidationContext(folder, raw=own_object(folder / "config.json")) if folder else None
    model = {"served as": server.model} | (model_facts(context) if context else {})
    return ValidationReport(server.root, found, where, model)


def _answered(check: Check, run) -> None:
    """A check whose server refuses a request that every server of this interface answers."""
    try:
        run(check)
    except Refused as error:
        check.fail(str(error), "the server does not answer a request of OpenAI's interface" if error.status else
                   "the server ended or does not answer")


def _served(options: argparse.Namespace, server: Endpoint, folder: Path | None) -> checks.Served:
    tokenizer, reference, vocabulary, ends = None, None, 256, []
    absent = "there is no reference (give the checkpoint's folder, or --original DIR)"
    if folder is not None:
        raw = own_object(folder / "config.json")
        vocabulary = raw.get("vocab_size") or (raw.get("text_config") or {}).get("vocab_size") or vocabulary
        ends = end_ids(folder, raw)
        tokenizer = _tokenizer(folder)
        if decoded_gib(folder) <= options.reference_gib:
            mimo = raw.get("model_type") == "mimo_v2"
            reference = load_model(folder, dtype=torch.float32) if mimo else load_hf(folder)
        else:
            absent = "the model in float32 does not fit (--reference-gib)"
    prompts = read_prompts(options.prompts, tokenizer, vocabulary, per_domain=options.prompts_per_domain, longest=1024)
    return checks.Served(server, prompts, tokenizer, reference, absent, ends, options.tokens, options.samples)


def _tokenizer(folder: Path):
    try:
        return load_tokenizer(folder)
    except ValueError:
        return None
