"""Ports' bugs as changes of an independent model: `suspects.py` says what each looks like from outside.

Every function changes a copy of a MiMoV2ForCausalLM or DFlashDraftModel in place and returns False where its bug cannot be (no
sinks, no window, shapes that do not allow it). Where a bug is not its own inverse both directions are here, since the change
may have to undo what a file has wrong or to repeat what an engine does wrong.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F


def attentions(model) -> Iterator:
    layers = model.model.layers if hasattr(model, "model") else model.layers
    return (layer.self_attn for layer in layers)


def experts_of(model) -> list:
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def each_expert(model, change) -> bool:
    for experts in experts_of(model):
        experts.gate_up_proj.copy_(change(experts.gate_up_proj))
        experts.down_proj.copy_(change(experts.down_proj))
    return bool(experts_of(model))


def swap_nibbles(model) -> bool:
    return each_expert(model, lambda w: w.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def scales_as_numbers(model) -> bool:
    def change(w):
        blocks = w.unflatten(-1, (-1, 32))
        # A block's exponent is two (floor) below its maximum's; the code alone times the byte is what such a port computes.
        exponent = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-125).log2().floor() - 2
        return (blocks * torch.exp2(-exponent) * (exponent + 127)).flatten(-2)

    return each_expert(model, change)


def swap_gate_up(model) -> bool:
    for experts in experts_of(model):
        experts.gate_up_proj.copy_(experts.gate_up_proj.roll(experts.gate_up_proj.shape[1] // 2, 1))
    return bool(experts_of(model))


def clamp(model) -> bool:
    def gate(gate_up):
        half = gate_up.shape[-1] // 2
        return F.silu(gate_up[..., :half].clamp(max=7.0)) * gate_up[..., half:].clamp(-7.0, 7.0)

    for experts in experts_of(model):
        experts._apply_gate = gate
    return bool(experts_of(model))


def drop_sinks(model) -> bool:
    found = [a for a in attentions(model) if a.attention_sink_bias is not None]
    for attention in found:
        attention.attention_sink_bias = None
    return bool(found)


def windows(model, change) -> bool:
    found = [a for a in attentions(model) if a.window is not None]
    for attention in found:
        attention.window = change(attention.window)
    return bool(found) and all(a.window is None or a.window > 0 for a in found)


def swap_bases(model) -> bool:
    full, window = ([a for a in attentions(model) if (a.window is None) == kind] for kind in (True, False))
    if not full or not window or full[0].rotary_base == window[0].rotary_base:
        return False
    bases = full[0].rotary_base, window[0].rotary_base
    for group, base in ((full, bases[1]), (window, bases[0])):
        for attention in group:
            attention.rotary_base = base
    return True


def rotary_base(model, value: float, full: bool) -> bool:
    found = [a for a in attentions(model) if (a.window is None) == full]
    for attention in found:
        attention.rotary_base = value
    return bool(found)


def rotary_width(model, factor: float) -> bool:
    for attention in attentions(model):
        attention.rotary_dim = int(attention.qk_dim * factor) // 2 * 2
        if not attention.rotary_dim:
            return False
    return True


def qk_rows(attention, layer: int, config):
    """(weight, rows) of the query and key heads, one slice of rows per head, whatever the layout."""
    from modeling.names import qkv_rows

    if not attention.fused:
        return [(p.weight, slice(h * attention.qk_dim, (h + 1) * attention.qk_dim))
                for p, heads in ((attention.q_proj, attention.query_heads), (attention.k_proj, attention.key_heads))
                for h in range(heads)]
    rows = qkv_rows(config, layer)
    return [(attention.qkv_proj.weight, slice(start, start + attention.qk_dim))
            for part in "qk" for s in rows[part] for start in range(s.start, s.stop, attention.qk_dim)]


def rotary_pairs(model) -> bool:
    for layer, attention in enumerate(attentions(model)):
        n = attention.rotary_dim
        order = torch.cat((torch.arange(0, n, 2), torch.arange(1, n, 2), torch.arange(n, attention.qk_dim)))
        for weight, rows in qk_rows(attention, layer, model.config):
            weight[rows] = weight[rows][order]
    return True


def value_scale(model, scale: float | None) -> bool:
    for attention in attentions(model):
        attention.value_scale = scale
    return True


def chunk_order(attention, layer: int, config) -> torch.Tensor | None:
    """Rows of the fused matrix in the order [all queries | all keys | all values]."""
    from modeling.names import qkv_rows

    if not attention.fused:
        return None
    rows = qkv_rows(config, layer)
    return torch.cat([torch.arange(s.start, s.stop) for part in "qkv" for s in rows[part]])


def fused_as_plain(model) -> bool:
    for layer, attention in enumerate(attentions(model)):
        order = chunk_order(attention, layer, model.config)
        if order is None:
            return False
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        attention.qkv_proj.weight.copy_(attention.qkv_proj.weight[inverse])
    return True


def plain_as_fused(model) -> bool:
    for layer, attention in enumerate(attentions(model)):
        order = chunk_order(attention, layer, model.config)
        if order is None:
            return False
        attention.qkv_proj.weight.copy_(attention.qkv_proj.weight[order])
    return True


def interleaved(query_heads: int, key_heads: int) -> torch.Tensor:
    """Order of query heads that makes grouped attention pair head h with key head h % key_heads."""
    return torch.arange(query_heads).view(-1, key_heads).T.flatten()


def interleave_heads(model) -> bool:
    changed = False
    for layer, attention in enumerate(attentions(model)):
        if attention.key_heads in (1, attention.query_heads):
            continue
        order = interleaved(attention.query_heads, attention.key_heads)
        queries = qk_rows(attention, layer, model.config)[:attention.query_heads]
        weight = queries[0][0]
        copies = [weight[rows].clone() for _, rows in queries]
        for (_, rows), source in zip(queries, order.tolist(), strict=True):
            weight[rows] = copies[source]
        columns = attention.o_proj.weight.unflatten(1, (attention.query_heads, -1))
        attention.o_proj.weight.copy_(columns[:, order].flatten(1))
        if attention.attention_sink_bias is not None:
            attention.attention_sink_bias.copy_(attention.attention_sink_bias[order])
        changed = True
    return changed


def routers(model) -> list:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def drop_correction(model) -> bool:
    for router in routers(model):
        router.e_score_correction_bias.zero_()
    return bool(routers(model))


def toggle_router_norm(model) -> bool:
    for router in routers(model):
        router.config = copy.deepcopy(router.config)
        router.config.norm_topk_prob = not router.config.norm_topk_prob
    return bool(routers(model))


def tie(model) -> bool:
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return True


def draft_value_scale(model, scale: float | None) -> None:
    for attention in attentions(model):
        attention.value_scale = scale


def draft_interleave(model) -> bool:
    heads, keys, width = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    if keys in (1, heads):
        return False
    order = interleaved(heads, keys)
    for attention in attentions(model):
        attention.q_proj.weight.copy_(attention.q_proj.weight.unflatten(0, (heads, width))[order].flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (heads, -1))[:, order].flatten(1))
        if attention.attention_sink_bias is not None:
            attention.attention_sink_bias.copy_(attention.attention_sink_bias[order])
    return True


def draft_no_qk_norm(model) -> None:
    for attention in attentions(model):
        attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()


def reverse_taps(model) -> bool:
    count = len(model.target_layer_ids)
    if count == 1:
        return False
    model.fc.weight.copy_(model.fc.weight.unflatten(1, (count, -1)).flip(1).flatten(1))
    return True


def permute_experts(model, order: Callable[[int], list[int]]) -> bool:
    """Experts change places, routers stay: expert e of the result is expert order(E)[e]."""
    changed = False
    for experts in experts_of(model):
        places = order(experts.num_experts)
        if places != list(range(experts.num_experts)):
            experts.gate_up_proj.copy_(experts.gate_up_proj[places])
            experts.down_proj.copy_(experts.down_proj[places])
            changed = True
    return changed


def by_text(count: int) -> list[int]:
    """0, 1, 10, 11, 2, ...: names sorted as text."""
    return sorted(range(count), key=str)


def by_text_undone(count: int) -> list[int]:
    return sorted(range(count), key=by_text(count).__getitem__)


def exchanged(first: int, second: int) -> Callable[[int], list[int]]:
    def order(count: int) -> list[int]:
        places = list(range(count))
        if second < count:
            places[first], places[second] = second, first
        return places

    return order


def transpose_experts(model) -> bool:
    """Each matrix is its own transpose: only square ones can be taken for each other."""
    if any(e.down_proj.shape[1] != e.down_proj.shape[2] for e in experts_of(model)):
        return False
    for experts in experts_of(model):
        gate, up = experts.gate_up_proj.clone().chunk(2, 1)
        experts.gate_up_proj.copy_(torch.cat((gate.mT, up.mT), 1))
        experts.down_proj.copy_(experts.down_proj.clone().mT)
    return bool(experts_of(model))


def epsilon(model, value: float) -> bool:
    found = [m for m in model.modules() if hasattr(m, "epsilon")]
    if all(m.epsilon == value for m in found):
        return False
    for module in found:
        module.epsilon = value
    return True


def shift_norms(model, by: float) -> None:
    for module in model.modules():
        if hasattr(module, "epsilon"):
            module.weight.add_(by)


def swap_norms(model) -> None:
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


def swap_keys_values(model) -> bool:
    found = [a for a in attentions(model) if not getattr(a, "fused", False)]
    if not found or any(a.k_proj.weight.shape != a.v_proj.weight.shape for a in found):
        return False
    for attention in found:
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    return True


def order_layers(model, places: list[int]) -> bool:
    layers = list(model.model.layers)
    if places == list(range(len(layers))) or len(places) != len(layers):
        return False
    shapes = [[tuple(p.shape) for p in layer.parameters()] for layer in layers]
    if any(shapes[a] != shapes[b] or layers[a].self_attn.window != layers[b].self_attn.window for a, b in enumerate(places)):
        return False
    for i, place in enumerate(places):
        model.model.layers[i] = layers[place]
    return True


def roll_sinks(model, by: int) -> bool:
    found = [a for a in attentions(model) if a.attention_sink_bias is not None]
    if len(found) < 2:
        return False
    values = [a.attention_sink_bias.clone() for a in found]
    for i, attention in enumerate(found):
        attention.attention_sink_bias.copy_(values[(i + by) % len(found)])
    return True


def roll_rows(model, by: int, *, head: bool) -> None:
    module = model.lm_head if head else model.model.embed_tokens
    module.weight.copy_(module.weight.roll(by, 0))


def scale_embedding(model, power: float) -> None:
    weight = model.model.embed_tokens.weight
    weight.mul_(math.sqrt(weight.shape[1]) ** power)


def choose(model, change: Callable[[int], int]) -> bool:
    """Another number of experts per token."""
    for router in routers(model):
        router.config = copy.deepcopy(router.config)
        count = change(router.config.num_experts_per_tok)
        if not 0 < count <= router.config.n_routed_experts:
            return False
        router.config.num_experts_per_tok = count
    return bool(routers(model))


def routed_scale(model, factor: float) -> bool:
    for router in routers(model):
        if (router.config.routed_scaling_factor or 1.0) == factor:
            return False
        router.config = copy.deepcopy(router.config)
        router.config.routed_scaling_factor = factor
    return bool(routers(model))


def route_otherwise(model, *, softmax: bool = False, biased: bool = False) -> bool:
    """Scores by softmax instead of sigmoid; the correction bias in the weights, not only in the choice."""
    if any(router.config.n_group > 1 for router in routers(model)):
        return False
    for router in routers(model):
        router.forward = partial(_route, router, softmax, biased)
    return bool(routers(model))


def _route(router, softmax: bool, biased: bool, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    config, logits = router.config, F.linear(x.float(), router.weight.float())
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    choice = scores + router.e_score_correction_bias
    index = choice.topk(config.num_experts_per_tok, dim=-1).indices
    weight = (choice if biased else scores).gather(1, index)
    if config.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return index, weight * (config.routed_scaling_factor or 1.0)
