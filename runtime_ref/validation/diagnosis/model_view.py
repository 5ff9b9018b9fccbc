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
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

Change = Callable[[torch.Tensor], torch.Tensor]


def each(items: Iterable, change: Callable) -> bool:
    """Changes every item; whether there is one."""
    items = list(items)
    for item in items:
        change(item)
    return bool(items)


class ModelView:
    """The parts of a decoder; subclasses say what differs between classes."""

    epsilon_name, sink_name = "epsilon", "attention_sink_bias"
    transposed = False

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

    @property
    def sinks(self) -> list[torch.Tensor]:
        return [s for a in self.attentions if (s := getattr(a, self.sink_name, None)) is not None]

    # Experts

    def each_expert_matrix(self, change: Change) -> bool:
        """`change` of every fused expert tensor, given with the dimension of its blocks last."""
        return each((w for e in self.experts for w in (e.gate_up_proj, e.down_proj)),
                    lambda w: w.copy_(change(w.mT.contiguous()).mT if self.transposed else change(w)))

    def gate_up_rows(self, order: Change) -> bool:
        """Output rows of gate_up (and their biases) in the order order(arange(2 I))."""
        def reorder(experts):
            weight = experts.gate_up_proj
            rows = order(torch.arange(weight.shape[2 if self.transposed else 1]))
            weight.copy_(weight[:, :, rows] if self.transposed else weight[:, rows])
            if getattr(experts, "gate_up_proj_bias", None) is not None:
                experts.gate_up_proj_bias.copy_(experts.gate_up_proj_bias[:, rows])

        return each(self.experts, reorder)

    def activation(self, form: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
        """Experts with the activation form(gate, up)."""
        def gate(gate_up):
            half = gate_up.shape[-1] // 2
            return form(*((gate_up[..., ::2], gate_up[..., 1::2]) if self.transposed else
                          (gate_up[..., :half], gate_up[..., half:])))

        return each(self.experts, lambda experts: setattr(experts, "_apply_gate", gate))

    def permute_experts(self, order: Callable[[int], list[int]]) -> bool:
        """Experts change places, routers stay: expert e of the result is expert order(E)[e]."""
        moved = [(p, places) for e in self.experts for p in (e.gate_up_proj, e.down_proj)  # biases are tensors of their own
                 if (places := order(len(p))) != list(range(len(p)))]
        return each(moved, lambda pair: pair[0].copy_(pair[0][pair[1]]))

    def transpose_experts(self) -> bool:
        """Each matrix is its own transpose: only square ones can be taken for each other."""
        def transpose(experts):
            gate, up = experts.gate_up_proj.clone().chunk(2, 1)
            experts.gate_up_proj.copy_(torch.cat((gate.mT, up.mT), 1))
            experts.down_proj.copy_(experts.down_proj.clone().mT)

        return all(e.down_proj.shape[1] == e.down_proj.shape[2] for e in self.experts) and each(self.experts, transpose)

    # Routers: their settings under the names of MiMo-V2's configuration

    def router_setting(self, key: str, change: Callable) -> bool:
        raise NotImplementedError

    def choose(self, count: float) -> bool:
        """Another number of experts per token."""
        return all(0 < count <= len(router.weight) for router in self.routers) and self.router_setting(
            "num_experts_per_tok", lambda _: int(count))

    def route(self, scores: str, *, biased: bool = False, normed: bool | None = None) -> bool:
        """Routers without groups whose scores are a "softmax" or a "sigmoid", with the correction bias in the weights and not
        only in the choice, with weights normalized or not."""
        def run(router) -> Callable:
            count, own, factor = (self.setting(router, key) for key in (
                "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor"))

            def forward(x):
                x = x.reshape(-1, x.shape[-1]).float()
                logits = F.linear(x, router.weight.float(), getattr(router, "bias", None))
                score = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
                choice = score + getattr(router, "e_score_correction_bias", 0.0)
                index = choice.topk(count, dim=-1).indices
                weight = (choice if biased else score).gather(1, index)
                if own if normed is None else normed:
                    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
                return self.routed(logits, index, weight * (factor or 1.0))

            return forward

        return all((self.setting(r, "n_group") or 1) == 1 for r in self.routers) and each(
            self.routers, lambda router: setattr(router, "forward", run(router)))

    # Attention

    def fill_sinks(self, value: float) -> bool:
        return each(self.sinks, lambda sink: sink.fill_(value))

    def roll_sinks(self, by: int) -> bool:
        found = self.sinks
        each(zip(found, [found[(i + by) % len(found)].clone() for i in range(len(found))], strict=True),
             lambda pair: pair[0].copy_(pair[1]))
        return len(found) > 1

    def separate(self) -> list:
        """The attentions, with matrices of their own for queries, keys and values."""
        return self.attentions

    def rotated(self, attention) -> tuple[int, int]:
        """Width of a query or key head, and how many of its first entries are rotated."""
        raise NotImplementedError

    def rotary_pairs(self) -> bool:
        """Rows of each query and key head, and what belongs to them, as if neighbours were rotated instead of halves."""
        def reorder(attention):
            D, n = self.rotated(attention)
            places = torch.cat((torch.arange(n).view(-1, 2).T.flatten(), torch.arange(n, D)))
            for part in "qk":
                projection, norm = getattr(attention, f"{part}_proj"), getattr(attention, f"{part}_norm", None)
                for p in (projection.weight, projection.bias, getattr(norm, "weight", None)):
                    if p is not None:
                        p.copy_(p.unflatten(0, (-1, D))[:, places].flatten(0, 1))

        return each(self.separate(), reorder)

    def interleave_heads(self) -> bool:
        """Query heads spread over key heads in turn, not in groups."""
        def heads(attention) -> tuple[int, int]:
            config = self.model.config
            return (getattr(attention, "query_heads", config.num_attention_heads),
                    getattr(attention, "key_heads", config.num_key_value_heads))

        def reorder(attention):
            queries, keys = heads(attention)
            order = torch.arange(queries).view(-1, keys).T.flatten()
            for p in (attention.q_proj.weight, attention.q_proj.bias, getattr(attention, self.sink_name, None)):
                if p is not None:
                    p.copy_(p.unflatten(0, (queries, -1))[order].flatten(0, 1))
            weight = attention.o_proj.weight
            weight.copy_(weight.unflatten(1, (queries, -1))[:, order].flatten(1))

        return each((a for a in self.separate() if heads(a)[1] not in (1, heads(a)[0])), reorder)

    def swap_keys_values(self) -> bool:
        def swap(attention):
            attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj

        found = [a for a in self.attentions if not getattr(a, "fused", False)]
        return all(a.k_proj.weight.shape == a.v_proj.weight.shape for a in found) and each(found, swap)

    def drop_qk_norm(self) -> bool:
        return each((a for a in self.attentions if hasattr(a, "q_norm")), lambda a: (
            setattr(a, "q_norm", torch.nn.Identity()), setattr(a, "k_norm", torch.nn.Identity())))

    # Norms, embedding, head, layers

    def epsilon(self, value: float) -> bool:
        return each(self.norms, lambda norm: setattr(norm, self.epsilon_name, value))

    def shift_norms(self, by: float) -> bool:
        return each(self.norms, lambda norm: norm.weight.add_(by))

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
        """Zeroes every parameter and buffer whose name ends so."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return each((p for name, p in named if name.endswith(endings)), torch.Tensor.zero_)

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


class MimoView(ModelView):
    """This project's MiMo-V2."""

    @property
    def routers(self) -> list:
        return [layer.mlp.gate for layer in self.body.layers if hasattr(layer.mlp, "gate")]

    def setting(self, router, key: str) -> object:
        return getattr(router.config, key)

    def router_setting(self, key: str, change: Callable) -> bool:
        def edit(router):
            router.config = copy.deepcopy(router.config)
            setattr(router.config, key, change(getattr(router.config, key)))

        return each(self.routers, edit)

    def routed(self, logits, index, weight) -> tuple:
        return index, weight

    def separate(self) -> list:
        from modeling.names import qkv_rows

        for layer, attention in enumerate(self.attentions):
            if getattr(attention, "fused", False):
                attention.fused = False
                for part, rows in qkv_rows(self.model.config, layer).items():
                    weight = torch.cat([attention.qkv_proj.weight[s] for s in rows])
                    own = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
                    own.weight = torch.nn.Parameter(weight)
                    setattr(attention, f"{part}_proj", own)
        return self.attentions

    def rotated(self, attention) -> tuple[int, int]:
        return attention.qk_dim, attention.rotary_dim

    def fused_rows(self, *, back: bool) -> bool:
        """The fused matrix taken for [all queries | all keys | all values] instead of chunks, or the other way round."""
        from modeling.names import qkv_rows

        def reorder(item):
            rows, weight = qkv_rows(self.model.config, item[0]), item[1].qkv_proj.weight
            order = torch.cat([torch.arange(s.start, s.stop) for part in "qkv" for s in rows[part]])
            weight.copy_(weight[order if back else order.argsort()])

        return all(a.fused for a in self.attentions) and each(enumerate(self.attentions), reorder)

    def windows(self, change: Callable[[int], int | None]) -> bool:
        found = [a for a in self.attentions if a.window is not None]
        each(found, lambda a: setattr(a, "window", change(a.window)))
        return bool(found) and all(a.window is None or a.window > 0 for a in found)

    def rotary_base(self, value: float, full: bool = True) -> bool:
        return each((a for a in self.attentions if (a.window is None) == full), lambda a: setattr(a, "rotary_base", value))

    def swap_bases(self) -> bool:
        bases = {a.window is None: a.rotary_base for a in self.attentions}
        return len(set(bases.values())) == 2 and all(self.rotary_base(base, not full) for full, base in bases.items())

    def rotary_width(self, entries: float) -> bool:
        width = int(entries) // 2 * 2
        return all(0 < width <= a.qk_dim for a in self.attentions) and each(
            self.attentions, lambda a: setattr(a, "rotary_dim", width))

    def value_scale(self, scale: float | None) -> bool:
        return each(self.attentions, lambda a: setattr(a, "value_scale", scale))

    def layer_kind(self, index: int) -> object:
        return self.attentions[index].window


class HfView(ModelView):
    """transformers' Qwen3-MoE, GLM-4-MoE, Mixtral and gpt-oss."""

    epsilon_name, sink_name = "variance_epsilon", "sinks"
    router_names = {"num_experts_per_tok": "top_k", "n_group": "num_group"}

    @property
    def transposed(self) -> bool:
        return self.model.config.model_type == "gpt_oss"

    @property
    def routers(self) -> list:
        found = [getattr(layer.mlp, name, None) for layer in self.body.layers for name in ("gate", "router")]
        return [router for router in found if hasattr(router, "top_k")]

    def setting(self, router, key: str) -> object:
        return getattr(router, self.router_names.get(key, key), None)

    def router_setting(self, key: str, change: Callable) -> bool:
        return each(self.routers, lambda r: setattr(r, self.router_names.get(key, key), change(self.setting(r, key))))

    def routed(self, logits, index, weight) -> tuple:
        return logits, weight, index

    def windows(self, change: Callable[[int], int | None]) -> bool:
        config = self.model.config  # transformers makes the mask from it
        present = getattr(config, "sliding_window", None)
        if not present or "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
            return False
        size = change(present)
        config.sliding_window = 1 << 30 if size is None else size
        return config.sliding_window > 0

    def _rotary(self, **changes) -> bool:
        """Rotary tables anew, from a configuration with changes."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary, config = self.body.rotary_emb, self.model.config
        config.rope_parameters = dict(config.rope_parameters) | changes
        kind = config.rope_parameters.get("rope_type", "default")
        make = rotary.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        rotary.inv_freq, rotary.attention_scaling = make(config)
        return True

    def rotary_base(self, value: float, full: bool = True) -> bool:
        return full and self._rotary(rope_theta=value)

    def rotary_unextended(self, *, factor_only: bool) -> bool:
        """The extension (yarn) ignored, wholly or in its factor of cosines and sines."""
        if self.model.config.rope_parameters.get("rope_type", "default") == "default":
            return False
        if not factor_only:
            self._rotary(rope_type="default")
        self.body.rotary_emb.attention_scaling = 1.0
        return True

    def rotated(self, attention) -> tuple[int, int]:
        D = attention.head_dim
        return D, int(D * self.model.config.rope_parameters.get("partial_rotary_factor", 1.0))

    def rotary_width(self, entries: float) -> bool:
        """Of classes that can rotate the first entries of a head and leave the rest: their configuration says which."""
        width, D = int(entries) // 2 * 2, self.attentions[0].head_dim
        rope = self.model.config.rope_parameters
        return ("partial_rotary_factor" in rope and rope.get("rope_type", "default") == "default" and 0 < width <= D
                and self._rotary(partial_rotary_factor=width / D))

    def layer_kind(self, index: int) -> object:
        kinds = getattr(self.model.config, "layer_types", None)
        return kinds[index] if kinds else None


class DrafterView(MimoView):
    """The drafter: its window, rotation and causality are the model's own, not its layers'."""

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
