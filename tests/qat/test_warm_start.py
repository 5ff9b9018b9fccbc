"""GPTQ start: less output error than plain rounding, on the grid, reproducible from the masters it leaves."""

import pytest
import torch

from mxfp4 import fake_quantize
from qat.attach import ExpertQuantizer
from qat.trainer import make_teacher
from qat.warm_start import compensated, gptq_warm_start, second_moments
from recipes.schema import WarmStart


def correlated(experts: int, inputs: int, tokens: int, seed: int) -> torch.Tensor:
    """[experts, tokens, inputs] activations of low effective rank, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(experts, inputs // 4, inputs, generator=generator)
    noise = 0.1 * torch.randn(experts, tokens, inputs, generator=generator)
    return torch.randn(experts, tokens, inputs // 4, generator=generator) @ mixing + noise


@pytest.mark.parametrize("rule", ["floor", "rceil", "even", "mse"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_output_error_is_below_plain_rounding_for_every_expert(rule, seed):
    torch.manual_seed(seed)
    weight = torch.randn(3, 48, 64)
    x = correlated(3, 64, 500, seed)
    start = compensated(weight.clone(), x.transpose(1, 2) @ x, rule, damping=0.01)

    def error(rounded):
        return (x @ (rounded - weight).transpose(1, 2)).square().sum((1, 2))

    ours, plain = error(fake_quantize(start, scale_rule=rule)), error(fake_quantize(weight, scale_rule=rule))
    assert (ours < 0.5 * plain).all()


def test_an_expert_without_tokens_is_rounded_plainly():
    torch.manual_seed(0)
    weight = torch.randn(2, 32, 32)
    moments = torch.stack([torch.eye(32), torch.zeros(32, 32)])
    start = compensated(weight.clone(), moments, "even", damping=0.01)
    assert torch.equal(start[1], weight[1])


def test_uncorrelated_equal_inputs_leave_nothing_to_compensate():
    torch.manual_seed(0)
    weight = torch.randn(1, 32, 64)
    start = compensated(weight.clone(), torch.eye(64)[None], "even", damping=0.01)
    assert torch.equal(fake_quantize(start), fake_quantize(weight))


def test_second_moments_are_those_of_the_routed_tokens(model):
    model.eval()
    from qat.attach import find_expert_tensors

    tensors = [t for t in find_expert_tensors(model) if t.module == "model.layers.1.mlp.experts"]
    rows = torch.randint(0, 250, (3, 40))
    seen = []
    experts = model.get_submodule("model.layers.1.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda module, args, kwargs: seen.append((*args, *kwargs.values())),
                                               with_kwargs=True)
    with torch.no_grad():
        model(input_ids=rows)
    handle.remove()
    hidden, chosen, weights = seen[0]
    moments = second_moments(model, "model.layers.1.mlp.experts", tensors, rows)
    for e in range(4):
        gain = (weights * (chosen == e)).sum(1).float()
        x = hidden.float() * gain[:, None]
        torch.testing.assert_close(moments[tensors[0].name][e], x.T @ x, atol=1e-4, rtol=1e-4)


def test_warm_start_moves_masters_and_model_together(model):
    teacher = make_teacher(model)
    quantizer = ExpertQuantizer(model)
    plain = [t.parameter.detach().clone() for t in quantizer.tensors]
    gptq_warm_start(teacher, quantizer, torch.randint(0, 250, (8, 64)), WarmStart(method="gptq"))
    for (tensor, master), before in zip(quantizer, plain, strict=True):
        assert torch.equal(tensor.parameter, fake_quantize(master.data))
        assert not torch.equal(tensor.parameter, before)


def test_health_counts_code_changes_from_the_last_report_or_rebase(model):
    from qat.health import Health

    teacher = make_teacher(model)
    quantizer = ExpertQuantizer(model)
    health = Health(model, quantizer)
    gptq_warm_start(teacher, quantizer, torch.randint(0, 250, (8, 64)), WarmStart(method="gptq"))
    assert all(min(record["flipped"]) > 0.02 for record in health.report())
    assert all(max(record["flipped"]) == 0 for record in health.report())
    with torch.no_grad():
        quantizer.masters[0][1].mul_(-1)
    quantizer.requantize()
    health.rebase()
    assert all(max(record["flipped"]) == 0 for record in health.report())
