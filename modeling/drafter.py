"""The DFlash drafter: a small decoder that proposes a whole block of tokens in one pass (block diffusion).

Self-contained (torch and transformers only), because it is shipped inside exported checkpoints as `dflash/dflash.py`.

One round: the target has committed tokens up to the anchor. For every position before the anchor it left features (the
outputs of chosen layers); concatenated, projected (`fc`) and normalised they become, layer by layer, keys and values
beside those of the block [anchor, MASK x (B - 1)]. The features never pass through the drafter's own MLPs, so each is
projected once and kept. The output at a masked position predicts the token *at that position*. Embedding and head are the
target's, frozen and shared; the final norm is the drafter's.

MiMo's form, in full: sliding window in every layer, non-causal inside the block, RMS norms on queries and keys, one sink
logit per head, values scaled, only the first int(D * partial_rotary_factor) entries of a head rotated and with the
*backbone's* base, a learned embedding for MASK that lives beside the weights (`mask_embedding.pt`).

Shape legend: B batch, A anchors of a row, T block size, S context positions, H hidden size, Q query heads, K key/value
heads, G = Q / K, D width of queries and keys, V width of values.

Options (off by default; a checkpoint without them has exactly the published tensors):
- `causal`: a position of the block sees only those before it (JetSpec; speculators' default);
- `convolution`: x_t + c(x_t) * x_(t-1) inside the block around each sublayer, c of low rank and zero at the start
  (our reading of DFlash 2's two-point dynamic depthwise convolution);
- `markov_rank`: logits of a position get U[previous token] . W[token] added (DSpark, arXiv 2607.05147); decoded token by
  token, or, as in DFlash 2's path selector, by the best path through the `selector_top_k` candidates of each position.

Sources: DFlash, arXiv 2602.06036; dflash/config.json of XiaomiMiMo/MiMo-V2.5-Pro-FP4-DFlash and MiMo-V2.5-DFlash.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Qwen3Config

from .block_mask import block_positions, key_ranges, visible_block, visible_context

# Anchors of one chunk of the training attention: scores of [anchors x block, slice of the context] are held at once.
ANCHOR_CHUNK = 32
MASK_FILE = "mask_embedding.pt"
MASK_BYTES = 16 << 20


def drafter_config(*, hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int,
                   num_key_value_heads: int, head_dim: int, vocab_size: int, target_layer_ids: Sequence[int],
                   num_target_layers: int, mask_token_id: int, rotary_base: float, v_head_dim: int | None = None,
                   block_size: int = 8, window: int | None = 1024, causal: bool = False, partial_rotary_factor: float = 1.0,
                   attention_value_scale: float | None = None, attention_sink_bias: bool = True, rms_norm_eps: float = 1e-5,
                   max_position_embeddings: int = 262144, num_anchors: int = 512, loss_decay_gamma: float = 7.0,
                   convolution_rank: int = 0, markov_rank: int = 0, selector_top_k: int = 0,
                   bos_token_id: int | None = None, eos_token_id: int | None = None) -> Qwen3Config:
    """Configuration with every released key, plus the explicit ones that keep clients from guessing.

    Window and causality stand under each engine's key (`layer_types`, `sliding_window`, `use_sliding_window`, `is_causal`,
    `dflash_config.use_swa`, `.causal`): readers differ in the key that they believe. `rope_theta` and
    `rope_parameters.rope_theta` are the backbone's base, the one that is used (the released file leaves 10,000 there).

    Args:
        target_layer_ids: decoder layers whose outputs are the features ("after layer i"); first and last are allowed.
        window: keys closer than this many positions are seen; None = full attention.

    Raises:
        ValueError: a geometry that cannot be.
    """
    if num_attention_heads % num_key_value_heads:
        raise ValueError(f"num_attention_heads={num_attention_heads} is not a multiple of "
                         f"num_key_value_heads={num_key_value_heads}")
    rotated = int(head_dim * partial_rotary_factor)
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise ValueError(f"partial_rotary_factor={partial_rotary_factor} rotates {rotated} of head_dim={head_dim} entries, "
                         f"expected an even number from 2 to {head_dim}")
    if not 2 <= block_size <= (window or block_size):
        raise ValueError(f"block_size={block_size}: expected 2 to window={window}")
    for layer in target_layer_ids:
        if not 0 <= layer < num_target_layers:
            raise ValueError(f"target_layer_ids: layer {layer}, expected 0 to {num_target_layers - 1}")
    if not target_layer_ids or len(set(target_layer_ids)) != len(target_layer_ids):
        raise ValueError(f"target_layer_ids={list(target_layer_ids)}: expected one or more different layers")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id={mask_token_id}: expected 0 to {vocab_size - 1}")
    if selector_top_k and not markov_rank:
        raise ValueError("selector_top_k needs markov_rank: the path is scored by the Markov head")
    kind = "full_attention" if window is None else "sliding_attention"
    dflash = {
        "target_layer_ids": list(target_layer_ids), "mask_token_id": mask_token_id, "num_anchors": num_anchors,
        "block_size": block_size, "loss_decay_gamma": loss_decay_gamma, "use_swa": window is not None,
        "swa_window_size": window, "backbone_rotary_base": rotary_base, "attention_value_scale": attention_value_scale,
        "attention_sink_bias": attention_sink_bias, "causal": causal, "num_target_layers": num_target_layers,
    }
    dflash |= {k: v for k, v in {"convolution_rank": convolution_rank, "markov_rank": markov_rank,
                                 "selector_top_k": selector_top_k}.items() if v}
    return Qwen3Config(
        architectures=["DFlashDraftModel"], auto_map={"AutoModel": "dflash.DFlashDraftModel"}, hidden_size=hidden_size,
        intermediate_size=intermediate_size, num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads, head_dim=head_dim, v_head_dim=v_head_dim or head_dim,
        partial_rotary_factor=partial_rotary_factor, block_size=block_size, dflash_config=dflash,
        num_target_layers=num_target_layers, vocab_size=vocab_size, max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rotary_base, "partial_rotary_factor": partial_rotary_factor},
        rope_theta=rotary_base, use_sliding_window=window is not None, sliding_window=window, max_window_layers=0,
        layer_types=[kind] * num_hidden_layers, is_causal=causal, rms_norm_eps=rms_norm_eps, hidden_act="silu",
        attention_bias=False, tie_word_embeddings=False, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
        dtype="bfloat16")


def released_drafter(name: str) -> Qwen3Config:
    """Configuration of a published drafter: "MiMo-V2.5-Pro" or "MiMo-V2.5"; KeyError for any other."""
    common = dict(num_hidden_layers=5, num_key_value_heads=8, head_dim=128, intermediate_size=16384, window=1024,
                  partial_rotary_factor=0.5, rotary_base=5_000_000, attention_value_scale=0.612, num_anchors=4096,
                  loss_decay_gamma=7.0, bos_token_id=151643, eos_token_id=151645)
    return drafter_config(**common, **{
        "MiMo-V2.5-Pro": dict(hidden_size=6144, num_attention_heads=128, vocab_size=152576, num_target_layers=70,
                              target_layer_ids=[0, 15, 31, 47, 69], mask_token_id=151669),
        "MiMo-V2.5": dict(hidden_size=4096, num_attention_heads=64, vocab_size=152576, num_target_layers=48,
                          target_layer_ids=[0, 11, 23, 35, 47], mask_token_id=151675, rms_norm_eps=1e-6),
    }[name])


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.rms_norm(x.float(), (x.shape[-1],), eps=self.epsilon) * self.weight.float()).to(x.dtype)


class Convolution(nn.Module):
    """x_t + c(x_t) * x_(t-1) within a block; c = up(down(x_t)) is zero at the start. x [..., T, H]."""

    def __init__(self, size: int, rank: int):
        super().__init__()
        self.down_proj = nn.Linear(size, rank, bias=False)
        self.up_proj = nn.Linear(rank, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up_proj(self.down_proj(x)) * F.pad(x, (0, 0, 1, 0))[..., :-1, :]


class Attention(nn.Module):
    """Queries from the block; keys and values from context features and block."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        special = config.dflash_config
        self.query_heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.qk_dim = config.head_dim
        self.v_dim = getattr(config, "v_head_dim", None) or config.head_dim
        self.value_scale = special.get("attention_value_scale")
        H = config.hidden_size
        self.q_proj = nn.Linear(H, self.query_heads * self.qk_dim, bias=False)
        self.k_proj = nn.Linear(H, self.key_heads * self.qk_dim, bias=False)
        self.v_proj = nn.Linear(H, self.key_heads * self.v_dim, bias=False)
        self.o_proj = nn.Linear(self.query_heads * self.v_dim, H, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.qk_dim, config.rms_norm_eps), RMSNorm(self.qk_dim, config.rms_norm_eps)
        self.attention_sink_bias = nn.Parameter(torch.zeros(self.query_heads)) if special.get("attention_sink_bias") else None

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys [..., S, K, D] and scaled values [..., S, K, V] of x [..., S, H]."""
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (self.key_heads, self.qk_dim))), cos, sin)
        v = self.v_proj(x).unflatten(-1, (self.key_heads, self.v_dim))
        return k, v if self.value_scale is None else v * self.value_scale

    def queries(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotated, scaled queries [..., T, Q, D]."""
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.query_heads, self.qk_dim))), cos, sin)
        return q * self.qk_dim**-0.5

    def weigh(self, context_scores: torch.Tensor, own_scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax over context, own block and sink; masked scores [..., K, G, rows, keys], -inf where hidden.

        Returns the weights of the context and of the block. Scores keep their dtype (torch's softmax works in float32
        inside): float32 copies of them are a third of a training step on a CPU.
        """
        S = context_scores.shape[-1]
        parts = [context_scores, own_scores]
        if self.attention_sink_bias is not None:
            sink = self.attention_sink_bias.to(own_scores.dtype).view(self.key_heads, -1, 1, 1)
            parts.append(sink.expand(*own_scores.shape[:-1], 1))
        weights = torch.cat(parts, dim=-1).softmax(-1)
        return weights[..., :S], weights[..., S:S + own_scores.shape[-1]]


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        rank = config.dflash_config.get("convolution_rank", 0)
        self.attention_convolution = Convolution(config.hidden_size, rank) if rank else nn.Identity()
        self.mlp_convolution = Convolution(config.hidden_size, rank) if rank else nn.Identity()

    def forward(self, x: torch.Tensor, attend) -> torch.Tensor:
        """x [..., T, H]; `attend(attention, normed x)` returns heads [..., T, Q * V] before the output projection."""
        x = x + self.self_attn.o_proj(attend(self.self_attn, self.attention_convolution(self.input_layernorm(x))))
        return x + self.mlp(self.mlp_convolution(self.post_attention_layernorm(x)))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, in halves, of the first 2R entries of x [..., heads, D]; cos, sin [..., R] (no heads)."""
    cos, sin, half = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype), cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class DFlashDraftModel(PreTrainedModel):
    """The drafter. See the module's text; parameter names are the published ones.

    `mask_embedding` [H] is a parameter that `save_drafter` writes to its own file, as published.
    """

    config_class = Qwen3Config
    base_model_prefix = ""
    _no_split_modules = ["DraftLayer"]
    _keys_to_ignore_on_load_missing = ["mask_embedding"]

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        special, H = config.dflash_config, config.hidden_size
        self.block_size = special.get("block_size", getattr(config, "block_size", None))
        self.target_layer_ids = list(special["target_layer_ids"])
        self.mask_token_id = special["mask_token_id"]
        self.window = special.get("swa_window_size", config.sliding_window) if special.get("use_swa") else config.sliding_window
        self.causal = bool(special.get("causal", getattr(config, "is_causal", False)))
        rope = config.rope_parameters  # transformers moves the keys of the top level in here
        self.rotary_base = special.get("backbone_rotary_base") or rope["rope_theta"]
        factor = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        self.rotary_dim = int(config.head_dim * factor)
        self.fc = nn.Linear(len(self.target_layer_ids) * H, H, bias=False)
        self.hidden_norm, self.norm = RMSNorm(H, config.rms_norm_eps), RMSNorm(H, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.mask_embedding = nn.Parameter(torch.zeros(H))
        self.selector_top_k = special.get("selector_top_k", 0)
        rank = special.get("markov_rank", 0)
        self.markov_previous = nn.Embedding(config.vocab_size, rank) if rank else None
        self.markov_next = nn.Linear(rank, config.vocab_size, bias=False) if rank else None
        self.post_init()

    def _init_weights(self, module):
        """Normal(0, initializer_range); projections into the residual stream smaller by the depth; options start at zero."""
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("attention_sink_bias", "mask_embedding"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)
        if module is not self:  # transformers skips modules without parameters of their own, so the rest is done at the root
            return
        if getattr(self.fc.weight, "_is_hf_initialized", False):  # from_pretrained, come by for the mask embedding alone
            return
        with torch.no_grad():
            for layer in self.layers:
                for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    out.weight.mul_((2 * self.config.num_hidden_layers) ** -0.5)
                for convolution in (layer.attention_convolution, layer.mlp_convolution):
                    if isinstance(convolution, Convolution):
                        convolution.up_proj.weight.zero_()
            if self.markov_next is not None:
                self.markov_next.weight.zero_()

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [..., R] of integer positions [...]."""
        exponents = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32) / self.rotary_dim
        angles = positions[..., None].float() * self.rotary_base**-exponents
        return angles.cos(), angles.sin()

    def fuse(self, target_hidden: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """Context features [..., S, H] of the target's layers `target_layer_ids`: a sequence of [..., S, H], or already
        concatenated.

        Raises:
            ValueError: another number of features than the drafter was built for.
        """
        target_hidden = target_hidden if isinstance(target_hidden, torch.Tensor) else torch.cat(tuple(target_hidden), dim=-1)
        if target_hidden.shape[-1] != self.fc.in_features:
            raise ValueError(f"target_hidden: {target_hidden.shape[-1]} features, expected {self.fc.in_features} (outputs of "
                             f"layers {self.target_layer_ids})")
        return self.hidden_norm(self.fc(target_hidden.to(self.fc.weight.dtype)))

    def context_keys_values(self, context: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer: keys [B, K, S, D], values [B, K, S, V] of fused features [B, S, H] at positions [B or 1, S]."""
        cos, sin = self.cos_sin(positions)
        pairs = [layer.self_attn.keys_values(context, cos, sin) for layer in self.layers]
        return [(k.transpose(-3, -2), v.transpose(-3, -2)) for k, v in pairs]

    def embed_block(self, anchor_ids: torch.Tensor, embed_tokens: nn.Module) -> torch.Tensor:
        """Input [..., T, H] of blocks: the target's embedding of the anchors [...], then the learned mask embedding."""
        first = embed_tokens(anchor_ids)[..., None, :].to(self.mask_embedding.dtype)
        rest = self.mask_embedding.expand(*first.shape[:-2], self.block_size - 1, -1)
        return torch.cat((first, rest), dim=-2)

    def block_hidden(self, embeds: torch.Tensor, positions: torch.Tensor, context: list[tuple[torch.Tensor, torch.Tensor]],
                     context_positions: torch.Tensor) -> torch.Tensor:
        """Decoding: hidden states [B, T, H] after the final norm of one block per row (its first T positions).

        Args:
            embeds: [B, T, H], T up to the block size (fewer drafts = the first positions).
            positions: [B, T] of the block; the first is the anchor's.
            context: from `context_keys_values`.
            context_positions: [B or 1, S]; entries not before the anchor (empty slots of a ring) are ignored.
        """
        cos, sin = self.cos_sin(positions)
        seen = visible_context(positions[:, :, None], context_positions[:, None], positions[:, :1, None], self.window)
        own = visible_block(positions.shape[1], self.causal, positions.device)
        x = embeds
        for layer, (keys, values) in zip(self.layers, context, strict=True):
            x = layer(x, lambda attention, y, k=keys, v=values: self._decode(attention, y, k, v, cos, sin, seen, own))
        return self.norm(x)

    @staticmethod
    def _decode(attention, x, keys, values, cos, sin, seen_BTS, own_TT):
        B, T, _ = x.shape
        K, D = attention.key_heads, attention.qk_dim
        q = attention.queries(x, cos, sin).view(B, T, K, -1, D).permute(0, 2, 3, 1, 4)  # [B, K, G, T, D]
        k, v = (t.transpose(1, 2)[:, :, None] for t in attention.keys_values(x, cos, sin))
        context = (q @ keys[:, :, None].mT).masked_fill(~seen_BTS[:, None, None], float("-inf"))
        weights, own = attention.weigh(context, (q @ k.mT).masked_fill(~own_TT, float("-inf")))
        out = weights @ values[:, :, None] + own @ v
        return out.permute(0, 3, 1, 2, 4).reshape(B, T, -1)

    def forward(self, target_hidden: torch.Tensor, anchor_ids_BA: torch.Tensor, anchors_BA: torch.Tensor,
                starts_BS: torch.Tensor, embed_tokens: nn.Module, *, attention: str | None = None) -> torch.Tensor:
        """Training: all blocks of packed rows in one pass; hidden states [B, A, T, H] after the final norm.

        Args:
            target_hidden: [B, S, n * H], features of each token of the row.
            anchor_ids_BA: token ids of the anchors.
            anchors_BA: their index in the row, ascending, with negative entries (no anchor; output meaningless) first.
            starts_BS: index at which the document of each token begins; positions are counted from there.
            embed_tokens: the target's input embedding.
            attention: "blocked" (default on CPU), "flex" (default on CUDA) or "dense" (the reference).

        Raises:
            ValueError: unknown attention; anchors not sorted.
        """
        attention = attention or ("flex" if target_hidden.is_cuda else "blocked")
        if attention not in _ATTENTIONS:
            raise ValueError(f"attention={attention!r}: expected one of {', '.join(_ATTENTIONS)}")
        if bool((anchors_BA[:, 1:] < anchors_BA[:, :-1]).any()):
            raise ValueError("anchors_BA: expected ascending indices in each row")
        context = self.fuse(target_hidden)
        rows = torch.arange(starts_BS.shape[1], device=target_hidden.device)
        cos_sin_context = self.cos_sin(rows - starts_BS)
        begins = starts_BS.gather(1, anchors_BA.clamp_min(0))
        cos_sin_block = self.cos_sin(block_positions(anchors_BA - begins, self.block_size))
        run = _ATTENTIONS[attention](anchors_BA, starts_BS, self.block_size, self.window, self.causal)

        def attend(layer_attention, x_BATH):
            k, v = layer_attention.keys_values(context, *cos_sin_context)
            q = layer_attention.queries(x_BATH, *cos_sin_block)
            own_k, own_v = layer_attention.keys_values(x_BATH, *cos_sin_block)
            return run(layer_attention, q, k, v, own_k, own_v).flatten(-2)

        x = self.embed_block(anchor_ids_BA, embed_tokens)
        for layer in self.layers:
            x = layer(x, attend)
        return self.norm(x)

    def markov_bias(self, previous: torch.Tensor) -> torch.Tensor:
        """Addition [..., vocabulary] to the logits of a position whose previous token is `previous` [...]."""
        return self.markov_next(self.markov_previous(previous))


def _blocked(anchors_BA, starts_BS, block, window, causal):
    """Attention of chunks of anchors against their slice of the context. Returns a function of
    (attention, q [B, A, T, Q, D], context k, v [B, S, K, .], block k, v [B, A, T, K, .]) -> [B, A, T, Q, V]."""
    plans = []
    own_hidden = _hidden(visible_block(block, causal, anchors_BA.device))
    for part, first, length in key_ranges(anchors_BA, starts_BS, window, ANCHOR_CHUNK):
        index = (first[:, None] + torch.arange(length, device=first.device)).clamp_max(starts_BS.shape[1] - 1)
        anchors = anchors_BA[:, part]
        begins = starts_BS.gather(1, anchors.clamp_min(0))[:, :, None, None]
        key = first[:, None, None, None] + torch.arange(length, device=first.device)
        seen = visible_context(block_positions(anchors, block)[..., None], key, anchors[:, :, None, None], window)
        plans.append((part, index, _hidden((seen & (key >= begins)).flatten(1, 2))[:, None, None]))

    def run(attention, q, k, v, own_k, own_v):
        B, A, T, Q, D = q.shape
        K, V = attention.key_heads, attention.v_dim
        pieces = []
        for part, index, hidden in plans:
            a = q[:, part].shape[1]
            qs = q[:, part].reshape(B, a * T, K, Q // K, D).permute(0, 2, 3, 1, 4)  # [B, K, G, a T, D]
            ks, vs = (t.gather(1, index[:, :, None, None].expand(-1, -1, K, t.shape[-1])).permute(0, 2, 1, 3) for t in (k, v))
            context = (qs.flatten(2, 3) @ ks.mT).view(B, K, Q // K, a * T, -1)
            context = context + hidden.to(context.dtype)
            blocks = qs.reshape(B, K, Q // K, a, T, D)
            own = blocks @ own_k[:, part].permute(0, 3, 1, 4, 2)[:, :, None]
            own = (own + own_hidden.to(own.dtype)).flatten(3, 4)
            weights, own = attention.weigh(context, own)
            out = (weights.flatten(2, 3) @ vs).view(B, K, Q // K, a, T, V)
            out = out + own.view(B, K, Q // K, a, T, T) @ own_v[:, part].permute(0, 3, 1, 2, 4)[:, :, None]
            pieces.append(out.permute(0, 3, 4, 1, 2, 5).reshape(B, a, T, Q, V))
        return torch.cat(pieces, dim=1)

    return run


def _hidden(visible: torch.Tensor) -> torch.Tensor:
    """What is added to scores: 0 where visible, -inf elsewhere (its gradient is free, unlike that of masked_fill)."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))


def _joined(q, k, v, own_k, own_v):
    """Heads first, blocks flattened, context and block keys in one sequence: q [B, Q, A T, D], k, v [B, K, S + A T, .]."""
    q = q.flatten(1, 2).transpose(1, 2)
    k, v = (torch.cat((c, o.flatten(1, 2)), dim=1).transpose(1, 2) for c, o in ((k, own_k), (v, own_v)))
    return q, k, v


def _dense(anchors_BA, starts_BS, block, window, causal):
    """As `_blocked`, over one dense mask."""
    from .block_mask import dense_mask

    mask = dense_mask(anchors_BA, starts_BS, block, window, causal)
    S = starts_BS.shape[1]

    def run(attention, q, k, v, own_k, own_v):
        shape = q.shape[:3]
        q, k, v = _joined(q, k, v, own_k, own_v)
        q = q.unflatten(1, (attention.key_heads, -1))
        scores = (q @ k[:, :, None].mT).masked_fill(~mask[:, None, None], float("-inf"))
        weights = torch.cat(attention.weigh(scores[..., :S], scores[..., S:]), dim=-1)
        out = weights @ v[:, :, None]
        return out.flatten(1, 2).transpose(1, 2).reshape(*shape, attention.query_heads, -1)

    return run


def _flex(anchors_BA, starts_BS, block, window, causal):
    """As `_blocked`, through flex_attention; a sink rescales the result by its share of the softmax's denominator."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    from .block_mask import flex_mask

    mask = flex_mask(anchors_BA, starts_BS, block, window, causal)
    kernel = torch.compile(flex_attention, dynamic=True) if anchors_BA.is_cuda else flex_attention

    def run(attention, q, k, v, own_k, own_v):
        shape = q.shape[:3]
        q, k, v = _joined(q, k, v, own_k, own_v)
        out, aux = kernel(q, k, v, block_mask=mask, scale=1.0, enable_gqa=True, return_aux=AuxRequest(lse=True))
        if attention.attention_sink_bias is not None:
            sink = attention.attention_sink_bias.float().view(1, -1, 1)
            out = out * (aux.lse - sink).sigmoid()[..., None].to(out.dtype)
        return out.transpose(1, 2).reshape(*shape, attention.query_heads, -1)

    return run


_ATTENTIONS = {"blocked": _blocked, "dense": _dense, "flex": _flex}


def config_json(config: Qwen3Config) -> dict:
    """What config.json holds: every released key, also those that transformers folds away, without its housekeeping."""
    noise = ("_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions",
             "output_hidden_states", "problem_type", "return_dict", "transformers_version")
    rope = config.rope_parameters
    folded = {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
              "torch_dtype": "bfloat16"}
    return {k: v for k, v in config.to_dict().items() if k not in noise} | folded


def save_drafter(model: DFlashDraftModel, folder: str | Path) -> None:
    """Writes config.json, model.safetensors (bf16, published names) and mask_embedding.pt into `folder`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    mask = tensors.pop("mask_embedding")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({"mask_token_id": model.mask_token_id, "embedding": mask.clone()}, folder / MASK_FILE)
    text = json.dumps(config_json(model.config), indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _read(file: Path, reader):
    """What `reader` makes of a file. Raises ValueError, of one line, if it cannot."""
    try:
        return reader(file)
    except Exception as error:  # what readers and configuration classes raise for values of another type is no closed list
        start = file.read_bytes()[:64] if file.stat().st_size < 1024 else b""
        why = ("a pointer of Git LFS: fetch the file itself (git lfs pull)" if start.startswith(b"version https://git-lfs")
               else " ".join(str(error).split())[:300] or type(error).__name__)
        raise ValueError(f"{file}: cannot be read: {why}") from None


def read_mask(file: str | Path) -> tuple[int, torch.Tensor]:
    """(mask_token_id, embedding [H]) of a mask_embedding.pt.

    Nothing in the file can run (`weights_only`), and nothing read from it is larger than the file: compressed entries and
    tensors that repeat their values are refused.

    Raises:
        ValueError: not such a file, damaged, or with something else in it.
    """
    file = Path(file)

    def reader(file: Path):
        if not file.is_file() or file.stat().st_size > MASK_BYTES:
            raise ValueError(f"not an ordinary file of at most {MASK_BYTES >> 20} MiB")
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, which torch.save never does")
        return torch.load(file, map_location="cpu", weights_only=True)

    try:
        mask = _read(file, reader)
    except ValueError as error:
        raise ValueError(f"{error}; expected a torch file of mask_token_id and embedding") from None
    token, vector = (mask.get("mask_token_id"), mask.get("embedding")) if isinstance(mask, dict) else (None, None)
    if isinstance(token, torch.Tensor) and token.numel() == 1:
        token = token.item()
    if type(token) is not int or not isinstance(vector, torch.Tensor):
        raise ValueError(f"{file}: expected a torch file of mask_token_id and embedding")
    if vector.ndim != 1 or not vector.is_floating_point() or not vector.is_contiguous():
        raise ValueError(f"{file}: embedding {vector.dtype} {list(vector.shape)}, expected one vector of floats")
    return token, vector


def require_layers(config: dict, tensors: int) -> None:
    """Raises ValueError if a config.json describes more layers than a file of so many tensors can hold."""
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= max(1, tensors):
        raise ValueError(f"config.json: num_hidden_layers {str(layers)[:40]}, the files hold {tensors:,} tensors")


def load_drafter(folder: str | Path, dtype: torch.dtype = torch.bfloat16, *,
                 vocabulary: torch.Tensor | None = None) -> DFlashDraftModel:
    """A drafter folder as `save_drafter`, the exporter or somebody else wrote it, in evaluation mode.

    Args:
        vocabulary: the target's embedding [rows, H]; the mask token's row of it stands in for a missing mask_embedding.pt.

    Raises:
        ValueError: a missing or unreadable file, a missing tensor or mask embedding, or a tensor of another shape.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for needed in ("config.json", *([MASK_FILE] if vocabulary is None else [])):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder}: no {needed}, expected the folder of a trained drafter")
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "dflash_reference.safetensors" and file.is_file():
            tensors |= _read(file, load_file)

    def build(file: Path) -> DFlashDraftModel:
        raw = json.loads(file.read_text(encoding="utf-8"))
        require_layers(raw, len(tensors))
        config = Qwen3Config.from_dict(raw)
        with torch.device("meta"):  # a size that cannot be is told by a shape below, not by the memory it takes
            sizes = {name: p.shape for name, p in DFlashDraftModel(config).named_parameters()}
        wrong = next((name for name, tensor in tensors.items() if name in sizes and tensor.shape != sizes[name]), None)
        if wrong is not None:
            raise ValueError(f"{wrong}: shape {list(tensors[wrong].shape)}, expected {list(sizes[wrong])}")
        if sum(shape.numel() for shape in sizes.values()) > 2 * sum(t.numel() for t in tensors.values()) + (1 << 20):
            raise ValueError("describes more weights than the files hold")
        return DFlashDraftModel(config)

    model = _read(folder / "config.json", build)
    if vocabulary is not None and not (folder / MASK_FILE).is_file():
        token, embedding = model.mask_token_id, vocabulary[model.mask_token_id].detach()
    else:
        token, embedding = read_mask(folder / MASK_FILE)
    if token != model.mask_token_id:
        raise ValueError(f"{folder / MASK_FILE}: mask_token_id {token}, config.json says {model.mask_token_id}")
    tensors["mask_embedding"] = embedding
    expected = dict(model.named_parameters())
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"{folder}: drafter tensors missing {missing or 'none'}, unexpected {extra or 'none'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{folder}: {name}: shape {list(tensor.shape)}, expected {list(expected[name].shape)}")
    model.load_state_dict(tensors)
    return model.to(dtype).eval()
