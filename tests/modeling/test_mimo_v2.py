"""The decoder: parity with transformers' own class, caches equal to one full forward, taps, generation, round trips."""

import pytest
import torch
from tolerance import EXPERTS_BF16, MODEL_FP32
from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.load import load_model
from modeling.modeling_mimo_v2 import Experts, MiMoV2ForCausalLM, Router, _visible

SIZES = dict(vocab_size=160, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=48, v_head_dim=32, num_experts_per_tok=2)


def config(**changes) -> MiMoV2Config:
    settings = SIZES | dict(
        swa_num_key_value_heads=4, n_routed_experts=4, sliding_window=9, hybrid_layer_pattern=[0, 1, 0],
        moe_layer_freq=[0, 1, 1], attention_value_scale=0.7, add_swa_attention_sink_bias=True,
        partial_rotary_factor=0.334, rope_theta=5e6)
    return MiMoV2Config(**settings | changes)


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=["split", "fused_qkv"])
def model(request):
    return randomised(MiMoV2ForCausalLM(config(attention_projection_layout=request.param)))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 160, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 8, 9, 10, 37])
def test_logits_and_gradients_equal_transformers_own_class(length):
    theirs = randomised(MiMoV2FlashForCausalLM(MiMoV2FlashConfig(
        **SIZES, n_routed_experts=4, num_local_experts=4, sliding_window=9, attention_value_scale=0.7,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"], attn_implementation="eager")))
    ours = MiMoV2ForCausalLM(config(sliding_window=theirs.config.sliding_window)).eval()
    ours.load_state_dict({k.replace("sinks", "attention_sink_bias"): v for k, v in theirs.state_dict().items()})
    ids = torch.randint(0, 160, (2, length), generator=torch.Generator().manual_seed(1))
    target = torch.randn(2, length, 160, generator=torch.Generator().manual_seed(2))
    outputs = []
    for m in (theirs, ours):
        logits = m(input_ids=ids, use_cache=False).logits
        (logits * target).mean().backward()
        outputs.append(logits)
    torch.testing.assert_close(outputs[1], outputs[0], **MODEL_FP32)
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        mine = gradients[name.replace("sinks", "attention_sink_bias")].grad
        torch.testing.assert_close(mine, parameter.grad, **MODEL_FP32, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("cuts", [[13], [1, 2, 3], [9, 10, 30, 31], list(range(1, 37))])
def test_cached_decoding_equals_one_full_forward_and_window_layers_keep_their_window(model, ids, cuts):
    whole = model(input_ids=ids, use_cache=False).logits
    cache, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, 37], strict=True):
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **MODEL_FP32)
    assert [layer.keys.shape[2] for layer in cache.layers] == [37, 8, 37]


@pytest.mark.parametrize("padding", [1, 5, 20])
def test_left_padding_changes_nothing(model, ids, padding):
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(padded[0, padding:], model(input_ids=ids[:1, padding:], use_cache=False).logits[0], **MODEL_FP32)
    torch.testing.assert_close(padded[1], model(input_ids=ids[1:], use_cache=False).logits[0], **MODEL_FP32)


def test_generate_with_cache_and_padding_equals_recomputing_every_token(model, ids):
    expected = ids[:, :12]
    for _ in range(15):
        expected = torch.cat([expected, model(input_ids=expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(ids[:, :12], max_new_tokens=15, do_sample=False), expected)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :8]], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    short = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, 12:]
    assert torch.equal(short, model.generate(ids[:1, :8], max_new_tokens=5, do_sample=False)[:, 8:])


def test_window_counts_the_query_itself():
    positions = torch.arange(6)
    visible = _visible(positions[:, None], positions, 3)
    assert visible.sum(1).tolist() == [1, 2, 3, 3, 3, 3] and visible[5].tolist() == [False] * 3 + [True] * 3


def test_band_and_dense_attention_agree(model, ids):
    attention = model.model.layers[1].self_attn
    torch.manual_seed(0)
    for length in (10, 18, 19, 37):
        q, k, v = (torch.randn(2, h, length, d) for h, d in ((4, 48), (4, 48), (4, 32)))
        torch.testing.assert_close(attention._banded(q, k, v), attention._dense(q, k, v, 0, None), **MODEL_FP32)


def test_taps_are_layer_outputs_in_the_order_asked(model, ids):
    seen = {}
    handles = [layer.register_forward_hook(lambda m, a, o, i=i: seen.__setitem__(i, o))
               for i, layer in enumerate(model.model.layers)]
    out = model(input_ids=ids, tap_layers=(2, 0, -1), use_cache=False)
    for handle in handles:
        handle.remove()
    for tap, layer in zip(out.taps, (2, 0, 2), strict=True):
        assert torch.equal(tap, seen[layer])
    assert model(input_ids=ids, use_cache=False).taps is None


def test_logits_to_keep_are_the_last_of_all(model, ids):
    whole = model(input_ids=ids, use_cache=False).logits
    assert model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.shape == (2, 1, 160)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False, logits_to_keep=3).logits, whole[:, -3:], **MODEL_FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_experts_equal_a_loop_over_tokens_even_when_some_are_idle(dtype, tokens):
    torch.manual_seed(0)
    settings = config(n_routed_experts=8)
    experts = Experts(settings)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    experts.to(dtype)
    x = torch.randn(tokens, 128, dtype=dtype)
    index = torch.randint(0, 3, (tokens, 1)) * 2  # experts 1, 3, 5, 6, 7 get nothing
    index = torch.cat([index, (index + 2) % 8], dim=1)
    weight = torch.rand(tokens, 2)
    expected = torch.zeros(tokens, 128)
    for n in range(tokens):
        for a in range(2):
            e = index[n, a]
            gate, up = (experts.gate_up_proj[e].float() @ x[n].float()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[n] += weight[n, a] * (experts.down_proj[e].float() @ inner)
    out = experts(x, index, weight)
    error = (out.float() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else EXPERTS_BF16)
    out.float().sum().backward()
    used = set(index.flatten().tolist())
    assert [bool(g.any()) for g in experts.down_proj.grad] == [e in used for e in range(8)]


def test_router_chooses_by_biased_score_and_weighs_by_the_score():
    router = Router(config())
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 8.0]))
    x = torch.randn(5, 128)
    index, weight = router(x)
    assert torch.equal(index.sort(1).values, torch.tensor([[2, 3]] * 5))
    scores = (x @ router.weight.T).sigmoid().gather(1, index)
    torch.testing.assert_close(weight, scores / scores.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_both_loaders_round_trip_exactly_under_published_names(model, dtype, tmp_path):
    from safetensors import safe_open

    from modeling.names import published_tensors

    saved = MiMoV2ForCausalLM(model.config)
    saved.load_state_dict(model.state_dict())
    saved.to(dtype).save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        names = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    expected = published_tensors(model.config, experts="bf16", dense="bf16")
    assert names == {t.name: t.shape for t in expected}
    for loaded in (MiMoV2ForCausalLM.from_pretrained(tmp_path, dtype=dtype), load_model(tmp_path, dtype=dtype)):
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name].to(tensor.dtype), tensor), name


def test_gradient_checkpointing_changes_no_gradient(ids):
    gradients = []
    for checkpointing in (False, True):
        model = randomised(MiMoV2ForCausalLM(config())).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, use_cache=False, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("changes", "message"), [
    ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern: 2 entries, expected num_hidden_layers=3"),
    ({"num_attention_heads": 3}, "num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
    ({"attention_projection_layout": "qkv"}, "expected split or fused_qkv"),
    ({"n_shared_experts": 1}, "no shared experts"),
    ({"scoring_func": "softmax"}, "expected sigmoid"),
])
def test_impossible_configurations_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
