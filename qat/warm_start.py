"""Error-compensating choice of the initial codes: GPTQ on fused experts, with MXFP4's fixed grid, in one dimension or both.

Plain rounding minimises the error of each weight; what counts is what the errors of a matrix do together. Its damage is
nearly tr(S E H E^T) for an error E [O, I] of the matrix, with H [I, I] and S [O, O] second moments of the matrix's inputs
and of the gradients at its outputs:

- `gptq` (arXiv 2210.17323): S = 1 and H = sum w x x^T over the tokens routed to the expert (w = squared routing weight: what
  the token's error counts in the layer's output). Columns are rounded one at a time and the still unrounded columns are
  moved so that they cancel the error made.
- `fisher`: the model's own answers are sampled, and the log likelihood's gradients g at the expert's outputs (before its gate;
  after its down projection) give S = sum |x|^2 g g^T and H = sum |g|^2 x x^T, the Kronecker-factored Fisher information,
  which is the curvature of the KL divergence that training measures. Rows, too, are then taken in turn: the error of a row,
  rounded by GPTQ, moves the rows after it. Nested like this, both dimensions together are GPTQ on the product of the factors
  (two-sided feedback as in YAQA, arXiv 2505.22988).

Block scales are those of the scale rule on the original weights, so columns and rows may be taken in order of decreasing
importance. The result becomes the masters' starting point: where rounding the compensated (not yet rounded) value under the
scale rule gives the chosen codes, the master keeps that value, so that elements near a threshold stay easy to flip in training;
elsewhere the master is put on the grid value itself.

All experts of a layer are processed together as batched matrices; moments are gathered for as many layers at once as
`moments_gib` allows.

Shape legend: E experts, O outputs, I inputs of a matrix; N tokens, A experts of a token, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from mxfp4 import BLOCK_SIZE, fake_quantize, quantize
from mxfp4.codec import round_to_scales, scale_values
from qat.expert_quantizer import ExpertQuantizer, ExpertTensor
from qat.losses import run_hidden
from qat.methods import MethodQuantizer, searched_scales
from recipes.schema import WarmStart

BATCH = 8  # sequences of one pass


@dataclass
class Moments:
    """Second moments of one expert tensor, float32: inputs [E, I, I]; outputs [E, O, O], or None (identity)."""

    inputs: torch.Tensor
    outputs: torch.Tensor | None


@torch.no_grad()
def choose_first_codes(teacher: nn.Module, quantizer: ExpertQuantizer, rows: torch.Tensor, settings: WarmStart, *,
                       seed: int = 0, model: nn.Module | None = None, say: Callable[[str], None] | None = None) -> None:
    """Replaces the quantizer's masters by error-compensated ones and requantizes the model.

    Args:
        teacher: the unquantized model, whose expert inputs (and gradients) are measured.
        rows: int64 [sequences, T] calibration text.
        seed: of the sampled answers (`fisher`).
        model: the quantizer's model; with `layers_together` it is measured instead, its first layers rounded by then.
        say: called with a line of progress after each measurement, and at most every ten seconds between.

    Raises:
        ValueError: an experts class whose intermediate activations cannot be computed here.
    """
    require_known_gates(teacher, quantizer.tensors, settings)
    by_name = {tensor.name: (tensor, master) for tensor, master in quantizer}
    left, said = dict(by_name), time.monotonic()
    for tensors in sweeps(quantizer.tensors, settings):
        measured = teacher
        if settings.layers_together:
            measured = model
            for tensor, master in left.values():
                tensor.parameter.data.copy_(master.data)
        with frozen(measured):
            gathered = (fisher_moments(measured, tensors, rows, seed) if settings.method == "fisher" else
                        input_moments(measured, tensors, rows, to_the_end=not settings.layers_together))
        for name, moments in gathered.items():
            if say and (tensors[0].name == name or time.monotonic() > said + 10):
                say(f"initial codes: {len(by_name) - len(left)} of {len(by_name)} tensors; {len(tensors)} measured over "
                    f"{rows.numel():,} tokens")
                said = time.monotonic()
            tensor, master = by_name[name]
            weight_EOI = master.data if tensor.axis == -1 else master.data.transpose(1, 2)
            if getattr(quantizer, "shifts", None):
                start_at_searched_scales(quantizer, tensor, weight_EOI.clone(), moments, settings)
            else:
                weight_EOI.copy_(compensated(weight_EOI.clone(), moments, quantizer.scale_rule, settings))
            del left[name]
        if settings.layers_together:
            quantizer.requantize()
    quantizer.requantize()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model gets a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def start_at_searched_scales(quantizer: MethodQuantizer, tensor: ExpertTensor, weight_EOI: torch.Tensor, moments: Moments,
                             settings: WarmStart) -> None:
    """Sets a tensor's masters and shifts: block scales first, by the inputs' moments, then codes that compensate on them."""
    importance = moments.inputs.diagonal(dim1=1, dim2=2) + torch.finfo(torch.float32).tiny  # experts without tokens: plain
    scales = searched_scales(weight_EOI, importance, quantizer.scale_rule)
    values, chosen = compensate(weight_EOI, moments, scales, settings)
    parts = (values, chosen, scales) if tensor.axis == -1 else (t.transpose(1, 2) for t in (values, chosen, scales))
    quantizer.start_at(quantizer.tensors.index(tensor), *parts)


def sweeps(tensors: list[ExpertTensor], settings: WarmStart) -> Iterator[list[ExpertTensor]]:
    """The tensors in groups of whole experts modules, each group's moments within `moments_gib` (or a single module)."""
    modules: dict[str, list[ExpertTensor]] = {}
    for tensor in tensors:
        modules.setdefault(tensor.module, []).append(tensor)
    group: list[ExpertTensor] = []
    size = layers = 0
    for members in modules.values():
        need = 0
        for t in members:
            _, a, b = t.parameter.shape
            inputs, outputs = (b, a) if t.axis == -1 else (a, b)
            need += 4 * len(t.owned) * (inputs**2 + (outputs**2 if settings.method == "fisher" else 0))
        if group and (size + need > settings.moments_gib * 2**30 or layers == settings.layers_together > 0):
            yield group
            group, size, layers = [], 0, 0
        group, size, layers = group + members, size + need, layers + 1
    yield group


def require_known_gates(model: nn.Module, tensors: list[ExpertTensor], settings: WarmStart) -> None:
    """Raises ValueError for experts whose gate cannot be computed here (also on the meta device)."""
    for name in {tensor.module for tensor in tensors} if settings.method != "none" else ():
        module = model.get_submodule(name)
        if not hasattr(module, "_apply_gate"):
            raise ValueError(f"qat.warm_start.method: gptq and fisher do not support {type(module).__name__} "
                             "(experts of an unknown gate); use none")


class _Measured(Exception):
    """Ends a forward pass early."""


class _Gate:
    """One experts module of the teacher: its matrices as [O, I], its gate, and its tensors' names.

    Experts are numbered as in `ExpertTensor.owned`: on a sharded model every rank measures its own.
    """

    def __init__(self, teacher: nn.Module, tensors: list[ExpertTensor]):
        self.module = module = teacher.get_submodule(tensors[0].module)
        self.owned = tensors[0].owned
        self.gated = getattr(module, "has_gate", True)
        self.first = "gate_up_proj" if self.gated else "up_proj"
        names = {t.name.rpartition(".")[2]: t.name for t in tensors}
        self.up, self.down = names[self.first], names["down_proj"]

    def _of(self, name: str, expert: int) -> torch.Tensor:
        whole = getattr(self.module, name)
        if hasattr(whole, "placements"):  # expert parallelism: the gathered experts of this rank
            whole = whole.to_local()
        return whole[(self.owned.start + expert) % whole.shape[0]]

    def matrix(self, name: str, expert: int) -> torch.Tensor:
        weight = self._of(name, expert)
        return weight.T if self.module.is_transposed else weight

    def before_gate(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """What the gate sees of inputs [n, H], in their dtype: the first product, with the expert's bias if it has one."""
        z = x @ self.matrix(self.first, expert).to(x.dtype).T
        return z + self._of(f"{self.first}_bias", expert).to(x.dtype) if getattr(self.module, "has_bias", False) else z

    def inner(self, z: torch.Tensor) -> torch.Tensor:
        return self.module._apply_gate(z) if self.gated else self.module.act_fn(z)

    def routed(self, args: tuple, kwargs: dict) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(place among the owned experts, token indices, inputs [n, H], float32 routing weights [n, 1]), of those with tokens.
        """
        hidden_NH, chosen_NA, weights_NA = (t.detach() for t in (*args, *kwargs.values())[:3])
        for i, e in enumerate(self.owned):
            token, slot = (chosen_NA == e).nonzero(as_tuple=True)
            if token.numel():
                yield i, token, hidden_NH[token], weights_NA[token, slot].float()[:, None]


def _gates(teacher: nn.Module, tensors: list[ExpertTensor]) -> list[_Gate]:
    modules: dict[str, list[ExpertTensor]] = {}
    for tensor in tensors:
        modules.setdefault(tensor.module, []).append(tensor)
    return [_Gate(teacher, members) for members in modules.values()]


def _zeros(tensors: list[ExpertTensor], outputs: bool) -> dict[str, Moments]:
    found = {}
    for t in tensors:
        E, (_, a, b) = len(t.owned), t.parameter.shape
        inputs, rest = (b, a) if t.axis == -1 else (a, b)
        found[t.name] = Moments(*(torch.zeros(E, n, n, device=t.parameter.device) if wanted else None
                                  for n, wanted in ((inputs, True), (rest, outputs))))
    return found


def _accumulate(moment_II: torch.Tensor, x_NI: torch.Tensor, weight_N1: torch.Tensor) -> None:
    moment_II.addmm_((x_NI * weight_N1).T, x_NI)


def input_moments(teacher: nn.Module, tensors: list[ExpertTensor], rows: torch.Tensor, *,
                  to_the_end: bool = True) -> dict[str, Moments]:
    """Moments of the tensors' inputs over `rows`, tokens weighted by their squared routing weight.

    to_the_end: run the layers behind the last of the tensors too (a sharded model expects whole passes).
    """
    moments, gates = _zeros(tensors, outputs=False), _gates(teacher, tensors)

    def gather(gate: _Gate) -> Callable:
        def hook(_, args, kwargs):
            for e, _, x, weight in gate.routed(args, kwargs):
                inner = gate.inner(gate.before_gate(x, e))
                _accumulate(moments[gate.up].inputs[e], x.float(), weight**2)
                _accumulate(moments[gate.down].inputs[e], inner.float(), weight**2)
            if gate is gates[-1] and not to_the_end:
                raise _Measured
        return hook

    handles = [gate.module.register_forward_pre_hook(gather(gate), with_kwargs=True) for gate in gates]
    try:
        for start in range(0, rows.shape[0], BATCH):
            with suppress(_Measured):
                teacher(input_ids=rows[start:start + BATCH], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def fisher_moments(teacher: nn.Module, tensors: list[ExpertTensor], rows: torch.Tensor, seed: int = 0,
                   chunk_tokens: int = 2048) -> dict[str, Moments]:
    """Moments of inputs and of output gradients over `rows`, of the log likelihood of tokens that the teacher samples."""
    moments = _zeros(tensors, outputs=True)
    generator = torch.Generator(rows.device).manual_seed(seed)

    def gather(gate: _Gate) -> Callable:
        def hook(_, args, kwargs, output):
            def with_gradient(grad_NH):
                for e, token, x, weight in gate.routed(args, kwargs):
                    out_grad = grad_NH[token].float() * weight
                    with torch.enable_grad():
                        z = gate.before_gate(x.float(), e).requires_grad_(True)
                        inner = gate.inner(z)
                    z_grad, = torch.autograd.grad(inner, z, out_grad @ gate.matrix("down_proj", e).float())
                    for name, inputs, gradients in ((gate.up, x.float(), z_grad), (gate.down, inner.detach(), out_grad)):
                        _accumulate(moments[name].inputs[e], inputs, gradients.square().sum(1, keepdim=True))
                        _accumulate(moments[name].outputs[e], gradients, inputs.square().sum(1, keepdim=True))
            output.register_hook(with_gradient)
        return hook

    # The weights are frozen; gradients reach the experts because the embeddings ask for one.
    handles = [teacher.get_input_embeddings().register_forward_hook(lambda m, args, output: output.requires_grad_(True))]
    handles += [gate.module.register_forward_hook(gather(gate), with_kwargs=True) for gate in _gates(teacher, tensors)]
    try:
        for start in range(0, rows.shape[0], BATCH):
            with torch.enable_grad():
                hidden = run_hidden(teacher, rows[start:start + BATCH]).last
            flat = hidden.detach().flatten(0, 1)
            parts = [_sampled_gradient(flat[i:i + chunk_tokens], teacher.get_output_embeddings(), generator)
                     for i in range(0, flat.shape[0], chunk_tokens)]
            hidden.backward(torch.cat(parts).view_as(hidden).to(hidden.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _sampled_gradient(hidden_CH: torch.Tensor, head: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Gradient [C, H] of -log p(y) with respect to last hidden states, y sampled from p itself."""
    p = head(hidden_CH).float().softmax(-1)
    sampled = torch.multinomial(p, 1, generator=generator)
    return p.scatter_add_(1, sampled, torch.full_like(sampled, -1, dtype=p.dtype)) @ head.weight.float()


def compensated(weight_EOI: torch.Tensor, moments: Moments, scale_rule: str, settings: WarmStart) -> torch.Tensor:
    """Masters [E, O, I] whose rounding is the compensated choice of codes for float32 weights [E, O, I].

    Experts that saw no token keep their weights (plain rounding).
    """
    I = weight_EOI.shape[2]
    unseen = moments.inputs.diagonal(dim1=1, dim2=2).sum(1) == 0
    w, chosen = compensate(weight_EOI, moments, quantize(weight_EOI, scale_rule=scale_rule)[1], settings)
    same = (fake_quantize(w, scale_rule=scale_rule) == chosen).unflatten(2, (I // BLOCK_SIZE, BLOCK_SIZE)).all(-1)
    start = torch.where(same.repeat_interleave(BLOCK_SIZE, dim=-1), w, chosen)
    return torch.where(unseen[:, None, None], weight_EOI, start)


def compensate(weight_EOI: torch.Tensor, moments: Moments, scales: torch.Tensor,
               settings: WarmStart) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights with the errors of others added, what they are rounded to), float32 [E, O, I], on scales [E, O, I / 32]."""
    E, O, I = weight_EOI.shape
    scale_EOI = scale_values(scales).repeat_interleave(BLOCK_SIZE, dim=-1)
    columns, spread = _spread(moments.inputs, settings.damping)
    if moments.outputs is None:
        order, rows_spread, together = torch.arange(O, device=weight_EOI.device).expand(E, O), None, O
    else:
        order, rows_spread = _spread(moments.outputs, settings.output_damping)
        together = settings.rows_together
    w, scale = (_permuted(t, order, columns) for t in (weight_EOI, scale_EOI))
    chosen = torch.empty_like(w)
    for i in range(0, O, together):
        here = slice(i, i + together)
        aim = w[:, here].clone()
        _round_columns(w[:, here], scale[:, here], spread, chosen[:, here])
        if i + together < O:
            later = slice(i + together, O)
            share = torch.linalg.solve_triangular(rows_spread[:, here, here], rows_spread[:, here, later], upper=True)
            w[:, later] -= share.transpose(1, 2) @ (aim - chosen[:, here])
    back = order.argsort(dim=1), columns.argsort(dim=1)
    return _permuted(w, *back), _permuted(chosen, *back)


def _round_columns(w: torch.Tensor, scale: torch.Tensor, spread: torch.Tensor, chosen: torch.Tensor) -> None:
    """GPTQ of rows [E, r, I], in place: `w` becomes the values that were rounded, `chosen` what they were rounded to."""
    I = w.shape[2]
    for j in range(I):
        chosen[:, :, j] = round_to_scales(w[:, :, j], scale[:, :, j])
        if j + 1 < I:
            error = (w[:, :, j] - chosen[:, :, j]) / spread[:, j, j, None]
            w[:, :, j + 1:] -= error[:, :, None] * spread[:, None, j, j + 1:]


def _spread(moment_Enn: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [E, n] of decreasing importance, upper Cholesky factor [E, n, n] of the inverse in that order).

    Row j of the factor says how the error of element j is best spread over those after it.
    """
    diagonal = moment_Enn.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    h = _permuted(moment_Enn, order, order) / torch.where(mean > 0, mean, 1)[:, None, None]
    h = h + damping * torch.eye(h.shape[1], device=h.device)
    return order, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def _permuted(t: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """t [E, m, n] with rows [E, m] and columns [E, n] in the given orders."""
    E, m, n = t.shape
    return t.gather(1, rows[:, :, None].expand(E, m, n)).gather(2, columns[:, None, :].expand(E, m, n))
