"""Chunked losses equal the whole-batch formulas, in value and gradient, and never hold more logits than a chunk."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerance import MODEL_FP32
from torch import nn

from qat.losses import chunked_statistics, hidden_loss


def setup(tokens: int, seed: int = 0):
    torch.manual_seed(seed)
    head = nn.Linear(16, 50, bias=False)
    student = torch.randn(tokens, 16, requires_grad=True)
    return head, student, torch.randn(tokens, 16), torch.randint(0, 50, (tokens,))


@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunks_equal_the_whole(tokens, temperature):
    head, student, teacher, labels = setup(tokens)
    labels[0] = -100
    sums = chunked_statistics(student, head, labels, teacher_NH=teacher, teacher_head=head, temperature=temperature,
                              chunk_tokens=17)
    (sums.kl + sums.cross_entropy).backward()
    gradient, head_gradient = student.grad.clone(), head.weight.grad.clone()

    student.grad, head.weight.grad = None, None
    logits = head(student)
    with torch.no_grad():
        taught = head(teacher)
    p, log_q = (taught / temperature).softmax(-1), (logits / temperature).log_softmax(-1)
    kl = (p * (p.log() - log_q)).sum() * temperature**2
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") if tokens > 1 else logits.sum() * 0
    (kl + ce).backward()
    torch.testing.assert_close(sums.kl, kl)
    torch.testing.assert_close(sums.cross_entropy, ce.detach() if tokens == 1 else ce)
    assert int(sums.agree) == int((logits.argmax(-1) == taught.argmax(-1)).sum())
    torch.testing.assert_close(gradient, student.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head_gradient, head.weight.grad, atol=1e-5, rtol=1e-4)


def test_equal_models_have_no_kl_and_agree_everywhere():
    head, student, _, labels = setup(40)
    sums = chunked_statistics(student, head, labels, teacher_NH=student, teacher_head=head, chunk_tokens=7)
    assert abs(float(sums.kl)) < 1e-5 and int(sums.agree) == 40


def test_no_more_logits_than_a_chunk_are_ever_computed():
    head, student, teacher, labels = setup(100)
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[0]))
    sums = chunked_statistics(student, head, labels, teacher_NH=teacher, teacher_head=head, chunk_tokens=32)
    (sums.kl + sums.cross_entropy).backward()
    assert max(seen) == 32


def test_hidden_loss_is_relative_to_the_teacher_and_zero_for_equals():
    torch.manual_seed(0)
    layers = [torch.randn(2, 5, 8), 100 * torch.randn(2, 5, 8)]
    assert float(hidden_loss(layers, layers)) == 0
    shifted = [x + 0.1 * x.std() for x in layers]
    torch.testing.assert_close(hidden_loss(shifted, layers), torch.tensor(0.01))


@pytest.mark.parametrize("gradient", ["recompute", "immediate"])
def test_a_token_counts_the_same_in_whatever_micro_step_it_stands(model, gradient):
    """Losses on answers: the gradient of unequal micro-steps is that of one batch, the mean over its counted tokens."""
    from qat.expert_quantizer import ExpertQuantizer
    from qat.trainer import Trainer, make_teacher
    from recipes.schema import QAT

    ids = torch.randint(1, 250, (4, 24))
    rows = torch.where(torch.rand(4, 24) < torch.tensor([0.1, 0.9, 0.5, 0.6])[:, None], ~ids, ids)
    teacher, quantizer = make_teacher(model.eval()), ExpertQuantizer(model)
    settings = QAT(steps=1, loss={"kl": 1.0, "cross_entropy": 0.3, "hidden_kl": 0.1, "gradient": gradient})
    recipe = SimpleNamespace(qat=settings, data=SimpleNamespace(loss_on="answers"))
    alone = SimpleNamespace(device="cpu", reduce=lambda value, reduction: value)
    job = SimpleNamespace(recipe=recipe, model=model, teacher=teacher, states=None, accelerator=alone)
    found = []
    for parts in ([rows], rows.split(1)):
        for part, share in zip(parts, Trainer._shares(job, list(parts)), strict=True):
            (Trainer._losses(job, {"input_ids": part}, share)["loss"] / len(parts)).backward()
        quantizer.pull_gradients()
        found.append([m.grad for m in quantizer.masters])
        for master in quantizer.masters:
            master.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other / one.abs().max(), one / one.abs().max(), **MODEL_FP32)
