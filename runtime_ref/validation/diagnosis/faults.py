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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from runtime_ref.validation.diagnosis import edits_mimo as make

# Relative error (Frobenius) below which two runs are the same run: float32 sums in another order give 1e-6 to 1e-5, the
# smallest bug of the list, another epsilon in the norms, 2e-4.
SAME = 1e-4
NORM_CAUSE = "norm weights are stored as differences from 1, or taken for that"
ROWS_CAUSE = "the model and its vocabulary do not belong together, or a token was added"
ORDER_CAUSE = "experts are in another order than their routers count them"
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


def first_culprit(model: torch.nn.Module, suspects: Iterable[Suspect], run: Callable[[torch.nn.Module], torch.Tensor],
                  observed: torch.Tensor) -> list[Suspect]:
    """As `culprits`, but ends with the first: for long lists in which one bug has one name."""
    return next(([suspect] for suspect in suspects if _explains(model, suspect, run, observed)), [])


def nearest(model: torch.nn.Module, suspects: Iterable[Suspect], run: Callable[[torch.nn.Module], torch.Tensor],
            observed: torch.Tensor) -> list[Suspect]:
    """The suspect that comes nearest to outputs of rounded arithmetic, which no suspect equals, and those that come as near:
    none if the best leaves more than half of the difference."""
    with torch.no_grad():
        limit, errors = difference(run(model), observed) / 2, []
        for suspect in suspects:
            changed = copy.deepcopy(model)
            if suspect.change(changed) is not False:
                errors.append((difference(run(changed), observed), suspect))
    best = min((error for error, _ in errors), default=float("inf"))
    return [suspect for error, suspect in errors if error <= min(1.1 * best, limit)]


def _explains(model, suspect: Suspect, run, observed) -> bool:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        return suspect.change(changed) is not False and difference(run(changed), observed) < SAME


def only_in(model: torch.nn.Module, layers: Sequence[int], suspects: Iterable[Suspect]) -> Iterator[Suspect]:
    """The same bugs, but in these layers of the model alone: in a file one layer can be wrong and the others right.

    Args:
        model: the model that `culprits` will change copies of.
    """
    named = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"

    def limited(change):
        def apply(changed) -> bool | None:
            if change(changed) is False:
                return False
            own = model.model
            changed.model.embed_tokens, changed.model.norm, changed.lm_head = own.embed_tokens, own.norm, model.lm_head
            for i, layer in enumerate(own.layers):
                if i not in layers:
                    changed.model.layers[i] = layer
            return None

        return apply

    for suspect in suspects:
        yield Suspect(f"{suspect.name} in {named}", f"{suspect.cause} (in {named} only)", limited(suspect.change))


def swapped_experts(count: int) -> Iterator[Suspect]:
    """Every pair of experts of a layer, for layers with few of them."""
    for second in range(min(count, 16)):
        for first in range(second):
            yield Suspect(f"experts {first} and {second}",
                          f"{ORDER_CAUSE} ({first} and {second} are exchanged)",
                          partial(make.permute_experts, order=make.exchanged(first, second)))


def target_suspects(config, rotary_bases: Iterable[float] = ()) -> Iterator[Suspect]:
    """Suspects of a MiMoV2ForCausalLM.

    Args:
        rotary_bases: further bases that a client may have mistaken for the target's.
    """
    yield Suspect("nibbles", "nibbles are swapped: the low nibble of a byte holds the even column", make.swap_nibbles)
    for power in (1, -1):
        yield Suspect(f"scale_bias{power:+d}", f"expert scales are off by 2^{power:+d}: a scale byte b means 2^(b - 127)",
                      lambda m, p=power: make.each_expert(m, lambda w: w * 2.0**p))
    yield Suspect("scale_raw", "scale bytes are read as numbers: a byte b means 2^(b - 127)", make.scales_as_numbers)
    yield Suspect("gate_up", "gate and up projections of the experts are exchanged", make.swap_gate_up)
    yield Suspect("swiglu_clamp", CLAMP_CAUSE, make.clamp)
    yield Suspect("sinks", "attention sinks of the window layers are dropped", make.drop_sinks)
    for window in (1, -1):
        yield Suspect(f"window{window:+d}", "the attention window is off by one: sliding_window counts the query itself",
                      lambda m, n=window: make.windows(m, lambda w: w + n))
    for factor in (2, 0.5, 4, 0.25, 8):
        yield Suspect(f"window_x{factor}", "the window of the window layers has another size (sliding_window)",
                      lambda m, f=factor: make.windows(m, lambda w: int(w * f)))
    yield Suspect("window_none", "window layers attend to everything: sliding_window or hybrid_layer_pattern is ignored",
                  lambda m: make.windows(m, lambda w: None))
    yield Suspect("bases_swapped", "rotary bases of full and window layers are exchanged (rope_theta, swa_rope_theta)",
                  make.swap_bases)
    for base in sorted({1e3, 1e4, 1e6, 5e6, 1e7, *rotary_bases}):
        for full in (True, False):
            key = "rope_theta" if full else "swa_rope_theta"
            yield Suspect(f"{key}={base:g}", f"wrong rotary base of the {'full' if full else 'window'} layers ({key})",
                          lambda m, b=base, f=full: make.rotary_base(m, b, f))
    for factor in (0.25, 1 / 3, 0.334, 0.5, 1.0):
        yield Suspect(f"rotary_width={factor:g}", "wrong rotary width: only the first int(head_dim x partial_rotary_factor) "
                      "entries of a head are rotated", lambda m, f=factor: make.rotary_width(m, f))
    yield Suspect("rotary_pairs", "rotary embedding rotates neighbours instead of halves", make.rotary_pairs)
    for scale in (None, 0.612, 0.707, 0.7):
        yield Suspect(f"value_scale={scale}", "wrong attention_value_scale: the values' factor is missing or another",
                      lambda m, s=scale: make.value_scale(m, s))
    for name, change in (("qkv_order", make.fused_as_plain), ("qkv_order_back", make.plain_as_fused)):
        yield Suspect(name, "KV layout: the fused qkv is num_key_value_heads chunks of [queries | keys | values], not [all "
                      "queries | all keys | all values]", change)
    yield Suspect("kv_heads", "KV layout: query heads are spread over key heads in turn, not in groups", make.interleave_heads)
    yield Suspect("router_bias", "e_score_correction_bias of the routers is ignored", make.drop_correction)
    yield Suspect("router_norm", "routing weights are not normalised (norm_topk_prob), or are although they should not be",
                  make.toggle_router_norm)
    yield Suspect("tied", "embedding and head are taken for the same matrix (tie_word_embeddings)", make.tie)
    yield from _file_suspects(config)


def _file_suspects(config) -> Iterator[Suspect]:
    """What exporters and configurations get wrong."""
    orders = {"reversed": lambda n: list(range(n))[::-1], "one later": lambda n: [(e + 1) % n for e in range(n)],
              "one earlier": lambda n: [(e - 1) % n for e in range(n)], "sorted as text": make.by_text,
              "sorted as text, undone": make.by_text_undone}
    for name, order in orders.items():
        yield Suspect(f"experts {name}", f"{ORDER_CAUSE} ({name})", partial(make.permute_experts, order=order))
    yield Suspect("experts transposed", "expert matrices are transposed: [out, in], packed along in", make.transpose_experts)
    for value in (1e-5, 1e-6, 1e-4, 1e-8, 1e-12):
        yield Suspect(f"epsilon={value:g}", "wrong epsilon of the norms (layernorm_epsilon)",
                      partial(make.epsilon, value=value))
    yield Suspect("norms swapped", "input_layernorm and post_attention_layernorm are exchanged", make.swap_norms)
    yield Suspect("keys for values", "key and value projections are exchanged", make.swap_keys_values)
    for by in (1, -1):
        yield Suspect(f"norms{by:+d}", NORM_CAUSE, partial(make.shift_norms, by=by))
        yield Suspect(f"sinks{by:+d}", "attention sinks are those of a neighbouring layer", partial(make.roll_sinks, by=by))
        yield Suspect(f"embedding rows{by:+d}", f"rows of the embedding are off by one: {ROWS_CAUSE}",
                      partial(make.roll_rows, by=by, head=False))
        yield Suspect(f"head rows{by:+d}", f"rows of the head are off by one: {ROWS_CAUSE}",
                      partial(make.roll_rows, by=by, head=True))
        yield Suspect(f"embedding scaled{by:+d}", "the embedding is scaled by the root of the width, as in Gemma",
                      partial(make.scale_embedding, power=by))
    for name, change in (("-1", lambda n: n - 1), ("+1", lambda n: n + 1), ("x2", lambda n: 2 * n), ("/2", lambda n: n // 2)):
        yield Suspect(f"experts per token{name}", "another number of experts per token (num_experts_per_tok)",
                      partial(make.choose, change=change))
    for factor in (1.0, 2.5, 0.4, 2.0, 0.5, 16.0):
        yield Suspect(f"routed scale={factor:g}", "wrong routed_scaling_factor of the experts' sum",
                      partial(make.routed_scale, factor=factor))
    yield Suspect("softmax router", "router scores by softmax: MiMo-V2's are sigmoids (scoring_func)",
                  partial(make.route_otherwise, softmax=True))
    yield Suspect("bias in weights", "e_score_correction_bias is added to the routing weights: it decides the choice, no more",
                  partial(make.route_otherwise, biased=True))
    depth = config.num_hidden_layers
    for i in range(min(depth - 1, 100)):
        yield Suspect(f"layers {i} and {i + 1}", f"layers {i} and {i + 1} are exchanged",
                      partial(make.order_layers, places=[*range(i), i + 1, i, *range(i + 2, depth)]))
    for name, places in (("", make.by_text(depth)), (" undone", make.by_text_undone(depth))):
        yield Suspect(f"layers by text{name}", "layers are in the order of their names as text (0, 1, 10, 11, 2, ...)",
                      partial(make.order_layers, places=places))


def drafter_suspects(drafter, vocabulary_row: torch.Tensor, target_bases: Iterable[float] = ()) -> Iterator[Suspect]:
    """Suspects of a DFlashDraftModel.

    Args:
        vocabulary_row: the target's embedding of the mask token.
    """
    yield Suspect("mask_row", "the mask embedding is not the vocabulary row of the mask token: mask_embedding.pt must be used",
                  lambda m: m.mask_embedding.copy_(vocabulary_row))
    yield Suspect("mask_zero", "the mask embedding is zero or missing: mask_embedding.pt must be used",
                  lambda m: m.mask_embedding.zero_())
    yield Suspect("draft_sinks", "attention sinks of the drafter are dropped", make.drop_sinks)
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
                      lambda m, s=scale: make.draft_value_scale(m, s))
    yield Suspect("draft_kv_heads", "KV layout of the drafter: query heads are spread over key heads in turn, not in groups",
                  make.draft_interleave)
    yield Suspect("draft_qk_norm", "query and key norms of the drafter are dropped", make.draft_no_qk_norm)
    for value in (1e-5, 1e-6, 1e-4, 1e-8):
        yield Suspect(f"draft_epsilon={value:g}", "wrong epsilon of the drafter's norms (rms_norm_eps)",
                      partial(make.epsilon, value=value))
    yield Suspect("draft_keys_values", "key and value projections of the drafter are exchanged", make.swap_keys_values)
    for by in (1, -1):
        yield Suspect(f"draft_norms{by:+d}", f"{NORM_CAUSE} (drafter)", partial(make.shift_norms, by=by))
    yield Suspect("taps_order", "tapped layers are concatenated in another order (target_layer_ids)", make.reverse_taps)
