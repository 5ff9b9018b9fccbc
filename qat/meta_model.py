"""The model of a recipe on the meta device: all shapes, no weights, in seconds for a trillion parameters.

The geometry is that of the checkpoint folder `model.path` if there is one, else the published one named by
`model.released`, else the configuration of the hub name `model.path`. Rejected: always asking the hub (a plan must work
where there is no network).
"""

from __future__ import annotations

import re
from pathlib import Path

from checkpoint.findings import one_line
from checkpoint.load import require_known_activation
from recipes.schema import Recipe
from storage.reading import read_json


def meta_model(recipe: Recipe):
    """(the recipe's model on the meta device, where its geometry comes from).

    Raises:
        ValueError: no configuration at `model.path`, or `model.released` is not a known release.
    """
    model, _, _, name = _found(recipe)
    return model, name


def _found(recipe: Recipe):
    """(model, MTP layers of its files, whether its dense weights are FP8, where its geometry comes from)."""
    import torch

    path, released = recipe.model.path, recipe.model.released
    with torch.device("meta"):
        if path is not None and (released is None or Path(path).is_dir()):
            return *_model_at(path, recipe.model.trust_remote_code), path
        return *_released_model(released), released


def model_and_release(recipe: Recipe):
    """As `meta_model`, with what it is published as.

    Returns:
        model: on the meta device. name: where its geometry comes from. inventory: every tensor of its FP4 release
        (list of `modeling.names.PublishedTensor`), or None for other families than MiMo-V2.

    Raises:
        ValueError: as `meta_model`.
    """
    model, mtp_layers, fp8, name = _found(recipe)
    if model.config.model_type != "mimo_v2":
        return model, name, None
    from modeling.names import published_tensors

    router = "F32" if fp8 and getattr(model.config, "moe_router_dtype", None) != "bfloat16" else "BF16"
    return model, name, list(published_tensors(model.config, mtp_layers=mtp_layers, dense="fp8" if fp8 else "bf16",
                                               router=router))


def _released_model(name: str):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM
    from modeling.published_geometries import MTP_LAYERS, OTHER_RELEASES, released_config

    if name in OTHER_RELEASES:
        kind, difference = OTHER_RELEASES[name]
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**difference)), 0, False
    try:
        geometry = released_config(name)
    except ValueError as error:
        raise ValueError(f"{error}; other families: {', '.join(OTHER_RELEASES)}") from None
    return MiMoV2ForCausalLM(MiMoV2Config(**geometry)), MTP_LAYERS, True


def _model_at(path: str, trust_remote_code: bool):
    """(model, MTP layers in its files, whether its dense weights are FP8) of a folder or hub name; reads no weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    folder, impossible = Path(path), "config.json describes no model that can be built"
    if folder.is_dir() and (folder / "config.json").is_file():
        keys = read_json(folder / "config.json")
        # The test that `checkpoint.load` makes: V2-Flash as released is read by this project's class.
        if keys.get("model_type") == "mimo_v2" or keys.get("model_type") == "mimo_v2_flash" and "hybrid_layer_pattern" in keys:
            fp8 = (keys.get("quantization_config") or {}).get("quant_method") == "fp8"
            geometry = {k: v for k, v in keys.items() if k not in ("quantization_config", "model_type", "dtype", "torch_dtype")}
            with one_line(folder, impossible):
                return MiMoV2ForCausalLM(MiMoV2Config.from_dict(geometry)), _mtp_layers(folder), fp8
    try:
        with one_line(folder, impossible, passed=(OSError,)):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if impossible in str(error):
            raise
        raise ValueError(f"model.path: {path}: no config.json to plan with (not a checkpoint folder, and no hub model that "
                         "can be reached from here); a published geometry can be planned with model.released") from None
    # A packed base is decoded before training; its declaration would make transformers look for kernels.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if not trust_remote_code:
        require_known_activation(config, path)
    with one_line(folder, impossible):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code), 0, False


def model_at(path: str, trust_remote_code: bool):
    """The model of a folder or hub name, to be called on the meta device. Raises ValueError: no configuration there."""
    return _model_at(path, trust_remote_code)[0]


def _mtp_layers(folder: Path) -> int:
    from checkpoint.tensor_files import INDEX, weight_map

    index = folder / INDEX
    names = weight_map(index) if index.is_file() else ()
    return len({m[1] for m in (re.match(r"model\.mtp\.layers\.(\d+)\.", n) for n in names) if m})
