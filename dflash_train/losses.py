"""The drafter's losses, fused with the head: [anchors x block, vocabulary] logits never exist as a whole.

For a chunk of anchors the logits are made, the loss and its gradient with respect to the chunk's hidden states are taken
at once, and the logits are dropped; the backward pass through the drafter then starts from those gradients. Against
recomputation in the backward pass this saves one head product and one softmax of each kind. Teacher logits are
recomputed from the target's last hidden state, chunk by chunk, and never stored.

Per masked position k = 1..B-1 of a block, with p the target's distribution at that position (given the true text before
it) and q the drafter's:

    cross_entropy  -log q(x)          kl  KL(p || q)          tv  1 - sum min(p, q)          lk  -log sum min(p, q)

1 - tv is the probability that rejection sampling accepts. Weights: `decay` exp(-(k-1)/gamma) (DFlash), or `dpace`
w_k = sum_{m >= k} prod_{i <= m} ((1 - a) q(x_i) + a), the expected number of accepted tokens that depend on position k
(D-PACE, arXiv 2605.18810), without a gradient. The sum is divided by the number of anchors.

Shape legend: N anchors, C anchors of a chunk, T = B - 1 masked positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from modeling.drafter import DFlashDraftModel
from recipes.schema import DraftLoss


class _Precomputed(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx, value, gradients, *tensors):
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(grad * g for g in ctx.saved_tensors)


def draft_loss(hidden_NTH: torch.Tensor, labels_NT: torch.Tensor, teacher_NTH: torch.Tensor, previous_NT: torch.Tensor,
               head: nn.Module, drafter: DFlashDraftModel, settings: DraftLoss) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss (differentiable) and metrics.

    Args:
        hidden_NTH: drafter's hidden states at the masked positions, after its final norm.
        labels_NT: the text's tokens; -100 = no label (such positions, and all after them, count for nothing).
        teacher_NTH: the target's last hidden states, at the positions that predict the labels.
        previous_NT: the token before each masked position (used by a Markov head only).
        head: the target's output projection, frozen.

    Returns:
        The loss, and sums over anchors (0-d or [T], float32, no gradient): `anchors`, `loss`, `valid` [T], `correct` [T]
        (arg-max is the label), `overlap` [T] (sum min(p, q)), `greedy_length`, `sampled_length` (expected tokens of a
        round begun at each anchor, bonus included).
    """
    markov = [] if drafter.markov_next is None else [drafter.markov_previous.weight, drafter.markov_next.weight]
    learns = torch.is_grad_enabled() and hidden_NTH.requires_grad
    anchors = (labels_NT[:, 0] >= 0).sum().clamp_min(1)
    sums: dict[str, torch.Tensor] = {}
    gradients, markov_gradients = [], [torch.zeros_like(w) for w in markov]
    for start in range(0, len(hidden_NTH), settings.chunk_anchors):
        rows = slice(start, start + settings.chunk_anchors)
        with torch.enable_grad() if learns else torch.no_grad():
            chunk = hidden_NTH[rows].detach().requires_grad_(learns)
            logits = head(chunk.to(head.weight.dtype)).float()
            if markov:
                logits = logits + drafter.markov_bias(previous_NT[rows]).float()
            value, metrics, slope = chunk_loss(logits, labels_NT[rows], teacher_NTH[rows], head, settings)
            value = value / anchors
        if learns:
            grad, *others = (torch.autograd.grad(value, [chunk, *markov]) if slope is None else
                             torch.autograd.grad(logits, [chunk, *markov], slope.div_(anchors)))
            gradients.append(grad)
            for total, part in zip(markov_gradients, others, strict=True):
                total += part
        for name, part in (metrics | {"loss": value.detach() * anchors}).items():
            sums[name] = sums.get(name, 0) + part
    sums["anchors"] = anchors.float()
    loss = sums["loss"] / anchors
    if learns:
        loss = _Precomputed.apply(loss, [torch.cat(gradients).to(hidden_NTH.dtype), *markov_gradients], hidden_NTH, *markov)
    return loss, sums


def chunk_loss(logits_CTV, labels_CT, teacher_CTH, head, settings) -> tuple[torch.Tensor, dict, torch.Tensor | None]:
    """Weighted sum of losses, metric sums, and, without tv and lk, the sum's gradient with respect to the logits (else None).

    That gradient is known in closed form, (ce + kl) q - kl p - ce [label], and takes fewer passes over [C, T, V] than autograd.
    """
    valid = (labels_CT >= 0).cumprod(1).bool()
    labels = labels_CT.clamp_min(0)
    known = settings.tv == settings.lk == 0
    with torch.no_grad():
        log_p = head(teacher_CTH.to(head.weight.dtype)).float().log_softmax(-1)
        p = log_p.exp()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not known):
        log_q = logits_CTV.log_softmax(-1)
        log_q_label = log_q.gather(-1, labels[..., None])[..., 0]
        losses = settings.cross_entropy * -log_q_label
        if settings.kl:
            losses = losses + settings.kl * (log_p.sub_(log_q).mul_(p) if known else p * (log_p - log_q)).sum(-1)
        q = log_q.exp_() if known else log_q.exp()
        overlap = (torch.minimum(p, q, out=log_p) if known else torch.minimum(p, q)).sum(-1)
        losses = losses + settings.tv * (1 - overlap) - settings.lk * overlap.clamp_min(1e-6).log()
    weights = position_weights(log_q_label.detach().exp(), valid, settings)
    value = torch.where(valid, weights * losses, 0).sum()
    with torch.no_grad():
        correct = (logits_CTV.argmax(-1) == labels) & valid
        accepted = torch.where(valid, overlap.detach(), 0)
        metrics = {"valid": valid.sum(0).float(), "correct": correct.sum(0).float(), "overlap": accepted.sum(0),
                   "cross_entropy": torch.where(valid, -log_q_label.detach(), 0).sum(),
                   "greedy_length": (valid[:, 0] + correct.cumprod(1).sum(1)).sum().float(),
                   "sampled_length": (valid[:, 0] + accepted.cumprod(1).sum(1)).sum()}
        if not known:
            return value, metrics, None
        counts = torch.where(valid, weights, 0)[..., None]
        slope = q.mul_(counts * (settings.cross_entropy + settings.kl)).sub_(p.mul_(counts * settings.kl))
        return value, metrics, slope.scatter_add_(-1, labels[..., None], -settings.cross_entropy * counts)


def position_weights(confidence_CT: torch.Tensor, valid_CT: torch.Tensor, settings: DraftLoss) -> torch.Tensor:
    """Weights [C or 1, T] of the masked positions; see the module's text."""
    if settings.weighting == "decay":
        steps = torch.arange(confidence_CT.shape[1], device=confidence_CT.device, dtype=torch.float32)
        return torch.exp(-steps / settings.decay_gamma)[None]
    smoothed = (1 - settings.dpace_alpha) * confidence_CT + settings.dpace_alpha
    reached = torch.where(valid_CT, smoothed, 0).cumprod(1)
    return reached.flip(1).cumsum(1).flip(1)
