"""The fused loss is the plain formula, in value and gradient; weights and metrics mean what they say."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import DRAFTER_FP32
from torch import nn

from dflash_train.losses import draft_loss, position_weights
from modeling.drafter import DFlashDraftModel, drafter_config
from recipes.schema import DraftLoss

N, T, H, V = 11, 7, 64, 100


def make(markov_rank=0):
    torch.manual_seed(0)
    drafter = DFlashDraftModel(drafter_config(
        hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        vocab_size=V, target_layer_ids=[0], num_target_layers=2, mask_token_id=0, rotary_base=1e4, window=16,
        markov_rank=markov_rank))
    if markov_rank:
        nn.init.normal_(drafter.markov_next.weight)
    head = nn.Linear(H, V, bias=False).requires_grad_(False)
    labels = torch.randint(0, V, (N, T))
    labels[3, 4:], labels[5] = -100, -100
    return drafter, head, torch.randn(N, T, H, requires_grad=True), labels, torch.randn(N, T, H), torch.randint(0, V, (N, T))


def plain_formula(drafter, head, hidden, labels, teacher, previous, settings):
    logits = head(hidden)
    if drafter.markov_next is not None:
        logits = logits + drafter.markov_bias(previous)
    q, p = logits.softmax(-1), head(teacher).softmax(-1)
    total = 0.0
    for n in range(N):
        confidences = []
        for k in range(T):
            if labels[n, k] >= 0:
                confidences.append(float(q[n, k, labels[n, k]]))
        for k in range(len(confidences)):
            if settings.weighting == "decay":
                w = math.exp(-k / settings.decay_gamma)
            else:
                smooth = [(1 - settings.dpace_alpha) * c + settings.dpace_alpha for c in confidences]
                w = sum(math.prod(smooth[:m + 1]) for m in range(k, len(smooth)))
            overlap = torch.minimum(p[n, k], q[n, k]).sum()
            total = total + w * (settings.cross_entropy * -q[n, k, labels[n, k]].log()
                                 + settings.kl * F.kl_div(q[n, k].log(), p[n, k], reduction="sum")
                                 + settings.tv * (0.5 * (p[n, k] - q[n, k]).abs().sum()) - settings.lk * overlap.log())
    return total / int((labels[:, 0] >= 0).sum())


@pytest.mark.parametrize("markov_rank", [0, 4])
@pytest.mark.parametrize("settings", [
    {}, {"kl": 0.7}, {"cross_entropy": 0.0, "tv": 1.0}, {"cross_entropy": 0.0, "lk": 1.0},
    {"cross_entropy": 0.5, "kl": 0.3, "tv": 0.9, "lk": 0.2, "weighting": "dpace"}, {"weighting": "dpace", "dpace_alpha": 0.2}],
    ids=str)
def test_the_fused_loss_and_its_gradients_are_those_of_the_formula(settings, markov_rank):
    settings = DraftLoss(**settings, chunk_anchors=4)
    drafter, head, hidden, labels, teacher, previous = make(markov_rank)
    trained = [hidden] + ([drafter.markov_previous.weight, drafter.markov_next.weight] if markov_rank else [])
    expected = plain_formula(drafter, head, hidden, labels, teacher, previous, settings)
    wanted = torch.autograd.grad(expected, trained)
    loss, _ = draft_loss(hidden, labels, teacher, previous, head, drafter, settings)
    torch.testing.assert_close(loss, expected.detach(), **DRAFTER_FP32)
    for got, want in zip(torch.autograd.grad(2 * loss, trained), wanted, strict=True):
        torch.testing.assert_close(got, 2 * want, **DRAFTER_FP32)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(chunk):
    drafter, head, hidden, labels, teacher, previous = make()
    whole, sums = draft_loss(hidden, labels, teacher, previous, head, drafter, DraftLoss(kl=1.0, chunk_anchors=1000))
    parts, part_sums = draft_loss(hidden, labels, teacher, previous, head, drafter, DraftLoss(kl=1.0, chunk_anchors=chunk))
    torch.testing.assert_close(parts, whole, **DRAFTER_FP32)
    for name in sums:
        torch.testing.assert_close(part_sums[name], sums[name], **DRAFTER_FP32)


def test_no_logits_of_all_anchors_exist(monkeypatch):
    drafter, head, hidden, labels, teacher, previous = make()
    largest = []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda x: largest.append(x.numel() // H) or forward(x))
    draft_loss(hidden, labels, teacher, previous, head, drafter, DraftLoss(kl=1.0, chunk_anchors=2))
    assert max(largest) == 2 * T


def test_a_perfect_drafter_accepts_everything():
    drafter, head, _, _, teacher, previous = make()
    labels = head(teacher).argmax(-1)
    _, sums = draft_loss(teacher, labels, teacher, previous, head, drafter, DraftLoss())
    assert sums["greedy_length"] == N * 8 and sums["sampled_length"] == pytest.approx(N * 8, rel=1e-5)
    assert (sums["correct"] == N).all()


def test_lengths_count_only_what_lies_before_the_first_missing_label_and_the_bonus():
    drafter, head, hidden, labels, teacher, previous = make()
    with torch.no_grad():
        labels = torch.where(labels >= 0, head(hidden).argmax(-1), -100)
        labels[0, 2] = (labels[0, 2] + 1) % V
    _, sums = draft_loss(hidden.detach(), labels, teacher, previous, head, drafter, DraftLoss())
    assert sums["anchors"] == N - 1
    assert sums["greedy_length"] == (N - 3) * 8 + (1 + 2) + (1 + 4)


def test_decay_weights_are_those_of_dflash():
    weights = position_weights(torch.rand(3, T), torch.ones(3, T, dtype=torch.bool), DraftLoss(decay_gamma=4.0))
    torch.testing.assert_close(weights[0], torch.tensor([math.exp(-k / 4) for k in range(T)]))


def test_all_zero_losses_are_refused():
    with pytest.raises(ValueError, match="nothing would be trained"):
        DraftLoss(cross_entropy=0.0)
