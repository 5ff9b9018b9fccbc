"""Checks 2b and 3: the runtime against references that share no code with it.

2b  The runtime in float32 against the folder's model (modeling/), layer by layer. A difference means that the runtime is wrong:
    the first layer, the first op of it whose result is not its reference's, and the fault that explains it are named.
3   Every op of the backend against its float64 reference (`reference_ops.py`), on the inputs that it really had. With several
    ranks each checks its own shares, and what is gathered is checked against gathered references. The kernels, which have no
    float32, are checked as they serve: their ops within the rounding of bf16, and their drafts. What they compute wrong is
    named by the fault that comes nearest to it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from checkpoint.drafter_folder import draft_round
from runtime_ref.backends.base import Backend, Drafter
from runtime_ref.checkpoints.host_weights import Dense
from runtime_ref.core.batch import KIND, DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import Op, target_program
from runtime_ref.core.tensor_parallel import Ranks
from runtime_ref.validation import reference_ops
from runtime_ref.validation.checks.draft_rounds import check_rounds, engine_rounds
from runtime_ref.validation.checks.reference import (
    ENGINE_CAUSE,
    Probe,
    faults_of,
    features,
    name_causes,
    target_bases,
)
from runtime_ref.validation.context import ValidationContext
from runtime_ref.validation.diagnosis.fault_table import clamp_cause, drafter_faults
from runtime_ref.validation.diagnosis.faults import SAME, difference, matching_faults, nearest_faults
from runtime_ref.validation.quantities import Number, Table
from runtime_ref.validation.result import Check

# Relative error of one float32 op against float64: sums of a few thousand terms.
OP_ERROR = 2e-5
# The same of one op of the kernels, in the worst row: operands of products are rounded to bf16, by at most 2^-9 each, in an MLP
# twice, and terms of a sum that cancel double that relative to it.
KERNEL_OP_ERROR = 2.0**-6
# Of the kernels' draft logits: a dozen such products lie between features and logits.
KERNEL_DRAFT_ERROR = 8 * 2.0**-8
MISSING_CLAMP_CAUSE = "the clamp of gpt-oss's SwiGLU is missing, or has another limit or alpha (swiglu_limit)"


def run_watched(backend: Backend, ids: list[int], *, target_layers=(), watch=None) -> tuple[dict, SequenceChunk, KvCache]:
    """Buffers of one step over `ids` on a fresh cache, the chunk, and the cache (still holding it)."""
    cache = KvCache(backend.pools, prefix=False)
    tables = cache.tables()
    cache.extend(tables, list(tables), len(ids))
    chunk = SequenceChunk(tables, 0, ids)
    return backend.run(target_program(backend.config, target_layers), backend.plan([chunk]), watch), chunk, cache


@dataclass(frozen=True)
class Outputs:
    """What a backend makes of the probe's text: outputs of the layers [tokens, layers, hidden] and logits, as it has them."""

    layers: torch.Tensor
    logits: torch.Tensor


def outputs_of(backend: Backend, probe: Probe) -> Outputs:
    """Of one step as it is served (nothing watches it); to be called on all ranks alike."""
    layers, n = range(backend.config.num_hidden_layers), len(probe.ids)
    buffers, chunk, cache = run_watched(backend, probe.ids, target_layers=layers)
    cache.release(chunk.tables)
    return Outputs(torch.stack([buffers[f"target_hidden.{i}"][:n] for i in layers], dim=1), buffers["logits"][:n].cpu())


class OpErrors:
    """Relative errors of a backend's ops on the inputs that they had, in the order in which they ran.

    Attributes:
        found: (op, error), the worst of all ranks; ops whose inputs were not finite are left out.
        bound: what an error may be.
        reference: the backend whose float32 weights the references take.
    """

    def __init__(self, backend: Backend, ids: list[int], exact: Backend | None = None):
        """Runs the target over `ids` on a fresh cache; to be made on all ranks alike.

        Args:
            exact: for kernels, a float32 backend on the same folder. Their errors are those of the worst row, so that a few
                wrong rows are not lost among many rounded ones.
        """
        self.backend, self.found = backend, []
        self.kernels, self.bound, self.reference = exact is not None, OP_ERROR, backend
        if self.kernels:
            self.bound, self.reference = KERNEL_OP_ERROR, copy.copy(exact)
            self.reference.pools = backend.pools
        self._kept: dict[str, torch.Tensor] = {}
        cache = KvCache(backend.pools, prefix=False)
        tables = cache.tables()
        cache.extend(tables, list(tables), len(ids))
        self._chunk = SequenceChunk(tables, 0, ids)
        step = backend.plan([self._chunk])
        self._kept["ids"] = step.ids.cpu()
        backend.run(target_program(backend.config), step, self._watch)
        cache.release(tables)
        self.found = _worst_of_ranks(self.found, backend.ranks)

    def _watch(self, op: Op, buffers: dict) -> None:
        inputs, rows = {name: self._kept[name] for name in op.reads if name in self._kept}, len(self._chunk.tokens)
        if len(inputs) == len(op.reads) and all(bool(torch.isfinite(x).all()) for x in inputs.values()):
            expected = self.expected(op, inputs, self._chunk, rows)
            if expected is not None:
                got = reference_ops.found(op, buffers, self.backend)
                if op.name.startswith("attend"):
                    got = got[:, :rows]
                self.found.append((op, self.error(op, got.cpu().double(), expected)))
        # Some backends show only what a op touches: what it left alone is as it was.
        self._kept |= {name: value.to("cpu", copy=True) for name, value in buffers.items()}

    def expected(self, op: Op, inputs: dict[str, torch.Tensor], chunk: SequenceChunk, rows: int) -> torch.Tensor | None:
        """See `reference_ops.expected`."""
        return reference_ops.expected(self.reference, op, inputs, chunk, rows,
                                      mxfp8=self.backend.capabilities.mxfp8_activations)

    def error(self, op: Op, found: torch.Tensor, expected: torch.Tensor) -> float:
        if not self.kernels:
            return difference(found, expected)
        if op.writes == ("partial",):  # a rank of the kernels may add for its neighbour
            found, expected = (self.backend.ranks.gather(t[None].contiguous()).sum(0) for t in (found, expected))
        if op.name.startswith("project"):  # one flat vector of all heads
            return difference(found, expected)
        return worst_row(found, expected)

    @property
    def first_wrong(self) -> tuple[Op, float] | None:
        return next(((op, error) for op, error in self.found if not error <= self.bound), None)

    def by_op(self) -> dict[str, float]:
        worst: dict[str, float] = {}
        for op, error in self.found:
            worst[op.name] = max(worst.get(op.name, 0.0), error)
        return worst


def worst_row(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row (of all heads, where a row has heads: [heads, rows, width])."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    over = (0, 2) if found.ndim == 3 else (1,)
    return float(((found - expected).norm(dim=over) / expected.norm(dim=over).clamp_min(1e-30)).max())


def _worst_of_ranks(found: list[tuple[Op, float]], ranks: Ranks) -> list[tuple[Op, float]]:
    errors = ranks.gather(torch.tensor([[error for _, error in found]], dtype=torch.float64)).amax(0)
    return [(op, float(error)) for (op, _), error in zip(found, errors, strict=True)]


def place_of(op: Op) -> str:
    return f"op {op.name}" + (f" of layer {op.layer}" if op.layer >= 0 else "")


def check_runtime(check: Check, context: ValidationContext, probe: Probe, exact: Backend, served: Outputs | None,
                  drafter: Drafter | None, ops: OpErrors) -> None:
    """Check 2b: the runtime in float32 (`exact`) layer by layer, and how far the dtype that is served rounds.

    Args:
        served: of the backend that serves, if that is another one. ops: of `exact`. To be called on all ranks alike.
    """
    layers, n = context.config.num_hidden_layers, len(probe.ids)
    runs = [(run.layers.float().cpu(), run.logits) for run in (outputs_of(exact, probe), served) if run is not None]
    rounds = engine_rounds(exact, drafter, probe) if drafter is not None else None
    if probe.target is None:
        check.leave_out(probe.absent)
        return
    ids = torch.tensor([probe.ids])
    with torch.no_grad():
        expected = features(probe.target, ids, list(range(layers)))
        logits = probe.target(input_ids=ids).logits[0]
    rows = [["layer", "float32", *(["as served"] if len(runs) > 1 else [])]]
    for i in range(layers):
        rows.append([i, *(difference(hidden[:, i], expected[:, i]) for hidden, _ in runs)])
    rows.append(["logits", *(difference(found, logits) for _, found in runs)])
    check.tables[Table.LAYERS] = rows
    check.measure(Number.LOGITS_ERROR, rows[-1][1], SAME)
    check.measure(Number.TOKENS, n)
    if len(runs) > 1:
        _rounding(check, runs[1][1], logits)
    if not all(row[1] < SAME for row in rows[1:]):
        first = next(row[0] for row in rows[1:] if not row[1] < SAME)
        _blame_runtime(check, context, probe, ids, runs[0][1], f"layer {first}" if first != "logits" else "the logits", ops)
        check.findings[0] += f" (relative error of the logits {rows[-1][1]:.2g})"
    elif rounds is not None and probe.drafter is not None:
        check_rounds(check, context, probe, rounds)


def check_kernels(check: Check, context: ValidationContext, probe: Probe, ops: OpErrors, served: Outputs, drafter) -> None:
    """What only kernels need, added to check 3: what their wrong ops make of the model, and the drafts that they serve.

    Args:
        check: of `check_ops`. ops, served: of the kernels. drafter: theirs, or None. To be called on all ranks alike.
    """
    drafts = None if drafter is None else _runtime_drafts(probe, ops.backend, drafter, served.layers).cpu()
    if probe.target is None:
        return
    if ops.first_wrong is not None:
        ids = torch.tensor([probe.ids])
        found = nearest_faults(probe.target, faults_of(context), lambda m: m(input_ids=ids).logits[0], served.logits)
        for hypothesis in found:
            check.fail(f"explained by: {hypothesis.name}", f"{ENGINE_CAUSE}: {hypothesis.cause}")
    elif drafts is not None and probe.drafter is not None:
        _compare_drafts(check, context, probe, drafts, served.layers.cpu().float(), KERNEL_DRAFT_ERROR)


def _rounding(check: Check, served: torch.Tensor, logits: torch.Tensor) -> None:
    """How far the dtype that is served is from float32; a measurement, not a judgement."""
    kl = torch.nn.functional.kl_div(served.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean")
    same = (served.argmax(-1) == logits.argmax(-1)).float().mean()
    check.measure(Number.SERVED_KL, float(kl))
    check.measure(Number.SERVED_SAME, float(same))


@torch.no_grad()
def _blame_runtime(check: Check, context: ValidationContext, probe: Probe, ids, found, where: str, ops: OpErrors) -> None:
    """First the op (its own inputs were right), then the bug that explains the logits."""
    wrong = ops.first_wrong
    at = (f"{place_of(wrong[0])}, relative error {wrong[1]:.2g} on its own inputs" if wrong
          else "every op is right on its own inputs")
    check.fail(f"the runtime parts from the model at {where}: {at}")
    hypotheses = matching_faults(probe.target, faults_of(context), lambda m: m(input_ids=ids).logits[0], found)
    otherwise = (f"no known bug explains it; {place_of(wrong[0])} is the first that is wrong" if wrong else
                 f"the ops are right, but not their order, weights or what is handed on; it begins at {where}")
    name_causes(check, hypotheses, otherwise, f"{ENGINE_CAUSE}: ")


def _runtime_drafts(probe: Probe, exact: Backend, drafter: Drafter, target_hidden: torch.Tensor) -> torch.Tensor:
    """The runtime's draft logits after the probe's text but its last token, which is the anchor."""
    n = len(probe.ids) - 1
    cache = KvCache({KIND: drafter.pool}, prefix=False)
    tables = cache.tables()
    cache.extend(tables, [KIND], n + drafter.block)
    features = torch.cat([target_hidden[:n, i] for i in drafter.target_layers], dim=-1)
    drafter.extend_tables(features[:n - 3], 0, tables[KIND])
    logits = drafter.logits([DraftRequest(tables, probe.ids[n], n, drafter.block - 1, features[n - 3:])])[0]
    cache.release(tables)
    return logits


@torch.no_grad()
def _compare_drafts(check: Check, context: ValidationContext, probe: Probe, found: torch.Tensor, layers: torch.Tensor,
                    bound: float) -> None:
    """The runtime's draft logits, rounded as kernels round them, against the drafter model's on the outputs of `layers`."""
    n, embed = len(probe.ids) - 1, probe.target.model.embed_tokens
    target_hidden, ids = layers[None, :n][:, :, probe.drafter.target_layer_ids], torch.tensor([probe.ids[:n + 1]])

    def run(drafter):
        return probe.target.lm_head(draft_round(drafter, target_hidden, ids, embed.weight)[0, 1:])

    error = difference(found, run(probe.drafter))
    check.measure(Number.DRAFT_LOGITS_ERROR, error, bound)
    if error < bound:
        return
    check.fail(f"the runtime's drafts differ from the drafter model (relative error {error:.2g})")
    row = embed.weight[probe.drafter.mask_token_id]
    hypotheses = drafter_faults(probe.drafter, row, target_bases(context))
    name_causes(check, nearest_faults(probe.drafter, hypotheses, run, found), "the drafter; no known bug explains it",
                f"{ENGINE_CAUSE}: ")


def check_ops(check: Check, all_ops: list[OpErrors]) -> None:
    """Check 3: every op of each backend, in float32."""
    rows = [["backend", "op", "worst relative error", "calls"]]
    for ops in all_ops:
        name, calls = ops.backend.capabilities.name, [op.name for op, _ in ops.found]
        rows += [[name, kind, error, calls.count(kind)] for kind, error in sorted(ops.by_op().items())]
        wrong = [(op, error) for op, error in ops.found if not error <= ops.bound]
        for op, error in wrong[:3]:
            check.fail(f"{name}: {place_of(op)}: relative error {error:.2g}, expected at most {ops.bound:.2g}",
                       f"the {name} backend's op {op.name} is wrong")
        if ops.backend.capabilities.single_ops:
            error = _worst_of_ranks([(None, _large_activations(ops))], ops.backend.ranks)[0][1]
            rows.append([name, "dense_mlp, experts at large activations", error, len(ops.backend.weights.layers)])
            if not error <= ops.bound:
                clamped = getattr(ops.backend.config, "clamp", None) is not None
                check.fail(f"{name}: experts at large activations: relative error {error:.2g}",
                           f"{ENGINE_CAUSE}: {MISSING_CLAMP_CAUSE if clamped else clamp_cause(_family(ops))}")
    check.tables[Table.OPS] = rows
    check.measure(Number.WORST_OP, max(row[2] for row in rows[1:]), max(ops.bound for ops in all_ops))
    check.measure(Number.BACKENDS, ", ".join(ops.backend.capabilities.name for ops in all_ops))
    check.measure(Number.RANKS, all_ops[0].backend.ranks.count)
    check.measure(Number.ROW_BLOCKS, f"multiples of {max(ops.backend.capabilities.row_multiple for ops in all_ops)}")


def _family(ops: OpErrors) -> str:
    return getattr(ops.backend.config, "model_type", "mimo_v2")


def _large_activations(ops: OpErrors) -> float:
    """Worst error of the MLPs on inputs that take gates far beyond 7, where a clamp would show."""
    generator, backend = torch.Generator().manual_seed(3), ops.backend
    step, worst = backend.plan_of_rows(), 0.0
    for i, layer in enumerate(backend.weights.layers):
        y = (64 * torch.randn(8, backend.config.hidden_size, generator=generator)).to(backend.device)
        if isinstance(layer.mlp, Dense):
            op, inputs = Op("dense_mlp", i, ("y",), ("partial",)), {"y": y}
        else:
            index, weight = backend.ops["route"](step, i, y)
            inputs = {"y": y, "index": index, "weight": weight}
            op = Op("experts", i, tuple(inputs), ("partial",))
        expected = ops.expected(op, {name: t.cpu() for name, t in inputs.items()}, SequenceChunk({}, 0, []), 8)
        got = backend.ops[op.name](step, i, *inputs.values()).cpu().double().sum(0)
        worst = max(worst, ops.error(op, got, expected))
    return worst
