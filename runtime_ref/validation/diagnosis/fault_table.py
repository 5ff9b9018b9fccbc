"""What usually goes wrong with a model of these families and with its drafter: the table of faults.

It collects what the public ports of this checkpoint family got wrong, and its neighbours. A fault is a line: a name, the cause
as a user reads it, and the change of a `ModelView` that has the same effect. Where a bug is not its own inverse both directions
are here, since the change may have to undo what a file has wrong or to repeat what an engine does wrong.

To add one: say what it does to a model of the right weights, as a method of the view if no method does it yet, and add a test
that injects it (tests/runtime_ref/validation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from checkpoint.families.registry import FAMILIES
from runtime_ref.validation.diagnosis.faults import Fault

NIBBLE_CAUSE = "nibbles are swapped: the low nibble of a byte holds the even column"
NORM_CAUSE = "norm weights are stored as differences from 1, or taken for that"
ROWS_CAUSE = "the model and its vocabulary do not belong together, or a token was added"
ORDER_CAUSE = "experts are in another order than their routers count them"
WINDOW_CAUSE = "the window of the window layers has another size (sliding_window)"
SCALE_CAUSE = "wrong attention_value_scale: the values' factor is missing or another"
NORMALISED_CAUSE = "routing weights are not normalised (norm_topk_prob), or are although they should not be"
RAW_CAUSE = ("the quantized drafter is bypassed: context values come from a raw slice of the qkv weight, codes without their "
             "scale")
BASES = (1e3, 1e4, 1e5, 1.5e5, 1e6, 5e6, 1e7)
VALUE_SCALES = (0.3, 0.612, 0.707, 0.9, 2.0)
EPSILONS = (1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def target_faults(config, bases: Iterable[float] = ()) -> Iterator[Fault]:
    """Faults of a target.

    Args:
        config: MiMoV2Config, or the geometry of another family. bases: rotary bases that a client may have mistaken for it.
    """
    family = config.model_type
    yield from _expert_faults(config, family)
    yield from (_sigmoid_routers if FAMILIES[family].router == "sigmoid" else _softmax_routers)(config, family)
    yield from _window_faults(config)
    yield from _sink_faults()
    starts = tuple(sorted({*BASES, *bases}))
    yield from (_mimo_attention if family == "mimo_v2" else _hf_attention)(config, family, starts)
    yield Fault("rotary pairs", "rotary embedding rotates neighbours instead of halves", lambda v: v.rotary_pairs())
    yield Fault("kv heads", "KV layout: query heads are spread over key heads in turn, not in groups",
                lambda v: v.interleave_heads())
    yield Fault("keys for values", "key and value projections are exchanged", lambda v: v.swap_keys_values())
    yield from _shared_faults(config, "layernorm_epsilon" if family == "mimo_v2" else "rms_norm_eps")


def clamp_cause(family: str) -> str:
    name = {"mimo_v2": "MiMo-V2", "qwen3_moe": "Qwen3-MoE", "glm4_moe": "GLM-4-MoE"}.get(family, family)
    return f"SwiGLU is clamped at 7 as in gpt-oss: {name}'s experts have no clamp"


def _expert_faults(config, family: str) -> Iterator[Fault]:
    yield Fault("nibbles", NIBBLE_CAUSE,
                lambda v: v.each_expert_matrix(lambda w: w.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)))
    for power in (1, -1):
        yield Fault(f"scale bias {power:+d}", f"expert scales are off by 2^{power:+d}: a scale byte b means 2^(b - 127)",
                    lambda v, p=power: v.each_expert_matrix(lambda w: w * 2.0**p))
    yield Fault("raw scales", "scale bytes are read as numbers: a byte b means 2^(b - 127)",
                lambda v: v.each_expert_matrix(scales_as_numbers))
    turns = family == "gpt_oss"
    yield Fault("gate for up", "gate and up projections of the experts are exchanged", lambda v: v.gate_up_rows(
        (lambda rows: rows.view(-1, 2).flip(1).flatten()) if turns else (lambda rows: rows.roll(rows.numel() // 2))))
    cause = ("gate and up rows alternate in gpt-oss: they are taken for halves" if turns else
             "gate and up are tensors of their own: they are taken for alternating rows, as in gpt-oss")
    yield Fault("gate and up alternating", cause, lambda v: v.gate_up_rows(lambda rows: rows.view(2, -1).T.flatten()))
    yield Fault("gate and up as halves", cause, lambda v: v.gate_up_rows(lambda rows: rows.view(-1, 2).T.flatten()))
    yield from _gpt_oss_experts(*config.clamp) if turns else [Fault(
        "swiglu clamp", clamp_cause(family), lambda v: v.activation(
            lambda g, u: F.silu(g.clamp(max=7.0)) * u.clamp(-7.0, 7.0)))]
    orders = {"reversed": lambda n: list(range(n))[::-1], "one later": lambda n: [(e + 1) % n for e in range(n)],
              "one earlier": lambda n: [(e - 1) % n for e in range(n)], "sorted as text": by_text,
              "sorted as text, undone": by_text_undone}
    for name, order in orders.items():
        yield Fault(f"experts {name}", f"{ORDER_CAUSE} ({name})", lambda v, o=order: v.permute_experts(o))
    yield Fault("experts transposed", "expert matrices are transposed: [out, in], packed along in",
                lambda v: not v.transposed and v.transpose_experts())


def _gpt_oss_experts(limit: float, alpha: float) -> Iterator[Fault]:
    yield Fault("no clamp", "the clamp of gpt-oss's SwiGLU is missing (swiglu_limit)", lambda v: v.activation(
        lambda g, u: g * (alpha * g).sigmoid() * (u + 1)))
    yield Fault("alpha", f"alpha of gpt-oss's SwiGLU is missing: gate sigmoid({alpha:g} gate)", lambda v: v.activation(
        lambda g, u: F.silu(g.clamp(max=limit)) * (u.clamp(-limit, limit) + 1)))
    yield Fault("plus one", "gpt-oss's SwiGLU multiplies by up + 1, not by up", lambda v: v.activation(
        lambda g, u: (g := g.clamp(max=limit)) * (alpha * g).sigmoid() * u.clamp(-limit, limit)))
    yield Fault("expert biases", "biases of the experts are dropped (gate_up_proj_bias, down_proj_bias)",
                lambda v: v.zero("gate_up_proj_bias", "down_proj_bias"))
    yield Fault("down bias", "the bias of the experts' down projection is dropped (down_proj_bias)",
                lambda v: v.zero("down_proj_bias"))
    yield Fault("gate_up bias", "the bias of the experts' gate and up projections is dropped (gate_up_proj_bias)",
                lambda v: v.zero("gate_up_proj_bias"))


def _sigmoid_routers(config, family: str) -> Iterator[Fault]:
    yield Fault("router bias", "e_score_correction_bias of the routers is ignored",
                lambda v: v.zero("e_score_correction_bias"))
    yield Fault("router norm", NORMALISED_CAUSE, lambda v: v.router_setting("norm_topk_prob", lambda on: not on))
    yield Fault("routed scale", "wrong routed_scaling_factor of the experts' sum",
                lambda v, factor: v.router_setting("routed_scaling_factor", lambda _: factor), (0.25, 0.5, 1.0, 2.5, 16.0))
    yield Fault("softmax router", "router scores by softmax: they are sigmoids (scoring_func)", lambda v: v.route("softmax"))
    yield Fault("bias in weights", "e_score_correction_bias is added to the routing weights: it decides the choice, no more",
                lambda v: v.route("sigmoid", biased=True))
    if config.n_group > 1:
        yield Fault("router groups", "groups of experts are ignored (n_group, topk_group)", lambda v: v.router_setting(
            "n_group", lambda _: 1) & v.router_setting("topk_group", lambda _: 1))
    if getattr(config, "shared_width", 0):
        yield Fault("shared experts", "the shared experts are left out (n_shared_experts)",
                    lambda v: v.zero("shared_experts.down_proj.weight"))


def _softmax_routers(config, family: str) -> Iterator[Fault]:
    chosen = "routing weights are a softmax of the chosen experts' logits, not of all"
    cause = chosen if family == "gpt_oss" else NORMALISED_CAUSE
    for name, normed in (("all", False), ("chosen", True)):
        yield Fault(f"router {name}", cause, lambda v, n=normed: v.route("softmax", normed=n))
    yield Fault("sigmoid router", "router scores by sigmoid: these are a softmax", lambda v: v.route("sigmoid", normed=True))
    if family == "gpt_oss":
        yield Fault("router bias", "the routers' bias is dropped (router.bias)", lambda v: v.zero("router.bias"))


def _window_faults(config) -> Iterator[Fault]:
    own = config.sliding_window
    if not own:
        return
    for by in (1, -1):
        yield Fault(f"window {by:+d}", "the attention window is off by one: sliding_window counts the query itself",
                    lambda v, n=by: v.windows(lambda w: w + n))
    starts = tuple(max(1, int(own * f)) for f in (0.125, 0.25, 0.5, 0.75, 1.5, 2, 4, 8))
    yield Fault("window", WINDOW_CAUSE, lambda v, size: v.windows(lambda w: int(size) if abs(size - w) > 1 else -1), starts,
                whole=True)
    yield Fault("no window", "window layers attend to everything: sliding_window or hybrid_layer_pattern is ignored",
                lambda v: v.windows(lambda w: None))


def _sink_faults() -> Iterator[Fault]:
    yield Fault("sinks", "attention sinks are dropped (of the window layers, self_attn.sinks)", lambda v: v.fill_sinks(-1e30))
    yield Fault("sinks zero", "attention sinks are dropped: taken for zero", lambda v: v.fill_sinks(0.0))
    for by in (1, -1):
        yield Fault(f"sinks {by:+d}", "attention sinks are those of a neighbouring layer", lambda v, n=by: v.roll_sinks(n))


def _mimo_attention(config, family: str, bases: tuple[float, ...]) -> Iterator[Fault]:
    yield Fault("bases swapped", "rotary bases of full and window layers are exchanged (rope_theta, swa_rope_theta)",
                lambda v: v.swap_bases())
    for full, key in ((True, "rope_theta"), (False, "swa_rope_theta")):
        yield Fault(key, f"wrong rotary base of the {'full' if full else 'window'} layers ({key})",
                    lambda v, base, f=full: v.rotary_base(base, f), bases)
    yield _rotary_width(config)
    yield Fault("no value scale", SCALE_CAUSE, lambda v: v.value_scale(None))
    yield Fault("value scale", SCALE_CAUSE, lambda v, scale: v.value_scale(scale), VALUE_SCALES)
    for name, back in (("qkv order", False), ("qkv order back", True)):
        yield Fault(name, "KV layout: the fused qkv is num_key_value_heads chunks of [queries | keys | values], not [all "
                    "queries | all keys | all values]", lambda v, b=back: v.fused_rows(back=b))


def _rotary_width(config) -> Fault:
    widths = tuple(sorted({2 * max(1, int(config.head_dim * f) // 2) for f in (0.25, 1 / 3, 0.5, 1.0)}))
    return Fault("rotary width", "wrong rotary width: only the first int(head_dim x partial_rotary_factor) entries of a head "
                 "are rotated", lambda v, entries: v.rotary_width(entries), widths, whole=True)


def _hf_attention(config, family: str, bases: tuple[float, ...]) -> Iterator[Fault]:
    yield Fault("rope_theta", "wrong rotary base (rope_theta)", lambda v, base: v.rotary_base(base), bases)
    yield _rotary_width(config)
    if config.attention_biases:
        yield Fault("attention biases", "biases of the attention's projections are dropped (attention_bias)",
                    lambda v: v.zero(*(f"{part}_proj.bias" for part in config.attention_biases)))
    if family != "gpt_oss":
        yield Fault("qk norm", "the norms of query and key heads are dropped (q_norm, k_norm)", lambda v: v.drop_qk_norm())
        return
    yield Fault("yarn", "the rotary extension is ignored (rope_parameters: yarn)",
                lambda v: v.rotary_unextended(factor_only=False))
    yield Fault("yarn factor", "yarn's factor of cosines and sines is ignored (0.1 ln(factor) + 1)",
                lambda v: v.rotary_unextended(factor_only=True))
    yield Fault("output bias", "the bias of the attention's output projection is dropped (o_proj.bias)",
                lambda v: v.zero("o_proj.bias"))


def _shared_faults(config, epsilon_key: str) -> Iterator[Fault]:
    depth, counts = config.num_hidden_layers, {*range(1, min(16, config.n_routed_experts) + 1), 2 * config.num_experts_per_tok}
    yield Fault("experts per token", "another number of experts per token (num_experts_per_tok)",
                lambda v, count: v.choose(count), tuple(sorted(counts - {config.num_experts_per_tok})), whole=True)
    yield Fault("tied", "embedding and head are taken for the same matrix (tie_word_embeddings)", lambda v: v.tie())
    yield Fault("epsilon", f"wrong epsilon of the norms ({epsilon_key})", lambda v, e: v.epsilon(e), EPSILONS)
    yield Fault("norms swapped", "input_layernorm and post_attention_layernorm are exchanged", lambda v: v.swap_norms())
    for by in (1, -1):
        yield Fault(f"norms {by:+d}", NORM_CAUSE, lambda v, n=by: v.shift_norms(n))
        yield Fault(f"embedding rows {by:+d}", f"rows of the embedding are off by one: {ROWS_CAUSE}",
                    lambda v, n=by: v.roll_rows(n, head=False))
        yield Fault(f"head rows {by:+d}", f"rows of the head are off by one: {ROWS_CAUSE}",
                    lambda v, n=by: v.roll_rows(n, head=True))
        yield Fault(f"embedding scaled {by:+d}", "the embedding is scaled by the root of the width, as in Gemma",
                    lambda v, n=by: v.scale_embedding(n))
    for i in range(min(depth - 1, 100)):
        yield Fault(f"layers {i} and {i + 1}", f"layers {i} and {i + 1} are exchanged",
                    lambda v, p=(*range(i), i + 1, i, *range(i + 2, depth)): v.order_layers(list(p)))
    for name, places in (("", by_text(depth)), (" undone", by_text_undone(depth))):
        yield Fault(f"layers by text{name}", "layers are in the order of their names as text (0, 1, 10, 11, 2, ...)",
                    lambda v, p=places: v.order_layers(p))


def exchanged_expert_faults(count: int) -> Iterator[Fault]:
    """Every pair of experts of a layer, for layers with few of them."""
    for second in range(min(count, 16)):
        for first in range(second):
            yield Fault(f"experts {first} and {second}", f"{ORDER_CAUSE} ({first} and {second} are exchanged)",
                        lambda v, pair=(first, second): v.permute_experts(exchanged(*pair)))


def drafter_faults(drafter, vocabulary_row: torch.Tensor, bases: Iterable[float] = ()) -> Iterator[Fault]:
    """Faults of a DFlashDraftModel.

    Args:
        vocabulary_row: the target's embedding of the mask token. bases: rotary bases that may be mistaken for its own.
    """
    def of_model(name: str, cause: str, change: Callable, *more, **options) -> Fault:
        return Fault(name, cause, lambda v, *value: change(v.model, *value), *more, **options)

    def setting(attribute: str) -> Callable:
        return lambda model, value: setattr(model, attribute, value)

    yield of_model("mask row", "the mask embedding is not the vocabulary row of the mask token: mask_embedding.pt must be used",
                   lambda m: m.mask_embedding.copy_(vocabulary_row))
    yield of_model("mask zero", "the mask embedding is zero or missing: mask_embedding.pt must be used",
                   lambda m: m.mask_embedding.zero_())
    yield Fault("draft sinks", "attention sinks of the drafter are dropped", lambda v: v.fill_sinks(-1e30))
    yield of_model("draft causal", "wrong causality: attention inside the drafter's block is not causal (is_causal, causal)",
                   lambda m: setattr(m, "causal", not m.causal))
    least, own = drafter.block_size, drafter.window or 64
    starts = {max(least, int(own * f)) for f in (0.25, 0.5, 2, 4)} | {16, 64, 256, 1024, own + 1, own - 1}
    yield of_model("draft window", "wrong window of the drafter (sliding_window, swa_window_size)",
                   lambda m, size: False if size < least or size == m.window else setattr(m, "window", int(size)),
                   tuple(sorted(s for s in starts if s >= least)), whole=True)
    yield of_model("no draft window", "wrong window of the drafter: it attends to the whole context (use_swa ignored)",
                   lambda m: setattr(m, "window", None) if m.window else False)
    yield of_model("draft base", "wrong rotary base of the drafter: it is the backbone's (dflash_config.backbone_rotary_base)",
                   setting("rotary_base"), tuple(sorted({*BASES, *bases})))
    D = drafter.config.head_dim
    yield of_model("draft width", "wrong rotary width of the drafter (partial_rotary_factor)",
                   lambda m, n: False if not 2 <= n <= D else setattr(m, "rotary_dim", int(n) // 2 * 2),
                   tuple(sorted({2 * max(1, int(D * f) // 2) for f in (0.25, 1 / 3, 0.5, 1.0)})), whole=True)
    cause = "wrong attention_value_scale of the drafter"
    yield Fault("no draft value scale", cause, lambda v: v.value_scale(None))
    yield Fault("draft value scale", cause, lambda v, scale: v.value_scale(scale), VALUE_SCALES)
    yield Fault("draft kv heads", "KV layout of the drafter: query heads are spread over key heads in turn, not in groups",
                lambda v: v.interleave_heads())
    yield Fault("draft qk norm", "query and key norms of the drafter are dropped", lambda v: v.drop_qk_norm())
    yield Fault("draft epsilon", "wrong epsilon of the drafter's norms (rms_norm_eps)", lambda v, e: v.epsilon(e), EPSILONS)
    yield Fault("draft keys for values", "key and value projections of the drafter are exchanged",
                lambda v: v.swap_keys_values())
    for by in (1, -1):
        yield Fault(f"draft norms {by:+d}", f"{NORM_CAUSE} (drafter)", lambda v, n=by: v.shift_norms(n))
    for parts in ("qkv", "kv", "v"):
        yield Fault(f"raw {parts}", RAW_CAUSE, lambda v, p=parts: v.raw_context_values(p))
    yield Fault("features reversed", "target layers are concatenated in another order (target_layer_ids)",
                lambda v: v.reverse_features())


def scales_as_numbers(weight: torch.Tensor) -> torch.Tensor:
    """What a port computes that multiplies codes by the scale byte itself, of decoded weights [..., blocks of 32]."""
    blocks = weight.unflatten(-1, (-1, 32))
    # A block's exponent is two (floor) below its maximum's.
    exponent = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-125).log2().floor() - 2
    return (blocks * torch.exp2(-exponent) * (exponent + 127)).flatten(-2)


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

