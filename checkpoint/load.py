"""Any supported checkpoint folder -> model: MiMo-V2 in bf16, FP8 (128x128 blocks) or native MXFP4; others by transformers.

A checkpoint of a released MiMo-V2 mixes four encodings, told apart tensor by tensor:

    plain              BF16 / F32                                             as it is
    FP8 E4M3           + `weight_scale_inv` F32, one scale per 128 x 128      multiplied out; the grid of a fused qkv
                                                                              restarts with each of its chunks
    MXFP4 experts      uint8 `weight` + uint8 `weight_scale`                  `mxfp4.dequantize`
    MTP layers         `model.mtp.*`                                          not part of the decoder, left out

Other model types go through `AutoModelForCausalLM` (Qwen3-MoE, gpt-oss, ...), which fuses experts by itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoint.fp8 import dequantize_fp8
from checkpoint.inventory import is_mimo
from checkpoint.tensor_files import INDEX, TensorFiles, weight_map
from modeling.names import expert_parts
from mxfp4 import dequantize

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
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no usable tokenizer: {str(error).splitlines()[0]}") from None


def load_model(path: str | Path, *, dtype: torch.dtype, trust_remote_code: bool = False):
    """A causal language model with fused 3-D experts, on the CPU, in `dtype` (routers' correction bias stays float32).

    Memory: the model in `dtype` and one tensor more; a checkpoint larger than that needs an expert-parallel reader.

    Raises:
        ValueError: no such folder or config; a missing shard or tensor; a tensor of another shape; unreadable files.
    """
    _require_folder(path)
    config = _read_config(path)
    if not is_mimo(config):
        return _load_by_transformers(path, dtype, trust_remote_code)
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
        model = MiMoV2ForCausalLM(settings)
    return _fill(model, Path(path), dtype)


def _load_by_transformers(path: str | Path, dtype: torch.dtype, trust_remote_code: bool):
    """As AutoModelForCausalLM loads it, except that what it would initialise at random with a warning is an error."""
    from transformers import AutoModelForCausalLM

    if (index := Path(path) / INDEX).is_file():
        weight_map(index)  # transformers reads it without a word about what is wrong with it
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True,
            ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from None
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(f"{path}: {name}: shape {list(found)}, expected {list(expected)}")
    if info["missing_keys"]:
        raise ValueError(f"{path}: {len(info['missing_keys'])} tensors are missing, the first {min(info['missing_keys'])}")
    return model


def _fill(model, folder: Path, dtype: torch.dtype):
    """Materialises a meta model tensor by tensor from the checkpoint (peak: one fused expert tensor beside the model)."""
    files = TensorFiles(folder)
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, empty in targets.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        # The routers' correction bias is published in float32 and decides which experts run: it is never rounded.
        value = _assemble(name, empty, files, model.config, torch.float32 if leaf in module._buffers else dtype)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = torch.nn.Parameter(value)
    model.tie_weights()  # a tied head has no tensor of its own in the files
    unused = sorted(n for n in files.unused() if not n.startswith("model.mtp."))
    if unused:
        raise ValueError(f"{folder}: {len(unused)} tensors that this model does not have, the first {unused[0]}")
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.eval()


def _assemble(name: str, empty: torch.Tensor, files: TensorFiles, config, dtype: torch.dtype) -> torch.Tensor:
    parts = expert_parts(name, empty.shape)
    if parts is None:
        return _checked(name, _decoded(name, files, config, dtype), empty.shape, files.folder)
    value = torch.empty(empty.shape, dtype=dtype)
    for part in parts:
        tensor = _decoded(part.name, files, config, dtype)
        value[part.expert, part.rows] = _checked(part.name, tensor, value[part.expert, part.rows].shape, files.folder)
    return value


def _checked(name: str, tensor: torch.Tensor, shape: torch.Size, folder: Path) -> torch.Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{folder}: {name}: shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def _decoded(name: str, files: TensorFiles, config, dtype: torch.dtype) -> torch.Tensor:
    raw = files.read(name)
    if raw.dtype == torch.uint8:
        return dequantize(raw, files.read(name + "_scale"), dtype=dtype)
    if raw.dtype == torch.float8_e4m3fn:
        return dequantize_fp8(name, raw, files.read(name + "_scale_inv"), config).to(dtype)
    if raw.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{files.folder}: {name}: dtype {raw.dtype}, expected a float, FP8 E4M3 or packed MXFP4 (uint8)")
    return raw.to(dtype)


def _require_folder(path: str | Path) -> None:
    if re.match(r"^[.~/]", str(path)) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        if not Path(path).is_dir():
            raise ValueError(f"model.path: {path}: no such checkpoint folder (looked from {Path.cwd()})")


def _read_config(path: str | Path) -> dict:
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(path)).to_dict()  # a hub name
        except OSError as error:
            raise ValueError(f"model.path: {path}: neither a folder nor reachable on the hub: "
                             f"{str(error).splitlines()[0]}") from None
    if not file.is_file():
        raise ValueError(f"{path}: no config.json")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
