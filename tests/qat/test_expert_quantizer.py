"""Attaching: exactly the routed experts are quantized, nothing is skipped silently, and the model stays the model."""

import pytest
import torch
from torch import nn

from mxfp4 import fake_quantize
from qat.expert_quantizer import ExpertQuantizer, describe, find_expert_tensors, require_finite, without_noise


def tiny_transformers_moe(kind: str):
    import transformers as tf

    sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 head_dim=32, num_experts_per_tok=2)
    configs = {
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(intermediate_size=64, moe_intermediate_size=32, num_experts=4, **sizes),
        "mixtral": lambda: tf.MixtralConfig(intermediate_size=96, num_local_experts=4, **sizes),
        "gpt_oss": lambda: tf.GptOssConfig(intermediate_size=96, num_local_experts=4, **sizes),
        "qwen2_moe": lambda: tf.Qwen2MoeConfig(intermediate_size=64, moe_intermediate_size=32, num_experts=4,
                                               shared_expert_intermediate_size=32, **sizes),
        "llama": lambda: tf.LlamaConfig(intermediate_size=64, **{k: v for k, v in sizes.items() if "experts" not in k}),
    }
    with torch.device("meta"):
        return tf.AutoModelForCausalLM.from_config(configs[kind]())


@pytest.mark.parametrize(("kind", "axis"), [("qwen3_moe", -1), ("mixtral", -1), ("gpt_oss", 1), ("qwen2_moe", -1)])
def test_finds_both_projections_of_every_moe_layer_and_only_routed_experts(kind, axis):
    tensors = find_expert_tensors(tiny_transformers_moe(kind))
    assert sorted(t.name.rpartition(".")[2] for t in tensors) == ["down_proj"] * 2 + ["gate_up_proj"] * 2
    assert {t.axis for t in tensors} == {axis}
    assert all(t.num_experts == 4 and "shared" not in t.name for t in tensors)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no fused 3-D expert weights"):
        find_expert_tensors(tiny_transformers_moe("llama"))


class Experts(nn.Module):
    is_transposed = False

    def __init__(self, *shape, **names):
        super().__init__()
        for name in names or {"down_proj": 1}:
            self.register_parameter(name, nn.Parameter(torch.randn(*shape)))


def holder(path: str, module: nn.Module) -> nn.Module:
    root = nn.Module()
    node = root
    *parents, last = path.split(".")
    for part in parents:
        node.add_module(part, nn.Module())
        node = node.get_submodule(part)
    node.add_module(last, module)
    return root


@pytest.mark.parametrize(("path", "kind"), [("mlp.shared_experts", "shared expert"), ("self_attn.experts", "attention"),
                                            ("mlp.router.experts", "router"), ("lm_head", "output head")])
def test_a_protected_module_marked_as_experts_is_refused(path, kind):
    with pytest.raises(ValueError, match=f"{path}.down_proj: belongs to a {kind}"):
        find_expert_tensors(holder(path, Experts(2, 32, 32)))


def test_an_expert_tensor_with_a_second_name_is_refused():
    root = holder("mlp.experts", Experts(2, 32, 32))
    root.mlp.shared_experts = nn.Module()
    root.mlp.shared_experts.down_proj = root.mlp.experts.down_proj
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj: tied to mlp\.shared_experts\.down_proj"):
        find_expert_tensors(root)


def test_experts_of_unknown_layout_are_refused_by_name():
    strange = Experts(2, 32, 32)
    strange.is_transposed = None
    with pytest.raises(ValueError, match=r"unknown layout.*mlp\.experts\.down_proj \(Experts, \(2, 32, 32\)\)"):
        find_expert_tensors(holder("mlp.experts", strange))


def test_separate_linear_experts_are_named_in_the_refusal():
    module = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(ValueError, match=r"experts\.0\.weight"):
        find_expert_tensors(holder("mlp.experts", module))


@pytest.mark.parametrize("size", [63, 100])
def test_a_block_dimension_that_32_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=f"{size}.* is not a multiple of the MXFP4 block size 32"):
        find_expert_tensors(holder("mlp.experts", Experts(2, 32, size)))


@pytest.mark.parametrize("rule", ["floor", "rceil", "even", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_holds_the_rounded_masters_bit_for_bit_under_its_own_keys(model, rule, dtype):
    model = model.to(dtype)
    keys = list(model.state_dict())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantizer = ExpertQuantizer(model, scale_rule=rule)
    assert list(model.state_dict()) == keys
    quantized = {t.name for t in quantizer.tensors}
    for name, parameter in model.named_parameters():
        if name in quantized:
            assert torch.equal(parameter, fake_quantize(before[name].float(), scale_rule=rule).to(dtype))
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])


def test_masters_get_the_gradient_of_the_quantized_weights(model):
    quantizer = ExpertQuantizer(model)
    ids = torch.arange(32)[None] % 50
    model(input_ids=ids).logits.float().square().mean().backward()
    expected = [t.parameter.grad.clone() for t in quantizer.tensors]
    quantizer.pull_gradients()
    for (tensor, master), gradient in zip(quantizer, expected, strict=True):
        assert master.grad.dtype == torch.float32 and torch.equal(master.grad, gradient) and gradient.any()
        assert tensor.parameter.grad is None


def test_micro_steps_accumulate_in_float32(model):
    model = model.to(torch.bfloat16)
    quantizer = ExpertQuantizer(model)
    tensor = quantizer.tensors[0]
    for _ in range(2):
        (tensor.parameter * (1 + 2**-7)).sum().backward()
    # Each contribution is 1 + 2^-7 exactly; 2 + 2^-6 in bf16 would still fit, three of them would not.
    (tensor.parameter * 2**-7).sum().backward()
    quantizer.pull_gradients()
    assert torch.equal(quantizer.masters[0].grad, torch.full_like(quantizer.masters[0], 2 + 3 * 2**-7))


def test_clip_zeroes_the_gradient_of_saturated_elements_only():
    model = holder("mlp.experts", Experts(1, 1, 32))
    weight = model.get_parameter("mlp.experts.down_proj")
    with torch.no_grad():
        weight.copy_(torch.full((32,), 1.0))
        weight[0, 0, 0] = 7.9  # floor: scale 2^0 for a maximum in [4, 8), so 7.9 saturates to 6
    quantizer = ExpertQuantizer(model, scale_rule="floor", ste="clip")
    weight.sum().backward()
    quantizer.pull_gradients()
    assert quantizer.masters[0].grad.flatten().tolist() == [0.0] + [1.0] * 31


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_expert_is_refused_with_tensor_expert_and_index(model, bad):
    tensor = find_expert_tensors(model)[1]
    with torch.no_grad():
        tensor.parameter[2, 5, 7] = bad
    with pytest.raises(ValueError, match=rf"{tensor.name}: 1 non-finite values, the first at expert 2, index \[5, 7\]"):
        ExpertQuantizer(model)


def test_expected_tensors_guards_the_match(model):
    with pytest.raises(ValueError, match="expected_tensors: 6, but MiMoV2ForCausalLM has 4"):
        ExpertQuantizer(model, expected_tensors=6)


def test_description_accounts_for_every_parameter(model):
    quantizer = ExpertQuantizer(model)
    rows = describe(quantizer.tensors, model)
    assert sum(r[3] for r in rows) == sum(p.numel() for p in model.parameters())
    assert sum(r[3] for r in rows[:-1]) == quantizer.num_parameters


def test_require_finite_accepts_finite_tensors():
    require_finite("x", torch.zeros(2, 3, 4))


def test_forward_backward_and_recomputation_round_nothing(model, monkeypatch):
    import qat.expert_quantizer

    quantizer = ExpertQuantizer(model)
    calls = []
    original = qat.expert_quantizer.fake_quantize_
    monkeypatch.setattr(qat.expert_quantizer, "fake_quantize_", lambda *a, **k: calls.append(1) or original(*a, **k))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for _ in range(3):  # micro-steps
        model(input_ids=torch.arange(20)[None], use_cache=False).logits.float().mean().backward()
    quantizer.pull_gradients()
    assert not calls
    quantizer.requantize()
    assert len(calls) == len(quantizer.tensors)


@pytest.mark.parametrize(("kind", "noise"), [
    ("mixtral", {"router_jitter_noise": 0.3, "attention_dropout": 0.5}),
    ("phimoe", {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "attention_dropout": 0.5}),
    ("qwen3_moe", {"attention_dropout": 0.5})])
def test_a_student_without_noise_says_what_is_served_and_recomputes(kind, noise):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind](vocab_size=40, hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
                                  num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
                                  num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, **noise)
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config), torch.arange(40)[None]
    quiet, noisy = model.eval()(ids).logits, model.train()(ids).logits
    assert not torch.equal(noisy, quiet)
    without_noise(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    passes = []
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *args: passes.append(1))
    logits = model(ids, use_cache=False).logits
    assert torch.equal(logits, quiet)
    logits.sum().backward()
    assert len(passes) == 2
