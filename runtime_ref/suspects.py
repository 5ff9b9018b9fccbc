"""What usually goes wrong in a port, as things that can be tried: how `validate` names causes.

When outputs disagree, each suspect changes an independent model (modeling/, float32) in the one way that its bug would,
and the run is repeated. The suspect whose change makes the disagreement vanish *is* the cause, whether the folder is wrong
(the change is the remedy: the changed model gives the stored reference) or an engine is (the changed model gives the engine's
outputs). Nothing is guessed from the size of an error.

The list collects what the public ports of this checkpoint family got wrong, and its neighbours. A cause that is not in it is
still located: the first layer whose output parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Relative error (Frobenius) below which two runs are the same run: float32 sums in another order give 1e-6 to 1e-5, the
# smallest bug in the list 1e-2.
SAME = 1e-3
CLAMP_CAUSE = "SwiGLU is clamped at 7 as in gpt-oss: MiMo-V2's experts have no clamp"


@dataclass(frozen=True)
class Suspect:
    """A bug: `cause` in one line, `change` turns a copy of the right model into what the bug makes of it (or back).

    `change` returns False where the bug cannot be (no sinks, no window, ...).
    """

    name: str
    cause: str
    change: Callable[[torch.nn.Module], bool | None]


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error (Frobenius); infinite for other shapes and non-finite values."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def culprits(model: torch.nn.Module, suspects: Iterable[Suspect], run: Callable[[torch.nn.Module], torch.Tensor],
             observed: torch.Tensor) -> list[Suspect]:
    """The suspects whose change makes `run(model)` equal to `observed`."""
    return [suspect for suspect in suspects if _explains(model, suspect, run, observed)]


def _explains(model, suspect: Suspect, run, observed) -> bool:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        return suspect.change(changed) is not False and difference(run(changed), observed) < SAME


def target_suspects(config, rotary_bases: Iterable[float] = ()) -> Iterator[Suspect]:
    """Suspects of a MiMoV2ForCausalLM.

    Args:
        rotary_bases: further bases that a client may have mistaken for the target's.
    """
    yield Suspect("nibbles", "nibbles are swapped: the low nibble of a byte holds the even column", _swap_nibbles)
    for power in (1, -1):
        yield Suspect(f"scale_bias{power:+d}", f"expert scales are off by 2^{power:+d}: a scale byte b means 2^(b - 127)",
                      lambda m, p=power: _each_expert(m, lambda w: w * 2.0**p))
    yield Suspect("scale_raw", "scale bytes are read as numbers: a byte b means 2^(b - 127)", _scales_as_numbers)
    yield Suspect("gate_up", "gate and up projections of the experts are exchanged", _swap_gate_up)
    yield Suspect("swiglu_clamp", CLAMP_CAUSE, _clamp)
    yield Suspect("sinks", "attention sinks of the window layers are dropped", _drop_sinks)
    for window in (1, -1):
        yield Suspect(f"window{window:+d}", "the attention window is off by one: sliding_window counts the query itself",
                      lambda m, n=window: _windows(m, lambda w: w + n))
    for factor in (2, 0.5, 4, 0.25, 8):
        yield Suspect(f"window_x{factor}", "the window of the window layers has another size (sliding_window)",
                      lambda m, f=factor: _windows(m, lambda w: int(w * f)))
    yield Suspect("window_none", "window layers attend to everything: sliding_window or hybrid_layer_pattern is ignored",
                  lambda m: _windows(m, lambda w: None))
    yield Suspect("bases_swapped", "rotary bases of full and window layers are exchanged (rope_theta, swa_rope_theta)",
                  _swap_bases)
    for base in sorted({1e3, 1e4, 1e6, 5e6, 1e7, *rotary_bases}):
        for full in (True, False):
            key = "rope_theta" if full else "swa_rope_theta"
            yield Suspect(f"{key}={base:g}", f"wrong rotary base of the {'full' if full else 'window'} layers ({key})",
                          lambda m, b=base, f=full: _base(m, b, f))
    for factor in (0.25, 1 / 3, 0.334, 0.5, 1.0):
        yield Suspect(f"rotary_width={factor:g}", "wrong rotary width: only the first int(head_dim x partial_rotary_factor) "
                      "entries of a head are rotated", lambda m, f=factor: _rotary_width(m, f))
    yield Suspect("rotary_pairs", "rotary embedding rotates neighbours instead of halves", _rotary_pairs)
    for scale in (None, 0.612, 0.707, 0.7):
        yield Suspect(f"value_scale={scale}", "wrong attention_value_scale: the values' factor is missing or another",
                      lambda m, s=scale: _value_scale(m, s))
    for name, change in (("qkv_order", _fused_as_plain), ("qkv_order_back", _plain_as_fused)):
        yield Suspect(name, "KV layout: the fused qkv is num_key_value_heads chunks of [queries | keys | values], not [all "
                      "queries | all keys | all values]", change)
    yield Suspect("kv_heads", "KV layout: query heads are spread over key heads in turn, not in groups", _interleave_heads)
    yield Suspect("router_bias", "e_score_correction_bias of the routers is ignored", _drop_correction)
    yield Suspect("router_norm", "routing weights are not normalised (norm_topk_prob), or are although they should not be",
                  _toggle_router_norm)
    yield Suspect("mask_row", "embedding and head are taken for the same matrix (tie_word_embeddings)", _tie)


def drafter_suspects(drafter, vocabulary_row: torch.Tensor, target_bases: Iterable[float] = ()) -> Iterator[Suspect]:
    """Suspects of a DFlashDraftModel.

    Args:
        vocabulary_row: the target's embedding of the mask token.
    """
    yield Suspect("mask_row", "the mask embedding is not the vocabulary row of the mask token: mask_embedding.pt must be used",
                  lambda m: m.mask_embedding.copy_(vocabulary_row))
    yield Suspect("mask_zero", "the mask embedding is zero or missing: mask_embedding.pt must be used",
                  lambda m: m.mask_embedding.zero_())
    yield Suspect("draft_sinks", "attention sinks of the drafter are dropped", _drop_sinks)
    yield Suspect("draft_causal", "wrong causality: attention inside the drafter's block is not causal (is_causal, causal)",
                  lambda m: setattr(m, "causal", not m.causal))
    windows = {(drafter.window or 0) + d for d in (1, -1)} | {drafter.window * f for f in (2, 4)} if drafter.window else set()
    halves = {int(drafter.window * f) for f in (0.5, 0.25)} if drafter.window else set()
    for window in sorted(w for w in windows | halves | {16, 24, 32, 64, 128, 256, 512, 1024, 2048} if w >= drafter.block_size):
        yield Suspect(f"draft_window={window}", "wrong window of the drafter (sliding_window, swa_window_size)",
                      lambda m, w=window: None if m.window != w and setattr(m, "window", w) is None else False)
    yield Suspect("draft_window_none", "wrong window of the drafter: it attends to the whole context (use_swa ignored)",
                  lambda m: setattr(m, "window", None) if m.window else False)
    for base in sorted({1e3, 1e4, 1e6, 5e6, 1e7, *target_bases}):
        yield Suspect(f"draft_base={base:g}", "wrong rotary base of the drafter: it is the backbone's "
                      "(dflash_config.backbone_rotary_base)", lambda m, b=base: setattr(m, "rotary_base", b))
    D = drafter.config.head_dim
    for factor in (0.25, 0.334, 0.5, 1.0):
        yield Suspect(f"draft_width={factor:g}", "wrong rotary width of the drafter (partial_rotary_factor)",
                      lambda m, f=factor: setattr(m, "rotary_dim", int(D * f)))
    for scale in (None, 0.612, 0.707, 0.7):
        yield Suspect(f"draft_value_scale={scale}", "wrong attention_value_scale of the drafter",
                      lambda m, s=scale: _draft_value_scale(m, s))
    yield Suspect("draft_kv_heads", "KV layout of the drafter: query heads are spread over key heads in turn, not in groups",
                  _draft_interleave)
    yield Suspect("draft_qk_norm", "query and key norms of the drafter are dropped", _draft_no_qk_norm)
    yield Suspect("taps_order", "tapped layers are concatenated in another order (target_layer_ids)", _reverse_taps)


def _attentions(model) -> Iterator:
    layers = model.model.layers if hasattr(model, "model") else model.layers
    return (layer.self_attn for layer in layers)


def _experts(model) -> list:
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def _each_expert(model, change) -> bool:
    for experts in _experts(model):
        experts.gate_up_proj.copy_(change(experts.gate_up_proj))
        experts.down_proj.copy_(change(experts.down_proj))
    return bool(_experts(model))


def _swap_nibbles(model) -> bool:
    return _each_expert(model, lambda w: w.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def _scales_as_numbers(model) -> bool:
    def change(w):
        blocks = w.unflatten(-1, (-1, 32))
        # A block's exponent is two (floor) below its maximum's; the code alone times the byte is what such a port computes.
        exponent = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-125).log2().floor() - 2
        return (blocks * torch.exp2(-exponent) * (exponent + 127)).flatten(-2)

    return _each_expert(model, change)


def _swap_gate_up(model) -> bool:
    for experts in _experts(model):
        experts.gate_up_proj.copy_(experts.gate_up_proj.roll(experts.gate_up_proj.shape[1] // 2, 1))
    return bool(_experts(model))


def _clamp(model) -> bool:
    def gate(gate_up):
        half = gate_up.shape[-1] // 2
        return F.silu(gate_up[..., :half].clamp(max=7.0)) * gate_up[..., half:].clamp(-7.0, 7.0)

    for experts in _experts(model):
        experts._apply_gate = gate
    return bool(_experts(model))


def _drop_sinks(model) -> bool:
    found = [a for a in _attentions(model) if a.attention_sink_bias is not None]
    for attention in found:
        attention.attention_sink_bias = None
    return bool(found)


def _windows(model, change) -> bool:
    found = [a for a in _attentions(model) if a.window is not None]
    for attention in found:
        attention.window = change(attention.window)
    return bool(found) and all(a.window is None or a.window > 0 for a in found)


def _swap_bases(model) -> bool:
    full, window = ([a for a in _attentions(model) if (a.window is None) == kind] for kind in (True, False))
    if not full or not window or full[0].rotary_base == window[0].rotary_base:
        return False
    bases = full[0].rotary_base, window[0].rotary_base
    for group, base in ((full, bases[1]), (window, bases[0])):
        for attention in group:
            attention.rotary_base = base
    return True


def _base(model, base: float, full: bool) -> bool:
    found = [a for a in _attentions(model) if (a.window is None) == full]
    for attention in found:
        attention.rotary_base = base
    return bool(found)


def _rotary_width(model, factor: float) -> bool:
    for attention in _attentions(model):
        attention.rotary_dim = int(attention.qk_dim * factor) // 2 * 2
        if not attention.rotary_dim:
            return False
    return True


def _qk_rows(attention, layer: int, config):
    """(weight, rows) of the query and key heads, one slice of rows per head, whatever the layout."""
    from modeling.names import qkv_rows

    if not attention.fused:
        return [(p.weight, slice(h * attention.qk_dim, (h + 1) * attention.qk_dim))
                for p, heads in ((attention.q_proj, attention.query_heads), (attention.k_proj, attention.key_heads))
                for h in range(heads)]
    rows = qkv_rows(config, layer)
    return [(attention.qkv_proj.weight, slice(start, start + attention.qk_dim))
            for part in "qk" for s in rows[part] for start in range(s.start, s.stop, attention.qk_dim)]


def _rotary_pairs(model) -> bool:
    for layer, attention in enumerate(_attentions(model)):
        n = attention.rotary_dim
        order = torch.cat((torch.arange(0, n, 2), torch.arange(1, n, 2), torch.arange(n, attention.qk_dim)))
        for weight, rows in _qk_rows(attention, layer, model.config):
            weight[rows] = weight[rows][order]
    return True


def _value_scale(model, scale: float | None) -> bool:
    for attention in _attentions(model):
        attention.value_scale = scale
    return True


def _chunk_order(attention, layer: int, config) -> torch.Tensor | None:
    """Rows of the fused matrix in the order [all queries | all keys | all values]."""
    from modeling.names import qkv_rows

    if not attention.fused:
        return None
    rows = qkv_rows(config, layer)
    return torch.cat([torch.arange(s.start, s.stop) for part in "qkv" for s in rows[part]])


def _fused_as_plain(model) -> bool:
    for layer, attention in enumerate(_attentions(model)):
        order = _chunk_order(attention, layer, model.config)
        if order is None:
            return False
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        attention.qkv_proj.weight.copy_(attention.qkv_proj.weight[inverse])
    return True


def _plain_as_fused(model) -> bool:
    for layer, attention in enumerate(_attentions(model)):
        order = _chunk_order(attention, layer, model.config)
        if order is None:
            return False
        attention.qkv_proj.weight.copy_(attention.qkv_proj.weight[order])
    return True


def _interleaved(query_heads: int, key_heads: int) -> torch.Tensor:
    """Order of query heads that makes grouped attention pair head h with key head h % key_heads."""
    return torch.arange(query_heads).view(-1, key_heads).T.flatten()


def _interleave_heads(model) -> bool:
    changed = False
    for layer, attention in enumerate(_attentions(model)):
        if attention.key_heads in (1, attention.query_heads):
            continue
        order = _interleaved(attention.query_heads, attention.key_heads)
        queries = _qk_rows(attention, layer, model.config)[:attention.query_heads]
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


def _routers(model) -> list:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def _drop_correction(model) -> bool:
    for router in _routers(model):
        router.e_score_correction_bias.zero_()
    return bool(_routers(model))


def _toggle_router_norm(model) -> bool:
    for router in _routers(model):
        router.config = copy.deepcopy(router.config)
        router.config.norm_topk_prob = not router.config.norm_topk_prob
    return bool(_routers(model))


def _tie(model) -> bool:
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return True


def _draft_value_scale(model, scale: float | None) -> None:
    for attention in _attentions(model):
        attention.value_scale = scale


def _draft_interleave(model) -> bool:
    heads, keys, width = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
    if keys in (1, heads):
        return False
    order = _interleaved(heads, keys)
    for attention in _attentions(model):
        attention.q_proj.weight.copy_(attention.q_proj.weight.unflatten(0, (heads, width))[order].flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (heads, -1))[:, order].flatten(1))
        if attention.attention_sink_bias is not None:
            attention.attention_sink_bias.copy_(attention.attention_sink_bias[order])
    return True


def _draft_no_qk_norm(model) -> None:
    for attention in _attentions(model):
        attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()


def _reverse_taps(model) -> bool:
    count = len(model.target_layer_ids)
    if count == 1:
        return False
    model.fc.weight.copy_(model.fc.weight.unflatten(1, (count, -1)).flip(1).flatten(1))
    return True
