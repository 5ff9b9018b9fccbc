"""The DFlash drafter: published shapes, the mask in all its forms, training forward = decoding, each known port bug."""

import json

import pytest
import torch
from tolerance import DRAFTER_FP32
from torch import nn

from modeling.block_mask import dense_mask, key_ranges, visible_block
from modeling.drafter import (
    DFlashDraftModel,
    config_json,
    drafter_config,
    load_drafter,
    released_drafter,
    rotate,
    save_drafter,
)

GEOMETRY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                head_dim=16, v_head_dim=24, vocab_size=100, target_layer_ids=[0, 2, 4], num_target_layers=5, mask_token_id=3,
                rotary_base=1e6, window=16, partial_rotary_factor=0.5, attention_value_scale=0.7)
S, A = 63, 13


def build(**changes) -> DFlashDraftModel:
    torch.manual_seed(0)
    model = DFlashDraftModel(drafter_config(**GEOMETRY | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture
def rows():
    """Two packed rows of 63 tokens: dialogues that begin at 0, 20 / 0, 33; 13 anchors each, two of them missing."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.zeros(2, S, dtype=torch.long)
    starts[0, 20:], starts[1, 33:] = 20, 33
    anchors = torch.stack([torch.randperm(S, generator=generator)[:A].sort().values for _ in range(2)])
    anchors[0, -1], anchors[0, 4] = S - 1, 20  # an anchor on the row's last token, one on a dialogue's first
    anchors = anchors.sort(dim=1).values
    anchors[1, :2] = -1
    return {"target_hidden": torch.randn(2, S, 3 * 64, generator=generator),
            "ids": torch.randint(0, 100, (2, A), generator=generator),
            "anchors": anchors, "starts": starts}


@pytest.fixture
def embed():
    torch.manual_seed(2)
    return nn.Embedding(100, 64)


def run(model, rows, embed, **kwargs):
    return model(rows["target_hidden"], rows["ids"], rows["anchors"], rows["starts"], embed, **kwargs)


def decode(model, rows, embed, row, column, length=8, **wrong):
    """The same block through the decoding path; `wrong` injects a port's mistake."""
    anchor = int(rows["anchors"][row, column])
    begin = int(rows["starts"][row, anchor])
    context = model.fuse(wrong.get("target_hidden", rows["target_hidden"])[row:row + 1, begin:anchor])
    positions = torch.arange(anchor - begin)[None] + wrong.get("shift", 0)
    block = torch.arange(anchor - begin, anchor - begin + length)[None]
    embeds = model.embed_block(rows["ids"][row:row + 1, column], embed)[:, :length]
    return model.block_hidden(embeds, block, model.context_keys_values(context, positions), positions)[0]


@pytest.mark.parametrize("name, tensors, byte_count", [("MiMo-V2.5", 63, 2_936_114_304), ("MiMo-V2.5-Pro", 63, 5_536_632_576)])
def test_released_geometries_have_the_published_tensors(name, tensors, byte_count):
    config = released_drafter(name)
    with torch.device("meta"):
        model = DFlashDraftModel(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n != "mask_embedding"}
    H, heads, layers = config.hidden_size, config.num_attention_heads, range(5)
    expected = {"fc.weight": (H, 5 * H), "hidden_norm.weight": (H,), "norm.weight": (H,)}
    for i in layers:
        expected |= {f"layers.{i}.{n}.weight": (H,) for n in ("input_layernorm", "post_attention_layernorm")}
        a = f"layers.{i}.self_attn"
        expected |= {f"{a}.q_proj.weight": (heads * 128, H), f"{a}.k_proj.weight": (1024, H), f"{a}.v_proj.weight": (1024, H),
                     f"{a}.o_proj.weight": (H, heads * 128), f"{a}.q_norm.weight": (128,), f"{a}.k_norm.weight": (128,),
                     f"{a}.attention_sink_bias": (heads,)}
        expected |= {f"layers.{i}.mlp.{n}_proj.weight": (16384, H) for n in ("gate", "up")}
        expected[f"layers.{i}.mlp.down_proj.weight"] = (H, 16384)
    assert shapes == expected and len(shapes) == tensors
    assert sum(2 * torch.Size(s).numel() for s in shapes.values()) == byte_count


def test_the_configuration_says_window_and_causality_under_every_engines_key():
    text = config_json(drafter_config(**GEOMETRY))
    assert text["layer_types"] == ["sliding_attention"] * 2 and text["sliding_window"] == 16 and text["use_sliding_window"]
    assert text["dflash_config"]["use_swa"] and text["dflash_config"]["swa_window_size"] == 16
    assert text["is_causal"] is False and text["dflash_config"]["causal"] is False and text["max_window_layers"] == 0
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == text["dflash_config"]["backbone_rotary_base"] == 1e6
    assert text["partial_rotary_factor"] == 0.5 and text["block_size"] == text["dflash_config"]["block_size"] == 8
    assert text["model_type"] == "qwen3" and text["architectures"] == ["DFlashDraftModel"]


def test_stock_transformers_reads_the_window_of_a_saved_drafter(tmp_path):
    from transformers import AutoConfig

    save_drafter(build(), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.sliding_window, config.layer_types) == (16, ["sliding_attention"] * 2)
    assert config.dflash_config["target_layer_ids"] == [0, 2, 4]


def test_a_block_sees_earlier_context_of_its_document_within_the_window_and_itself():
    starts = torch.zeros(1, 12, dtype=torch.long)
    starts[0, 5:] = 5
    mask = dense_mask(torch.tensor([[9]]), starts, block=3, window=4, causal=False)[0]
    assert [sorted(row.nonzero().flatten().tolist()) for row in mask] == [
        [6, 7, 8, 12, 13, 14], [7, 8, 12, 13, 14], [8, 12, 13, 14]]
    first = dense_mask(torch.tensor([[5]]), starts, block=3, window=4, causal=False)[0]
    assert not first[:, :12].any(), "the first token of a document has no context, least of all the document before"
    assert torch.equal(visible_block(3, causal=True), torch.ones(3, 3).tril().bool())


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("window", [9, None])
def test_the_slices_of_context_hold_all_that_is_visible(rows, chunk, window):
    mask = dense_mask(rows["anchors"], rows["starts"], 8, window, False)[:, :, :S].view(2, A, 8, S).any(2)
    for part, first, length in key_ranges(rows["anchors"], rows["starts"], window, chunk):
        for b in range(2):
            seen = mask[b, part].any(0).nonzero().flatten()
            if len(seen):
                assert first[b] <= seen.min() and seen.max() < first[b] + length


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"window": None}, {"attention_sink_bias": False},
                                     {"convolution_rank": 4}, {"window": 8, "v_head_dim": None}], ids=str)
def test_all_forms_of_the_training_attention_agree(rows, embed, changes):
    model, here = build(**changes), rows["anchors"] >= 0
    with torch.no_grad():  # flex_attention has no backward pass on a CPU
        dense, blocked, flex = (run(model, rows, embed, attention=a) for a in ("dense", "blocked", "flex"))
    torch.testing.assert_close(blocked[here], dense[here], **DRAFTER_FP32)
    torch.testing.assert_close(flex[here], dense[here], **DRAFTER_FP32)
    assert torch.isfinite(blocked).all()


def test_gradients_of_the_blocked_form_are_those_of_the_dense_one(rows, embed):
    grads = []
    for form in ("dense", "blocked"):
        model = build()
        (run(model, rows, embed, attention=form)[rows["anchors"] >= 0] ** 2).mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], **DRAFTER_FP32, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"window": None}, {"convolution_rank": 4}], ids=str)
def test_decoding_equals_training(rows, embed, changes):
    model = build(**changes)
    with torch.no_grad():
        trained = run(model, rows, embed)
        for row, column in [(0, 0), (0, 5), (0, A - 1), (1, 2), (1, A - 1)]:
            torch.testing.assert_close(decode(model, rows, embed, row, column), trained[row, column], **DRAFTER_FP32)


def test_positions_beyond_the_window_change_nothing_and_those_within_do(rows, embed):
    model = build()
    anchor = int(rows["anchors"][0, -1])
    assert anchor - 20 > 16
    with torch.no_grad():
        before = run(model, rows, embed)[0, -1]
        rows["target_hidden"][0, anchor - 16] += 1.0
        assert torch.equal(run(model, rows, embed)[0, -1], before)
        rows["target_hidden"][0, anchor - 15] += 1.0  # the anchor's farthest key
        after = run(model, rows, embed)[0, -1]
    assert not torch.equal(after, before)


def test_neither_the_anchors_own_feature_nor_another_block_is_seen(rows, embed):
    model = build()
    with torch.no_grad():
        before = run(model, rows, embed)
        changed = {k: v.clone() for k, v in rows.items()}
        anchor = int(rows["anchors"][0, 6])
        changed["target_hidden"][0, anchor:] += 1.0
        changed["ids"][0, :6] = (changed["ids"][0, :6] + 1) % 100
        after = run(model, changed, embed)
    assert torch.equal(after[0, 6], before[0, 6])


def test_fewer_drafts_are_the_first_positions_of_a_causal_block(rows, embed):
    model = build(causal=True)
    with torch.no_grad():
        whole, four = decode(model, rows, embed, 0, 5), decode(model, rows, embed, 0, 5, length=4)
    torch.testing.assert_close(four, whole[:4], **DRAFTER_FP32)


def _swap_clamp(model):
    for layer in model.layers:
        layer.mlp.forward = lambda x, m=layer.mlp: m.down_proj(
            nn.functional.silu(m.gate_proj(x).clamp(max=0.5)) * m.up_proj(x).clamp(-0.5, 0.5))


# What ports of this drafter got wrong, in public; each must be visible in the hidden states.
PORT_BUGS = {
    "mask embedding left at the vocabulary's zero row": lambda m: m.mask_embedding.data.zero_(),
    "rotary over the whole head": lambda m: setattr(m, "rotary_dim", 16),
    "the draft config's rotary base instead of the backbone's": lambda m: setattr(m, "rotary_base", 10_000.0),
    "sinks dropped": lambda m: [layer.self_attn.attention_sink_bias.data.fill_(-1e9) for layer in m.layers],
    "value scale dropped": lambda m: [setattr(layer.self_attn, "value_scale", None) for layer in m.layers],
    "causal inside the block": lambda m: setattr(m, "causal", True),
    "window ignored": lambda m: setattr(m, "window", None),
    "window off by one": lambda m: setattr(m, "window", m.window - 1),
    "SwiGLU clamped as in gpt-oss": _swap_clamp,
    "query and key norms dropped": lambda m: [layer.self_attn.q_norm.weight.data.fill_(1.0) for layer in m.layers],
    "final norm is the target's": lambda m: m.norm.weight.data.fill_(1.0),
}


@pytest.mark.parametrize("bug", PORT_BUGS, ids=lambda b: b.replace(" ", "-"))
def test_port_bugs_show(rows, embed, bug):
    model = build()
    with torch.no_grad():
        right = decode(model, rows, embed, 0, A - 1)
        PORT_BUGS[bug](model)
        wrong = decode(model, rows, embed, 0, A - 1)
    assert (wrong - right).norm() > 1e-2 * right.norm()


@pytest.mark.parametrize("wrong", [{"shift": 1}, {"target_hidden": "rolled"}], ids=["context-positions",
                                                                                     "wrong-layer-order"])
def test_port_bugs_of_the_context_show(rows, embed, wrong):
    model = build()
    if "target_hidden" in wrong:
        wrong = {"target_hidden": rows["target_hidden"].roll(64, dims=-1)}
    with torch.no_grad():
        right, found = decode(model, rows, embed, 0, A - 1), decode(model, rows, embed, 0, A - 1, **wrong)
    assert (found - right).norm() > 1e-2 * right.norm()


def test_saving_and_loading_is_exact_and_complete(tmp_path, rows, embed):
    model = build().to(torch.bfloat16).float()
    save_drafter(model, tmp_path)
    loaded = load_drafter(tmp_path, torch.float32)
    assert {n: p.tolist() for n, p in loaded.named_parameters()} == {n: p.tolist() for n, p in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(run(loaded, rows, embed), run(model, rows, embed))
    mask = torch.load(tmp_path / "mask_embedding.pt", weights_only=True)
    assert mask["mask_token_id"] == 3 and mask["embedding"].dtype == torch.bfloat16


def test_an_incomplete_drafter_folder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_drafter(build(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    sink = tensors.pop("layers.1.self_attn.attention_sink_bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing.*layers.1.self_attn.attention_sink_bias"):
        load_drafter(tmp_path)
    save_file(tensors | {"layers.1.self_attn.attention_sink_bias": sink[:2].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="shape"):
        load_drafter(tmp_path)
    (tmp_path / "mask_embedding.pt").unlink()
    with pytest.raises(ValueError, match="mask_embedding.pt"):
        load_drafter(tmp_path)


def test_the_released_configuration_reads_as_what_it_means(tmp_path):
    """Only the released keys: window and causality are in dflash_config, the rotary base is the backbone's."""
    released = {k: v for k, v in config_json(released_drafter("MiMo-V2.5")).items()
                if k not in ("layer_types", "use_sliding_window", "max_window_layers", "is_causal", "rope_parameters")}
    released |= {"rope_theta": 10000, "num_hidden_layers": 1, "intermediate_size": 64}
    released["dflash_config"] = {k: v for k, v in released["dflash_config"].items() if k not in ("causal", "num_target_layers")}
    (tmp_path / "config.json").write_text(json.dumps(released))
    from transformers import AutoConfig

    with torch.device("meta"):
        model = DFlashDraftModel(AutoConfig.from_pretrained(tmp_path))
    assert (model.window, model.causal, model.rotary_base, model.rotary_dim) == (1024, False, 5_000_000, 64)
    assert model.layers[0].self_attn.value_scale == 0.612


def test_rotation_keeps_lengths_and_leaves_the_rest_of_the_head_alone():
    x = torch.randn(5, 3, 16)
    cos, sin = build().cos_sin(torch.arange(5))
    y = rotate(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 8:], x[..., 8:]) and torch.equal(y[0], x[0])


@pytest.mark.parametrize("changes, words", [
    ({"target_layer_ids": [0, 5]}, "layer 5"), ({"target_layer_ids": []}, "one or more"),
    ({"target_layer_ids": [1, 1]}, "different"), ({"mask_token_id": 100}, "mask_token_id=100"),
    ({"num_key_value_heads": 3}, "multiple"), ({"block_size": 17}, "block_size=17"),
    ({"partial_rotary_factor": 0.2}, "even number"), ({"selector_top_k": 4}, "markov_rank"),
], ids=str)
def test_impossible_geometries_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        drafter_config(**GEOMETRY | changes)


def test_unsorted_anchors_and_unknown_attention_are_refused(rows, embed):
    with pytest.raises(ValueError, match="blocked, dense, flex"):
        run(build(), rows, embed, attention="eager")
    rows["anchors"] = rows["anchors"].flip(1)
    with pytest.raises(ValueError, match="ascending"):
        run(build(), rows, embed)


def test_options_start_as_plain_dflash(rows, embed):
    """Fresh convolution and Markov head add nothing, and plain checkpoints have none of their tensors."""
    torch.manual_seed(3)
    model = DFlashDraftModel(drafter_config(**GEOMETRY, convolution_rank=4, markov_rank=4))
    plain = DFlashDraftModel(drafter_config(**GEOMETRY))
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "convolution" not in n and "markov" not in n})
    with torch.no_grad():
        assert torch.equal(run(model, rows, embed), run(plain, rows, embed))
    assert not model.markov_bias(torch.arange(5)).any()
