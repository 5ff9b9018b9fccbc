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
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modeling.names import FP8_BLOCK, expert_parts, qkv_scale_rows
from mxfp4 import dequantize
from storage.reading import inner_name

INDEX = "model.safetensors.index.json"
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
    if not _is_mimo(config):
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


def _is_mimo(config: dict) -> bool:
    """Released configurations of the family, V2-Flash included.

    transformers has a class for V2-Flash, but takes the block height of an FP8 matrix to be rows / scale rows, which is
    wrong, silently, for the per-head grids of its key projections. Folders that this class saved have no
    `hybrid_layer_pattern` and stay with it.
    """
    kind = config.get("model_type")
    return kind == "mimo_v2" or kind == "mimo_v2_flash" and "hybrid_layer_pattern" in config


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


def dequantize_fp8(name: str, weight: torch.Tensor, scale_inv: torch.Tensor, config) -> torch.Tensor:
    """Block-quantized FP8 -> float32: each 128 x 128 block times its scale.

    Args:
        weight: float8_e4m3fn [rows, columns]; scale_inv: float32 [scale rows, ceil(columns / 128)].
        config: a MiMoV2Config, for tensors whose grid restarts within the rows (fused qkv, per-head k and v).

    Raises:
        ValueError: a scale grid of an unexpected shape.
    """
    rows, columns = weight.shape
    segments = qkv_scale_rows(name, rows, config)
    expected = (sum(-(-n // FP8_BLOCK) for n in segments), -(-columns // FP8_BLOCK))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(f"{name}_scale_inv: shape {list(scale_inv.shape)}, expected {list(expected)} "
                         f"for a weight of {[rows, columns]}")
    out, done, scale_row = torch.empty(rows, columns), 0, 0
    for n in segments:
        blocks = -(-n // FP8_BLOCK)
        scale = scale_inv[scale_row:scale_row + blocks].float()
        grid = scale.repeat_interleave(FP8_BLOCK, 0)[:n].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
        out[done:done + n] = weight[done:done + n].float() * grid
        done, scale_row = done + n, scale_row + blocks
    return out


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of a safetensors index.

    Raises:
        ValueError: not JSON, or not an index.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are not UTF-8
        raise ValueError(f"{index}: not valid JSON: {error}") from None
    found = content.get("weight_map") if isinstance(content, dict) else None
    outside = next((f for f in found.values() if not inner_name(f)), None) if isinstance(found, dict) else None
    if isinstance(outside, str):
        raise ValueError(f"{index}: names {outside!r}, expected files of its own folder")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f'{index}: not a safetensors index: expected {{"weight_map": {{tensor name: file name}}}}')
    return found


class TensorFiles:
    """The tensors of a checkpoint folder, by name, memory-mapped: one safetensors file, or shards with an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._handles: dict[str, safe_open] = {}
        index, single = folder / INDEX, folder / "model.safetensors"
        if index.is_file():
            self._where = weight_map(index)
        elif single.is_file():
            self._where = {name: single.name for name in self._open(single.name).keys()}
        else:
            raise ValueError(f"{folder}: neither model.safetensors nor {INDEX}")
        self._read: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def _open(self, file: str):
        if file in self._handles:  # a shard's header lists thousands of tensors: parse it once
            return self._handles[file]
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{self.folder}: shard {file} is missing")
        try:
            return self._handles.setdefault(file, safe_open(str(path), framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor.

        Raises:
            ValueError: it is not in the checkpoint, or its shard is missing or damaged.
        """
        if name not in self._where:
            raise ValueError(f"{self.folder}: tensor {name} is missing{self._nearest(name)}")
        self._read.add(name)
        try:
            return self._open(self._where[name]).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder / self._where[name]}: {name}: {error}") from None

    def unused(self) -> set[str]:
        """Names that were never read."""
        return set(self._where) - self._read

    def _nearest(self, name: str) -> str:
        import difflib

        near = difflib.get_close_matches(name, [n for n in self._where if n.count(".") == name.count(".")][:2000], n=1)
        return f" (nearest: {near[0]})" if near else ""


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
