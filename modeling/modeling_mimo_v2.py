"""The MiMo-V2 decoder: hybrid full / sliding-window attention and routed experts.

Self-contained (torch and transformers only), because it is shipped inside exported checkpoints as remote code. There is
no parallelism and no quantization in this file.

Shape legend: B batch, T new tokens, S keys (cached and new), H hidden size, Q query heads, K key/value heads,
G = Q / K query heads of one key head, D width of queries and keys, V width of values, W window, N = B.T tokens,
E experts, A experts of one token (top-k), I expert intermediate size.

Conventions, each in one place only:
- a query of a window layer sees W keys, itself included (`_visible`);
- the first int(D * partial_rotary_factor) entries of each head are rotated, in halves (`_rotate`);
- a sink is one extra logit per head in the softmax's denominator; it has no value (`_attend`);
- fused qkv rows are `num_key_value_heads` chunks of [queries | keys | values] (`Attention._project`);
- experts are chosen by sigmoid score + correction bias and weighted by the score alone (`Router`).

Training and prefill without padding take fast paths. Full layers: SDPA, or on a CPU, up to BLOCKED_UP_TO tokens, blocks
of queries that meet only the keys before their end (half the work of T x T, and its backward pass runs at the speed of
matrix products: 3 times faster than the CPU's SDPA, measured at 16 x 512 tokens in bf16). Window layers: bands of W
queries x 2W keys instead of T x T. Everything else (cache, padding, sinks on full layers) is one dense masked softmax.
Rejected for the bands: float32 scores and an extra column for the sink (3 times slower: copies that no kernel can use).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, __version__
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from .configuration_mimo_v2 import MiMoV2Config

try:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
except ImportError:
    raise ImportError(f"MiMo-V2's experts are fused while they are loaded, which transformers {__version__} cannot do: 5.17 or "
                      "newer is needed for the model (its configuration and tokenizer load with 4.57 too)") from None

# Queries per block of a full-attention layer on a CPU, and the length from which SDPA's constant memory wins over speed.
QUERY_BLOCK = 128
BLOCKED_UP_TO = 2048
# What this transformers calls the keys and values of earlier tokens, as argument and in outputs (renamed in 5.24).
CACHE_NAME = ("cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
              else "past_key_values")


@dataclass
class MiMoV2Output(ModelOutput):
    """last_hidden_state [B, T, H] after the final norm; the cache, under the name of this transformers (`CACHE_NAME`);
    aux_hidden_states: outputs [B, T, H] of the decoder layers asked for."""

    last_hidden_state: torch.Tensor | None = None
    if CACHE_NAME == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
        cache = property(lambda self: self.past_key_values)
    hidden_states: tuple[torch.Tensor, ...] | None = None
    aux_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class MiMoV2CausalLMOutput(ModelOutput):
    """loss (if labels), logits [B, T or logits_to_keep, vocabulary], cache (`CACHE_NAME`) and aux_hidden_states."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    if CACHE_NAME == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
        cache = property(lambda self: self.past_key_values)
    hidden_states: tuple[torch.Tensor, ...] | None = None
    aux_hidden_states: tuple[torch.Tensor, ...] | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.float(), (x.shape[-1],), eps=self.epsilon)
        return self.weight * y.to(x.dtype)


def _visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Bool mask over positions: keys not after the query and, in window layers, among the last `window` (self included)."""
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `visible`, minus infinity elsewhere (no row may be all hidden)."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first 2R entries of x [B, T, heads, D]; cos, sin [B or 1, T, 1, R]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def _attend(scores: torch.Tensor, visible: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Masked softmax of scores [..., queries, keys] (float32) with an optional extra logit `sink` (broadcastable)."""
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sink is None:
        return scores.softmax(-1)
    sink = sink.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]


class _SinkSoftmax(torch.autograd.Function):
    """Softmax of scores + mask whose column 0 is replaced by the sink's logit.

    By hand because autograd would spend more on that one column than on the softmax: a full-size zero tensor for its
    slice and a full-size sum for its gradient.
    """

    @staticmethod
    def forward(ctx, scores: torch.Tensor, mask: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        """scores [..., queries, keys]; mask broadcasts against it, sink against [..., queries]."""
        scores = scores + mask
        scores[..., 0] = sink
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        ctx.types = scores.dtype, sink.dtype, sink.shape
        return weights

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (weights,) = ctx.saved_tensors
        scores_dtype, sink_dtype, sink_shape = ctx.types
        grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
        grad_sink = grad[..., 0].sum_to_size(sink_shape).to(sink_dtype)
        grad[..., 0] = 0
        return grad.to(scores_dtype), None, grad_sink


class Attention(nn.Module):
    """Attention of one layer, full or sliding-window, with its own head counts, widths and rotary base."""

    def __init__(self, config: MiMoV2Config, layer: int):
        super().__init__()
        swa = bool(config.hybrid_layer_pattern[layer])
        prefix = "swa_" if swa else ""
        self.layer = layer
        self.window = config.sliding_window if swa else None
        self.query_heads = getattr(config, f"{prefix}num_attention_heads")
        self.key_heads = getattr(config, f"{prefix}num_key_value_heads")
        self.qk_dim = getattr(config, f"{prefix}head_dim")
        self.v_dim = getattr(config, f"{prefix}v_head_dim")
        self.value_scale = config.attention_value_scale
        self.rotary_base = getattr(config, f"{prefix}rope_theta")
        self.rotary_dim = int(self.qk_dim * config.partial_rotary_factor)
        self.fused = config.attention_projection_layout == "fused_qkv"
        self.chunks = config.num_key_value_heads
        sizes = (self.query_heads * self.qk_dim, self.key_heads * self.qk_dim, self.key_heads * self.v_dim)
        if self.fused:
            self.qkv_proj = nn.Linear(config.hidden_size, sum(sizes), bias=config.attention_bias)
        else:
            self.q_proj = nn.Linear(config.hidden_size, sizes[0], bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, sizes[1], bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, sizes[2], bias=config.attention_bias)
        self.o_proj = nn.Linear(self.query_heads * self.v_dim, config.hidden_size, bias=False)
        has_sink = config.add_swa_attention_sink_bias if swa else config.add_full_attention_sink_bias
        self.attention_sink_bias = nn.Parameter(torch.zeros(self.query_heads)) if has_sink else None

    def forward(self, x_BTH, positions_BT, visible_from, cache):
        """`visible_from` [B, S]: bool, False for padding keys, or None; `positions_BT` None means 0..T-1."""
        B, T, _ = x_BTH.shape
        q, k, v = self._project(x_BTH)
        cos, sin = self._cos_sin(positions_BT, T, x_BTH)
        q, k = _rotate(q, cos, sin) * self.qk_dim**-0.5, _rotate(k, cos, sin)
        if self.value_scale is not None:
            v = v * self.value_scale
        q_BQTD, k_BKSD, v_BKSV = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        start = 0
        if cache is not None:
            start = cache.get_seq_length(self.layer)
            k_BKSD, v_BKSV = cache.update(k_BKSD, v_BKSV, self.layer)
        plain = start == 0 and visible_from is None and T > 1
        if plain and self.window is None and self.attention_sink_bias is None:
            out = self._full(q_BQTD, k_BKSD, v_BKSV)
        elif plain and self.window is not None and T > self.window:
            out = self._banded(q_BQTD, k_BKSD, v_BKSV)
        else:
            out = self._dense(q_BQTD, k_BKSD, v_BKSV, start, visible_from)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def _project(self, x_BTH):
        """Queries [B, T, Q, D], keys [B, T, K, D], values [B, T, K, V]."""
        B, T, _ = x_BTH.shape
        if not self.fused:
            q, k, v = self.q_proj(x_BTH), self.k_proj(x_BTH), self.v_proj(x_BTH)
        else:
            q_rows, k_rows = self.query_heads // self.chunks * self.qk_dim, self.key_heads // self.chunks * self.qk_dim
            v_rows = self.key_heads // self.chunks * self.v_dim
            chunks = self.qkv_proj(x_BTH).view(B, T, self.chunks, q_rows + k_rows + v_rows)
            q, k, v = chunks.split((q_rows, k_rows, v_rows), dim=-1)
        return (q.reshape(B, T, self.query_heads, self.qk_dim), k.reshape(B, T, self.key_heads, self.qk_dim),
                v.reshape(B, T, self.key_heads, self.v_dim))

    def _cos_sin(self, positions_BT, length, like):
        if positions_BT is None:
            positions_BT = torch.arange(length, device=like.device)[None]
        exponents = torch.arange(0, self.rotary_dim, 2, device=like.device, dtype=torch.float32) / self.rotary_dim
        angles = positions_BT[:, :, None, None].float() * self.rotary_base**-exponents
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def _full(self, q_BQTD, k_BKSD, v_BKSV):
        if q_BQTD.device.type == "cpu" and q_BQTD.shape[2] <= BLOCKED_UP_TO:
            return self._blocked(q_BQTD, k_BKSD, v_BKSV)
        repeats = self.query_heads // self.key_heads
        k, v = k_BKSD.repeat_interleave(repeats, dim=1), v_BKSV.repeat_interleave(repeats, dim=1)
        return F.scaled_dot_product_attention(q_BQTD, k, v, is_causal=True, scale=1.0)

    def _blocked(self, q_BQTD, k_BKSD, v_BKSV):
        """Blocks of queries, each against the keys up to its end."""
        B, Q, T, D = q_BQTD.shape
        K, G = self.key_heads, self.query_heads // self.key_heads
        q, k, v = q_BQTD.reshape(B * K, G, T, D), k_BKSD.flatten(0, 1), v_BKSV.flatten(0, 1)
        blocks = []
        for start in range(0, T, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, T)
            positions = torch.arange(end, device=q.device)
            mask = _additive(_visible(positions[start:, None], positions, None), q.dtype)
            scores = q[:, :, start:end].flatten(1, 2) @ k[:, :end].transpose(-1, -2)
            weights = (scores.view(B * K, G, end - start, end) + mask).softmax(-1).to(v.dtype)
            out = weights.view(B * K, G * (end - start), end) @ v[:, :end]
            blocks.append(out.view(B, Q, end - start, -1))
        return torch.cat(blocks, dim=2)

    def _banded(self, q_BQTD, k_BKSD, v_BKSV):
        """Each block of W queries meets its own and the previous block of keys.

        The first key of the previous block lies W before the first query, out of everybody's window: its slot is left
        empty (a zero key and value) and holds the sink.
        """
        B, Q, T, D = q_BQTD.shape
        K, W = self.key_heads, self.window
        G, blocks = Q // K, -(-T // W)
        pad = blocks * W - T
        # Queries of one key head and block side by side: [B * K * blocks, G * W, D].
        q = F.pad(q_BQTD, (0, 0, 0, pad)).view(B, K, G, blocks, W, D).transpose(2, 3).reshape(-1, G * W, D)

        def pairs(x):  # [B, K, S, .] -> [B * K * blocks, 2W, .]: previous block and own
            x = F.pad(x, (0, 0, 0, pad)).view(B, K, blocks, W, -1)
            return torch.cat((F.pad(x[:, :, :-1, 1:], (0, 0, 1, 0, 1, 0)), x), dim=3).flatten(0, 2)

        scores = (q @ pairs(k_BKSD).transpose(-1, -2)).view(B, K, blocks, G, W, 2 * W)
        queries = torch.arange(W, 2 * W, device=q.device)[:, None]
        keys = torch.arange(2 * W, device=q.device)
        visible = _visible(queries, keys, W).repeat(blocks, 1, 1)
        visible[0] &= keys >= W  # the first block has no previous one
        mask = _additive(visible, q.dtype)[:, None]
        if self.attention_sink_bias is None:
            weights = (scores + mask).softmax(-1)
        else:
            weights = _SinkSoftmax.apply(scores, mask, self.attention_sink_bias.view(K, 1, G, 1))
        out = weights.to(v_BKSV.dtype).view(-1, G * W, 2 * W) @ pairs(v_BKSV)
        out = out.view(B, K, blocks, G, W, -1).transpose(2, 3).reshape(B, Q, blocks * W, -1)
        return out[:, :, :T]

    def _dense(self, q_BQTD, k_BKSD, v_BKSV, start, visible_from):
        B, Q, T, D = q_BQTD.shape
        K, S = self.key_heads, k_BKSD.shape[2]
        G = Q // K
        scores = (q_BQTD.reshape(B, K, G * T, D) @ k_BKSD.transpose(-1, -2)).float().view(B, K, G, T, S)
        queries = torch.arange(start, start + T, device=q_BQTD.device)[:, None]
        keys = torch.arange(start + T - S, start + T, device=q_BQTD.device)  # a window cache has dropped the first ones
        visible = _visible(queries, keys, self.window)
        if visible_from is not None:
            visible = visible & visible_from[:, None, start + T - S:start + T]
            visible = visible[:, None, None]
        sink = None if self.attention_sink_bias is None else self.attention_sink_bias.view(1, K, G, 1, 1)
        weights = _attend(scores, visible, sink).to(v_BKSV.dtype)
        return (weights.view(B, K, G * T, S) @ v_BKSV).view(B, Q, T, -1)


class Router(nn.Module):
    """Sigmoid scores; the top A by score + correction bias, weighted by their scores (optionally normalised)."""

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        """Moves as any module does, but the correction bias, which decides what runs, stays float32: so it is published."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_NH):
        """Expert indices [N, A] int64 and weights [N, A] float32."""
        config = self.config
        scores_NE = F.linear(x_NH.float(), self.weight.float()).sigmoid()
        choice_NE = scores_NE + self.e_score_correction_bias
        if config.n_group > 1:  # only experts of the best groups (by the sum of their two best) may be chosen
            grouped = choice_NE.view(-1, config.n_group, config.n_routed_experts // config.n_group)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            choice_NE = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        index_NA = choice_NE.topk(config.num_experts_per_tok, dim=-1).indices
        weight_NA = scores_NE.gather(1, index_NA)
        if config.norm_topk_prob:
            weight_NA = weight_NA / (weight_NA.sum(-1, keepdim=True) + 1e-20)
        return index_NA, weight_NA * (config.routed_scaling_factor or 1.0)


def _activation(name: str) -> nn.Module:
    if name not in ACT2FN:
        raise ValueError(f"hidden_act={name!r}: expected an activation that transformers knows, e.g. silu")
    return ACT2FN[name]


class Experts(nn.Module):
    """All routed experts of a layer as fused tensors, run by grouped matrix products over tokens sorted by expert."""

    # transformers' marks of a fused-experts module.
    is_transposed, is_concatenated, has_gate, has_bias = False, True, True, False

    def __init__(self, config: MiMoV2Config):
        super().__init__()
        E, H, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))  # gate rows first
        self.down_proj = nn.Parameter(torch.empty(E, H, I))
        self.act_fn = _activation(config.hidden_act)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x_NH, index_NA, weight_NA):
        N, A = index_NA.shape
        flat = index_NA.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.num_experts).cumsum(0).to(torch.int32)
        rows = x_NH.index_select(0, order // A)
        inner = self._apply_gate(F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends))
        out = F.grouped_mm(inner, self.down_proj.transpose(1, 2), offs=ends)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        out_NAH = out.index_select(0, inverse).view(N, A, -1)
        return (out_NAH * weight_NA.to(out.dtype)[..., None]).sum(1)


class MoE(nn.Module):
    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, x_BTH):
        x_NH = x_BTH.reshape(-1, x_BTH.shape[-1])
        index_NA, weight_NA = self.gate(x_NH)
        return self.experts(x_NH, index_NA, weight_NA).view_as(x_BTH)


class MLP(nn.Module):
    def __init__(self, config: MiMoV2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = _activation(config.hidden_act)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MiMoV2Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MoE(config) if config.moe_layer_freq[layer] else MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)

    def forward(self, x_BTH, positions_BT=None, visible_from=None, cache=None):
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), positions_BT, visible_from, cache)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))


class MiMoV2PreTrainedModel(PreTrainedModel):
    config_class = MiMoV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # Multi-token-prediction layers of the released checkpoints are not part of the decoder.
    _keys_to_ignore_on_load_unexpected = [r"model\.mtp\."]
    # The correction bias decides which experts run; half precision would move it.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As in transformers; checkpoints with FP8 or MXFP4 weights are decoded while they are read."""
        if pretrained_model_name_or_path is not None:
            if not isinstance(config, PretrainedConfig):
                hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path,
                                                          **{k: kwargs[k] for k in hub if k in kwargs})
            if getattr(config, "quantization_config", None) is not None:
                from .native_loading import translated

                config = translated(config)
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def _init_weights(self, module):
        """Normal(0, initializer_range) for every matrix; norms 1, sinks and correction biases 0."""
        for name, parameter in module.named_parameters(recurse=False):
            if name == "attention_sink_bias" or name == "bias":
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)
        if isinstance(module, Router):
            nn.init.zeros_(module.e_score_correction_bias)


class MiMoV2Model(MiMoV2PreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, use_cache=None,
                output_hidden_states=None, aux_layers=(), past_key_values=None, **kwargs) -> MiMoV2Output:
        """Runs the decoder.

        Args:
            input_ids: [B, T] int64, or inputs_embeds [B, T, H].
            attention_mask: [B, S] (cached and new), 0 for padding; None if nothing is padded.
            position_ids: [B, T]; by default counted over what is not padding.
            cache: keys and values of earlier tokens; a new DynamicCache if use_cache. Window layers keep W - 1 positions.
            past_key_values: the same, by its name before transformers 5.24.
            aux_layers: indices of decoder layers whose outputs are returned (before the final norm), in this order.

        Raises:
            ValueError: inputs, masks, caches or layers that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layers = len(self.layers)
        for layer in aux_layers:
            if not -layers <= layer < layers:
                raise ValueError(f"aux_layers: layer {layer}, expected {-layers} to {layers - 1}")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        # A recomputed layer would append its keys twice.
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and cache.is_compileable:
            raise ValueError(f"cache: {type(cache).__name__}, expected a cache that grows (DynamicCache)")
        start = cache.get_seq_length() if cache is not None else 0
        visible_from = self._padding(attention_mask, start + x.shape[1])
        positions = self._positions(position_ids, visible_from, start, x)
        wanted = {layer % layers: None for layer in aux_layers}
        hidden = [x] if output_hidden_states else None
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, visible_from, cache)
            if i in wanted:
                wanted[i] = x
            if hidden is not None and i + 1 < layers:
                hidden.append(x)
        x = self.norm(x)
        aux_hidden_states = tuple(wanted[layer % layers] for layer in aux_layers) or None
        return MiMoV2Output(last_hidden_state=x, aux_hidden_states=aux_hidden_states,
                            hidden_states=(*hidden, x) if hidden is not None else None,
                            **{CACHE_NAME: cache})

    @staticmethod
    def _padding(attention_mask, length):
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(f"attention_mask: {type(attention_mask).__name__}, expected a tensor [batch, keys]")
        if attention_mask.ndim != 2 or attention_mask.shape[1] != length:
            raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)}, expected [batch, {length}]")
        mask = attention_mask.bool()
        return None if bool(mask.all()) else mask

    @staticmethod
    def _positions(position_ids, visible_from, start, x):
        if position_ids is not None:
            return position_ids
        if visible_from is not None:
            return (visible_from.long().cumsum(1) - 1).clamp_min(0)[:, start:]
        return torch.arange(start, start + x.shape[1], device=x.device)[None] if start else None


class MiMoV2ForCausalLM(MiMoV2PreTrainedModel, GenerationMixin):
    """MiMo-V2 with its output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Sharded training (transformers' DistributedConfig): norm and head stay gathered between forward and backward pass.
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MiMoV2Config):
        super().__init__(config)
        self.model = MiMoV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs) -> MiMoV2CausalLMOutput:
        """As `MiMoV2Model.forward`, and logits: of all positions, the last `logits_to_keep`, or an index tensor."""
        out = self.model(input_ids=input_ids, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else (
            logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else slice(None))
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return MiMoV2CausalLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states,
                                   aux_hidden_states=out.aux_hidden_states,
                                    **{CACHE_NAME: getattr(out, CACHE_NAME)})


def _register_expert_names() -> None:
    """On disk experts are per-expert matrices, as published; transformers fuses and splits them by this table."""
    table = [
        WeightConverter(["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"], "mlp.experts.gate_up_proj",
                        operations=[MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]
    register_checkpoint_conversion_mapping(MiMoV2Config.model_type, table, overwrite=True)


_register_expert_names()
