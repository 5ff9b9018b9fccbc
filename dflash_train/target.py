"""The target: the model that will be served, frozen, with the features that the drafter reads.

By default the result of quantization-aware training, whose expert weights *are* the MXFP4 values that will be served;
for comparison also `model.path` with rounded experts (`ptq`) or as it is (`base`). Works on any transformers causal
language model whose base model has `layers`: features are caught by forward hooks on the target layers.

Shape legend: B sequences, T tokens, H hidden size, n target layers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from checkpoint.load import load_model, load_tokenizer
from modeling.all_experts import use_all_experts
from modeling.drafter import DFlashDraftModel, drafter_config, load_drafter
from modeling.modeling_mimo_v2 import CACHE_NAME
from modeling.output_head import require_plain_head
from mxfp4.fake_quant import fake_quantize_
from qat.expert_quantizer import find_expert_tensors
from recipes.schema import Drafter, Recipe
from storage.digests import combined, model_digests
from storage.reading import first_line, read_json
from training.accelerator import from_first
from training.checkpoint import require_newest_result

DEFAULT_TARGET_LAYERS = 5


class TargetFiles:
    """What is known of a target without its weights: all that is needed where a server of it answers."""

    def __init__(self, path: Path, tokenizer, end_ids: list[int], target_layers: list[int], vocabulary: int,
                 positions: int | None = None):
        self.path, self.tokenizer, self.end_ids = path, tokenizer, end_ids
        self.target_layers, self.vocabulary = target_layers, vocabulary
        self.positions = positions  # None: not limited, as far as its configuration says
        self._fingerprint: str | None = None
        if not end_ids:
            raise ValueError(f"{path}: neither generation_config nor the tokenizer names a token that ends an answer")

    def rest(self) -> None:
        """To be called where ranks whose passes through a divided target may differ in number do something together again."""

    def fingerprint(self) -> str:
        """Digest of every byte of the files that decide what the target says: weights, configuration, tokenizer, code."""
        if self._fingerprint is None:
            self._fingerprint = combined(model_digests(self.path))
        return self._fingerprint

    def agree_on_fingerprint(self, accelerator) -> None:
        """Lets the first process alone read the files."""
        self._fingerprint = from_first(accelerator, self.fingerprint)


class Target(TargetFiles):
    """A frozen causal language model, its tokenizer, and hooks that collect the outputs of the layers `target_layers`."""

    def __init__(self, model: nn.Module, tokenizer, target_layers: list[int], path: Path):
        super().__init__(path, tokenizer, end_ids(getattr(model, "generation_config", None), tokenizer), target_layers,
                         model.get_output_embeddings().weight.shape[0], positions_of(model.config))
        self.model = model.eval().requires_grad_(False)
        self.base = model.base_model
        self.embed_tokens, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.norm = getattr(self.base, "norm", None)
        self.hidden_size = self.embed_tokens.weight.shape[1]
        self._caught: dict[int, torch.Tensor] = {}
        for layer in target_layers:
            self.base.layers[layer].register_forward_hook(lambda module, args, output, i=layer: self._catch(i, output))

    def _catch(self, layer: int, output) -> None:
        self._caught[layer] = output[0] if isinstance(output, tuple) else output

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.no_grad()
    def run(self, ids_BT: torch.Tensor, *, cache=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [B, T, n * H], last hidden state after the final norm [B, T, H]).

        Args:
            cache: grows by the T tokens; None to keep nothing. Other arguments go to the base model.
        """
        self._caught.clear()
        last = self.base(input_ids=ids_BT, use_cache=cache is not None, **{CACHE_NAME: cache}, **kwargs).last_hidden_state
        return torch.cat([self._caught[layer] for layer in self.target_layers], dim=-1), last


def positions_of(config) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def end_ids(generation, tokenizer) -> list[int]:
    """Tokens that end an answer: those of the generation configuration (which may be None), else the tokenizer's."""
    ends = getattr(generation, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return sorted({int(e) for e in (ends if isinstance(ends, (list, tuple)) else [ends]) if e is not None})


def target_folder(recipe: Recipe) -> Path:
    """Where the target's weights are.

    Raises:
        ValueError: no such folder, with the command that makes it; a name on the hub.
    """
    if recipe.dflash.target == "qat":
        folder = Path(recipe.output) / recipe.name / "qat" / "model"
        if not folder.is_dir():
            raise ValueError(f"dflash.target: qat: no {folder}; run qat/train.py with this recipe first, or set dflash.target: "
                             "ptq or base")
        require_newest_result(folder.parent)
        return folder
    if recipe.model.path is None:
        raise ValueError("model.path: required to train a drafter (model.released serves --plan only)")
    if not Path(recipe.model.path).is_dir():
        raise ValueError(f"model.path: {recipe.model.path}: no such folder; a drafter's target is read from one, so fetch a "
                         "model of the hub first (hf download NAME --local-dir FOLDER)")
    return Path(recipe.model.path)


def target_files(recipe: Recipe) -> TargetFiles:
    """The target that `dflash.target` names, without its weights.

    Raises:
        ValueError: as `load_target`, as far as it can be told without them.
    """
    from transformers import AutoConfig, GenerationConfig

    folder, trust = target_folder(recipe), recipe.model.trust_remote_code
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)  # it also makes mimo_v2 known to AutoConfig
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust)
    generation = (GenerationConfig.from_pretrained(str(folder)) if (folder / "generation_config.json").is_file()
                  else GenerationConfig.from_model_config(config))
    require_key_value_layers(config, folder)
    target_layers = choose_target_layers(recipe.drafter.target_layer_ids, config.get_text_config().num_hidden_layers)
    return TargetFiles(folder, tokenizer, end_ids(generation, tokenizer), target_layers, config.get_text_config().vocab_size,
                       positions_of(config))


def load_target(recipe: Recipe, device: torch.device | str = "cpu", ranks: int = 1) -> Target:
    """The target that `dflash.target` names: whole, or with `cluster.sharding` divided among the `ranks` processes of a launch.

    Raises:
        ValueError: no such folder; target layers that it does not have; a tokenizer without an end token; a model whose
            logits are not its head's (see `modeling.output_head`).
    """
    folder = target_folder(recipe)
    divided = ranks > 1 and recipe.cluster is not None and recipe.cluster.sharding != "ddp"
    if divided:
        from dflash_train.sharded import ShardedTarget, load_divided  # builds on this module

        model, kind = load_divided(recipe, folder, ranks), ShardedTarget
    else:
        model = load_model(folder, dtype=getattr(torch, recipe.model.dtype), trust_remote_code=recipe.model.trust_remote_code)
        use_all_experts(model)  # more than twice as fast on a CPU, where it applies
        model, kind = model.to(device), Target
    tokenizer = load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)
    if recipe.dflash.target == "ptq":
        for tensor in find_expert_tensors(model):
            weight = getattr(tensor.parameter.data, "_local_tensor", tensor.parameter.data)  # whole experts in either case
            fake_quantize_(weight, weight, scale_rule=recipe.quantization.scale_rule, axis=tensor.axis)
    return target_of(model, tokenizer, recipe.drafter.target_layer_ids, folder, kind)


def target_of(model: nn.Module, tokenizer, layers: list[int] | None, folder: Path, kind: type[Target] = Target) -> Target:
    """A model as a target whose outputs of `layers` are used; tools/family_table.py asks it about every family.

    Raises:
        ValueError: as `load_target`: what keeps a drafter from being trained for this model.
    """
    require_key_value_layers(model.config, folder)
    if not hasattr(model.base_model, "layers"):
        raise ValueError(f"model.path: {folder}: {type(model).__name__} has its decoder layers under another name than "
                         "`layers`; a drafter's target is read layer by layer")
    target = kind(model, tokenizer, choose_target_layers(layers, len(model.base_model.layers)), folder)
    require_plain_head(target.model)
    _require_plain_cache(target)
    return target


def require_key_value_layers(config, folder: Path) -> None:
    """Raises ValueError for hybrid models, told by their configuration: linear attention and the like keep other state."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or getattr(config, "layers_block_type", None) or []
    other = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention", "chunked_attention", "attention"})
    if other:
        raise ValueError(f"model.path: {folder}: a target with layers of {', '.join(other)}; speculative decoding here takes "
                         "rejected drafts back from a cache of keys and values, which such layers do not have")


def _require_plain_cache(target: Target) -> None:
    """Raises ValueError for a target that does not decode with a plain cache of keys and values, before anything is trained."""
    from dflash_train.reference_decoding import SlotCache  # builds on this module

    ids = torch.tensor([[0, 1, 2]], device=target.device)
    try:
        cache = SlotCache(len(target.base.layers), 3)
        target.run(ids[:, :2], cache=cache)
        target.run(ids[:, 2:], cache=cache)
    except (ValueError, AttributeError, TypeError, IndexError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {first_line(error)[:160]}"
        raise ValueError(f"model.path: {target.path}: {target.model.config.model_type} does not decode with a plain cache of "
                         f"keys and values ({reason}); no drafter can be trained for it here") from None


def choose_target_layers(requested: list[int] | None, layers: int) -> list[int]:
    """Layers whose outputs are the features: those asked for, or up to five, evenly from the first to the last.

    Raises:
        ValueError: a layer that the target does not have.
    """
    if requested is None:
        count = min(DEFAULT_TARGET_LAYERS, layers)
        return sorted({round(i * (layers - 1) / max(1, count - 1)) for i in range(count)})
    for layer in requested:
        if layer >= layers:
            raise ValueError(f"drafter.target_layer_ids: layer {layer}, but the target has layers 0 to {layers - 1}")
    return list(requested)


def mask_token_id(setting: str | int | None, tokenizer, vocabulary: int, ends: Sequence[int] = ()) -> int:
    """Id of the reserved mask entry: the recipe's, the tokenizer's, or the first that the tokenizer leaves unused.

    Raises:
        ValueError: no such entry, or one that text uses: an ordinary, end (`ends`) or padding token.
    """
    if setting is None:
        setting = tokenizer.mask_token_id
        if setting is None:
            setting = max(tokenizer.get_vocab().values()) + 1  # vocabularies are padded to a round number
        if setting >= vocabulary:
            raise ValueError("drafter.mask_token: the tokenizer has no mask token and uses every entry of the vocabulary; name "
                             "a reserved one (text or id) that never occurs in text")
    if isinstance(setting, str):
        found = tokenizer.get_vocab().get(setting)
        if found is None:
            raise ValueError(f"drafter.mask_token: {setting!r} is not an entry of the tokenizer")
        setting = found
    if not 0 <= setting < vocabulary:
        raise ValueError(f"drafter.mask_token: {setting}, expected an id from 0 to {vocabulary - 1}")
    # The export writes the mask's vector into this row of the target.
    text = tokenizer.convert_ids_to_tokens(setting) if setting < len(tokenizer) else None
    used = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad", "unk")}
    role = next((name for name, token in used.items() if token == setting), "end" if setting in ends else None)
    if role is not None:
        raise ValueError(f"drafter.mask_token: {setting} ({text}) is the tokenizer's {role} token, whose embedding the target "
                         "needs; expected a reserved entry that never occurs in text")
    if text is not None and setting not in tokenizer.added_tokens_decoder:
        raise ValueError(f"drafter.mask_token: {setting} ({text!r}) is an ordinary entry of the vocabulary, whose embedding "
                         "the target needs; expected a reserved entry that never occurs in text")
    return setting


def rotary_base(config) -> float:
    """Rotary base of a transformers configuration's full-attention layers; 10,000 where it names none."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = rope.get("full_attention") or next((v for v in rope.values() if isinstance(v, dict)), {})
    return float(getattr(config, "rope_theta", None) or rope.get("rope_theta") or nested.get("rope_theta") or 10_000.0)


def configure_drafter(settings: Drafter, dflash, *, config, target_layers: list[int], mask_id: int):
    """The drafter's configuration from the recipe and the target's transformers configuration.

    Args:
        settings, dflash: recipe sections `drafter` and `dflash`.
        config: the target's (its text part).
    """
    return drafter_config(
        hidden_size=config.hidden_size, vocab_size=config.vocab_size, num_target_layers=config.num_hidden_layers,
        target_layer_ids=target_layers, mask_token_id=mask_id, rotary_base=settings.rotary_base or rotary_base(config),
        max_position_embeddings=getattr(config, "max_position_embeddings", 262144),
        num_anchors=dflash.anchors if dflash else 512, loss_decay_gamma=dflash.loss.decay_gamma if dflash else 7.0,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
        **settings.model_dump(exclude={"target_layer_ids", "mask_token", "rotary_base"}))


def new_drafter(recipe: Recipe, target: Target) -> DFlashDraftModel:
    """A fresh float32 drafter for `target`, started near it.

    The mask embedding starts as the mean of the vocabulary's embeddings, the final norm as the target's (the shared head
    expects its scale), and `fc` passes the last target layer on: worth about 20 of the first 60 steps.

    With `dflash.start_from` its weights are those of an earlier drafter instead.

    Raises:
        ValueError: no mask token, a geometry that cannot be (the recipe key is named), or an earlier drafter that differs.
    """
    mask_id = mask_token_id(recipe.drafter.mask_token, target.tokenizer, target.vocabulary, target.end_ids)
    try:
        config = configure_drafter(recipe.drafter, recipe.dflash, config=target.model.config.get_text_config(),
                                   target_layers=target.target_layers, mask_id=mask_id)
    except ValueError as error:
        raise ValueError(f"drafter: {error}") from None
    if recipe.dflash is not None and recipe.dflash.start_from is not None:
        return _earlier_drafter(Path(recipe.dflash.start_from), config, target.embed_tokens.weight)
    torch.manual_seed(recipe.seed)
    model = DFlashDraftModel(config).float()
    with torch.no_grad():
        model.mask_embedding.copy_(target.embed_tokens.weight.float().mean(0))
        norm = norm_scale(target.norm)
        if norm is not None and norm.shape == model.norm.weight.shape:
            model.norm.weight.copy_(norm)
        model.fc.weight.mul_(0.3)
        model.fc.weight[:, -target.hidden_size:] += torch.eye(target.hidden_size)
    return model


def norm_scale(norm: nn.Module | None) -> torch.Tensor | None:
    """What an RMS norm multiplies by: its weight, or 1 + weight, as the module itself does it; None if it is neither."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    does = norm(torch.ones_like(weight)[None])[0].float()
    return next((scale for scale in (weight, 1 + weight) if torch.allclose(does, scale.float(), rtol=0.02, atol=1e-3)), None)


# What dflash_config may say that is known here; anything else changes what a drafter computes in a way that is not.
KNOWN_FLAGS = {"target_layer_ids", "mask_token_id", "num_anchors", "block_size", "loss_decay_gamma", "use_swa",
               "swa_window_size", "backbone_rotary_base", "attention_value_scale", "attention_sink_bias", "causal",
               "num_target_layers", "convolution_rank", "markov_rank", "selector_top_k"}


def _earlier_drafter(folder: Path, expected, vocabulary: torch.Tensor) -> DFlashDraftModel:
    """The drafter in `folder`, float32, if everything that its weights depend on is as in the configuration `expected`.

    It may be anybody's: what counts is what its configuration means, whichever keys say it; without a mask_embedding.pt the
    mask token's row of the target's `vocabulary` is taken.
    """
    try:
        raw = {}
        with contextlib.suppress(ValueError):  # said below
            raw = read_json(folder / "config.json")
        unknown = sorted((raw.get("dflash_config") or {}).keys() - KNOWN_FLAGS)
        if unknown:
            raise ValueError(f"{folder}: dflash_config.{unknown[0]}: a flag that is not known here")
        if len(set(raw.get("layer_types") or ())) > 1:
            raise ValueError(f"{folder}: layer_types: {', '.join(sorted(set(raw['layer_types'])))} in one drafter; expected "
                             "one kind in all layers")
        model = load_drafter(folder, torch.float32, vocabulary=vocabulary)
    except ValueError as error:
        raise ValueError(f"dflash.start_from: {error}") from None
    with torch.device("meta"):
        mine, theirs = _meaning(DFlashDraftModel(expected)), _meaning(model)
    for key in mine:
        if mine[key] != theirs[key]:
            raise ValueError(f"dflash.start_from: {folder}: {key} is {theirs[key]}, the recipe's drafter has {mine[key]}")
    model.config = expected  # every key in every spelling
    return model


def _meaning(model: DFlashDraftModel) -> dict:
    """What a drafter's configuration means, whichever keys say it."""
    config, special = model.config, model.config.dflash_config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "rms_norm_eps")
    options = ("convolution_rank", "markov_rank", "selector_top_k")
    return {key: getattr(config, key) for key in sizes} | {key: special.get(key, 0) for key in options} | {
        "v_head_dim": getattr(config, "v_head_dim", None) or config.head_dim, "block_size": model.block_size,
        "target_layer_ids": model.target_layer_ids, "mask_token_id": model.mask_token_id, "sliding_window": model.window,
        "causal": model.causal, "rotary base": float(model.rotary_base), "rotated entries": model.rotary_dim,
        "attention_value_scale": special.get("attention_value_scale"),
        "attention_sink_bias": bool(special.get("attention_sink_bias"))}


def identity(target: TargetFiles, recipe: Recipe) -> list:
    """Everything that determines what the target says to given tokens: its files, the rounding of its experts, its dtype."""
    rule = recipe.quantization.scale_rule if recipe.dflash.target == "ptq" else None
    return [target.fingerprint(), recipe.dflash.target, rule, recipe.model.dtype]


def describe_target(target: TargetFiles, recipe: Recipe) -> dict:
    """Facts for provenance: folder, kind, fingerprint, target layers."""
    return {"folder": str(target.path), "kind": recipe.dflash.target, "dtype": recipe.model.dtype,
            "weights": target.fingerprint(), "taps": target.target_layers,
            "model_type": json.loads((target.path / "config.json").read_text())["model_type"]}
