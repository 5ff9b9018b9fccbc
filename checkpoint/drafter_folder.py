"""The folder of a DFlash drafter (`dflash/` of a checkpoint, or a folder of its own), known once.

    config.json                     what it is; the same thing is said under several keys, and engines differ in which they read
    *.safetensors                   published names, without `model.` prefix
    mask_embedding.pt               the vector of the masked positions (mask_token_id, embedding bf16 [hidden]); without it the
                                    target's vocabulary row of the mask token is that vector
    dflash_reference.safetensors    one worked example of an export of this project: inputs, features, draft logits

Who reads which key (engines as of vLLM 0.33, SGLang 0.5.23):

    window      vLLM: dflash_config.use_swa and .swa_window_size, else sliding_window; SGLang: layer_types and sliding_window
    causality   both: is_causal; vLLM: else dflash_config.causal, else sliding layers are causal; SGLang: sliding layers are
    rotation    vLLM, SGLang: rope_parameters or rope_theta; the published code: dflash_config.backbone_rotary_base
    mask        both: mask_embedding.pt, where it is there
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
MASK = "mask_embedding.pt"
ARCHITECTURE = "DFlashDraftModel"
MOST_LAYERS = 1000


@dataclass(frozen=True)
class Fault:
    """Something about a drafter's configuration. grave: no engine can use it; otherwise engines read it differently."""

    text: str
    grave: bool = True


def is_drafter(config: dict) -> bool:
    """Whether a config.json describes a drafter."""
    return isinstance(config.get("dflash_config"), dict) or config.get("architectures") == [ARCHITECTURE]


def special_of(config: dict) -> dict:
    """`dflash_config`, with what older files keep at the top level.

    Raises:
        ValueError: no target layers, mask token or block size, or of another form.
    """
    special = config.get("dflash_config")
    if not isinstance(special, dict):
        raise ValueError(f"dflash_config: {type(special).__name__}, expected an object")
    for key in ("target_layer_ids", "mask_token_id", "block_size"):
        if key not in special and key in config:
            special = special | {key: config[key]}
    depth = config.get("num_hidden_layers", 1)
    if type(depth) is not int or not 0 < depth <= MOST_LAYERS:  # lists of that length are made of it
        raise ValueError(f"num_hidden_layers={depth!r}: expected 1 to {MOST_LAYERS}")
    layers = special.get("target_layer_ids")
    if not isinstance(layers, list) or not layers or not all(type(i) is int for i in layers):
        raise ValueError(f"dflash_config.target_layer_ids={layers!r}: expected layer numbers")
    for key, least in (("mask_token_id", 0), ("block_size", 2)):
        if type(special.get(key)) is not int or special[key] < least:
            raise ValueError(f"dflash_config.{key}={special.get(key)!r}: expected an integer of {least} or more")
    return special


def fit_faults(config: dict, target) -> Iterator[Fault]:
    """What keeps this drafter from working with a target (its configuration object)."""
    special = special_of(config)
    layers, ids = target.num_hidden_layers, special["target_layer_ids"]
    if not all(0 <= i < layers for i in ids):
        yield Fault(f"dflash_config.target_layer_ids={ids}: expected layers from 0 to {layers - 1}")
    elif len(set(ids)) != len(ids):
        yield Fault(f"dflash_config.target_layer_ids={ids}: a layer occurs twice")
    for where, value in (("dflash_config", special.get("num_target_layers", layers)),
                         ("config.json", config.get("num_target_layers", layers))):
        if value != layers:
            yield Fault(f"{where}: num_target_layers={value}, the target has {layers}")
    if config.get("hidden_size") != target.hidden_size:
        yield Fault(f"hidden_size={config.get('hidden_size')}, the target's is {target.hidden_size}")
    if config.get("vocab_size") != target.vocab_size:
        yield Fault(f"vocab_size={config.get('vocab_size')}, the target's is {target.vocab_size} (engines share the target's "
                    "embedding and head)", grave=False)
    if special["mask_token_id"] >= target.vocab_size:
        yield Fault(f"dflash_config.mask_token_id={special['mask_token_id']}: expected 0 to {target.vocab_size - 1}")


def mask_faults(special: dict, mask: dict, hidden_size: int) -> Iterator[Fault]:
    """What is wrong with the contents of mask_embedding.pt."""
    token, vector = mask["mask_token_id"], mask["embedding"]
    if token != special["mask_token_id"]:
        yield Fault(f"dflash_config.mask_token_id={special['mask_token_id']}, {MASK} has {token}")
    if tuple(vector.shape) != (hidden_size,):
        yield Fault(f"{MASK}: embedding of shape {list(vector.shape)}, expected [{hidden_size}]")
    elif not bool(torch.isfinite(vector).all()):
        yield Fault(f"{MASK}: the embedding is not finite")
    elif not bool(vector.any()):
        yield Fault(f"{MASK}: the embedding is all zero", grave=False)
    if vector.dtype != torch.bfloat16:
        yield Fault(f"{MASK}: embedding of {vector.dtype}, expected bfloat16", grave=False)


def grouping_note(config: dict, target) -> str | None:
    """What vLLM says of the drafter's depth beside a target; None: nothing.

    It keeps layers of one kind in cache groups of one size: the smallest number of layers of a kind, or the largest, if that is
    less than half as much again. A drafter's layers must lie in one group (v1/core/kv_cache_utils.py and
    v1/spec_decode/llm_base_proposer.py of 0.32). Layers are of one kind if their windows, key heads and head sizes are.
    """
    counts, mine = Counter(layer_kinds(target)), drafter_kind(config)
    own = config["num_hidden_layers"]

    def fits(n: int) -> bool:
        sizes = (counts + Counter({mine: n})).values()
        size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
        return n == 1 or counts[mine] + n <= size

    if len({window for window, *_ in (*counts, mine)}) == 1 or fits(own):  # of one window: one group
        return None
    return (f"{own} layers beside {' and '.join(map(str, counts.values()))} of the target's kinds of attention: vLLM does not "
            'start ("All drafting layers should belong to the same kv cache group"); one of at most '
            f"{max(filter(fits, range(1, own)))} layers runs there")


def layer_kinds(target) -> list[tuple]:
    """(window or None, key heads, sizes of a key and a value) of each layer of a target."""
    def kind(windowed: bool, prefix: str = "") -> tuple:
        names = ("num_key_value_heads", "head_dim", "v_head_dim")
        heads, key, value = (getattr(target, f"{prefix}{name}", None) for name in names)
        key = key or target.hidden_size // target.num_attention_heads
        return (target.sliding_window if windowed else None, heads, key, value or key)

    if pattern := getattr(target, "hybrid_layer_pattern", None):  # MiMo's: windowed layers have a geometry of their own
        return [kind(bool(windowed), "swa_" * bool(windowed)) for windowed in pattern]
    if types := getattr(target, "layer_types", None):
        return [kind(one == "sliding_attention") for one in types]
    return [kind(getattr(target, "sliding_window", None) is not None)] * target.num_hidden_layers


def drafter_kind(config: dict) -> tuple:
    """The same of a drafter's layers, which are alike; Qwen3Config says what is left out."""
    key = config.get("head_dim", 128)
    return window_of(config, special_of(config)), config.get("num_key_value_heads", 32), key, config.get("v_head_dim") or key


def window_of(config: dict, special: dict) -> int | None:
    """Positions that are seen, None = all: as vLLM and the published code read it."""
    if special.get("use_swa"):
        return special.get("swa_window_size", config.get("sliding_window"))
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    return config.get("sliding_window") if config.get("use_sliding_window") or sliding else None


def expected_tensors(config: dict, held: int | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every tensor of the drafter's file, from its configuration: name -> (shape, dtype).

    Args:
        held: tensors in the file. Raises ValueError where the configuration describes far more: listing them takes for ever.
    """
    from transformers import Qwen3Config

    from modeling.drafter import DFlashDraftModel, require_layers

    if held is not None:
        require_layers(config, held)
    with torch.device("meta"):
        model = DFlashDraftModel(Qwen3Config.from_dict(dict(config)))
    return {n: (tuple(p.shape), "BF16") for n, p in model.named_parameters() if n != "mask_embedding"}


def read_mask(folder: Path) -> dict:
    """mask_embedding.pt: {"mask_token_id": int, "embedding": [hidden]}.

    Raises:
        ValueError: no such file, or another content.
    """
    from modeling.drafter import read_mask as read  # also in the published code of drafters, which imports nothing of this room

    token, embedding = read(folder / MASK)
    return {"mask_token_id": token, "embedding": embedding}


def speculators_config(config: dict, verifier: str, architecture: str | None) -> dict:
    """config.json of the same drafter in the format of `speculators` (vLLM reads it too).

    Its layers are counted as `hidden_states` are, one more than here; the mask token's vector is the verifier's vocabulary row.

    Args:
        verifier, architecture: name or path and class of the target.

    Raises:
        ValueError: what that format cannot say.
    """
    special, window = special_of(config), window_of(config, special_of(config))
    rope = config.get("rope_parameters") or {}
    causal = bool(special.get("causal", config.get("is_causal", False)))
    for name, value in (("attention_sink_bias", special.get("attention_sink_bias")),
                        ("attention_value_scale", special.get("attention_value_scale")),
                        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0) != 1.0),
                        ("v_head_dim", config.get("v_head_dim", config["head_dim"]) != config["head_dim"]),
                        ("causal (without a window)", causal and window is None), ("markov_rank", special.get("markov_rank")),
                        ("convolution_rank", special.get("convolution_rank"))):
        if value:
            raise ValueError(f"export.speculators: the drafter has {name}, which the format of speculators cannot say; train "
                             "one with drafter.attention_sink_bias: false, partial_rotary_factor: 1.0, no "
                             "attention_value_scale")
    base = special.get("backbone_rotary_base") or rope.get("rope_theta") or config.get("rope_theta")
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "tie_word_embeddings")
    layer = {key: config[key] for key in keys if key in config} | {
        "model_type": "qwen3", "rope_theta": base, "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0,
        "layer_types": ["full_attention" if window is None else "sliding_attention"] * config["num_hidden_layers"]}
    return {"architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash", "speculators_version": "0.9.0",
            "transformer_layer_config": layer, "draft_vocab_size": config["vocab_size"], "block_size": special["block_size"],
            "target_hidden_size": config["hidden_size"], "mask_token_id": special["mask_token_id"],
            "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in special["target_layer_ids"]],
            "sliding_window_non_causal": not causal, "sample_from_anchor": False, "dtype": "bfloat16",
            "tie_word_embeddings": False,
            "speculators_config": {
                "algorithm": "dflash", "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": special["block_size"] - 1,
                                      "verifier_accept_k": 1, "accept_tolerance": 0.0}],
                "verifier": {"name_or_path": verifier, "architectures": [architecture] if architecture else []}}}


@torch.no_grad()
def draft_round(drafter, target_hidden: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Hidden states [1, T, H] of one block at the last of `ids` [1, S + 1], given target_hidden [1, S, n, H]."""
    S = target_hidden.shape[1]
    positions = torch.arange(S)[None]
    context = drafter.context_keys_values(drafter.fuse(target_hidden.flatten(2)), positions)
    embeds = drafter.embed_block(ids[:, -1], torch.nn.Embedding.from_pretrained(table))
    return drafter.block_hidden(embeds, S + torch.arange(drafter.block_size)[None], context, positions)


def read_reference(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, facts) of a reference file."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    return load_file(path), json.loads(metadata.get("reference", "{}"))
