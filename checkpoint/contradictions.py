"""Where the parts of a checkpoint contradict each other, or the checkpoint it was trained as.

Each part may be whole by itself, with checksums that fit: a tokenizer with more entries than the embedding has rows, a config
key that says something the tensors deny, a norm or a router of another training. Engines load such folders without a word.
All functions yield findings; what cannot be read is the caller's affair.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from checkpoint.families.registry import FAMILIES
from checkpoint.fp8 import dequantize_fp8
from checkpoint.sources import DTYPES, Source
from checkpoint.tokenizer_files import shipped_bytes, tokenizer_files
from checkpoint.trained import Weights, plain
from modeling.names import fused_name, split_qkv
from mxfp4.exact_pack import same_bytes
from storage.reading import first_line, read_json
from storage.terminal import counted

# Keys of config.json that change what a model computes or where it stops, without changing any tensor's shape.
MEANING = (  # of the keys that a client's own class shares with training's
    "attention_value_scale", "bos_token_id", "eos_token_id", "hidden_act", "layernorm_epsilon",
           "max_position_embeddings", "n_group", "norm_topk_prob", "num_experts_per_tok", "pad_token_id",
           "partial_rotary_factor", "rms_norm_eps", "rope_theta", "routed_scaling_factor", "scoring_func", "sliding_window",
           "swa_rope_theta", "tie_word_embeddings", "topk_group", "topk_method")
HEAD, EMBEDDING, SPLIT = "lm_head.weight", "model.embed_tokens.weight", ("q", "k", "v")
AUTO_MAP = {"AutoConfig": "configuration_mimo_v2.MiMoV2Config", "AutoModel": "modeling_mimo_v2.MiMoV2Model",
            "AutoModelForCausalLM": "modeling_mimo_v2.MiMoV2ForCausalLM"}


# Keys that an export writes anew in the native layout, which keeps all others as they were in training.
WRITTEN_ANEW = {"architectures", "auto_map", "model_type", "dtype", "torch_dtype", "quantization_config", "use_cache",
                "transformers_version", "_name_or_path", "attention_projection_layout", "sliding_window_size",
                "attention_chunk_size"}
# Keys that have two names, from before transformers 5 and since.
SPELLINGS = (("torch_dtype", "dtype"), ("num_experts", "num_local_experts"))


def refuse_oversize(config, tensors: int) -> None:
    """ValueError for a configuration of far more tensors than are there: listing them would take forever."""
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None) or 1
    described = config.num_hidden_layers * experts
    if described > 100 * tensors + 1000:
        raise ValueError(f"config.json describes {counted(config.num_hidden_layers, 'layer')} of {experts:,} experts, the "
                         f"files hold {counted(tensors, 'tensor')}")


def token_faults(folder: Path, config) -> Iterator[str]:
    """Token ids that the embedding has no row for."""
    rows = config.vocab_size
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        held = (tokenizer.get("model") or {}).get("vocab") or {}
        ids = list(held.values()) if isinstance(held, dict) else list(range(len(held)))
        ids += [token["id"] for token in tokenizer.get("added_tokens") or []]
        if ids and max(ids) >= rows:
            yield f"tokenizer.json: has the token id {max(ids)}, the embedding has {rows} rows"
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    for where, keys in (("generation_config.json", generation), ("config.json", vars(config))):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = keys.get(key)
            for token in value if isinstance(value, list) else [] if value is None else [value]:
                if not isinstance(token, int) or not -1 <= token < rows:
                    yield f"{where}: {key}={token!r}: expected a row of the embedding, 0 to {rows - 1}"


def config_contradictions(config: dict, source: Source | None) -> Iterator[str]:
    """Keys that deny what the tensors or other keys say."""
    classes, expected = config.get("architectures"), [_architecture(config)]
    if classes is not None and expected != [None] and classes != expected:
        yield f"config.json: architectures={classes!r}, expected {expected!r}: engines choose the model's class by it"
    rope = {f"rope_parameters.{key}": value for key, value in (config.get("rope_parameters") or {}).items()}
    for old, new in (*SPELLINGS, ("rope_theta", "rope_parameters.rope_theta")):
        ours, theirs = config.get(old), (config | rope).get(new)
        if None not in (ours, theirs) and ours != theirs:
            yield f"config.json: {old}={ours!r}, but {new}={theirs!r}: clients of different age read one or the other"
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype != "bfloat16":
        yield f"config.json: dtype={dtype!r}, the weights are bfloat16"
    if config.get("tie_word_embeddings") and source is not None and {HEAD, EMBEDDING} <= source.infos.keys():
        if not torch.equal(source.read(HEAD), source.read(EMBEDDING)):
            yield f"config.json: tie_word_embeddings=true, but {HEAD} has values of its own"


def _architecture(config: dict) -> str | None:
    """The class that a model type is served by; None: nobody here knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    found = FAMILIES[kind].architecture if kind in FAMILIES else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    return found if isinstance(found, str) else None


def config_differences(config: dict, trained: Path, layout: str | None) -> Iterator[str]:
    """Keys that mean something else than in training."""
    if not (trained / "config.json").is_file():
        return
    expected = read_json(trained / "config.json")
    for key in sorted(expected.keys() - WRITTEN_ANEW) if layout == "native" else MEANING:
        if layout == "native" and key not in config:
            yield f"config.json: {key} is missing, trained with {expected[key]!r}"
        if key not in config or key not in expected:
            continue
        ours, theirs = config[key], expected[key]
        if key == "routed_scaling_factor":  # none means one
            ours, theirs = ours or 1.0, theirs or 1.0
        if ours != theirs:
            yield f"config.json: {key}={ours!r}, trained with {theirs!r}"


def companion_differences(folder: Path, trained: Path) -> Iterator[str]:
    """Tokenizer, chat template and generation settings that the trained checkpoint has and this one has not, or otherwise."""
    for name in (*tokenizer_files(trained), "generation_config.json"):
        if not (trained / name).is_file():
            continue
        if not (folder / name).is_file():
            yield f"{name}: missing, the trained checkpoint has it"
        elif (folder / name).read_bytes() != shipped_bytes(trained / name):
            yield f"{name}: differs from the trained checkpoint's"


def difference(name: str, ours: torch.Tensor, source: Source, weights: Weights, mask_row: int | None) -> Iterator[str]:
    """How a tensor that is no expert is not as it was trained (exactly, in the coarser of the two precisions).

    Matrices that are FP8 only here may be rounded by half a step. Left out: the embedding's `mask_row`.
    """
    trained, (shape, dtype) = dict(weights.trained.infos), source.infos[name]
    if (own := weights.names.name_in(weights.trained, name)) is not None:
        trained[name] = trained[own]
    whole = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name) if name not in trained else name
    if fused_name(name) or whole not in trained or not dtype.startswith(("BF", "F")):
        return
    if dtype == "F8_E4M3" and trained[whole][1] != "F8_E4M3":
        yield from _fp8_faults(name, ours, source, weights)
        return
    held = DTYPES[dtype if trained[whole][1] == "F8_E4M3" else trained[whole][1]]
    stored = dtype == "F8_E4M3" or name.endswith("_scale_inv")
    expected = weights.trained.read(name) if stored else plain(weights, whole, held)
    if whole != name and not hasattr(weights.config, "hybrid_layer_pattern"):
        return  # no configuration of the training's own that says how its rows are joined
    if whole != name:
        layer = int(re.search(r"layers\.(\d+)\.", name)[1])
        expected = split_qkv(expected, weights.config, layer)[SPLIT.index(name.split("_proj")[0][-1])]
    if tuple(expected.shape) != tuple(shape):
        yield f"{name}: shape {list(shape)}, trained {list(expected.shape)}"
        return
    if name == EMBEDDING and mask_row is not None:
        expected = expected.clone()
        expected[mask_row] = ours[mask_row].to(expected.dtype)
    if same_bytes(ours, expected):
        return
    differ = (ours.float() != expected.to(ours.dtype).float()) & (ours.to(expected.dtype).float() != expected.float())
    if bool(differ.any()):
        yield (f"{name}: {int(differ.sum())} of {differ.numel()} values differ from training, the first at "
               f"{differ.nonzero()[0].tolist()}")


def _fp8_faults(name: str, ours: torch.Tensor, source: Source, weights: Weights) -> Iterator[str]:
    """An FP8 matrix whose training is at hand in more bits: every value within half a step of E4M3, with its block's scale."""
    grid = source.read(name + "_scale_inv")
    expected = plain(weights, name, torch.float32)
    if expected.shape != ours.shape:
        yield f"{name}: shape {list(ours.shape)}, trained {list(expected.shape)}"
        return
    step = dequantize_fp8(name, torch.ones(ours.shape).to(torch.float8_e4m3fn), grid, weights.config)
    decoded = dequantize_fp8(name, ours, grid, weights.config)
    # Three bits of mantissa: 2^-4 of the value; below 2^-6 units the step is 2^-9. One bf16 rounding of the trained side: 2^-8.
    far = (decoded - expected).abs() > expected.abs() * (2**-4 + 2**-8) + step * 2**-10
    if bool(far.any()):
        yield (f"{name}: {int(far.sum())} of {far.numel()} values are not the trained ones rounded to FP8, the first at "
               f"{far.nonzero()[0].tolist()}")


def code_faults(folder: Path, auto_map: dict) -> Iterator[str]:
    """Shipped code that is no Python, or lacks a class that config.json promises; `folder` as a reader would load it."""
    defined: dict[str, set[str]] = {}
    for path in sorted(p for p in folder.glob("*.py") if p.is_file()):
        try:
            tree = ast.parse(path.read_bytes(), path.name)
        except (SyntaxError, ValueError) as error:
            yield f"{path.name}: not Python, line {getattr(error, 'lineno', 1)}: {error}"
            continue
        defined[path.stem] = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for value in auto_map.values():
        file, _, name = str(value).partition(".")
        if file in defined and name not in defined[file]:
            yield f"{file}.py: has no class {name}, which config.json names"


def front_matter(path: Path) -> None:
    """ValueError if the card does not begin with YAML between lines of three dashes, as hubs demand."""
    if not path.is_file():
        return  # said elsewhere
    text = path.read_text(encoding="utf-8")
    head = text.split("\n---", 1)[0]
    try:
        fields = yaml.safe_load(head.removeprefix("---")) if head.startswith("---\n") and head != text else None
    except yaml.YAMLError as error:
        raise ValueError(f"front matter is not YAML: {first_line(error)}") from None
    if not isinstance(fields, dict):
        raise ValueError("no front matter (YAML between lines of three dashes at the start)")
