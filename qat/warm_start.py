"""Error-compensating choice of the first codes: GPTQ on fused experts, with MXFP4's fixed grid.

Plain rounding minimises the error of each weight; what the model feels is the error of each expert's *output* on the
tokens that are routed to it. GPTQ (arXiv 2210.17323) rounds one input column at a time and moves the still unrounded
columns so that they cancel the error made, weighted by the second moments H = sum w x x^T of the expert's own inputs
(w = squared routing weight: what the token's error counts in the layer's output). Block scales are those of the scale
rule on the original weights, so columns may be taken in order of decreasing importance.

The result becomes the masters' starting point: where rounding the compensated (not yet rounded) value under the scale
rule gives the chosen codes, the master keeps that value, so that elements near a threshold stay easy to flip in
training; elsewhere the master is put on the grid value itself.

All experts of a layer are processed together as batched matrices; second moments are gathered one layer at a time.
"""

from __future__ import annotations

import torch
from torch import nn

from mxfp4 import BLOCK_SIZE, fake_quantize, quantize
from mxfp4.codec import round_to_scales, scale_values
from qat.attach import ExpertQuantizer, ExpertTensor
from recipes.schema import WarmStart


@torch.no_grad()
def gptq_warm_start(teacher: nn.Module, quantizer: ExpertQuantizer, rows: torch.Tensor, settings: WarmStart) -> None:
    """Replaces the quantizer's masters by GPTQ-compensated ones and requantizes the model.

    Args:
        teacher: the unquantized model, whose expert inputs are measured.
        rows: int64 [sequences, T] calibration text.

    Raises:
        ValueError: an experts class whose intermediate activations cannot be computed here.
    """
    by_module: dict[str, list[int]] = {}
    for i, tensor in enumerate(quantizer.tensors):
        by_module.setdefault(tensor.module, []).append(i)
    for module, indices in by_module.items():
        moments = second_moments(teacher, module, [quantizer.tensors[i] for i in indices], rows)
        for i in indices:
            tensor, master = quantizer.tensors[i], quantizer.masters[i]
            weight_EOI = master.data if tensor.axis == -1 else master.data.transpose(1, 2)
            start = compensated(weight_EOI.clone(), moments[tensor.name], quantizer.scale_rule, settings.damping)
            weight_EOI.copy_(start)
    quantizer.requantize()


def second_moments(teacher: nn.Module, module_name: str, tensors: list[ExpertTensor], rows: torch.Tensor,
                   batch: int = 8) -> dict[str, torch.Tensor]:
    """For each tensor of one experts module, [E, I, I] float32 second moments of its inputs over `rows`."""
    module = teacher.get_submodule(module_name)
    if not hasattr(module, "_apply_gate") or getattr(module, "has_bias", False):
        raise ValueError(f"qat.warm_start.method: gptq does not support {type(module).__name__} "
                         "(experts with biases or an unknown gate); use none")
    names = {t.name.rpartition(".")[2]: t.name for t in tensors}
    moments = {t.name: torch.zeros(t.num_experts, t.parameter.shape[t.axis], t.parameter.shape[t.axis],
                                   device=t.parameter.device) for t in tensors}
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"

    def gather(_, args, kwargs):
        hidden_NH, chosen_NK, weights_NK = args if len(args) == 3 else (args + tuple(kwargs.values()))[:3]
        for e in range(tensors[0].num_experts):
            token, slot = (chosen_NK == e).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            x = hidden_NH[token]
            importance = weights_NK[token, slot].float()[:, None]
            _accumulate(moments[names[first]][e], x.float() * importance)
            matrix = getattr(module, first)[e]
            inner = x @ matrix if module.is_transposed else x @ matrix.T
            inner = module._apply_gate(inner) if first == "gate_up_proj" else module.act_fn(inner)
            _accumulate(moments[names["down_proj"]][e], inner.float() * importance)

    handle = module.register_forward_pre_hook(gather, with_kwargs=True)
    try:
        for start in range(0, rows.shape[0], batch):
            teacher(input_ids=rows[start:start + batch], use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return moments


def _accumulate(moment_II: torch.Tensor, x_NI: torch.Tensor) -> None:
    moment_II.addmm_(x_NI.T, x_NI)


def compensated(weight_EOI: torch.Tensor, moment_EII: torch.Tensor, scale_rule: str, damping: float) -> torch.Tensor:
    """Masters [E, O, I] whose rounding is GPTQ's choice of codes for float32 weights [E, O, I].

    Experts that saw no token keep their weights (plain rounding).
    """
    E, O, I = weight_EOI.shape
    scale_EOI = scale_values(quantize(weight_EOI, scale_rule=scale_rule)[1]).repeat_interleave(BLOCK_SIZE, dim=-1)
    diagonal = moment_EII.diagonal(dim1=1, dim2=2)
    unseen = diagonal.sum(1) == 0
    mean = diagonal.mean(1).masked_fill(unseen, 1.0)
    order_EI = diagonal.argsort(dim=1, descending=True)
    columns = order_EI[:, None, :].expand(E, O, I)
    w = weight_EOI.gather(2, columns)
    scale = scale_EOI.gather(2, columns)
    h = moment_EII.gather(1, order_EI[:, :, None].expand(E, I, I)).gather(2, order_EI[:, None, :].expand(E, I, I))
    h = h / mean[:, None, None] + damping * torch.eye(I, device=h.device)
    # Rows of the upper Cholesky factor of H^-1: how the error of column j is spread over the columns after it.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    chosen = torch.empty_like(w)
    for j in range(I):
        chosen[:, :, j] = round_to_scales(w[:, :, j], scale[:, :, j])
        error = (w[:, :, j] - chosen[:, :, j]) / spread[:, j, j, None]
        if j + 1 < I:
            w[:, :, j + 1:] -= error[:, :, None] * spread[:, None, j, j + 1:]
    inverse = order_EI.argsort(dim=1)[:, None, :].expand(E, O, I)
    chosen, w = chosen.gather(2, inverse), w.gather(2, inverse)
    same = (fake_quantize(w, scale_rule=scale_rule) == chosen).unflatten(2, (I // BLOCK_SIZE, BLOCK_SIZE)).all(-1)
    start = torch.where(same.repeat_interleave(BLOCK_SIZE, dim=-1), w, chosen)
    return torch.where(unseen[:, None, None], weight_EOI, start)
