"""Arithmetic of the methods beside plain rounding: scales searched and learned, soft codes, the pull to the grid, resets."""

import copy
import math

import pytest
import torch
from torch import nn

from mxfp4 import fake_quantize
from mxfp4.codec import block_scales, round_to_scales, scale_values
from mxfp4.fake_quant import round_at_scales
from qat.expert_quantizer import ExpertQuantizer
from qat.losses import chunked_statistics, hidden_kl, immediate_statistics
from qat.methods import (
    LIMIT,
    MethodQuantizer,
    pull_strength,
    pull_to_grid,
    searched_scales,
    sharpness,
    soft_round,
)
from qat.oscillation import OscillationControl
from qat.warm_start import Moments, compensate
from recipes.schema import QAT, GridPull, Oscillation, SoftRounding, WarmStart


def spread(shape, seed=0):
    """Weights over many octaves, with zeros, signed zeros and exact ties."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.randint(-9, 9, (*shape[:-1], 1), generator=generator).float()
    w = torch.randn(*shape, generator=generator) * torch.exp2(octaves)
    w.view(-1)[::7], w.view(-1)[3::11], w.view(-1)[5::13] = 0.0, -0.0, 0.25
    return w


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("offset", [-3, -1, 0, 1, 2])
def test_rounding_at_given_scales_equals_the_codec_bit_for_bit(axis, offset):
    w = spread((3, 64, 96))
    scales = (block_scales(w, axis=axis).to(torch.int16) + offset).to(torch.uint8)
    expected = round_to_scales(w, scale_values(scales).repeat_interleave(32, dim=axis))
    found = round_at_scales(w, scales, axis=axis)
    assert torch.equal(found, expected) and torch.equal(torch.signbit(found), torch.signbit(expected))


def test_scales_near_the_ends_of_the_format_are_left_to_the_codec():
    w = torch.randn(2, 32) * torch.tensor([[2.0**-120], [2.0**110]])
    scales = block_scales(w)
    assert torch.equal(round_at_scales(w, scales), round_to_scales(w, scale_values(scales)))


@pytest.mark.parametrize("rule", ["floor", "rceil", "even", "mse"])
@pytest.mark.parametrize("d", [-1, 0, 1])
def test_every_scale_rule_returns_values_of_a_shifted_scale(rule, d):
    """Files are written by the scale rule: they must hold what a scale an octave off gave."""
    w = spread((4, 32, 64), seed=d + 2)
    shifted = round_at_scales(w, (block_scales(w, scale_rule=rule).to(torch.int16) + d).to(torch.uint8))
    assert torch.equal(fake_quantize(shifted, scale_rule=rule), shifted)
    assert d == 0 or not torch.equal(shifted, fake_quantize(w, scale_rule=rule))


def quantizer_of(model, **settings):
    return MethodQuantizer(model, settings=QAT.model_validate({"steps": 10} | settings))


def test_searched_scales_have_the_least_weighted_error_of_each_block_and_a_tie_keeps_the_rule():
    w, importance = torch.randn(2, 16, 64), torch.rand(2, 64) + 0.01
    scales = searched_scales(w, importance, "even")
    rule = block_scales(w).to(torch.int16)

    def error(bytes_):
        return ((w - round_at_scales(w, bytes_.to(torch.uint8))).square() * importance[:, None]).unflatten(-1, (-1, 32)).sum(-1)

    ours = error(scales)
    for d in (-1, 0, 1):
        assert (ours <= error(rule + d)).all()
    assert 0 < float((scales != rule).float().mean()) < 0.5
    zero = torch.zeros(1, 2, 32)
    assert torch.equal(searched_scales(zero, torch.ones(1, 32), "even"), block_scales(zero))


def test_searched_scales_make_less_error_than_the_rule_and_are_kept(model):
    plain = ExpertQuantizer(copy.deepcopy(model))
    ours = quantizer_of(model, scales={"method": "searched"})
    for index, master in enumerate(plain.masters):
        def error(q, index=index, master=master):
            return float((q.tensors[index].parameter - master).detach().square().sum())
        assert error(ours) < error(plain)
    before = [t.parameter.detach().clone() for t in ours.tensors]
    ours.requantize()
    assert all(torch.equal(b, t.parameter) for b, t in zip(before, ours.tensors, strict=True))
    assert all(torch.equal(t.parameter, fake_quantize(t.parameter.detach())) for t in ours.tensors)


def test_shifts_of_zero_round_as_the_rule_does(model):
    plain, ours = ExpertQuantizer(copy.deepcopy(model)), quantizer_of(model, scales={"method": "learned"})
    for shift in ours.shifts:
        shift.data.zero_()
    ours.masters, _ = plain.masters, ours.masters
    ours.requantize()
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(plain.tensors, ours.tensors, strict=True))


def test_a_shift_gets_the_gradient_of_a_power_of_two_step_size(model):
    ours = quantizer_of(model, scales={"method": "learned"})
    master, tensor, shift = ours.masters[0], ours.tensors[0], ours.shifts[0]
    master.data[0, 0, :32] = 0.3
    master.data[0, 0, :3] = torch.tensor([4.0, 1.1, 7.9])  # scale 2 by the rule; a shift of -1 makes it 1 and saturates 7.9
    shift.data.zero_()
    shift.data[0, 0, 0] = -0.8
    ours.requantize()
    gradient = torch.randn_like(tensor.parameter, dtype=torch.float32)
    for t in ours.tensors:
        t.parameter.grad = torch.zeros_like(t.parameter, dtype=torch.float32)
    tensor.parameter.grad = gradient.clone()
    ours.pull_gradients()
    ours.take_shift_gradients()
    slopes = torch.full((32,), 0.5 - 0.3)
    slopes[:3] = torch.tensor([0.0, 1.0 - 1.1, 6.0])  # q - w, and q itself where w is beyond 6
    assert torch.allclose(shift.grad[0, 0, 0], math.log(2) * (gradient[0, 0, :32] * slopes).sum(), rtol=1e-5)
    shift.data[0, 0, 0] = -7.0
    ours.keep_shifts_in_reach()
    assert float(shift.data[0, 0, 0]) == pytest.approx(-LIMIT)


def test_compensation_on_searched_scales_is_what_the_quantizer_returns(model):
    """Whatever a compensated master does to the rule's scale of its block, the chosen values come back."""
    ours = quantizer_of(model, scales={"method": "searched"})
    w = ours.masters[1].data.clone()
    x = torch.randn(len(w), 200, w.shape[2]) @ torch.randn(w.shape[2], w.shape[2])
    moments = Moments(x.transpose(1, 2) @ x, None)
    scales = searched_scales(w, moments.inputs.diagonal(dim1=1, dim2=2), "even")
    values, chosen = compensate(w, moments, scales, WarmStart())
    ours.start_at(1, values, chosen, scales)
    ours.requantize()
    assert torch.equal(ours.tensors[1].parameter.float(), chosen)


def test_soft_codes_lie_between_the_neighbours_and_become_the_nearest():
    w = spread((2, 16, 64), 4)
    scales = block_scales(w)
    unit = scale_values(scales).repeat_interleave(32, dim=-1)
    hard = round_to_scales(w, unit)
    soft, slope = soft_round(w, scales, -1, 2.0)
    assert bool(((soft - hard).abs() <= 2 * unit).all()) and bool((slope >= 0).all())
    sharp, _ = soft_round(w, scales, -1, 2000.0)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    midpoints = (grid[1:] + grid[:-1]) / 2
    away = ((w.abs() / unit)[..., None] - midpoints).abs().amin(-1) > 0.01  # exact ties stay halfway between
    assert torch.allclose(sharp[away], hard[away], rtol=1e-4, atol=1e-30) and float(away.float().mean()) > 0.9


def test_the_gradient_of_soft_codes_is_their_derivative():
    w = torch.linspace(-5.9, 5.9, 96, dtype=torch.float32)[None].clone()
    w[0, ::32] = 6.0
    scales = torch.full((1, 3), 127, dtype=torch.uint8)
    step = 1e-3
    up, down = (soft_round(w + s, scales, -1, 6.0)[0] for s in (step, -step))
    slope = soft_round(w, scales, -1, 6.0)[1]
    inside = (w.abs()[..., None] - torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])).abs().amin(-1) > 2 * step
    assert torch.allclose(slope[inside], ((up - down) / (2 * step))[inside], rtol=2e-2, atol=2e-3)


def test_sharpness_grows_geometrically_and_ends_before_the_run_does():
    settings = SoftRounding(method="annealed", sharpness=(4.0, 64.0), until=0.5)
    assert [sharpness(s, 8, settings) for s in range(8)] == [4.0, 8.0, 16.0, 32.0, None, None, None, None]


def test_a_quantizer_with_soft_codes_scales_gradients_and_ends_on_the_grid(model):
    ours = quantizer_of(model, soft_rounding={"method": "annealed", "until": 0.5})
    tensor, master = ours.tensors[0], ours.masters[0]
    values, slope = soft_round(master.data, block_scales(master.data), -1, 4.0)
    assert torch.equal(tensor.parameter, values) and not torch.equal(values, fake_quantize(values))
    for t in ours.tensors:
        t.parameter.grad = torch.ones_like(t.parameter, dtype=torch.float32)
    ours.pull_gradients()
    assert torch.equal(master.grad, slope)
    ours.set_step(5)
    ours.requantize()
    assert torch.equal(tensor.parameter, fake_quantize(master.detach()))


def test_the_pull_removes_its_share_of_the_distance_to_the_rounded_value(model):
    quantizer = ExpertQuantizer(model)
    before, rounded = quantizer.masters[0].detach().clone(), quantizer.tensors[0].parameter.detach().float()
    pull_to_grid(quantizer, 0.25)
    assert torch.allclose(quantizer.masters[0], before - 0.25 * (before - rounded), rtol=1e-5, atol=1e-7)
    settings = GridPull(strength=40.0, start=0.5)
    assert [pull_strength(s, 10, settings) for s in (0, 4, 5, 9)] == [0.0, 0.0, pytest.approx(8.0), pytest.approx(40.0)]


def test_a_reset_puts_an_oscillating_master_in_the_middle_of_its_cell_and_leaves_travelling_ones(model):
    quantizer = ExpertQuantizer(model)
    control = OscillationControl(quantizer, Oscillation(method="reset", start=0.0, reset_every=5, reset_ratio=4.0), 10)
    master, tensor = quantizer.masters[0], quantizer.tensors[0]
    with torch.no_grad():
        master[0, 0, :32] = 0.0
        master[0, 0, 0] = 4.0  # scale 1 for this block
    for step in range(5):
        with torch.no_grad():
            master[0, 0, 1] = 1.25 + (0.02 if step % 2 else -0.02)  # 1 or 1.5, over a hundredth of the way
            master[0, 0, 2] = 0.6 + 0.5 * step                     # to 2.6: the rounded value goes as far
        control.requantize(step)
    master = master.detach()
    assert float(master[0, 0, 1]) == float(tensor.parameter.detach()[0, 0, 1]) == 1.0
    assert float(master[0, 0, 2]) == pytest.approx(2.6)
    assert not control.ways[0].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kl_weight, ce_weight", [(1.0, 0.0), (0.7, 0.4), (0.0, 1.0)])
def test_immediate_gradients_equal_those_of_the_backward_pass(kl_weight, ce_weight, temperature):
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(24, 61, bias=False).requires_grad_(False), nn.Linear(24, 61, bias=False)
    student, teacher = torch.randn(63, 24), torch.randn(63, 24)
    labels = torch.randint(0, 61, (63,))
    labels[::8] = -100
    options = dict(teacher_NH=teacher, teacher_head=teacher_head, temperature=temperature, chunk_tokens=10)
    a, b = (student.clone().requires_grad_(True) for _ in range(2))
    sums = chunked_statistics(a, head, labels, **options)
    expected = kl_weight * sums.kl + ce_weight * sums.cross_entropy
    expected.backward()
    loss, found = immediate_statistics(b, head, labels, **options, kl_weight=kl_weight, ce_weight=ce_weight)
    (3 * loss).backward()
    for name in ("kl", "cross_entropy", "agree"):
        assert torch.allclose(getattr(found, name), getattr(sums, name), rtol=1e-5)
    assert torch.allclose(loss, expected, rtol=1e-5) and torch.allclose(b.grad, 3 * a.grad, rtol=1e-4, atol=1e-6)


def test_hidden_kl_is_the_divergence_of_feature_distributions():
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 20, requires_grad=True), torch.randn(7, 20)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert torch.allclose(hidden_kl(student, teacher), (p * (p / q).log()).sum(-1).mean(), rtol=1e-5)
    assert float(hidden_kl(teacher, teacher)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("settings, message", [
    ({"loss": {"gradient": "immediate"}, "train": "all"}, "gives the head no gradient"),
    ({"scales": {"method": "learned"}, "optimizer": {"name": "muon"}}, "learned needs"),
    ({"scales": {"method": "learned"}, "soft_rounding": {"method": "annealed"}}, "learned needs")])
def test_methods_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        QAT.model_validate({"steps": 10} | settings)
