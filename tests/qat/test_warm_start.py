"""GPTQ start: less output error than plain rounding, on the grid, reproducible from the masters it leaves."""

import copy

import pytest
import torch
from jobs import ROOT
from tolerance import MODEL_FP32

from mxfp4 import fake_quantize
from mxfp4.codec import round_to_scales
from qat.expert_quantizer import ExpertQuantizer, find_expert_tensors
from qat.kept_start import keep_start, start_file, take_start
from qat.trainer import make_teacher
from qat.warm_start import Moments, choose_first_codes, compensated, fisher_moments, input_moments, sweeps
from recipes.load import load_recipe
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
    start = compensated(weight.clone(), Moments(x.transpose(1, 2) @ x, None), rule, WarmStart())

    def error(rounded):
        return (x @ (rounded - weight).transpose(1, 2)).square().sum((1, 2))

    ours, plain = error(fake_quantize(start, scale_rule=rule)), error(fake_quantize(weight, scale_rule=rule))
    assert (ours < 0.5 * plain).all()


def test_an_expert_without_tokens_is_rounded_plainly():
    torch.manual_seed(0)
    weight = torch.randn(2, 32, 32)
    moments = torch.stack([torch.eye(32), torch.zeros(32, 32)])
    start = compensated(weight.clone(), Moments(moments, None), "even", WarmStart())
    assert torch.equal(start[1], weight[1])


def test_uncorrelated_equal_inputs_leave_nothing_to_compensate():
    torch.manual_seed(0)
    weight = torch.randn(1, 32, 64)
    start = compensated(weight.clone(), Moments(torch.eye(64)[None], None), "even", WarmStart())
    assert torch.equal(fake_quantize(start), fake_quantize(weight))


def test_second_moments_are_those_of_the_routed_tokens(model):
    model.eval()
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
    moments = input_moments(model, tensors, rows)
    for e in range(4):
        gain = (weights * (chosen == e)).sum(1).float()
        x = hidden.float() * gain[:, None]
        torch.testing.assert_close(moments[tensors[0].name].inputs[e], x.T @ x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["gptq", "fisher"])
def test_warm_start_moves_masters_and_model_together(model, method):
    teacher = make_teacher(model)
    quantizer = ExpertQuantizer(model)
    plain = [t.parameter.detach().clone() for t in quantizer.tensors]
    choose_first_codes(teacher, quantizer, torch.randint(0, 250, (8, 64)), WarmStart(method=method))
    for (tensor, master), before in zip(quantizer, plain, strict=True):
        assert torch.equal(tensor.parameter, fake_quantize(master.data))
        assert not torch.equal(tensor.parameter, before)


def both_sided_error(rounded, weight, moments):
    error = rounded - weight
    return (moments.outputs @ error @ moments.inputs @ error.transpose(1, 2)).diagonal(dim1=1, dim2=2).sum(1)


@pytest.mark.parametrize("together", [1, 4, 7])
def test_moments_of_outputs_lower_the_error_that_they_weigh(together):
    torch.manual_seed(0)
    weight = torch.randn(3, 50, 64)
    x, g = correlated(3, 64, 500, 1), correlated(3, 50, 500, 2)
    moments = Moments(x.transpose(1, 2) @ x, g.transpose(1, 2) @ g)
    settings = WarmStart(method="fisher", rows_together=together)
    both = fake_quantize(compensated(weight.clone(), moments, "even", settings))
    inputs_only = fake_quantize(compensated(weight.clone(), Moments(moments.inputs, None), "even", settings))
    assert (both_sided_error(both, weight, moments) < 0.7 * both_sided_error(inputs_only, weight, moments)).all()


def test_both_dimensions_nested_are_gptq_on_the_product_of_the_moments():
    """Row after row, column after column: the same as GPTQ on one row of O * I weights with moments kron(S, H)."""
    torch.manual_seed(0)
    O, I = 6, 32
    # Values on a grid of equal scales: one block per row, amax 6, so that every row's scale byte is the same.
    weight = torch.rand(1, O, I) * 10 - 5
    weight[..., 0] = 6.0
    x, g = correlated(1, I, 200, 1), correlated(1, O, 200, 2)
    moments = Moments(x.transpose(1, 2) @ x, g.transpose(1, 2) @ g)
    tiny = 1e-6
    nested = compensated(weight.clone(), moments, "even", WarmStart(
        method="fisher", rows_together=1, damping=tiny, output_damping=tiny))
    order_r = moments.outputs[0].diagonal().argsort(descending=True)
    order_c = moments.inputs[0].diagonal().argsort(descending=True)
    product = torch.kron(moments.outputs[0][order_r][:, order_r].double(), moments.inputs[0][order_c][:, order_c].double())
    spread = torch.linalg.cholesky(torch.linalg.inv(product / product.diagonal().mean()), upper=True)
    w = weight[0][order_r][:, order_c].double().flatten()
    chosen = torch.zeros_like(w)
    for j in range(w.numel()):
        chosen[j] = round_to_scales(w[j].float(), torch.tensor(1.0)).double()
        w[j:] -= (w[j] - chosen[j]) / spread[j, j] * spread[j, j:] if w[j] != chosen[j] else 0
    expected = torch.empty(O, I)
    expected[order_r[:, None], order_c[None]] = chosen.view(O, I).float()
    assert (fake_quantize(nested)[0] == expected).float().mean() > 0.99


def test_fisher_moments_are_those_of_autograd(model):
    """Against gradients with respect to every expert output taken one expert at a time on a dense copy of the layer."""
    model = model.eval().requires_grad_(False)
    name = "model.layers.2.mlp.experts"
    tensors = [t for t in find_expert_tensors(model) if t.module == name]
    rows = torch.randint(0, 250, (3, 20))
    moments = fisher_moments(model, tensors, rows, seed=5)
    experts = model.get_submodule(name)
    kept = {}

    def dense(module, args, kwargs, output):
        x, chosen, weights = (*args, *kwargs.values())[:3]
        total = torch.zeros_like(output)
        for e in range(4):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            z = (x[token] @ module.gate_up_proj[e].T).detach().requires_grad_(True)
            inner = module._apply_gate(z)
            out = inner @ module.down_proj[e].T
            out.retain_grad()
            kept[e] = (x[token].detach(), z, inner.detach(), out)
            total = total.index_add(0, token, out * weights[token, slot, None])
        return total

    handle = experts.register_forward_hook(dense, with_kwargs=True)
    hidden = model.base_model(input_ids=rows, use_cache=False).last_hidden_state
    handle.remove()
    log_p = model.lm_head(hidden.flatten(0, 1)).log_softmax(-1)
    sampled = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(5))
    (-log_p.gather(1, sampled).sum()).backward()
    for e, (x, z, inner, out) in kept.items():
        for tensor, inputs, gradients in ((tensors[0], x, z.grad), (tensors[1], inner, out.grad)):
            found = moments[tensor.name]
            scale = found.outputs[e].abs().max().clamp_min(1e-12)
            weighted = (gradients * inputs.square().sum(1, keepdim=True)).T @ gradients
            torch.testing.assert_close(found.outputs[e] / scale, weighted / scale, **MODEL_FP32)
            scale = found.inputs[e].abs().max().clamp_min(1e-12)
            weighted = (inputs * gradients.square().sum(1, keepdim=True)).T @ inputs
            torch.testing.assert_close(found.inputs[e] / scale, weighted / scale, **MODEL_FP32)


@pytest.mark.parametrize("method", ["gptq", "fisher"])
def test_layers_are_taken_together_as_memory_allows_and_the_result_is_the_same(model, method):
    rows = torch.randint(0, 250, (4, 32))
    results = []
    for gib, groups in ((4.0, 1), (1e-9, 2)):
        copied = copy.deepcopy(model)
        quantizer = ExpertQuantizer(copied)
        settings = WarmStart(method=method, moments_gib=gib)
        assert len(list(sweeps(quantizer.tensors, settings))) == groups
        choose_first_codes(make_teacher(model), quantizer, rows, settings)
        results.append([m.data for m in quantizer.masters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_health_counts_code_changes_from_the_last_report_or_rebase(model):
    from qat.quant_stats import Health

    teacher = make_teacher(model)
    quantizer = ExpertQuantizer(model)
    health = Health(model, quantizer)
    choose_first_codes(teacher, quantizer, torch.randint(0, 250, (8, 64)), WarmStart(method="gptq"))
    assert all(min(record["flipped"]) > 0.02 for record in health.report())
    assert all(max(record["flipped"]) == 0 for record in health.report())
    with torch.no_grad():
        quantizer.masters[0][1].mul_(-1)
    quantizer.requantize()
    health.rebase()
    assert all(max(record["flipped"]) == 0 for record in health.report())


def test_measured_behind_rounded_layers_the_start_is_another_one_and_leaves_the_model_trainable(model):
    rows = torch.randint(1, 250, (6, 40))
    starts = []
    for layers in (0, 1):
        student = copy.deepcopy(model)
        quantizer = ExpertQuantizer(student)
        choose_first_codes(model, quantizer, rows, WarmStart(method="fisher", layers_together=layers), model=student)
        assert all(t.parameter.requires_grad and t.parameter.grad is None for t in quantizer.tensors)
        assert all(torch.equal(t.parameter, fake_quantize(m.detach())) for t, m in quantizer)
        starts.append([m.detach().clone() for m in quantizer.masters])
    first, *others = [torch.equal(a, b) for a, b in zip(*starts, strict=True)]
    assert first and not any(others[1:])  # nothing was rounded before the first layer


def test_groups_hold_the_given_number_of_layers(model):
    tensors = ExpertQuantizer(model).tensors
    assert [len(group) for group in sweeps(tensors, WarmStart(layers_together=1))] == [2] * (len(tensors) // 2)
    assert [len(group) for group in sweeps(tensors, WarmStart())] == [len(tensors)]


def gpt_oss():
    """A gpt-oss layer stack: transposed experts with biases, gate and up interleaved, both clamped."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(3)
    model = GptOssForCausalLM(GptOssConfig(
        vocab_size=264, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_local_experts=3, num_experts_per_tok=2, sliding_window=16, swiglu_limit=2.0,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4})).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.normal_(0, 1.0 if "bias" in name else 0.3)
    return model


def test_experts_with_biases_are_measured_behind_their_biases():
    """gpt-oss, against the module's own arithmetic written out, values and gradients."""
    model, rows = gpt_oss(), torch.randint(0, 250, (2, 20))
    tensors = [t for t in find_expert_tensors(model) if t.module == "model.layers.1.mlp.experts"]
    experts, kept = model.get_submodule(tensors[0].module), {}

    def written_out(module, args, kwargs, output):
        x, chosen, weights = (*args, *kwargs.values())[:3]
        total = torch.zeros_like(output)
        for e in range(3):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            z = (x[token] @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]).detach().requires_grad_(True)
            gate, up = z[:, ::2].clamp(max=module.limit), z[:, 1::2].clamp(-module.limit, module.limit)
            inner = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
            out = inner @ module.down_proj[e] + module.down_proj_bias[e]
            out.retain_grad()
            kept[e] = (x[token].detach(), z, inner.detach(), out, weights[token, slot, None].detach())
            total = total.index_add(0, token, out * weights[token, slot, None])
        return total

    handle = experts.register_forward_hook(written_out, with_kwargs=True)
    hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state
    handle.remove()
    log_p = model.lm_head(hidden.flatten(0, 1)).log_softmax(-1)
    sampled = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(5))
    (-log_p.gather(1, sampled).sum()).backward()
    plain, fisher = input_moments(model, tensors, rows), fisher_moments(model, tensors, rows, seed=5)
    assert any((z.abs() > experts.limit).any() for _, z, *_ in kept.values())  # the clamp is at work
    for e, (x, z, inner, out, weight) in kept.items():
        for tensor, inputs, gradients in ((tensors[0], x, z.grad), (tensors[1], inner, out.grad)):
            by_outputs, by_inputs = (t.square().sum(1, keepdim=True) for t in (gradients, inputs))
            for found, wanted in ((plain[tensor.name].inputs[e], (inputs * weight**2).T @ inputs),
                                  (fisher[tensor.name].inputs[e], (inputs * by_outputs).T @ inputs),
                                  (fisher[tensor.name].outputs[e], (gradients * by_inputs).T @ gradients)):
                scale = wanted.abs().max().clamp_min(1e-12)
                torch.testing.assert_close(found / scale, wanted / scale, **MODEL_FP32)


@pytest.mark.parametrize("method", ["gptq", "fisher"])
def test_a_start_of_transposed_experts_with_biases_errs_less_than_plain_rounding(method):
    model, rows = gpt_oss(), torch.randint(0, 250, (16, 64))
    student = copy.deepcopy(model)
    quantizer = ExpertQuantizer(student)

    def error() -> float:
        with torch.no_grad():
            ours, wanted = (m.model(input_ids=rows).last_hidden_state for m in (student, model))
            return float((ours - wanted).norm())

    plain = error()
    choose_first_codes(model, quantizer, rows, WarmStart(method=method))
    assert error() < 0.9 * plain
    assert all(torch.equal(t.parameter, fake_quantize(m.data, axis=t.axis)) for t, m in quantizer)


def test_a_kept_start_is_taken_by_the_next_run_and_a_damaged_file_is_named(model, tmp_path):
    teacher, rows = make_teacher(model), torch.randint(0, 250, (8, 64))
    quantizer = ExpertQuantizer(model)
    choose_first_codes(teacher, quantizer, rows, WarmStart(method="gptq"))
    chosen = [m.data.clone() for m in quantizer.masters]
    file = tmp_path / "starts" / "start.safetensors"
    keep_start(file, quantizer)
    for master in quantizer.masters:
        master.data.zero_()
    take_start(file, quantizer)
    for (tensor, master), before in zip(quantizer, chosen, strict=True):
        assert torch.equal(master, before)
        assert torch.equal(tensor.parameter, fake_quantize(before))
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="start.safetensors: not the initial codes of this model.*remove it"):
            take_start(file, quantizer)


def test_a_kept_start_is_one_of_the_same_weights_text_and_settings(tmp_path):
    def name(base="a", rows=0, *overrides):
        recipe = load_recipe(ROOT / "recipes/tiny.yaml", [f"qat.warm_start.folder={tmp_path}", *overrides])
        return start_file(recipe, {"model.safetensors": base}, torch.full((2, 4), rows))

    assert name() == name("a", 0, "qat.optimizer.learning_rate=1e-3", "qat.steps=7", "qat.warm_start.moments_gib=1.0")
    others = [name("b"), name("a", 1), name("a", 0, "qat.warm_start.damping=0.1"), name("a", 0, "seed=1"),
              name("a", 0, "qat.scales.method=searched"), name("a", 0, "quantization.scale_rule=rceil")]
    assert len({name(), *others}) == 7
