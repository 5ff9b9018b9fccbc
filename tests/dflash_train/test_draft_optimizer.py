"""Muon turns every matrix, and nothing else; its step is the orthogonalised gradient."""

import copy

import pytest
import torch
from tolerance import NEWTON_SCHULZ_BF16
from torch import nn

from dflash_train.optimizer import is_matrix, make_optimizer
from modeling.drafter import DFlashDraftModel, drafter_config
from qat.optimizer import matched_rate
from recipes.schema import DraftOptimizer


def drafter():
    torch.manual_seed(0)
    return DFlashDraftModel(drafter_config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=100, target_layer_ids=[0, 1], num_target_layers=2, mask_token_id=0, rotary_base=1e4, window=16,
        markov_rank=8, convolution_rank=8)).float()


def step(model, settings, seed=0):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = make_optimizer(model, settings)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}, grads, optimizer


def test_matrices_get_muon_and_vectors_and_vocabulary_tables_get_adamw_at_the_high_rate():
    model = drafter()
    optimizer = make_optimizer(model, DraftOptimizer(learning_rate=1e-3, adamw_learning_rate=7e-3))
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: (g["use_muon"], g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        muon, rate = rates[name]
        assert muon == (parameter.ndim >= 2 and "markov" not in name), name
        assert rate == (matched_rate(1e-3, parameter.shape) if muon else 7e-3)
    assert not is_matrix("markov_next.weight", model.markov_next.weight)
    assert all(g["weight_decay"] == 0 for g in optimizer.param_groups if not g["use_muon"])


def test_the_first_step_has_flat_singular_values_and_the_rms_of_adamw():
    updates, _, _ = step(drafter(), DraftOptimizer(learning_rate=1e-2))
    for name in ("fc.weight", "layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"):
        update = updates[name]
        band = torch.linalg.svdvals(update) / (1e-2 * 0.2 * max(update.shape) ** 0.5)
        assert 0.5 < band.min() and band.max() < 1.5, name
        assert 0.6 < float(update.square().mean().sqrt()) / (0.2 * 1e-2) < 1.3


def test_the_step_is_a_slow_references_newton_schulz_of_the_gradient():
    updates, grads, _ = step(drafter(), DraftOptimizer(learning_rate=1e-2, betas=(0.95, 0.95)))
    for name in ("layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"):
        momentum = 0.05 * grads[name]
        x = (0.05 * grads[name] + 0.95 * momentum).double()  # Nesterov of the first step
        x = x / x.norm()
        wide = x if x.shape[0] <= x.shape[1] else x.T
        for _ in range(5):
            gram = wide @ wide.T
            wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
        expected = -1e-2 * 0.2 * max(x.shape) ** 0.5 * (wide if x.shape[0] <= x.shape[1] else wide.T)
        error = (updates[name] - expected).norm() / expected.norm()
        assert error < NEWTON_SCHULZ_BF16, name


def test_stacked_matrices_are_orthogonalised_one_by_one():
    class Stack(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight)

    gradient = torch.randn(3, 32, 64)
    stack, alone = Stack(torch.zeros(3, 32, 64)), Stack(torch.zeros(32, 64))
    for model, grad in ((stack, gradient), (alone, gradient[1])):
        optimizer = make_optimizer(model, DraftOptimizer())
        model.weight.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(stack.weight.detach()[1], alone.weight.detach())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_steps_are_deterministic_and_survive_a_state_round_trip(name):
    settings = DraftOptimizer(name=name)
    first, second = step(drafter(), settings), step(drafter(), settings)
    assert all(torch.equal(first[0][n], second[0][n]) for n in first[0])
    model, other = drafter(), drafter()
    a, b = make_optimizer(model, settings), make_optimizer(other, settings)
    for index in range(3):
        if index == 2:
            b.load_state_dict(copy.deepcopy(a.state_dict()))
            other.load_state_dict(model.state_dict())
        for m, optimizer in ((model, a), (other, b)):
            torch.manual_seed(index)
            for p in m.parameters():
                p.grad = torch.randn_like(p)
            if m is model or index == 2:
                optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_parameters_without_gradient_do_not_break_muon():
    model = drafter()
    optimizer = make_optimizer(model, DraftOptimizer())
    before = model.fc.weight.detach().clone()
    model.layers[0].mlp.up_proj.weight.grad = torch.ones_like(model.layers[0].mlp.up_proj.weight)
    optimizer.step()
    assert torch.equal(model.fc.weight.detach(), before)
