"""Schedules begin, peak and end where they say; Muon orthogonalises every expert by itself."""

import pytest
import torch

from qat.optimizer import make_optimizer, matched_rate
from recipes.schema import Optimizer
from training.schedule import learning_rate_factor, make_schedule, peak, present_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_warm_up_to_the_peak_and_never_exceed_it(schedule, warmup):
    settings = Optimizer(schedule=schedule, warmup_steps=warmup, min_learning_rate_ratio=0.1)
    factors = [learning_rate_factor(s, 100, settings) for s in range(101)]
    assert factors[:warmup] == sorted(factors[:warmup]) and all(0 < f <= 1 for f in factors)
    assert factors[warmup] == 1
    assert factors[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_wsd_is_constant_until_its_decay():
    settings = Optimizer(schedule="wsd", warmup_steps=0, decay_fraction=0.25)
    factors = [learning_rate_factor(s, 100, settings) for s in range(100)]
    assert set(factors[:76]) == {1.0} and factors[76] < 1


def step(shape, settings) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = make_optimizer([parameter], settings)
    parameter.grad = torch.randn(shape)
    optimizer.step()
    return parameter.detach(), parameter.grad


@pytest.mark.parametrize("shape", [(3, 64, 32), (3, 32, 64), (1, 48, 48)])
def test_muon_steps_have_flat_singular_values_and_the_rms_of_adamw(shape):
    settings = Optimizer(name="muon", learning_rate=1e-2)
    update, _ = step(shape, settings)
    for expert in update:
        values = torch.linalg.svdvals(expert)
        assert values.max() / values.min() < 2.5  # Newton-Schulz of five steps ends in about (0.7, 1.2)
        assert 0.6 < float(expert.square().mean().sqrt()) / (0.2 * 1e-2) < 1.3


def test_muon_treats_experts_of_a_fused_tensor_separately():
    settings = Optimizer(name="muon")
    update, gradient = step((3, 32, 64), settings)
    alone = torch.nn.Parameter(torch.zeros(1, 32, 64))
    optimizer = make_optimizer([alone], settings)
    alone.grad = gradient[1:2].clone()
    optimizer.step()
    torch.testing.assert_close(update[1], alone.detach()[0])


def test_a_relative_rate_moves_every_tensor_by_the_same_share_of_its_size():
    torch.manual_seed(0)
    small, large, zero = torch.randn(3, 8, 32), 8 * torch.randn(3, 32, 8), torch.zeros(4)
    parameters = [torch.nn.Parameter(t.clone()) for t in (small, large, zero)]
    optimizer = make_optimizer(parameters, Optimizer(learning_rate=1e-3, relative=True))
    for p in parameters:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    shares = [float((p.detach() - t).norm() / t.norm()) for p, t in zip(parameters, (small, large), strict=False)]
    assert shares == pytest.approx([1e-3, 1e-3], rel=1e-3) and not parameters[2].detach().any()
    with pytest.raises(ValueError, match="adamw"):
        Optimizer(name="muon", relative=True)


def test_adamw_follows_the_schedule():
    parameter = torch.nn.Parameter(torch.zeros(4))
    settings = Optimizer(learning_rate=0.5, warmup_steps=3)
    optimizer = make_optimizer([parameter], settings)
    schedule = make_schedule(optimizer, 10, settings)
    seen = []
    for _ in range(4):
        seen.append(schedule.get_last_lr()[0])
        parameter.grad = torch.ones(4)
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.125, 0.25, 0.375, 0.5])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_optimizers_step_under_accelerate_and_a_schedule(name):
    from accelerate import Accelerator

    parameter = torch.nn.Parameter(torch.ones(2, 4, 8))
    settings = Optimizer(name=name, learning_rate=0.1, warmup_steps=0)
    optimizer = make_optimizer([parameter], settings)
    schedule = make_schedule(optimizer, 10, settings)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    parameter.grad = torch.randn(2, 4, 8)
    prepared.step()
    schedule.step()
    assert not torch.equal(parameter, torch.ones(2, 4, 8))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_rate_that_is_recorded_is_the_recipes_whatever_units_the_optimizer_has(name):
    settings = Optimizer(name=name, learning_rate=1e-3, warmup_steps=3)
    parameter = torch.nn.Parameter(torch.zeros(1, 64, 512))
    optimizer = make_optimizer([parameter], settings)
    schedule = make_schedule(optimizer, 10, settings)
    units = matched_rate(1.0, (64, 512)) if name == "muon" else 1.0
    for now in range(10):
        assert schedule.get_last_lr()[0] == pytest.approx(units * present_rate(now, 10, settings), rel=1e-12)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    assert present_rate(3, 10, settings) == 1e-3 and units == (1.0 if name == "adamw" else pytest.approx(0.2 * 512**0.5))


@pytest.mark.parametrize("steps, warmup", [(6, 10), (10, 10), (11, 10), (12, 10), (1, 0), (200, 10)])
def test_the_peak_is_what_the_run_reaches(steps, warmup):
    settings = Optimizer(warmup_steps=warmup)
    assert peak(steps, settings) == max(learning_rate_factor(s, steps, settings) for s in range(steps))
