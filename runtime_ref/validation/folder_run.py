"""All checks of a folder, in order, each behind the guard: `validate_folder` gives the report."""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass

import torch

from checkpoint.families.geometry import NotHeld
from runtime_ref.backends.torch.backend import TorchBackend
from runtime_ref.core.kv_cache import PAGE
from runtime_ref.core.tensor_parallel import Ranks
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.validation.checks import decoding
from runtime_ref.validation.checks.files import check_files
from runtime_ref.validation.checks.folder import check_folder
from runtime_ref.validation.checks.reference import Probe, check_reference, probe_for
from runtime_ref.validation.checks.runtime_ops import OpErrors, check_kernels, check_ops, check_runtime, outputs_of
from runtime_ref.validation.checks.sampling import check_sampler
from runtime_ref.validation.context import ValidationContext, line_within
from runtime_ref.validation.guard import UserMistake, guarded
from runtime_ref.validation.provenance import environment, model_facts
from runtime_ref.validation.quantities import Number
from runtime_ref.validation.result import Check, ValidationReport

TITLES = {
    "files": "files beside the weights: checksums, tokenizer, chat template, generation settings",
    "folder": "schema, inventory, dtypes, scale range, sidecar, sinks, target layers",
    "reference": "reference outputs against the folder's model",
    "logits": "logits, layers and drafts against the independent model (float32)",
    "ops": "every op of each backend against its float64 reference",
    "text": "the model expects the text that its tokenizer makes",
    "lossless": "greedy with the drafter = without, alone = batched, token for token",
    "sampling": "sampled tokens with the drafter have the target's distribution",
    "acceptance": "acceptance length by domain",
    "cost": "experts touched, bytes and time of a step, against the memory bound",
}
# What is really tested where there is no drafter.
WITHOUT_DRAFTER = {
    "logits": "logits and layers against the independent model (float32)",
    "lossless": "greedy alone = batched, token for token",
    "sampling": "both acceptance rules on this model's logits, with drafts made up for the test: the target's distribution",
}
from storage.reading import strange_files


@dataclass
class FolderRun:
    """What the checks of one run share."""

    options: argparse.Namespace
    ranks: Ranks
    trained: dict | None
    context: ValidationContext
    checks: list[Check]

    def check(self, name: str, run) -> Check:
        """Runs a check behind the guard and keeps it."""
        check = Check(name, self.title(name))
        guarded(check, run, self.ranks, refused=(NotHeld,))
        self.checks.append(check)
        return check

    def title(self, name: str) -> str:
        return TITLES[name] if self.context.drafter_loadable else WITHOUT_DRAFTER.get(name, TITLES[name])

    def leave_out_the_rest(self, reason: str) -> None:
        done = {check.name for check in self.checks}
        self.checks += [Check(name, self.title(name)).leave_out(reason) for name in TITLES if name not in done]

    @property
    def failed(self) -> bool:
        return any(check.status == "failed" for check in self.checks)


def validate_folder(options: argparse.Namespace, ranks: Ranks, trained: dict | None) -> ValidationReport:
    """All checks of a folder, on all ranks alike (references run on rank 0).

    Raises:
        ValueError: a mistake of the user, or a folder of a model that the runtime does not run.
    """
    began = time.monotonic()
    run = FolderRun(options, ranks, trained, ValidationContext(options.folder, loadable=False), [])
    context = run.context
    folder = Check("folder", TITLES["folder"])
    for path in strange_files(options.folder):  # to open a pipe is to wait for ever: nothing else is looked at
        folder.fail(f"{path.relative_to(options.folder)}: neither a file nor a folder", "the folder holds a pipe or a device")
    if folder.findings:
        run.checks.append(folder)
        run.leave_out_the_rest("the folder is not looked at")
        return ValidationReport(str(options.folder), run.checks, environment(ranks.count, options.dtype), {})
    guarded(folder, lambda check: check_folder(check, context), ranks, refused=(NotHeld,))
    context.loadable &= not any("broke off" in finding for finding in folder.findings)
    run.check("files", lambda check: check_files(check, context, checksums=options.checksums and ranks.rank == 0))
    run.checks.append(folder)
    probe = _probe(run) if context.loadable else None
    if probe is not None:
        _model_checks(run, probe)
    run.leave_out_the_rest("the folder cannot be loaded")
    where = environment(ranks.count, options.dtype) | {"seconds": round(time.monotonic() - began, 1)}
    return ValidationReport(str(options.folder), run.checks, where, model_facts(context))


def _probe(run: FolderRun) -> Probe | None:
    """The probe; or None, and why the folder's weights cannot be decoded, on all ranks alike."""
    try:
        probe, why = probe_for(run.context, rank=run.ranks.rank, limit_gib=run.options.reference_gib), ""
    except (ValueError, OSError, RuntimeError) as error:
        probe, why = None, line_within(error, run.context.folder)
    why = run.ranks.broadcast(why)
    if why:
        run.check("reference", lambda check: check.fail(why, "the weights cannot be decoded"))
        run.leave_out_the_rest("the weights cannot be decoded")
        return None
    return probe


def _model_checks(run: FolderRun, probe: Probe) -> None:
    """Checks 2 to 7."""
    options, context = run.options, run.context
    run.check("reference", lambda check: check_reference(check, context, probe, options.original))
    served = torch.float32 if options.dtype == "float32" else torch.bfloat16
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine = _engine(run, served)
    if engine is None:
        return
    backends, drafter = _exact(run, engine, probe)
    ops = [OpErrors(backend, probe.ids) for backend in backends]
    outputs = None if served == torch.float32 else outputs_of(engine.backend, probe)
    run.check("logits", lambda check: check_runtime(check, context, probe, backends[0], outputs, drafter, ops[0]))
    kernels = [] if engine.backend.capabilities.float32 else [OpErrors(engine.backend, probe.ids, backends[0])]

    def all_ops(check: Check) -> None:
        check_ops(check, [*ops, *kernels])
        for judged in kernels:
            check_kernels(check, context, probe, judged, outputs, engine.drafter)
        if engine.launch.compared:
            check.notes.append(engine.launch.line())
        for part, way in engine.launch.different:
            check.fail(f"{part}, launch {way}: {engine.launch.refused[part, way]}",
                       "this launch computes something else than ops")

    run.check("ops", all_ops).notes += dict.fromkeys(str(w.message) for w in warned if "compiled ops" in str(w.message))
    failed = run.ranks.broadcast(run.failed)  # references are rank 0's alone
    if failed and not options.all:
        run.leave_out_the_rest("an earlier check failed (--all runs it anyway)")
    else:
        _decoding_checks(run, engine)


def _engine(run: FolderRun, served: torch.dtype) -> Engine | None:
    """The engine that serves the folder; None, and a finding, if it refuses.

    Raises:
        UserMistake: a backend that does not exist or is not installed.
    """
    options, context = run.options, run.context
    try:
        return Engine.from_folder(options.folder, ranks=run.ranks, dtype=served, drafter=context.drafter_loadable,
                                  backend=options.backend, launch=options.launch,
                                  options=EngineOptions(max_context=min(context.config.max_position_embeddings, 1024)))
    except ValueError as error:
        if str(error).startswith("backend"):
            raise UserMistake(str(error)) from None
        why = line_within(error, context.folder)
    run.check("logits", lambda check: check.fail(f"the runtime refuses the folder: {why}", "the folder cannot be served"))
    run.leave_out_the_rest("the runtime refuses the folder")
    return None


def _exact(run: FolderRun, engine: Engine, probe: Probe) -> tuple[list, object | None]:
    """Backends in float32 on the engine's weights, the engine's own kind first, and a drafter on that one."""
    pages = {kind: max(16, -(-len(probe.ids) // PAGE) + 4) for kind in ("full", "window")}
    weights = engine.backend.weights
    own = [type(engine.backend)] if engine.backend.capabilities.float32 else []
    kinds = [*own, *([TorchBackend] if TorchBackend not in own else [])]
    backends = [kind(weights, dtype=torch.float32, pages=pages) for kind in kinds]
    if not run.context.drafter_loadable:
        return backends, None
    context = min(run.context.config.max_position_embeddings, 1024)
    return backends, backends[0].load_drafter(run.options.folder / "dflash", max(24, pages["full"] + 2), context)


def _decoding_checks(run: FolderRun, engine: Engine) -> None:
    """Checks 4 to 7."""
    options = run.options
    prompts = _prompts(run, engine)
    tokens = min(options.tokens, engine.options.max_context // 2)
    run.check("text", lambda check: decoding.check_text(check, engine, prompts, run.trained))
    answers: list = []
    lossless = run.check("lossless", lambda check: answers.extend(decoding.check_lossless(check, engine, prompts, tokens)))
    run.check("sampling", lambda check: check_sampler(check, engine, prompts))
    lengths: list = []
    run.check("acceptance", lambda check: lengths.append(
        decoding.check_acceptance(check, engine, prompts, options.tokens, run.trained)))
    speeds = {key: lossless.numbers[key] for key in (Number.SPEED_PLAIN, Number.SPEED_DRAFTS) if key in lossless.numbers}
    run.check("cost", lambda check: decoding.check_cost(
        check, engine, answers or [[]] * len(prompts.all), prompts, lengths[0] if lengths else None, speeds, options.node_hour))


def _prompts(run: FolderRun, engine: Engine):
    """Prompts of the user's file, or random tokens.

    Raises:
        UserMistake: a file that cannot be read.
    """
    options = run.options
    longest = max(1, engine.options.max_context - options.tokens - 8)
    tokenizer = None
    broken = any("template" in cause for cause in run.checks[0].causes)  # rendering a dialogue with it might never end
    if options.prompts is not None and not broken:
        from checkpoint.load import load_tokenizer

        tokenizer = load_tokenizer(options.folder)
    try:
        return decoding.read_prompts(options.prompts, tokenizer, run.context.config.vocab_size,
                                     per_domain=options.prompts_per_domain, longest=longest)
    except ValueError as error:
        raise UserMistake(str(error)) from None
