"""Any supported checkpoint folder -> model in plain numbers: MiMo-V2 by its own class, others by transformers.

A checkpoint of a released MiMo-V2 mixes four encodings, told apart tensor by tensor:

    plain              BF16 / F32                                             as it is
    FP8 E4M3           + `weight_scale_inv` F32, one scale per 128 x 128      multiplied out; the grid of a fused qkv
                                                                              restarts with each of its chunks
    MXFP4 experts      uint8 `weight` + uint8 `weight_scale`                  `mxfp4.dequantize`
    MTP layers         `model.mtp.*`                                          not part of the decoder, left out

Other model types go through transformers' own class (Qwen3-MoE, gpt-oss, ...), which fuses experts by itself. What is packed
on disk (FP8 blocks, MXFP4 in any layout) is decoded here, tensor by tensor while transformers loads, and not by its quantizers:
those take an FP8 block's height to be rows / scale rows, and leave conversions on the model that a later save runs backwards.
The same way is taken where the index and the shards differ, because transformers does not look at the index for that.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoint.containers import Decoded, DecodedExperts, plain_infos, read_plain
from checkpoint.detect_format import local_folder, open_source
from checkpoint.families.published_names import meta_model
from checkpoint.families.registry import family_of
from checkpoint.findings import one_line
from checkpoint.inventory import is_mimo
from checkpoint.sources import Source
from checkpoint.tensor_files import TensorFiles, read_header
from modeling.cpu_products import speed_up_bf16_products
from modeling.names import expert_parts
from storage.reading import first_line
from storage.terminal import counted

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False):
    """The checkpoint's tokenizer.

    Raises:
        ValueError: no tokenizer there.
    """
    from transformers import AutoConfig, AutoTokenizer

    from modeling.configuration_mimo_v2 import MiMoV2Config

    _require_folder(path)
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{path}: no config.json: not a checkpoint folder")
    if folder.is_dir() and not trust_remote_code and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(f"{path}: no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    AutoConfig.register("mimo_v2", MiMoV2Config, exist_ok=True)  # or transformers warns of a type that it does not know
    with one_line(folder, "no usable tokenizer"):
        try:
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no usable tokenizer: {first_line(error)}") from None


def require_known_activation(config, where: str | Path) -> None:
    """Raises ValueError for a transformers configuration whose experts have a gate that transformers does not know."""
    from transformers.activations import ACT2FN

    text = config.get_text_config()
    for key in ("hidden_act", "hidden_activation"):
        name = getattr(text, key, None)
        if isinstance(name, str) and name not in ACT2FN:
            near = difflib.get_close_matches(name, ACT2FN, n=1)
            raise ValueError(f"{where}: config.json: {key} {name!r}: no activation that transformers knows"
                             + (f", did you mean {near[0]}?" if near else ", expected one such as silu"))


def load_model(path: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False, distributed_config=None):
    """A causal language model with fused 3-D experts, on the CPU, in `dtype` (routers' correction bias stays float32).

    Memory: the model in `dtype` and one tensor more.

    Args:
        distributed_config: transformers' `DistributedConfig`: every rank reads its own experts and its rows of everything
            else, straight into the shards, on its device. Memory: the shards and one tensor more.

    Raises:
        ValueError: no such folder or config; a missing shard or tensor; a tensor of another shape; unreadable files.
    """
    _require_folder(path)
    config = _read_config(path, trust_remote_code)
    if dtype is torch.bfloat16:
        speed_up_bf16_products()
    if not is_mimo(config):
        return _load_by_transformers(path, dtype, trust_remote_code, distributed_config)
    if not Path(path).is_dir():
        raise ValueError(f"model.path: {path}: a MiMo-V2 checkpoint is read from a folder, download it first")
    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.modeling_mimo_v2 import MiMoV2ForCausalLM

    # What is returned is decoded: a configuration that still promised packed weights would break the next save.
    stale = ("quantization_config", "model_type", "dtype", "torch_dtype")
    config = {key: value for key, value in config.items() if key not in stale}
    try:
        settings = MiMoV2Config.from_dict(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}/config.json: {str(error).splitlines()[0]}") from None
    settings.dtype, settings.name_or_path = dtype, str(path)
    with torch.device("meta"):
        model = MiMoV2ForCausalLM(settings).to(dtype)
    device = torch.device("cpu")
    if distributed_config is not None:
        distributed_config, device, meshes = MiMoV2ForCausalLM.prepare_distribute_model(distributed_config)
        model = MiMoV2ForCausalLM.maybe_distribute_model(model, distributed_config, meshes)
    return _fill(model, Path(path), dtype, torch.device(device or "cpu"))


def _load_by_transformers(path: str | Path, dtype: torch.dtype, trust_remote_code: bool, distributed_config=None):
    """As AutoModelForCausalLM loads it, except that what it would initialise at random with a warning is an error."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if distributed_config is not None:
        path = local_folder(str(path))
    tensors = _decoded_tensors(Path(path), always=distributed_config is not None) if Path(path).is_dir() else None
    with one_line(Path(path), "cannot be loaded"):
        if not trust_remote_code:
            require_known_activation(AutoConfig.from_pretrained(str(path)), path)
        try:
            if tensors is None:
                model, info = AutoModelForCausalLM.from_pretrained(
                    str(path), dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True,
                    ignore_mismatched_sizes=True)
            else:
                model, info = _load_tensors(path, tensors, dtype, trust_remote_code, distributed_config)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be loaded: {first_line(error)}") from None
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(f"{path}: {name}: shape {list(found)}, expected {list(expected)}")
    if info["missing_keys"]:
        raise ValueError(f"{path}: {counted(len(info['missing_keys']), 'tensor')} missing, the first "
                         f"{min(info['missing_keys'])}")
    return model


def _decoded_tensors(folder: Path, *, always: bool = False) -> dict[str, Decoded] | None:
    """The tensors of a folder that transformers would not read as they are meant; None if it does (but not if `always`)."""
    source = open_source(folder)
    kinds = plain_infos(source)
    packed = any(kind != "plain" for _, kind in kinds.values())
    shards = set(source.where.values()) if isinstance(source, TensorFiles) else set()
    agreed = sum(len(read_header(folder / file)) for file in shards) == len(source.infos) * bool(shards)
    agreed = agreed and not getattr(source, "left_out", 0)
    if agreed and not packed and not always:
        return None
    if packed and (method := (_read_config(folder).get("quantization_config") or {}).get("quant_method")) not in (
            "fp8", "mxfp4", "compressed-tensors"):
        raise ValueError(f"{folder}: quantization_config.quant_method {method!r}: expected fp8, mxfp4 or compressed-tensors "
                         "(MXFP4), or weights in plain numbers")
    return {name: Decoded(source, name) for name in kinds}


def _load_tensors(path: str | Path, tensors: dict[str, Decoded], dtype: torch.dtype, trust_remote_code: bool,
                  distributed_config=None):
    """(model, transformers' report) of tensors that are decoded here, when transformers' loader takes them.

    Into shards experts are read by this project alone: each rank's, into the place where they stay. transformers would stack
    them (twice the memory of a layer's) and cannot make a stack of none.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):  # what is returned is decoded
        del config.quantization_config
    kind, options = type(meta_model(config)), {}
    if distributed_config is not None:
        options, tensors = {"distributed_config": distributed_config}, _with_fused_experts(tensors, config, dtype)
    model, info = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True,
                                       ignore_mismatched_sizes=True, **options)
    if distributed_config is not None:
        model.__dict__.pop("_weight_conversions", None)  # those that were used; a save needs those of the experts, too
    model.config.name_or_path = str(path)
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(path))
    return model.eval(), info


def _with_fused_experts(tensors: dict[str, Decoded], config, dtype: torch.dtype) -> dict[str, Decoded | DecodedExperts]:
    """The same checkpoint with fused expert tensors instead of one matrix per expert, where it has all of them."""
    published = family_of(config).published(config)
    source = next(iter(tensors.values())).source
    parts: dict[str, dict[int, list]] = {}
    for name, place in published.experts.items():
        parts.setdefault(place.fused, {}).setdefault(place.expert, []).append((name, place.rows))
    found = dict(tensors)
    for fused, experts in parts.items():
        names = [name for members in experts.values() for name, _ in members]
        if not all(name in tensors for name in names):
            continue  # named as an earlier version of transformers did, which it knows
        for name in names:
            shape = tuple(found.pop(name).shape)
            if shape != published.shapes[name]:
                raise ValueError(f"{name}: shape {list(shape)}, expected {list(published.shapes[name])}")
        rows = sum(part.stop - part.start for _, part in experts[0])
        found[fused] = DecodedExperts(source, [experts[e] for e in range(len(experts))],
                                      (len(experts), rows, published.shapes[names[0]][1]), dtype)
    return found


def _fill(model, folder: Path, dtype: torch.dtype, device: torch.device):
    """Materialises a meta model tensor by tensor from the checkpoint (peak: one fused expert tensor beside the model)."""
    files = open_source(folder)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, empty in targets.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # The routers' correction bias is published in float32 and decides which experts run: it is never rounded.
        value = _assemble(name, empty, files, model.config, torch.float32 if leaf in module._buffers else dtype).to(device)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = torch.nn.Parameter(_as_shard(value, empty))
    model.tie_weights()  # a tied head has no tensor of its own in the files
    unused = sorted(n for n in files.unused() if not n.startswith("model.mtp."))
    if unused:
        raise ValueError(f"{folder}: {counted(len(unused), 'tensor')} that this model does not have, the first {unused[0]}")
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.eval()


def _assemble(name: str, empty: torch.Tensor, files: Source, config, dtype: torch.dtype) -> torch.Tensor:
    """The tensor, or where `empty` is sharded the rows of dimension 0 that this rank holds."""
    rows = owned_rows(empty)
    parts = expert_parts(name, empty.shape)
    if parts is None:
        all_of_it = len(rows) == empty.shape[0]
        value = _decoded(name, files, config, dtype, None if all_of_it else rows)
        return _checked(name, value, (len(rows), *empty.shape[1:]), files.folder)
    value = torch.empty((len(rows), *empty.shape[1:]), dtype=dtype)
    for part in parts:
        if part.expert not in rows:
            for name in (part.name, part.name + "_scale", part.name + "_scale_inv"):
                if name in files.infos:
                    files.leave(name)
            continue
        here = value[part.expert - rows.start, part.rows]
        here.copy_(_checked(part.name, _decoded(part.name, files, config, dtype), here.shape, files.folder))
    return value


def owned_rows(tensor: torch.Tensor) -> range:
    """Rows of dimension 0 that this rank holds of a sharded tensor (DTensor); all of them for an ordinary one."""
    if not hasattr(tensor, "placements"):
        return range(tensor.shape[0])
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return range(offset[0], offset[0] + shape[0]) if shape[0] else range(0)


def _as_shard(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not hasattr(like, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...], folder: Path) -> torch.Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{folder}: {name}: shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def _decoded(name: str, files: Source, config, dtype: torch.dtype, rows: range | None = None) -> torch.Tensor:
    for suffix in ("_scale", "_scale_inv"):
        if name + suffix in files.infos:
            files.leave(name + suffix)
    return read_plain(files, name, dtype, config, rows)


def _require_folder(path: str | Path) -> None:
    if re.match(r"^[.~/]", str(path)) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        if not Path(path).is_dir():
            raise ValueError(f"model.path: {path}: no such checkpoint folder (looked from {Path.cwd()})")


def _read_config(path: str | Path, trust_remote_code: bool = False) -> dict:
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code).to_dict()  # a hub name
        except OSError as error:
            raise ValueError(f"model.path: {path}: neither a folder nor reachable on the hub: "
                             f"{str(error).splitlines()[0]}") from None
    if not file.is_file():
        raise ValueError(f"{path}: no config.json")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
