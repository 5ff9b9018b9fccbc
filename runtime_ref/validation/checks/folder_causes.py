"""What a finding of the folder's verifier looks like: the port bug behind it, by the kind of the finding and its words."""

from __future__ import annotations

import re

SINKS = "attention sinks are dropped: every window layer has one learned logit per head (attention_sink_bias)"
DRAFTER_SINKS = "attention sinks of the drafter are dropped"
SINK_LAYERS = ("attention sinks are on other layers than the configuration says (hybrid_layer_pattern, "
               "add_swa_attention_sink_bias, add_full_attention_sink_bias)")
SCALES = "scale bytes are read as numbers: scales must be uint8 (E8M0), called {name}; a byte b means 2^(b - 127)"
BLOCKS = "scales are of blocks of another size: MXFP4 has one scale byte for 32 values (NVFP4 has one for 16)"
FORMAT = "engines take the experts for another format: {mark}"
TIED = "tie_word_embeddings is true although the head is a matrix of its own: engines would use the embedding for it"
BIAS = "the routers' correction bias was rounded: it decides which experts run and is published in float32"
DTYPE = "a tensor has another dtype than published, so it was rounded or clipped on the way"
INDEX = "index and shards do not fit each other: one of them is of another export, or a tensor was dropped"
TRUNCATED = "a weight file is damaged or truncated: the download or the copy broke off"
FINITE = "a weight is not finite: the training diverged, or a conversion overflowed"
GEOMETRY = "the geometry of config.json is not that of the weights"
OTHER_LAYOUT = "the tensors are of another layout than config.json says"
IMPOSSIBLE = "config.json describes a model that cannot be"
MASK = "the mask embedding is missing: mask_embedding.pt must be there, the vocabulary row of the mask token is untrained"
MASK_ID = "the mask token's id is off: the vocabulary holds the mask embedding in another row than mask_token_id"
HEAD = "the drafter has a head or embedding of its own: both are the target's, shared"
TARGET_LAYERS = "target layers are off by one or of other layers: an id i means the output of decoder layer i, counted from 0"
OTHER_DRAFTER = "the drafter was made for another target (num_target_layers, hidden_size)"
BLOCK_SIZE = "block size: one key says another than the other, or than the stored reference"
WINDOW = "wrong window of the drafter for some engines: they read different keys, which must agree"
CAUSAL = "wrong causality of the drafter for some engines: sliding layers count as causal unless is_causal is false"
ROTARY = "wrong rotary base of the drafter: it is the backbone's (or another share of a head is rotated)"
DRAFTER_FORM = "the drafter has tensors that the published form does not know, or lacks some"
INCOMPLETE = "the folder is incomplete or damaged"
STOP = "answers end at the wrong token: generation_config.json, config.json and the tokenizer must agree on eos_token_id"

# The first rule whose kind and words fit; "" is any kind.
_DRAFTER = (
    ("", r"sink", DRAFTER_SINKS), ("", r"lm_head|embed_tokens", HEAD), ("values", r"", FINITE), ("dtype", r"", DTYPE),
    ("", r"published names have no model\. prefix", "the drafter's tensors are called otherwise (no 'model.' prefix)"),
    ("", r"target_layer_ids", TARGET_LAYERS), ("", r"num_target_layers|hidden_size|vocab_size", OTHER_DRAFTER),
    ("", r"block_size", BLOCK_SIZE), ("", r"mask_embedding|mask_token_id", MASK),
    ("dialect", r"is_causal|\.causal", CAUSAL), ("dialect", r"layer_types|window", WINDOW), ("dialect", r"rope|rotary", ROTARY),
    ("shape", r"", "number of target layers or KV layout of the drafter (target_layer_ids, num_key_value_heads, head_dim)"),
    ("", r": missing|tensor is missing|unexpected tensor", DRAFTER_FORM), ("", r"", "the drafter's folder is incomplete"))
_FOLDER = (
    ("missing", r"experts.*_scales?:", "scales"), ("unexpected", r"_scale", "scales"), ("missing", r"sink", SINKS),
    ("unexpected", r"sink", SINK_LAYERS),
    ("missing", r"[qk]_norm", "the norms of query and key heads are dropped (q_norm, k_norm)"),
    ("missing", r"router\.bias", "the routers' bias is dropped (router.bias)"),
    ("missing", r"(gate_up|down)_proj_bias", "biases of the experts are dropped (gate_up_proj_bias, down_proj_bias)"),
    ("missing", r"_proj\.bias", "biases of the attention's projections are dropped (attention_bias)"),
    ("missing", r"weight_scale_inv",
     "FP8 weights without their scales: weight_scale_inv, one F32 for 128 x 128, must be there"),
    ("missing", r"", "the folder is incomplete: a tensor is missing"),
    ("unexpected", r"", "the folder holds tensors that this model does not have"),
    ("shape", r"_scales?: ", BLOCKS), ("shape", r"", GEOMETRY), ("dtype", r"_scales?: dtype", "scales"),
    ("dtype", r"expected U8", "expert codes must be uint8 (two E2M1 codes a byte)"),
    ("dtype", r"e_score_correction_bias", BIAS), ("dtype", r"", DTYPE), ("index", r"", INDEX),
    ("file", r"shard .* is missing", "the folder is incomplete: a shard is missing"), ("file", r"cannot be opened", TRUNCATED),
    ("file", r"no \*\.safetensors", INCOMPLETE), ("values", r"", FINITE),
    ("scales", r"255", "a block of an expert was not finite when it was exported"), ("scales", r"", "scales"),
    ("config", r"rope_theta", "wrong rotary base (rope_theta): keys contradict each other"),
    ("config", r"tie_word", TIED), ("config", r"block_size|group_size", BLOCKS),
    ("config", r"quant_method|store_dtype", FORMAT.format(mark="quant_method fp8 with store_dtype mxfp4 marks them")),
    ("config", r"quantization_config", FORMAT.format(mark="MXFP4 is 4-bit floats in groups of 32")),
    ("config", r"ignored_layers", "engines read a matrix as FP8 that is not, or the other way round (ignored_layers)"),
    ("config", r"cannot be checked", IMPOSSIBLE), ("tokens", r"", STOP), ("mask", r"", MASK), ("", r"", INCOMPLETE))


def cause_of(kind: str, text: str, family: str) -> str:
    """The likely cause of a finding."""
    rules = _DRAFTER if text.startswith("dflash") else _FOLDER
    cause = next(cause for own, words, cause in rules if own in ("", kind) and re.search(words, text))
    return SCALES.format(name="_scales" if family == "gpt_oss" else "weight_scale") if cause == "scales" else cause
