"""Training losses, computed in chunks so that [tokens, vocabulary] logits of a whole batch never exist.

Shape legend: N tokens of the batch, C tokens of a chunk, H hidden size, V vocabulary.

The logits of a chunk, of the student and of the teacher, are recomputed in the backward pass (activation
checkpointing), so memory is O(C.V) whatever the batch; teacher logits are computed from the teacher's last hidden state
and never stored. Default is KL(teacher || student): an already trained model is to keep its behaviour, and cross entropy
on other text pulls it away (quantization-aware distillation, arXiv 2601.20088).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class TokenStatistics:
    """Sums over predicted tokens (0-d float32 tensors, nats); `agree` counts equal arg-max tokens."""

    kl: torch.Tensor
    cross_entropy: torch.Tensor
    agree: torch.Tensor
    tokens: int


def chunked_statistics(student_NH: torch.Tensor, student_head: Callable, labels_N: torch.Tensor, *,
                       teacher_NH: torch.Tensor | None = None, teacher_head: Callable | None = None,
                       temperature: float = 1.0, chunk_tokens: int = 2048) -> TokenStatistics:
    """KL to the teacher, cross entropy against labels and top-1 agreement, summed over N tokens.

    Args:
        student_NH, teacher_NH: last hidden states (after the final norm), any float dtype; the teacher's gets no gradient.
        student_head, teacher_head: output projections, [., H] -> [., V] (`output_head`).
        labels_N: int64 next tokens; -100 is ignored by the cross entropy (the KL covers every row).
        temperature: divides both logits in the KL term, whose sum is multiplied by temperature**2.
        chunk_tokens: rows whose logits are held at once.
    """
    zero = student_NH.new_zeros((), dtype=torch.float32)
    kl, ce, agree = zero, zero, zero
    for start in range(0, student_NH.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        teacher_CH = None if teacher_NH is None else teacher_NH[rows].detach()
        args = (student_NH[rows], student_head, labels_N[rows], teacher_CH, teacher_head, temperature)
        if torch.is_grad_enabled() and student_NH.requires_grad:
            part = checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            part = _chunk(*args)
        kl, ce, agree = kl + part[0], ce + part[1], agree + part[2]
    return TokenStatistics(kl, ce, agree, student_NH.shape[0])


def _chunk(student_CH, student_head, labels_C, teacher_CH, teacher_head, temperature):
    logits_CV = student_head(student_CH).float()
    ce = F.cross_entropy(logits_CV, labels_C, ignore_index=-100, reduction="sum")
    if teacher_CH is None:
        return torch.zeros_like(ce), ce, torch.zeros_like(ce)
    with torch.no_grad():
        teacher_CV = teacher_head(teacher_CH).float()
        agree = (teacher_CV.argmax(-1) == logits_CV.argmax(-1)).sum().float()
        target_CV = torch.log_softmax(teacher_CV / temperature, dim=-1)
    log_student_CV = torch.log_softmax(logits_CV / temperature, dim=-1)
    kl = F.kl_div(log_student_CV, target_CV, log_target=True, reduction="sum") * temperature**2
    return kl, ce, agree


class _ImmediateGradient(torch.autograd.Function):
    """kl_weight * sum of KL + ce_weight * sum of cross entropy, with the gradient for the student's hidden states taken
    chunk by chunk in the forward pass: the head is frozen, so its logits are needed for nothing else."""

    @staticmethod
    def forward(ctx, student_NH, student_head, labels_N, teacher_NH, teacher_head, temperature, kl_weight, ce_weight, chunk):
        sums, gradient_NH = torch.zeros(3, device=student_NH.device), torch.empty_like(student_NH)
        for start in range(0, student_NH.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_CV = student_head(student_NH[rows]).float()
            teacher_CV = teacher_head(teacher_NH[rows]).float()
            sums[2] += (teacher_CV.argmax(-1) == logits_CV.argmax(-1)).sum()
            labels_C = labels_N[rows]
            seen = labels_C >= 0
            log_p = torch.log_softmax(logits_CV, dim=-1)
            sums[1] -= log_p.gather(1, labels_C.clamp_min(0)[:, None])[:, 0][seen].sum()
            of_logits = None
            if ce_weight:
                of_logits = log_p.exp()
                of_logits.scatter_add_(1, labels_C.clamp_min(0)[:, None], of_logits.new_full((len(labels_C), 1), -1.0))
                of_logits.mul_(ce_weight * seen[:, None])
            if temperature != 1:
                log_p = torch.log_softmax(logits_CV / temperature, dim=-1)
                teacher_CV /= temperature
            target_CV = torch.log_softmax(teacher_CV, dim=-1)
            p_CV = target_CV.exp()
            sums[0] += (p_CV * (target_CV - log_p)).sum() * temperature**2
            kl_part = log_p.exp_().sub_(p_CV).mul_(kl_weight * temperature)
            of_logits = kl_part if of_logits is None else of_logits.add_(kl_part)
            gradient_NH[rows] = of_logits.to(student_NH.dtype) @ student_head.weight
        ctx.save_for_backward(gradient_NH)
        loss = kl_weight * sums[0] + ce_weight * sums[1]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, of_loss, of_sums):
        gradient_NH, = ctx.saved_tensors
        return (gradient_NH * of_loss.to(gradient_NH.dtype), *[None] * 8)


def immediate_statistics(student_NH: torch.Tensor, student_head: nn.Module, labels_N: torch.Tensor, *, teacher_NH: torch.Tensor,
                         teacher_head: nn.Module, kl_weight: float, ce_weight: float, temperature: float = 1.0,
                         chunk_tokens: int = 2048) -> tuple[torch.Tensor, TokenStatistics]:
    """(kl_weight * KL + ce_weight * cross entropy, the statistics without gradient) of `chunked_statistics`'s arguments.

    Three products with the vocabulary instead of five; the heads get no gradient.
    """
    loss, sums = _ImmediateGradient.apply(student_NH, student_head, labels_N, teacher_NH.detach(), teacher_head, temperature,
                                          kl_weight, ce_weight, chunk_tokens)
    return loss, TokenStatistics(sums[0], sums[1], sums[2], student_NH.shape[0])


def hidden_kl(student_NH: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student), in nats, of the softmax over the H features of last hidden states [N, H]."""
    target = torch.log_softmax(teacher_NH.detach().float(), dim=-1)
    return F.kl_div(torch.log_softmax(student_NH.float(), dim=-1), target, log_target=True, reduction="batchmean")


def hidden_loss(student_layers: list[torch.Tensor], teacher_layers: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of |student - teacher|^2 / variance of the teacher's layer output (dimensionless).

    Args:
        student_layers, teacher_layers: outputs of the same decoder layers, each [..., H]; the teacher's get no gradient.
    """
    terms = []
    for student, teacher in zip(student_layers, teacher_layers, strict=True):
        teacher = teacher.detach().float()
        terms.append((student.float() - teacher).square().mean() / teacher.var().clamp_min(1e-12))
    return torch.stack(terms).mean()


def output_head(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output projection, to be called chunk by chunk after a forward pass of the whole model.

    Of an FSDP unit the function past its hooks: they would take each call for a pass of its own and let the gathered weight go
    after the first chunk's backward pass. The weight stays gathered from the model's forward pass on (`keep_full_weight`).
    """
    head = model.get_output_embeddings()
    return _PastHooks(head) if type(head).__name__.startswith("FSDP") else head


class _PastHooks:
    def __init__(self, head: nn.Linear):
        self.head = head

    @property
    def weight(self) -> torch.Tensor:
        return self.head.weight

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.head.weight, self.head.bias)


class HiddenCapture:
    """Context manager: the last hidden state (after the final norm) and, if asked, every decoder layer's output.

    Works on any transformers causal language model, by forward hooks on its base model and decoder layers: the model is
    called as a whole, while logits of all positions are never computed.
    """

    def __init__(self, model: nn.Module, *, layers: bool = False):
        self.last: torch.Tensor | None = None
        self.layers: list[torch.Tensor] = []
        self._base = model.base_model
        self._layers = list(self._base.layers) if layers else []
        self._handles: list = []

    def __enter__(self) -> HiddenCapture:
        self._handles = [self._base.register_forward_hook(self._keep_last)]
        self._handles += [layer.register_forward_hook(self._keep_layer) for layer in self._layers]
        return self

    def __exit__(self, *exc) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep_last(self, module, inputs, output) -> None:
        self.last = output.last_hidden_state

    def _keep_layer(self, module, inputs, output) -> None:
        self.layers.append(output[0] if isinstance(output, tuple) else output)


def run_hidden(model: nn.Module, input_ids: torch.Tensor, *, layers: bool = False) -> HiddenCapture:
    """Runs the model on [B, T] tokens and returns its hidden states.

    A model whose decoder an engine runs has that engine as `decoder_pass` (`training.sharding.zero3`).
    """
    with HiddenCapture(model, layers=layers) as seen:
        if "decoder_pass" in model.__dict__:
            seen.last = model.__dict__["decoder_pass"](input_ids)  # the engine's backward pass begins at what it returns
        else:
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    return seen
