"""Ports' bugs as changes of transformers' own Qwen3-MoE and gpt-oss: the suspects of folders in those layouts.

As `suspects.py` does with MiMo-V2: each suspect changes a copy of an independent model in the one way that its bug would, and
what makes a disagreement vanish is its cause. The models differ in what can go wrong (gate and up rows alternate in gpt-oss,
query and key norms exist only in Qwen3), so the changes are written against the modules of transformers' classes.

Shapes: Qwen3-MoE's fused experts are gate_up [E, 2 I, H] and down [E, H, I], blocks along the last dimension; gpt-oss's are
gate_up [E, H, 2 I] and down [E, I, H], blocks along the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from runtime_ref.validation.diagnosis.edits_mimo import (
    by_text,
    by_text_undone,
    experts_of,
    interleaved,
    permute_experts,
    roll_rows,
    scale_embedding,
    swap_norms,
    tie,
)
from runtime_ref.validation.diagnosis.faults import NORM_CAUSE, ORDER_CAUSE, ROWS_CAUSE, Suspect

NIBBLE_CAUSE = "nibbles are swapped: the low nibble of a byte holds the even column"


def transposed(model) -> bool:
    """Whether experts are stored [E, in, out] (gpt-oss)."""
    return model.config.model_type == "gpt_oss"


def along_blocks(model, change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Applies `change` to each expert tensor with the dimension of its blocks last."""
    for experts in experts_of(model):
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.copy_(change(weight.mT.contiguous()).mT if transposed(model) else change(weight))
    return bool(experts_of(model))


def swap_nibbles(model) -> bool:
    return along_blocks(model, lambda w: w.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def scales_as_numbers(model) -> bool:
    def change(w):
        blocks = w.unflatten(-1, (-1, 32))
        exponent = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-125).log2().floor() - 2
        return (blocks * torch.exp2(-exponent) * (exponent + 127)).flatten(-2)

    return along_blocks(model, change)


def reorder_gate_up(model, order: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Output rows of gate_up (and their biases) in the order `order(arange(2 I))`."""
    for experts in experts_of(model):
        weight = experts.gate_up_proj
        rows = order(torch.arange(weight.shape[2 if transposed(model) else 1]))
        weight.copy_(weight[:, :, rows] if transposed(model) else weight[:, rows])
        if transposed(model):
            experts.gate_up_proj_bias.copy_(experts.gate_up_proj_bias[:, rows])
    return bool(experts_of(model))


def swap_gate_up(model) -> bool:
    if transposed(model):
        return reorder_gate_up(model, lambda rows: rows.view(-1, 2).flip(1).flatten())
    return reorder_gate_up(model, lambda rows: rows.roll(rows.numel() // 2))


def alternating(rows: torch.Tensor) -> torch.Tensor:
    """0, I, 1, I + 1, ...: halves written as alternating rows."""
    return rows.view(2, -1).T.flatten()


def halved(rows: torch.Tensor) -> torch.Tensor:
    """0, 2, 4, ..., 1, 3, 5, ...: alternating rows written as halves."""
    return rows.view(-1, 2).T.flatten()


def gate_with(model, form: Callable) -> bool:
    """Another activation: form(gate, up)."""
    split = transposed(model)

    def gate(gate_up):
        half = gate_up.shape[-1] // 2
        return form(*((gate_up[..., ::2], gate_up[..., 1::2]) if split else (gate_up[..., :half], gate_up[..., half:])))

    for experts in experts_of(model):
        experts._apply_gate = gate
    return bool(experts_of(model))


def attentions(model) -> list:
    return [layer.self_attn for layer in model.model.layers]


def routers(model) -> list:
    mlps = [layer.mlp for layer in model.model.layers]
    found = [getattr(mlp, name) for mlp in mlps for name in ("gate", "router") if hasattr(mlp, name)]
    return [router for router in found if hasattr(router, "top_k")]


def sinks(model, change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> bool:
    found = [a.sinks for a in attentions(model) if hasattr(a, "sinks")]
    for own, value in zip(found, change([s.clone() for s in found]), strict=True):
        own.copy_(value)
    return len(found) > 1


def window(model, change: Callable[[int], int]) -> bool:
    """transformers makes the mask from the configuration."""
    present = getattr(model.config, "sliding_window", None)
    if not present or "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return False
    model.config.sliding_window = change(present)
    return model.config.sliding_window > 0


def rotary_base(model, base: float) -> bool:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary, parameters = model.model.rotary_emb, dict(model.config.rope_parameters)
    if parameters["rope_theta"] == base:
        return False
    model.config.rope_parameters = parameters | {"rope_theta": base}
    kind = parameters.get("rope_type", "default")
    make = rotary.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    rotary.inv_freq, rotary.attention_scaling = make(model.config)
    return True


def rotary_unextended(model, *, factor_only: bool) -> bool:
    """The extension (yarn) ignored, wholly or in its factor of cosines and sines."""
    rotary = model.model.rotary_emb
    if model.config.rope_parameters.get("rope_type", "default") == "default":
        return False
    if not factor_only:
        rotary.inv_freq = rotary.compute_default_rope_parameters(model.config)[0]
    rotary.attention_scaling = 1.0
    return True


def head_rows(model, attention, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Changes the order of the rows within each query and key head (and of what belongs to them)."""
    D = attention.head_dim
    order = change(torch.arange(D))
    for projection in (attention.q_proj, attention.k_proj):
        for p in (projection.weight, projection.bias):
            if p is not None:
                p.copy_(p.unflatten(0, (-1, D))[:, order].flatten(0, 1))
    for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
        if norm is not None:
            norm.weight.copy_(norm.weight[order])


def rotary_pairs(model) -> None:
    for attention in attentions(model):
        head_rows(model, attention, halved)


def interleave_heads(model) -> bool:
    heads, keys = model.config.num_attention_heads, model.config.num_key_value_heads
    if keys in (1, heads):
        return False
    order = interleaved(heads, keys)
    for attention in attentions(model):
        for p in (attention.q_proj.weight, attention.q_proj.bias):
            if p is not None:
                p.copy_(p.unflatten(0, (heads, -1))[order].flatten(0, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (heads, -1))[:, order].flatten(1))
        if hasattr(attention, "sinks"):
            attention.sinks.copy_(attention.sinks[order])
    return True


def swap_keys_values(model) -> None:
    for attention in attentions(model):
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def no_qk_norm(model) -> bool:
    found = [a for a in attentions(model) if hasattr(a, "q_norm")]
    for attention in found:
        attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()
    return bool(found)


def zero(model, names: tuple[str, ...]) -> bool:
    """Zeroes every parameter whose name ends so."""
    found = [p for name, p in model.named_parameters() if name.endswith(names)]
    for p in found:
        p.zero_()
    return bool(found)


def score_otherwise(model, kind: str) -> bool:
    """Routing weights from other scores: "all" (softmax over all experts, not normalized), "chosen" (normalized), "sigmoid"."""
    for router in routers(model):
        router.forward = partial(_route, router, kind)
    return bool(routers(model))


def _route(router, kind: str, x: torch.Tensor):
    logits = F.linear(x.reshape(-1, router.weight.shape[1]), router.weight, getattr(router, "bias", None))
    scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
    weight, index = scores.topk(router.top_k, dim=-1)
    return logits, weight / weight.sum(-1, keepdim=True) if kind != "all" else weight, index


def choose(model, change: Callable[[int], int]) -> bool:
    for router in routers(model):
        router.top_k = change(router.top_k)
        if not 0 < router.top_k <= router.weight.shape[0]:
            return False
    return bool(routers(model))


def epsilon(model, value: float) -> bool:
    found = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    if all(m.variance_epsilon == value for m in found):
        return False
    for module in found:
        module.variance_epsilon = value
    return True


def shift_norms(model, by: float) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.weight.add_(by)


def exchange_layers(model, first: int) -> bool:
    layers, kinds = model.model.layers, getattr(model.config, "layer_types", None)
    if kinds and kinds[first] != kinds[first + 1]:
        return False
    shapes = [[tuple(p.shape) for p in layers[i].parameters()] for i in (first, first + 1)]
    if shapes[0] != shapes[1]:
        return False
    layers[first], layers[first + 1] = layers[first + 1], layers[first]
    return True


def stock_suspects(config, bases=()) -> Iterator[Suspect]:
    """Suspects of transformers' model of a folder; `config` is its geometry (`families.Geometry`)."""
    oss = config.model_type == "gpt_oss"
    yield from _expert_suspects(config, oss)
    yield from _router_suspects(oss)
    yield from _attention_suspects(oss, bases)
    yield from _shared_suspects(config)


def _expert_suspects(config, oss: bool) -> Iterator[Suspect]:
    yield Suspect("nibbles", NIBBLE_CAUSE, swap_nibbles)
    for power in (1, -1):
        yield Suspect(f"scale_bias{power:+d}", f"expert scales are off by 2^{power:+d}: a scale byte b means 2^(b - 127)",
                      lambda m, p=power: along_blocks(m, lambda w: w * 2.0**p))
    yield Suspect("scale_raw", "scale bytes are read as numbers: a byte b means 2^(b - 127)", scales_as_numbers)
    yield Suspect("gate_up", "gate and up projections of the experts are exchanged", swap_gate_up)
    layout = ("gate and up rows alternate in gpt-oss: they are taken for halves" if oss else
              "gate and up are tensors of their own: they are taken for alternating rows, as in gpt-oss")
    for name, order in (("alternating", alternating), ("halved", halved)):
        yield Suspect(f"gate_up {name}", layout, partial(reorder_gate_up, order=order))
    if oss:
        limit, alpha = config.clamp
        yield Suspect("no clamp", "the clamp of gpt-oss's SwiGLU is missing (swiglu_limit)",
                      lambda m: gate_with(m, lambda g, u: g * (alpha * g).sigmoid() * (u + 1)))
        yield Suspect("alpha", f"alpha of gpt-oss's SwiGLU is missing: gate sigmoid({alpha:g} gate)", lambda m: gate_with(
            m, lambda g, u: F.silu(g.clamp(max=limit)) * (u.clamp(-limit, limit) + 1)))
        yield Suspect("plus one", "gpt-oss's SwiGLU multiplies by up + 1, not by up", lambda m: gate_with(
            m, lambda g, u: (g := g.clamp(max=limit)) * (alpha * g).sigmoid() * u.clamp(-limit, limit)))
        yield Suspect("expert biases", "biases of the experts are dropped (gate_up_proj_bias, down_proj_bias)",
                      partial(zero, names=("gate_up_proj_bias", "down_proj_bias")))
        yield Suspect("down bias", "the bias of the experts' down projection is dropped (down_proj_bias)",
                      partial(zero, names=("down_proj_bias",)))
        yield Suspect("gate_up bias", "the bias of the experts' gate and up projections is dropped (gate_up_proj_bias)",
                      partial(zero, names=("gate_up_proj_bias",)))
    else:
        yield Suspect("swiglu clamp", "SwiGLU is clamped at 7 as in gpt-oss: Qwen3-MoE's experts have no clamp",
                      lambda m: gate_with(m, lambda g, u: F.silu(g.clamp(max=7.0)) * u.clamp(-7.0, 7.0)))
    orders = {"reversed": lambda n: list(range(n))[::-1], "one later": lambda n: [(e + 1) % n for e in range(n)],
              "one earlier": lambda n: [(e - 1) % n for e in range(n)], "sorted as text": by_text,
              "sorted as text, undone": by_text_undone}
    for name, order in orders.items():
        yield Suspect(f"experts {name}", f"{ORDER_CAUSE} ({name})", partial(permute_experts, order=order))


def _router_suspects(oss: bool) -> Iterator[Suspect]:
    cause = ("routing weights are a softmax of the chosen experts' logits, not of all" if oss else
             "routing weights are not normalised (norm_topk_prob), or are although they should not be")
    for kind in ("all", "chosen"):
        yield Suspect(f"router {kind}", cause, partial(score_otherwise, kind=kind))
    yield Suspect("sigmoid router", "router scores by sigmoid, as in MiMo-V2: these are a softmax",
                  partial(score_otherwise, kind="sigmoid"))
    if oss:
        yield Suspect("router bias", "the routers' bias is dropped (router.bias)", partial(zero, names=("router.bias",)))
    for name, change in (("-1", lambda n: n - 1), ("+1", lambda n: n + 1), ("x2", lambda n: 2 * n), ("/2", lambda n: n // 2)):
        yield Suspect(f"experts per token{name}", "another number of experts per token (num_experts_per_tok)",
                      partial(choose, change=change))


def _attention_suspects(oss: bool, bases) -> Iterator[Suspect]:
    for base in sorted({1e3, 1e4, 1e5, 1.5e5, 1e6, 5e6, 1e7, *bases}):
        yield Suspect(f"rope_theta={base:g}", "wrong rotary base (rope_theta)", partial(rotary_base, base=base))
    yield Suspect("rotary_pairs", "rotary embedding rotates neighbours instead of halves", rotary_pairs)
    yield Suspect("kv_heads", "KV layout: query heads are spread over key heads in turn, not in groups", interleave_heads)
    yield Suspect("keys for values", "key and value projections are exchanged", swap_keys_values)
    if not oss:
        yield Suspect("qk_norm", "the norms of query and key heads are dropped (q_norm, k_norm)", no_qk_norm)
        return
    yield Suspect("yarn", "the rotary extension is ignored (rope_parameters: yarn)",
                  partial(rotary_unextended, factor_only=False))
    yield Suspect("yarn factor", "yarn's factor of cosines and sines is ignored (0.1 ln(factor) + 1)",
                  partial(rotary_unextended, factor_only=True))
    yield Suspect("sinks", "attention sinks are dropped (self_attn.sinks)",
                  lambda m: sinks(m, lambda found: [torch.full_like(s, -1e30) for s in found]))
    yield Suspect("sinks zero", "attention sinks are taken for zero (self_attn.sinks)",
                  lambda m: sinks(m, lambda found: [torch.zeros_like(s) for s in found]))
    for by in (1, -1):
        yield Suspect(f"sinks{by:+d}", "attention sinks are those of a neighbouring layer",
                      lambda m, n=by: sinks(m, lambda found: [found[(i + n) % len(found)] for i in range(len(found))]))
        yield Suspect(f"window{by:+d}", "the attention window is off by one: sliding_window counts the query itself",
                      lambda m, n=by: window(m, lambda w: w + n))
    for factor in (2, 0.5, 4, 0.25):
        yield Suspect(f"window_x{factor}", "the window of the window layers has another size (sliding_window)",
                      lambda m, f=factor: window(m, lambda w: int(w * f)))
    yield Suspect("window_none", "window layers attend to everything: sliding_window or layer_types is ignored",
                  lambda m: window(m, lambda w: 1 << 30))
    yield Suspect("attention biases", "biases of the attention's projections are dropped (attention_bias)",
                  partial(zero, names=("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")))
    yield Suspect("output bias", "the bias of the attention's output projection is dropped (o_proj.bias)",
                  partial(zero, names=("o_proj.bias",)))


def _shared_suspects(config) -> Iterator[Suspect]:
    yield Suspect("tied", "embedding and head are taken for the same matrix (tie_word_embeddings)", tie)
    for value in (1e-5, 1e-6, 1e-4, 1e-8, 1e-12):
        yield Suspect(f"epsilon={value:g}", "wrong epsilon of the norms (rms_norm_eps)", partial(epsilon, value=value))
    yield Suspect("norms swapped", "input_layernorm and post_attention_layernorm are exchanged", swap_norms)
    for by in (1, -1):
        yield Suspect(f"norms{by:+d}", NORM_CAUSE, partial(shift_norms, by=by))
        yield Suspect(f"embedding rows{by:+d}", f"rows of the embedding are off by one: {ROWS_CAUSE}",
                      partial(roll_rows, by=by, head=False))
        yield Suspect(f"head rows{by:+d}", f"rows of the head are off by one: {ROWS_CAUSE}",
                      partial(roll_rows, by=by, head=True))
        yield Suspect(f"embedding scaled{by:+d}", "the embedding is scaled by the root of the width, as in Gemma",
                      partial(scale_embedding, power=by))
    for i in range(min(config.num_hidden_layers - 1, 100)):
        yield Suspect(f"layers {i} and {i + 1}", f"layers {i} and {i + 1} are exchanged", partial(exchange_layers, first=i))
