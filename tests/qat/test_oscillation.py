"""Oscillation control: a master that hovers at a threshold stops flipping its code; settled ones are untouched."""

import pytest
import torch

from mxfp4 import fake_quantize
from qat.expert_quantizer import ExpertQuantizer
from qat.oscillation import OscillationControl
from recipes.schema import Oscillation


def run(model, method: str, steps: int, **settings) -> tuple[int, int]:
    """Makes one element hover around a threshold; returns its flips in the first and second half of the run."""
    quantizer = ExpertQuantizer(model)
    control = OscillationControl(quantizer, Oscillation(method=method, start=0.0, **settings), steps)
    master, tensor = quantizer.masters[0], quantizer.tensors[0]
    with torch.no_grad():
        master[0, 0, :32] = 0.0
        master[0, 0, 0] = 4.0  # scale 1 for this block
    flips, last = [0, 0], None
    for step in range(steps):
        with torch.no_grad():
            master[0, 0, 1] = 1.25 + (0.2 if step % 2 else -0.2)  # 1 or 1.5
        control.requantize(step)
        now = float(tensor.parameter[0, 0, 1])
        flips[step * 2 // steps] += last is not None and now != last
        last = now
    return flips[0], flips[1]


def test_without_control_every_step_flips(model):
    assert run(model, "none", 40) == (19, 20)


def test_the_mean_of_a_hovering_master_does_not_flip(model):
    assert run(model, "ema", 40, ema_decay=0.95)[1] == 0


@pytest.mark.parametrize("limit", [1, 4])
def test_freezing_pins_after_the_given_flips(model, limit):
    first, second = run(model, "freeze", 40, freeze_flips=limit)
    assert first <= limit + 1 and second == 0


@pytest.mark.parametrize("method", ["none", "ema", "freeze"])
def test_before_its_start_control_is_plain_rounding(model, method):
    quantizer = ExpertQuantizer(model)
    control = OscillationControl(quantizer, Oscillation(method=method, start=0.5), 10)
    with torch.no_grad():
        for master in quantizer.masters:
            master.mul_(1.3)
    control.requantize(4)
    expected = [t.parameter.detach().clone() for t in quantizer.tensors]
    quantizer.requantize()
    assert all(torch.equal(e, t.parameter) for e, t in zip(expected, quantizer.tensors, strict=True))


@pytest.mark.parametrize("method", ["ema", "freeze"])
def test_state_survives_a_round_trip(model, method):
    quantizer = ExpertQuantizer(model)
    settings = Oscillation(method=method, start=0.0)
    first = OscillationControl(quantizer, settings, 10)
    first.requantize(0)
    second = OscillationControl(quantizer, settings, 10)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for master in quantizer.masters:
            master.mul_(1.1)
    first.requantize(1)
    expected = [t.parameter.detach().clone() for t in quantizer.tensors]
    second.load_state_dict(first.state_dict())
    quantizer.requantize(first.means)
    if method == "ema":
        assert all(torch.equal(e, t.parameter) for e, t in zip(expected, quantizer.tensors, strict=True))
    else:
        assert all(torch.equal(a, b) for a, b in zip(first.flips, second.flips, strict=True))


@pytest.mark.parametrize("rule", ["even", "floor", "rceil"])
def test_a_pinned_value_never_moves_again_whatever_its_block_does(model, rule):
    quantizer = ExpertQuantizer(model, scale_rule=rule)
    control = OscillationControl(quantizer, Oscillation(method="freeze", start=0.0, freeze_flips=2), 60)
    generator = torch.Generator().manual_seed(0)
    pinned: list[dict] = [{} for _ in quantizer.tensors]
    moved = 0
    for step in range(60):
        with torch.no_grad():
            for master in quantizer.masters:  # rough enough that block scales move
                master += master.std() * 0.3 * torch.randn(master.shape, generator=generator)
        control.requantize(step)
        for i, frozen in enumerate(control.frozen):
            now = quantizer.rounded(i)
            if "mask" in pinned[i]:
                before = pinned[i]
                assert torch.equal(now[before["mask"]], before["values"][before["mask"]]), step
                moved += int((now != before["values"]).sum())
            assert torch.equal(now, fake_quantize(now, scale_rule=rule, axis=quantizer.tensors[i].axis))
            pinned[i] = {"mask": frozen.clone(), "values": now.clone()}
    assert moved and 0 < int(sum(p["mask"].sum() for p in pinned))
