"""One view of a model for faults to change: experts, routers, attentions, norms, layers, whatever its class calls them.

`view_of` knows this project's MiMo-V2 (`MimoView`), transformers' classes of other families (`HfView`) and the drafter
(`DrafterView`). A fault is written once against `ModelView`; what it cannot be in a model (no sinks, no window, shapes that do
not allow it) returns False. Views change the model that they were made of: give them a copy.

Shapes: gate_up [E, 2 I, H] and down [E, H, I] with blocks of 32 along the last dimension; gpt-oss stores both transposed, with
gate and up rows in turn, which `expert_matrices` and `gate_up_rows` hide.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

Change = Callable[[torch.Tensor], torch.Tensor]


class ModelView:
    """The parts of a decoder; subclasses say what differs between classes."""

    epsilon_name, sink_name = "epsilon", "attention_sink_bias"

    def __init__(self, model: torch.nn.Module):
        self.model, self.body = model, getattr(model, "model", model)

    @property
    def attentions(self) -> list:
        return [layer.self_attn for layer in self.body.layers]

    @property
    def experts(self) -> list:
        return [layer.mlp.experts for layer in self.body.layers if hasattr(layer.mlp, "experts")]

    @property
    def norms(self) -> list:
        return [m for m in self.model.modules() if hasattr(m, self.epsilon_name)]

    # Experts

    transposed = False

    def each_expert_matrix(self, change: Change) -> bool:
        """`change` of every fused expert tensor, given with the dimension of its blocks last."""
        for experts in self.experts:
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight.copy_(change(weight.mT.contiguous()).mT if self.transposed else change(weight))
        return bool(self.experts)

    def gate_up_rows(self, order: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Output rows of gate_up (and their biases) in the order order(arange(2 I))."""
        for experts in self.experts:
            weight = experts.gate_up_proj
            rows = order(torch.arange(weight.shape[2 if self.transposed else 1]))
            weight.copy_(weight[:, :, rows] if self.transposed else weight[:, rows])
            if getattr(experts, "gate_up_proj_bias", None) is not None:
                experts.gate_up_proj_bias.copy_(experts.gate_up_proj_bias[:, rows])
        return bool(self.experts)

    def activation(self, form: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
        """Experts with the activation form(gate, up)."""
        def gate(gate_up):
            half = gate_up.shape[-1] // 2
            return form(*((gate_up[..., ::2], gate_up[..., 1::2]) if self.transposed else
                          (gate_up[..., :half], gate_up[..., half:])))

        for experts in self.experts:
            experts._apply_gate = gate
        return bool(self.experts)

    def permute_experts(self, order: Callable[[int], list[int]]) -> bool:
        """Experts change places, routers stay: expert e of the result is expert order(E)[e]."""
        changed = False
        for experts in self.experts:
            count = experts.gate_up_proj.shape[0]
            places = order(count)
            if places != list(range(count)):
                for p in (experts.gate_up_proj, experts.down_proj):  # biases stand in tensors of their own
                    p.copy_(p[places])
                changed = True
        return changed

    def transpose_experts(self) -> bool:
        """Each matrix is its own transpose: only square ones can be taken for each other."""
        if any(e.down_proj.shape[1] != e.down_proj.shape[2] for e in self.experts):
            return False
        for experts in self.experts:
            gate, up = experts.gate_up_proj.clone().chunk(2, 1)
            experts.gate_up_proj.copy_(torch.cat((gate.mT, up.mT), 1))
            experts.down_proj.copy_(experts.down_proj.clone().mT)
        return bool(self.experts)

    # Attention

    def sinks(self) -> list[torch.Tensor]:
        return [s for a in self.attentions if (s := getattr(a, self.sink_name, None)) is not None]

    def fill_sinks(self, value: float) -> bool:
        for sink in self.sinks():
            sink.fill_(value)
        return bool(self.sinks())

    def roll_sinks(self, by: int) -> bool:
        found = self.sinks()
        values = [s.clone() for s in found]
        for i, sink in enumerate(found):
            sink.copy_(values[(i + by) % len(found)])
        return len(found) > 1

    def head_rows(self, order: Change) -> None:
        """Rows within each query and key head, and what belongs to them, in the order order(arange(D))."""
        for attention in self.attentions:
            D = self._qk_dim(attention)
            places = order(torch.arange(D))
            for projection in (attention.q_proj, attention.k_proj):
                for p in (projection.weight, projection.bias):
                    if p is not None:
                        p.copy_(p.unflatten(0, (-1, D))[:, places].flatten(0, 1))
            for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
                if hasattr(norm, "weight"):
                    norm.weight.copy_(norm.weight[places])

    def _qk_dim(self, attention) -> int:
        return attention.head_dim

    def interleave_heads(self) -> bool:
        """Query heads spread over key heads in turn, not in groups."""
        heads, keys = self.model.config.num_attention_heads, self.model.config.num_key_value_heads
        if keys in (1, heads):
            return False
        order = torch.arange(heads).view(-1, keys).T.flatten()
        for attention in self.attentions:
            for p in (attention.q_proj.weight, attention.q_proj.bias):
                if p is not None:
                    p.copy_(p.unflatten(0, (heads, -1))[order].flatten(0, 1))
            self._output_columns(attention, heads, order)
        return True

    def _output_columns(self, attention, heads: int, order: torch.Tensor) -> None:
        attention.o_proj.weight.copy_(attention.o_proj.weight.unflatten(1, (heads, -1))[:, order].flatten(1))
        if (sink := getattr(attention, self.sink_name, None)) is not None:
            sink.copy_(sink[order])

    def swap_keys_values(self) -> bool:
        found = [a for a in self.attentions if not getattr(a, "fused", False)]
        if not found or any(a.k_proj.weight.shape != a.v_proj.weight.shape for a in found):
            return False
        for attention in found:
            attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
        return True

    def drop_qk_norm(self) -> bool:
        found = [a for a in self.attentions if hasattr(a, "q_norm")]
        for attention in found:
            attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()
        return bool(found)

    # Norms, embedding, head, layers

    def epsilon(self, value: float) -> bool:
        for norm in self.norms:
            setattr(norm, self.epsilon_name, value)
        return bool(self.norms)

    def shift_norms(self, by: float) -> None:
        for norm in self.norms:
            norm.weight.add_(by)

    def swap_norms(self) -> None:
        for layer in self.body.layers:
            layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm

    def tie(self) -> None:
        self.model.lm_head.weight.copy_(self.body.embed_tokens.weight)

    def roll_rows(self, by: int, *, head: bool) -> None:
        weight = self.model.lm_head.weight if head else self.body.embed_tokens.weight
        weight.copy_(weight.roll(by, 0))

    def scale_embedding(self, power: float) -> None:
        weight = self.body.embed_tokens.weight
        weight.mul_(math.sqrt(weight.shape[1]) ** power)

    def zero(self, *endings: str) -> bool:
        """Zeroes every parameter whose name ends so."""
        found = [p for name, p in self.model.named_parameters() if name.endswith(endings)]
        for p in found:
            p.zero_()
        return bool(found)

    def zero_buffers(self, ending: str) -> bool:
        found = [b for name, b in self.model.named_buffers() if name.endswith(ending)]
        for b in found:
            b.zero_()
        return bool(found)

    def order_layers(self, places: list[int]) -> bool:
        layers = list(self.body.layers)
        if places == list(range(len(layers))) or len(places) != len(layers):
            return False
        kinds = [(self.layer_kind(i), [tuple(p.shape) for p in layer.parameters()]) for i, layer in enumerate(layers)]
        if any(kinds[a] != kinds[b] for a, b in enumerate(places)):
            return False
        for i, place in enumerate(places):
            self.body.layers[i] = layers[place]
        return True

    def layer_kind(self, index: int) -> object:
        """What two layers must share to stand in each other's place, besides shapes."""
        raise NotImplementedError


def routed(router, x: torch.Tensor, count: int, normed: bool, factor: float | None, *, softmax: bool,
           biased: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights of a router of sigmoid scores without groups that scores by softmax instead, or has the correction
    bias in the weights, not only in the choice."""
    logits = F.linear(x.float(), router.weight.float())
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    choice = scores + router.e_score_correction_bias
    index = choice.topk(count, dim=-1).indices
    weight = (choice if biased else scores).gather(1, index)
    if normed:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return index, weight * (factor or 1.0)


class MimoView(ModelView):
    """This project's MiMo-V2."""

    @property
    def routers(self) -> list:
        return [layer.mlp.gate for layer in self.body.layers if hasattr(layer.mlp, "gate")]

    def windows(self, change: Callable[[int], int | None]) -> bool:
        found = [a for a in self.attentions if a.window is not None]
        for attention in found:
            attention.window = change(attention.window)
        return bool(found) and all(a.window is None or a.window > 0 for a in found)

    def drop_sinks(self) -> bool:
        found = [a for a in self.attentions if a.attention_sink_bias is not None]
        for attention in found:
            attention.attention_sink_bias = None
        return bool(found)

    def rotary_base(self, value: float, full: bool = True) -> bool:
        found = [a for a in self.attentions if (a.window is None) == full]
        for attention in found:
            attention.rotary_base = value
        return bool(found)

    def swap_bases(self) -> bool:
        full, window = ([a for a in self.attentions if (a.window is None) == kind] for kind in (True, False))
        if not full or not window or full[0].rotary_base == window[0].rotary_base:
            return False
        bases = full[0].rotary_base, window[0].rotary_base
        return self.rotary_base(bases[1], True) & self.rotary_base(bases[0], False)

    def rotary_width(self, entries: float) -> bool:
        for attention in self.attentions:
            attention.rotary_dim = int(entries) // 2 * 2
            if not 0 < attention.rotary_dim <= attention.qk_dim:
                return False
        return True

    def value_scale(self, scale: float) -> None:
        for attention in self.attentions:
            attention.value_scale = scale

    def _qk_heads(self) -> Iterator[tuple[object, torch.Tensor, list[slice], list[slice]]]:
        """(attention, weight, slices of query heads, slices of key heads) of every matrix that holds such rows."""
        from modeling.names import qkv_rows

        for layer, a in enumerate(self.attentions):
            if a.fused:
                rows = qkv_rows(self.model.config, layer)
                cut = {part: [slice(n, n + a.qk_dim) for s in rows[part] for n in range(s.start, s.stop, a.qk_dim)]
                       for part in "qk"}
                yield a, a.qkv_proj.weight, cut["q"], cut["k"]
            else:
                yield a, a.q_proj.weight, [slice(h * a.qk_dim, (h + 1) * a.qk_dim) for h in range(a.query_heads)], []
                yield a, a.k_proj.weight, [], [slice(h * a.qk_dim, (h + 1) * a.qk_dim) for h in range(a.key_heads)]

    def rotary_pairs(self) -> None:
        for attention, weight, queries, keys in self._qk_heads():
            n = attention.rotary_dim
            order = torch.cat((torch.arange(0, n, 2), torch.arange(1, n, 2), torch.arange(n, attention.qk_dim)))
            for rows in (*queries, *keys):
                weight[rows] = weight[rows][order]

    def interleave_heads(self) -> bool:
        changed = False
        for attention, weight, queries, _ in self._qk_heads():
            if not queries or attention.key_heads in (1, attention.query_heads):
                continue
            order = torch.arange(attention.query_heads).view(-1, attention.key_heads).T.flatten()
            copies = [weight[rows].clone() for rows in queries]
            for rows, source in zip(queries, order.tolist(), strict=True):
                weight[rows] = copies[source]
            self._output_columns(attention, attention.query_heads, order)
            changed = True
        return changed

    def fused_rows(self, *, back: bool) -> bool:
        """The fused matrix taken for [all queries | all keys | all values] instead of chunks, or the other way round."""
        from modeling.names import qkv_rows

        for layer, attention in enumerate(self.attentions):
            if not attention.fused:
                return False
            rows = qkv_rows(self.model.config, layer)
            order = torch.cat([torch.arange(s.start, s.stop) for part in "qkv" for s in rows[part]])
            attention.qkv_proj.weight.copy_(attention.qkv_proj.weight[order if back else order.argsort()])
        return True

    def router_setting(self, key: str, change: Callable) -> bool:
        for router in self.routers:
            router.config = copy.deepcopy(router.config)
            setattr(router.config, key, change(getattr(router.config, key)))
        return bool(self.routers)

    def choose(self, count: float) -> bool:
        """Another number of experts per token."""
        most = self.model.config.n_routed_experts
        return 0 < count <= most and self.router_setting("num_experts_per_tok", lambda _: int(count))

    def route(self, *, softmax: bool = False, biased: bool = False) -> bool:
        if any(router.config.n_group > 1 for router in self.routers):
            return False
        for router in self.routers:
            config = router.config

            def forward(x, router=router, settings=(config.num_experts_per_tok, config.norm_topk_prob,
                                                    config.routed_scaling_factor)):
                return routed(router, x, *settings, softmax=softmax, biased=biased)

            router.forward = forward
        return bool(self.routers)

    def layer_kind(self, index: int) -> object:
        return self.attentions[index].window


class HfView(ModelView):
    """transformers' Qwen3-MoE, GLM-4-MoE, Mixtral and gpt-oss."""

    epsilon_name, sink_name = "variance_epsilon", "sinks"

    @property
    def transposed(self) -> bool:
        return self.model.config.model_type == "gpt_oss"

    @property
    def routers(self) -> list:
        found = [getattr(layer.mlp, name, None) for layer in self.body.layers for name in ("gate", "router")]
        return [router for router in found if hasattr(router, "top_k")]

    def windows(self, change: Callable[[int], int | None]) -> bool:
        config = self.model.config  # transformers makes the mask from it
        present = getattr(config, "sliding_window", None)
        if not present or "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
            return False
        wanted = change(present)
        config.sliding_window = 1 << 30 if wanted is None else wanted
        return config.sliding_window > 0

    def rotary_base(self, value: float, full: bool = True) -> bool:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary, config = self.body.rotary_emb, self.model.config
        config.rope_parameters = dict(config.rope_parameters) | {"rope_theta": value}
        kind = config.rope_parameters.get("rope_type", "default")
        make = rotary.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        rotary.inv_freq, rotary.attention_scaling = make(config)
        return full

    def rotary_unextended(self, *, factor_only: bool) -> bool:
        """The extension (yarn) ignored, wholly or in its factor of cosines and sines."""
        rotary = self.body.rotary_emb
        if self.model.config.rope_parameters.get("rope_type", "default") == "default":
            return False
        if not factor_only:
            rotary.inv_freq = rotary.compute_default_rope_parameters(self.model.config)[0]
        rotary.attention_scaling = 1.0
        return True

    def rotary_width(self, entries: float) -> bool:
        """Of classes that can rotate the first entries of a head and leave the rest: their configuration says which."""
        width, rotary, config = int(entries) // 2 * 2, self.body.rotary_emb, self.model.config
        D = self._qk_dim(self.attentions[0])
        rope = config.rope_parameters
        if "partial_rotary_factor" not in rope or not 0 < width <= D or rope.get("rope_type", "default") != "default":
            return False
        config.rope_parameters = dict(rope) | {"partial_rotary_factor": width / D}
        rotary.inv_freq = rotary.compute_default_rope_parameters(config)[0]
        return True

    def rotary_pairs(self) -> None:
        share = self.model.config.rope_parameters.get("partial_rotary_factor", 1.0)

        def pairs(rows):
            n = int(len(rows) * share)
            return torch.cat((rows[:n].view(-1, 2).T.flatten(), rows[n:]))

        self.head_rows(pairs)

    def drop_sinks(self) -> bool:
        return self.fill_sinks(-1e30)

    def choose(self, count: float) -> bool:
        for router in self.routers:
            if not 0 < count <= router.weight.shape[0]:
                return False
            router.top_k = int(count)
        return bool(self.routers)

    def router_setting(self, key: str, change: Callable) -> bool:
        key = {"n_group": "num_group"}.get(key, key)
        for router in self.routers:
            setattr(router, key, change(getattr(router, key)))
        return bool(self.routers)

    def route(self, *, softmax: bool = False, biased: bool = False) -> bool:
        if any(router.num_group > 1 for router in self.routers):
            return False
        for router in self.routers:
            def forward(x, router=router):
                index, weight = routed(router, x.reshape(-1, x.shape[-1]), router.top_k, router.norm_topk_prob,
                                       router.routed_scaling_factor, softmax=softmax, biased=biased)
                return None, weight, index

            router.forward = forward
        return bool(self.routers)

    def score(self, kind: str) -> bool:
        """Routing weights from other scores: "all" (softmax over all, not normalized), "chosen" (normalized), "sigmoid"."""
        def forward(router, x):
            logits = F.linear(x.reshape(-1, router.weight.shape[1]), router.weight, getattr(router, "bias", None))
            scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
            weight, index = scores.topk(router.top_k, dim=-1)
            return logits, weight / weight.sum(-1, keepdim=True) if kind != "all" else weight, index

        for router in self.routers:
            router.forward = lambda x, router=router: forward(router, x)
        return bool(self.routers)

    def layer_kind(self, index: int) -> object:
        kinds = getattr(self.model.config, "layer_types", None)
        return kinds[index] if kinds else None


class DrafterView(MimoView):
    """The drafter: its window, rotation and causality are the model's own, not its layers'."""

    def interleave_heads(self) -> bool:
        return ModelView.interleave_heads(self)

    def raw_context_values(self, parts: str) -> None:
        """Context values from FP8 codes (up to 448) of a matrix quantized with one scale; keys are normed, which hides it."""
        scales = [448 / max(float(getattr(a, f"{part}_proj").weight.abs().max()) for part in parts) for a in self.attentions]
        model, right = self.model, type(self.model).context_keys_values
        model.context_keys_values = lambda context, positions: [
            (k, v * scale) for (k, v), scale in zip(right(model, context, positions), scales, strict=True)]

    def reverse_features(self) -> bool:
        count, fc = len(self.model.target_layer_ids), self.model.fc.weight
        fc.copy_(fc.unflatten(1, (count, -1)).flip(1).flatten(1))
        return count > 1


def view_of(model: torch.nn.Module) -> ModelView:
    """The view of a model's class."""
    from modeling.drafter import DFlashDraftModel

    if isinstance(model, DFlashDraftModel):
        return DrafterView(model)
    return MimoView(model) if model.config.model_type == "mimo_v2" else HfView(model)
