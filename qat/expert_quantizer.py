"""Attaching MXFP4 fake quantization to the routed experts of a Mixture-of-Experts model, and to nothing else.

How it works. The model's expert parameters themselves hold the fake-quantized weights (bf16 values on the MXFP4 grid);
a float32 *master* of each lives here, and the optimizer updates the masters:

    forward/backward   use the model's parameters as they are: no hook, no parametrization, any experts implementation
    optimizer.step()   moves the masters, with the gradient of the quantized weight as theirs (straight-through)
    requantize()       writes fake_quantize(master) into the model's parameters, in place

So weights are rounded once per optimizer step, however many micro-steps and recomputations it has; there is no second
copy of the model beyond the float32 masters that mixed-precision training holds anyway; checkpoints keep the model's
own keys; and what is saved is exactly what was trained, because it *is* the rounded weight (rounding a weight that lies
on the grid returns its value for every scale rule).

Rejected: torch parametrizations (rename checkpoint keys, recompute in every forward, one more full-size copy in the
graph), forcing eager experts with one quantizer per expert and projection (29 times slower before any rounding, on a
CPU), matching experts by a name glob alone (also catches dense layers and shared experts).

Which tensors are experts is decided by structure: a 3-D floating-point parameter [experts, ., .] owned by a module that
transformers marks as a fused-experts module, or by one of a few classes (`modeling.fused_experts`).
Anything that looks like experts but is not understood is an error, never skipped: silently unquantized experts are the
failure that users of such tools report most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from checkpoint.load import owned_rows
from modeling.fused_experts import block_axis
from mxfp4 import BLOCK_SIZE, quantize
from mxfp4.fake_quant import fake_quantize_, saturated
from storage.terminal import counted

# Path parts that name a module which must stay in high precision.
_PROTECTED = {
    "router": r"router|gate|gating",
    "shared expert": r"shared_experts?|shared_mlp|.*shared.*",
    "attention": r"self_attn|attn|attention|linear_attn|cross_attn",
    "embedding": r"embed_tokens|wte|embeddings?",
    "output head": r"lm_head|output_layer",
}


@dataclass(frozen=True)
class ExpertTensor:
    """One fused expert weight.

    Attributes:
        name: parameter name in the model, e.g. "model.layers.3.mlp.experts.gate_up_proj".
        module: name of the owning experts module.
        parameter: [num_experts, ., .]; may be on the meta device.
        axis: the reduction (input) dimension that 32-element blocks run along: -1, or 1 for transposed layouts.
        num_experts: experts in this tensor.
        owned: those whose weights this rank holds; all of them unless the model is sharded.
    """

    name: str
    module: str
    parameter: nn.Parameter
    axis: int
    num_experts: int
    owned: range


def find_expert_tensors(model: nn.Module) -> list[ExpertTensor]:
    """Every routed-expert weight of `model`, in the model's parameter order. Works on the meta device.

    Raises:
        ValueError: no expert weights; an experts module of unknown layout; a protected module (router, shared expert,
            attention, embedding, head) would be touched; experts tied to another tensor; a block dimension that 32 does
            not divide.
    """
    found: list[ExpertTensor] = []
    unknown: list[str] = []
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for module_name, module in model.named_modules():
        axis = block_axis(module)
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 3 or not parameter.is_floating_point():
                continue
            name = f"{module_name}.{own_name}" if module_name else own_name
            if axis is None:
                if re.search(r"(^|\.)[^.]*experts?[^.]*(\.|$)", name) and not _protected_by(name):
                    unknown.append(f"{name} ({type(module).__name__}, {tuple(parameter.shape)})")
                continue
            kind = _protected_by(name)
            if kind:
                raise ValueError(f"{name}: belongs to a {kind}, which stays in high precision, but its class "
                                 f"{type(module).__name__} is marked as routed experts")
            tied = [other for other in names[id(parameter)] if other != name]
            if tied:
                raise ValueError(f"{name}: tied to {tied[0]}: rounding one would round the other; expected a tensor of its own")
            size = parameter.shape[axis]
            if size % BLOCK_SIZE:
                raise ValueError(f"{name}: shape {tuple(parameter.shape)}: dimension {axis} ({size}) is not a multiple "
                                 f"of the MXFP4 block size {BLOCK_SIZE}")
            found.append(ExpertTensor(name, module_name, parameter, axis, parameter.shape[0], owned_rows(parameter)))
    if unknown:
        raise ValueError(f"experts of unknown layout, refusing to leave them unquantized: {', '.join(unknown)}; "
                         "expected modules that carry transformers' fused-experts marks")
    if not found:
        raise ValueError(f"{type(model).__name__} has no fused 3-D expert weights: nothing to quantize"
                         f"{_per_expert_hint(model)}")
    return found


def require_number(model: nn.Module, tensors: list[ExpertTensor], expected: int | None) -> None:
    """Raises ValueError unless the model has as many expert tensors as the recipe promises (None: it does not)."""
    if expected is not None and len(tensors) != expected:
        raise ValueError(f"quantization.expected_tensors: {expected}, but {type(model).__name__} has "
                         f"{counted(len(tensors), 'expert tensor')}")


def _protected_by(name: str) -> str | None:
    for part in name.split(".")[:-1]:
        for kind, pattern in _PROTECTED.items():
            if re.fullmatch(pattern, part):
                return kind
    return None


def _per_expert_hint(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if re.search(r"experts\.\d+\.|experts\.expert_\d+\.", name) and parameter.ndim == 2:
            return f" (its experts are separate 2-D tensors such as {name}; fused [experts, out, in] tensors are needed)"
    return ""


class ExpertQuantizer:
    """Masters of the expert weights, and the rounding that writes them into the model.

    Attributes:
        tensors: the expert tensors of the model.
        masters: float32 parameters, one for each tensor and of its shape, for the optimizer.
    """

    def __init__(self, model: nn.Module, *, scale_rule: str = "even", ste: str = "identity",
                 expected_tensors: int | None = None):
        """Takes the model's present expert weights as masters and quantizes the model in place.

        Args:
            model: on its final device and in its compute dtype.
            scale_rule: floor | rceil | even | mse.
            ste: "identity" passes the gradient of saturated elements, "clip" zeroes it.
            expected_tensors: raise unless exactly this many tensors are found.

        Raises:
            ValueError: see `find_expert_tensors`; a non-finite weight (tensor, expert and index are named).
        """
        self.tensors = find_expert_tensors(model)
        require_number(model, self.tensors, expected_tensors)
        self.scale_rule, self.ste = scale_rule, ste
        self._take_masters()
        self.requantize()

    def _take_masters(self) -> None:
        self.masters = [nn.Parameter(t.parameter.detach().to(torch.float32, copy=True)) for t in self.tensors]
        for tensor in self.tensors:
            tensor.parameter.requires_grad_(True)
            # Micro-steps and data-parallel sums accumulate in float32 even where the weights are bf16.
            tensor.parameter.grad_dtype = torch.float32

    def __iter__(self) -> Iterator[tuple[ExpertTensor, nn.Parameter]]:
        return iter(zip(self.tensors, self.masters, strict=True))

    @property
    def num_parameters(self) -> int:
        """Number of quantized weights."""
        return sum(t.parameter.numel() for t in self.tensors)

    @torch.no_grad()
    def requantize(self, sources: Iterable[torch.Tensor] | None = None) -> None:
        """Writes fake_quantize(source) into the model. `sources` default to the masters.

        Raises:
            ValueError: a non-finite value, naming tensor, expert and index.
        """
        for tensor, source in zip(self.tensors, sources or self.masters, strict=True):
            try:
                fake_quantize_(tensor.parameter.data, source.data, scale_rule=self.scale_rule, axis=tensor.axis)
            except ValueError as error:
                require_finite(f"master of {tensor.name}", source)
                raise ValueError(f"{tensor.name}: {error}") from None

    def rounded(self, index: int) -> torch.Tensor:
        """The weights of tensor `index` as the model computes with them; not to be written to."""
        return self.tensors[index].parameter.data

    def codes(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of `rounded(index)`, as `mxfp4.quantize` gives them."""
        return quantize(self.rounded(index), scale_rule=self.scale_rule, axis=self.tensors[index].axis)

    def of_all_experts(self, index: int, values: torch.Tensor) -> torch.Tensor:
        """[experts held here, ...] -> [all experts, ...] of tensor `index`."""
        return values

    @torch.no_grad()
    def pull_gradients(self) -> None:
        """Adds the gradient of each quantized weight to its master's (straight-through) and clears the former.

        Once per update, or after each micro-batch: the master's gradients add up until the optimizer clears them.
        """
        for tensor, master in self:
            gradient = tensor.parameter.grad
            tensor.parameter.grad = None
            if gradient is None:  # a step in which no token reached this layer's experts
                gradient = torch.zeros_like(master)
            gradient = gradient.to(torch.float32)
            if self.ste == "clip":
                gradient.masked_fill_(saturated(master, scale_rule=self.scale_rule, axis=tensor.axis), 0)
            master.grad = gradient if master.grad is None else master.grad + gradient


def without_noise(model: nn.Module) -> nn.Module:
    """The model as it is served, ready for training: no dropout, no router jitter, no sampled routing.

    The teacher runs in evaluation mode, so noise in the student would be an error that no weights can remove: two passes of a
    small PhiMoE in training mode send 3.5 % of its tokens to other experts. Layers alone stay in training mode, without
    which they would not recompute activations.
    """
    model.eval()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
    return model


def require_finite(name: str, tensor: torch.Tensor, *, first_expert: int = 0) -> None:
    """Raises ValueError naming the first non-finite element of an expert tensor [E, ., .] (or any tensor)."""
    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return
    index = tuple(int(i) for i in bad.nonzero()[0])
    where = f"expert {first_expert + index[0]}, index {list(index[1:])}" if tensor.ndim == 3 else f"index {list(index)}"
    raise ValueError(f"{name}: {int(bad.sum())} non-finite values, the first at {where} ({float(tensor[index])})")


def describe(tensors: list[ExpertTensor], model: nn.Module) -> list[tuple[str, str, int, int]]:
    """Rows (tensor name pattern, shape, count, parameters) of what is quantized, then one row of what is not."""
    groups: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        pattern, shape = re.sub(r"\.\d+\.", ".*.", tensor.name), _shape(tensor.parameter)
        groups.setdefault((pattern, str(list(shape))), []).append(shape.numel())
    rows = [(pattern, shape, len(sizes), sum(sizes)) for (pattern, shape), sizes in groups.items()]
    sizes = [_shape(p).numel() for p in model.parameters()]
    kept = sum(sizes) - sum(row[3] for row in rows)
    return [*rows, ("everything else (kept)", "", len(sizes) - len(tensors), kept)]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
