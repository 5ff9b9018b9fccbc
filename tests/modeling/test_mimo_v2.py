"""The decoder: parity with transformers' own class, caches equal to one forward, chosen layers, generation, round trips."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tolerance import ATTENTION_BF16, EXPERTS_BF16, MODEL_FP32
from transformers import DynamicCache, MiMoV2FlashConfig, MiMoV2FlashForCausalLM

import modeling.modeling_mimo_v2
from checkpoint.load import load_model
from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.modeling_mimo_v2 import CACHE_NAME, Experts, MiMoV2ForCausalLM, Router, _SinkSoftmax, _visible

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


@pytest.mark.parametrize(("length", "groups"), [(1, 1), (8, 1), (9, 1), (10, 1), (37, 2), (150, 1)])
def test_logits_and_gradients_equal_transformers_own_class(length, groups):
    theirs = randomised(MiMoV2FlashForCausalLM(MiMoV2FlashConfig(
        **SIZES, n_routed_experts=4, num_local_experts=4, n_group=groups, sliding_window=9, attention_value_scale=0.7,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"], attn_implementation="eager")))
    for layer in theirs.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.1, -0.1, 0.2, 0.0]))
    ours = MiMoV2ForCausalLM(config(sliding_window=theirs.config.sliding_window, n_group=groups)).eval()
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
        out = model(input_ids=ids[:, start:stop], cache=cache, use_cache=True)
        cache = out[CACHE_NAME]
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **MODEL_FP32)
    assert [layer.keys.shape[2] for layer in cache.layers] == [37, 8, 37]


def test_a_cache_goes_by_its_old_and_its_new_name_but_not_by_both(model, ids):
    logits = []
    for name in ("cache", "past_key_values"):
        first = model(input_ids=ids[:, :9], use_cache=True)
        assert first.cache is first.past_key_values is first[CACHE_NAME] and isinstance(first.cache, DynamicCache)
        logits.append(model(input_ids=ids[:, 9:], **{name: first.cache}).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=ids[:, 9:], cache=first.cache, past_key_values=first.cache)


def test_right_padding_changes_nothing(model, ids):
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(padded[0, :30], model(input_ids=ids[:1, :30], use_cache=False).logits[0], **MODEL_FP32)
    torch.testing.assert_close(padded[1], model(input_ids=ids[1:], use_cache=False).logits[0], **MODEL_FP32)


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


def attention_inputs(attention, length, dtype=torch.float32):
    """Random queries (scaled), keys, values and output gradient of one attention layer."""
    torch.manual_seed(length)
    heads, keys = attention.query_heads, attention.key_heads
    shapes = ((heads, 48), (keys, 48), (keys, 32), (heads, 32))
    q, k, v, gradient = (torch.randn(2, h, length, d) for h, d in shapes)
    return [(x * scale).to(dtype).requires_grad_() for x, scale in ((q, 48**-0.5), (k, 1), (v, 1))], gradient.to(dtype)


def output_and_gradients(run, inputs, gradient, sink=None):
    wanted = inputs if sink is None else [*inputs, sink]
    out = run(*inputs)
    return [out, *torch.autograd.grad(out, wanted, gradient)]


@pytest.mark.parametrize("length", [10, 18, 19, 63, 100])
@pytest.mark.parametrize("with_sink", [True, False])
def test_bands_equal_dense_attention_in_outputs_and_gradients(length, with_sink):
    attention = randomised(MiMoV2ForCausalLM(config(add_swa_attention_sink_bias=with_sink))).model.layers[1].self_attn
    inputs, gradient = attention_inputs(attention, length)
    dense = output_and_gradients(lambda *x: attention._dense(*x, 0, None), inputs, gradient, attention.attention_sink_bias)
    bands = output_and_gradients(attention._banded, inputs, gradient, attention.attention_sink_bias)
    for mine, expected in zip(bands, dense, strict=True):
        torch.testing.assert_close(mine, expected, **MODEL_FP32)


def test_sink_softmax_has_the_gradients_of_its_definition():
    torch.manual_seed(0)
    scores, sink = torch.randn(2, 3, 4, 7, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    mask = torch.zeros(4, 7, dtype=torch.float64).masked_fill_(torch.arange(7) > torch.arange(2, 6)[:, None], float("-inf"))
    assert torch.autograd.gradcheck(_SinkSoftmax.apply, (scores.requires_grad_(), mask, sink.requires_grad_()))


@pytest.mark.parametrize("length", [2, 100, 128, 129, 300])
def test_blocks_and_sdpa_equal_dense_attention_in_outputs_and_gradients(model, length, monkeypatch):
    attention = model.model.layers[0].self_attn
    inputs, gradient = attention_inputs(attention, length)
    dense = output_and_gradients(lambda *x: attention._dense(*x, 0, None), inputs, gradient)
    blocks = output_and_gradients(attention._full, inputs, gradient)
    monkeypatch.setattr(modeling.modeling_mimo_v2, "BLOCKED_UP_TO", 0)
    sdpa = output_and_gradients(attention._full, inputs, gradient)
    for other in (blocks, sdpa):
        for mine, expected in zip(other, dense, strict=True):
            torch.testing.assert_close(mine, expected, **MODEL_FP32)


@pytest.mark.parametrize("layer", [0, 1])
def test_bf16_attention_is_the_float32_one_up_to_its_roundings(model, layer):
    attention = model.model.layers[layer].self_attn
    inputs, gradient = attention_inputs(attention, 100, torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    run = attention._full if attention.window is None else attention._banded
    expected = output_and_gradients(lambda *x: attention._dense(*x, 0, None), exact, gradient.float())
    for mine, reference in zip(output_and_gradients(run, inputs, gradient), expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - reference).norm() / reference.norm() < ATTENTION_BF16


def test_aux_hidden_states_are_layer_outputs_in_the_order_asked(model, ids):
    seen = {}
    handles = [layer.register_forward_hook(lambda m, a, o, i=i: seen.__setitem__(i, o))
               for i, layer in enumerate(model.model.layers)]
    out = model(input_ids=ids, aux_layers=(2, 0, -1), use_cache=False)
    for handle in handles:
        handle.remove()
    for hidden, layer in zip(out.aux_hidden_states, (2, 0, 2), strict=True):
        assert torch.equal(hidden, seen[layer])
    assert model(input_ids=ids, use_cache=False).aux_hidden_states is None


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


def test_the_correction_bias_stays_float32_in_memory_and_in_the_file(tmp_path):
    from safetensors.torch import load_file

    model = MiMoV2ForCausalLM(config())
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4])
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert torch.equal(model.model.layers[1].mlp.gate.e_score_correction_bias, bias)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.layers.1.mlp.gate.e_score_correction_bias"], bias)
    assert saved["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_the_three_files_run_as_remote_code_of_a_checkpoint(model, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    for name in ("configuration_mimo_v2", "modeling_mimo_v2", "native_loading"):
        shutil.copy(Path(modeling.modeling_mimo_v2.__file__).with_name(f"{name}.py"), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "configuration_mimo_v2.MiMoV2Config",
                            "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(settings))
    remote, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(remote).__module__.startswith("transformers_modules") and not any(info.values())
    assert torch.equal(remote(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(("call", "message"), [
    ({"aux_layers": (0, 3)}, "aux_layers: layer 3, expected -3 to 2"),
    ({"attention_mask": torch.ones(2, 36)}, r"attention_mask: shape \(2, 36\), expected \[batch, 37\]"),
    ({"attention_mask": {}}, "attention_mask: dict, expected a tensor"),
    ({"inputs_embeds": torch.zeros(2, 37, 128)}, "either input_ids or inputs_embeds"),
])
def test_inputs_that_do_not_fit_are_one_line(model, ids, call, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, **call)


def test_a_cache_of_fixed_size_is_refused(model, ids):
    with pytest.raises(ValueError, match="cache: StaticCache, expected a cache that grows"):
        model.generate(ids, max_new_tokens=2, do_sample=False, cache_implementation="static")


def test_gradient_checkpointing_changes_no_gradient_even_when_a_cache_is_asked_for(ids):
    gradients = []
    for checkpointing in (False, True):
        model = randomised(MiMoV2ForCausalLM(config())).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, use_cache=True, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("changes", "message"), [
    ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern: 2 entries, expected num_hidden_layers=3"),
    ({"num_attention_heads": 3}, "num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
    ({"attention_projection_layout": "qkv"}, "expected split or fused_qkv"),
    ({"n_shared_experts": 1}, "no shared experts"),
    ({"hybrid_layer_pattern": [0, 2, 0]}, "hybrid_layer_pattern: 2, expected only 0 and 1"),
    ({"sliding_window": 0}, "sliding_window=0: expected a positive integer"),
    ({"sliding_window_size": 128}, "sliding_window_size=128 differs from sliding_window=9"),
    ({"partial_rotary_factor": 0.4}, "rotates 19 of head_dim=48 entries, expected an even number"),
    ({"moe_intermediate_size": 63}, "moe_intermediate_size=63: expected a multiple of 8"),
    ({"n_group": 3}, "n_group=3: expected equal groups"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: only 4 experts can be chosen"),
    ({"num_experts_per_tok": 3, "n_group": 2}, "num_experts_per_tok=3: only 2 experts can be chosen"),
    ({"num_key_value_heads": 4, "swa_num_key_value_heads": 2, "attention_projection_layout": "fused_qkv"}, "chunks"),
    ({"hidden_size": None}, "hidden_size=None: expected a positive integer"),
    ({"scoring_func": "softmax"}, "expected sigmoid"),
])
def test_impossible_configurations_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
