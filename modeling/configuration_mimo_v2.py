"""Configuration of the MiMo-V2 decoder (model_type `mimo_v2`): the keys of the released config.json files.

Self-contained (torch-free, transformers only), because it is shipped inside exported checkpoints as remote code. What an
absent key means follows the released loaders: no `hybrid_layer_pattern` = full attention everywhere, no
`moe_layer_freq` = dense everywhere, no `attention_projection_layout` = split projections, `attention_value_scale: null` =
no scaling, no `swa_*` key = as for full attention.
"""

from __future__ import annotations

from transformers.configuration_utils import PretrainedConfig  # the spelling that 4.x and 5.x have


class MiMoV2Config(PretrainedConfig):
    """MiMo-V2 geometry.

    Args that are not self-explanatory:
        hybrid_layer_pattern: for each layer 0 = full attention, 1 = sliding-window attention (SWA).
        sliding_window: keys that a query of an SWA layer sees, itself included (128: 127 before it). The released files
            repeat it as `sliding_window_size` and `attention_chunk_size`.
        head_dim, v_head_dim: per-head width of queries and keys, and of values; `swa_*` for SWA layers.
        attention_projection_layout: "split" (q_proj, k_proj, v_proj) or "fused_qkv" (qkv_proj, whose rows are
            `num_key_value_heads` chunks, each [queries | keys | values] of its share of the heads).
        attention_value_scale: factor on the values.
        add_*_attention_sink_bias: one learned extra logit per head in the softmax's denominator.
        partial_rotary_factor: share of `head_dim` that is rotated (the first int(head_dim * factor) entries).
        moe_layer_freq: for each layer 0 = dense MLP, 1 = routed experts.
        routed_scaling_factor: factor on the routing weights (null = 1).

    Raises:
        ValueError: a geometry that cannot be: lists of the wrong length, heads or groups that do not divide, sizes that
            grouped matrix products do not take, three different windows, unknown functions.
    """

    model_type = "mimo_v2"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # Expert parallelism (transformers' DistributedConfig): whole experts per rank, tokens travel.
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    def __init__(
        self, vocab_size=152576, hidden_size=4096, intermediate_size=16384, num_hidden_layers=48,
        num_attention_heads=64, num_key_value_heads=4, head_dim=192, v_head_dim=None, swa_num_attention_heads=None,
        swa_num_key_value_heads=None, swa_head_dim=None, swa_v_head_dim=None, hybrid_layer_pattern=None,
        sliding_window=128, add_full_attention_sink_bias=False, add_swa_attention_sink_bias=False,
        attention_value_scale=None, attention_projection_layout="split", partial_rotary_factor=1.0, rope_theta=1e7,
        swa_rope_theta=1e4, moe_layer_freq=None, n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048,
        n_shared_experts=None, scoring_func="sigmoid", topk_method="noaux_tc", n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=None, layernorm_epsilon=1e-5, hidden_act="silu",
        initializer_range=0.02, max_position_embeddings=262144, attention_bias=False, use_cache=True,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None, **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim or head_dim
        self.swa_num_attention_heads = swa_num_attention_heads or num_attention_heads
        self.swa_num_key_value_heads = swa_num_key_value_heads or num_key_value_heads
        self.swa_head_dim = swa_head_dim or head_dim
        self.swa_v_head_dim = swa_v_head_dim or (v_head_dim if swa_head_dim is None else None) or self.swa_head_dim
        self.hybrid_layer_pattern = list(hybrid_layer_pattern or [0] * num_hidden_layers)
        self.sliding_window = sliding_window
        self.sliding_window_size = kwargs.pop("sliding_window_size", sliding_window)
        self.attention_chunk_size = kwargs.pop("attention_chunk_size", sliding_window)
        self.add_full_attention_sink_bias = add_full_attention_sink_bias
        self.add_swa_attention_sink_bias = add_swa_attention_sink_bias
        self.attention_value_scale = attention_value_scale
        self.attention_projection_layout = attention_projection_layout
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_theta = rope_theta
        self.swa_rope_theta = swa_rope_theta
        self.moe_layer_freq = list(moe_layer_freq or [0] * num_hidden_layers)
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.n_shared_experts = n_shared_experts
        self.scoring_func = scoring_func
        self.topk_method = topk_method
        self.n_group = n_group
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.layernorm_epsilon = layernorm_epsilon
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.use_cache = use_cache
        # transformers' caches read this to give window layers a window-sized cache.
        self.layer_types = ["sliding_attention" if swa else "full_attention" for swa in self.hybrid_layer_pattern]
        kwargs.pop("layer_types", None)
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, bos_token_id=bos_token_id,
                         eos_token_id=eos_token_id, **kwargs)

    def _check(self) -> None:
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            _positive(self, key)
        for key in ("hybrid_layer_pattern", "moe_layer_freq"):
            values = getattr(self, key)
            if len(values) != self.num_hidden_layers:
                raise ValueError(f"{key}: {len(values)} entries, expected num_hidden_layers={self.num_hidden_layers}")
            if not set(values) <= {0, 1}:
                raise ValueError(f"{key}: {next(v for v in values if v not in (0, 1))!r}, expected only 0 and 1")
        self._check_attention()
        if any(self.moe_layer_freq):
            self._check_experts()

    def _check_attention(self) -> None:
        if self.attention_projection_layout not in ("split", "fused_qkv"):
            raise ValueError(f"attention_projection_layout={self.attention_projection_layout!r}: expected split or fused_qkv")
        for prefix in ("", "swa_"):
            for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"):
                _positive(self, prefix + key)
            heads, kv = getattr(self, f"{prefix}num_attention_heads"), getattr(self, f"{prefix}num_key_value_heads")
            if heads % kv:
                raise ValueError(f"{prefix}num_attention_heads={heads} is not a multiple of {prefix}num_key_value_heads={kv}")
            if self.attention_projection_layout == "fused_qkv" and kv % self.num_key_value_heads:
                raise ValueError(f"{prefix}num_key_value_heads={kv} cannot be divided into the {self.num_key_value_heads} "
                                 "chunks (num_key_value_heads) of a fused qkv projection")
            width = getattr(self, f"{prefix}head_dim")
            rotated = int(width * self.partial_rotary_factor)
            if rotated % 2 or not 0 < rotated <= width:
                raise ValueError(f"partial_rotary_factor={self.partial_rotary_factor} rotates {rotated} of {prefix}head_dim="
                                 f"{width} entries, expected an even number from 2 to {width}")
        if any(self.hybrid_layer_pattern):
            _positive(self, "sliding_window")
            for key in ("sliding_window_size", "attention_chunk_size"):
                if getattr(self, key) != self.sliding_window:  # other engines read the other keys
                    raise ValueError(f"{key}={getattr(self, key)} differs from sliding_window={self.sliding_window}")

    def _check_experts(self) -> None:
        if self.scoring_func != "sigmoid" or self.topk_method != "noaux_tc":
            raise ValueError(f"scoring_func={self.scoring_func!r}, topk_method={self.topk_method!r}: "
                             "expected sigmoid, noaux_tc")
        if self.n_shared_experts:
            raise ValueError(f"n_shared_experts={self.n_shared_experts}: MiMo-V2 has no shared experts")
        for key in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size"):
            _positive(self, key)
        for key in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, key) % 8:  # rows of 16 bytes in bf16
                raise ValueError(f"{key}={getattr(self, key)}: expected a multiple of 8, which grouped matrix products need")
        if self.n_group > 1 and (self.n_routed_experts % self.n_group or self.n_routed_experts < 2 * self.n_group):
            raise ValueError(f"n_group={self.n_group}: expected equal groups of two or more of the n_routed_experts="
                             f"{self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} of n_group={self.n_group}")
        allowed = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > allowed:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: only {allowed} experts can be chosen "
                             f"(n_routed_experts={self.n_routed_experts}, {self.topk_group} of {self.n_group} groups)")


def _positive(config: MiMoV2Config, key: str) -> None:
    value = getattr(config, key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value!r}: expected a positive integer")
