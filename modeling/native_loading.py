"""Lets stock transformers load a native FP4 checkpoint of MiMo-V2: MXFP4 experts and block-quantized FP8, on any device.

Shipped inside exported checkpoints as remote code beside `modeling_mimo_v2.py`, so it is self-contained (torch and
transformers only). transformers' own FP8 loader cannot read these files: it expects other names and dtypes for packed
experts and takes the block height of an FP8 matrix to be rows / scale rows, which is wrong, without an error, for the
fused qkv whose scale grid restarts with each chunk.

It hooks in where transformers provides for it: a quantizer and its configuration, registered under an own method name, whose
conversions join each weight with its scale and decode both while the file is streamed. The checkpoint's own
`quantization_config` (method "fp8", what engines read) is translated just before loading; the loaded model holds plain
weights and promises no quantization.

Rejected: replacing transformers' "fp8" entry (would change every other model of the process), unpacked buffers and a
decoding forward (slower than a decoded model wherever this path is used), reading the files again after a plain load.
"""

from __future__ import annotations

import copy
import re

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto as registry
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "mimo_v2_native"
FP8_BLOCK = 128
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# A weight is stored as itself, or with one of these beside it. Older transformers take the first of a conversion's names that a
# stored name begins with: the longest come first.
SCALES = ("_scale_inv", "_scale")
SUFFIXES = (*SCALES, "")


def decode_mxfp4(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Packed MXFP4 -> weights.

    Args:
        codes: uint8 [..., n / 2], two E2M1 codes per byte, the even column in the low nibble.
        scales: uint8 [..., n / 32], E8M0: 2^(byte - 127); 255 is NaN.

    Returns:
        `dtype` [..., n]; exact in bfloat16 and float32.
    """
    table = torch.tensor(E2M1, dtype=torch.float32, device=codes.device)
    values = torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), dim=-1).flatten(-2)
    bits = scales.view(torch.uint8).to(torch.int32)
    # Built from bits: the byte 0 is the subnormal 2^-127, which exp2 may flush to zero.
    scale = torch.where(bits == 0, 1 << 22, bits << 23).to(torch.int32).view(torch.float32)
    scale = torch.where(bits == 255, torch.nan, scale)
    return (values.unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2).to(dtype)


def decode_fp8(weight: torch.Tensor, scale_inv: torch.Tensor, segments: int, dtype: torch.dtype) -> torch.Tensor:
    """Block-quantized FP8 -> weights.

    Args:
        weight: float8_e4m3fn [rows, columns]; scale_inv: float32, one entry per 128 x 128 block.
        segments: equal parts of the rows within each of which the grid of scales starts anew.

    Raises:
        ValueError: a grid of another shape.
    """
    rows, columns = weight.shape
    height = -(-(rows // segments) // FP8_BLOCK)
    expected = (segments * height, -(-columns // FP8_BLOCK))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(f"weight_scale_inv of shape {list(scale_inv.shape)}, expected {list(expected)} for a weight of "
                         f"{[rows, columns]} in {segments} segments")
    grid = scale_inv.float().view(segments, height, -1).repeat_interleave(FP8_BLOCK, 1)[:, :rows // segments]
    grid = grid.reshape(rows, -1).repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return (weight.float() * grid).to(dtype)


def scale_segments(name: str, config) -> int:
    """Parts of an FP8 matrix's rows within which its scale grid runs: chunks of a fused qkv, heads of a split k or v."""
    if name.endswith("qkv_proj.weight"):
        return config.num_key_value_heads
    match = re.search(r"layers\.(\d+)\.self_attn\.[kv]_proj\.weight$", name)
    if match is None:
        return 1
    return config.swa_num_key_value_heads if config.hybrid_layer_pattern[int(match[1])] else config.num_key_value_heads


class Decode(ConversionOps):
    """First operation of a conversion: {pattern: stored tensors, pattern + suffix: scales} -> {pattern: weights}."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer  # transformers keeps the stored dtype of tensors whose conversion has one

    def convert(self, input_dict, full_layer_name=None, model=None, config=None, **kwargs):
        config = model.config if model is not None else config
        dtype = model.get_parameter(full_layer_name).dtype if model is not None else torch.bfloat16
        decoded = {}
        for pattern, tensors in input_dict.items():
            if pattern.endswith(SCALES):
                continue
            tensors = tensors if isinstance(tensors, list) else [tensors]
            scales, kind = next(((input_dict[pattern + s], s) for s in SCALES if pattern + s in input_dict), (None, ""))
            scales = scales if isinstance(scales, list) else [scales] * len(tensors)
            if len(scales) != len(tensors):
                raise ValueError(f"{full_layer_name}: {len(tensors)} tensors, {len(scales)} scales for {pattern}")
            decoded[pattern] = [self._one(full_layer_name, t, s, kind, config, dtype)
                                for t, s in zip(tensors, scales, strict=True)]
        if list(decoded) == ["weight"]:  # the conversion of every weight that the model's own table does not name
            return {full_layer_name or "weight": decoded["weight"][0]}
        return decoded

    @staticmethod
    def _one(name, tensor, scale, kind, config, dtype):
        if tensor.dtype == torch.uint8 and kind == "_scale":
            return decode_mxfp4(tensor, scale, dtype)
        if tensor.is_floating_point() and kind == "_scale_inv":
            codes = tensor.to(torch.float8_e4m3fn)  # transformers 5.17 to 5.19 give it in the model's dtype, which is exact
            if codes.dtype == tensor.dtype or torch.equal(codes.to(tensor.dtype), tensor):
                return decode_fp8(codes, scale, scale_segments(name, config), dtype)
        if tensor.is_floating_point() and not kind:
            return tensor.to(dtype)
        raise ValueError(f"{name}: a tensor of {tensor.dtype} with {'scale weight' + kind if kind else 'no scale'}")


class NativeConfig(QuantizationConfigMixin):
    """The checkpoint's quantization_config under this file's method name."""

    def __init__(self, **stored):
        self.quant_method = METHOD
        self.dequantize = True
        self.stored = {k: v for k, v in stored.items() if k not in ("quant_method", "dequantize")}


class NativeQuantizer(HfQuantizer):
    """Decodes while loading; leaves an ordinary model."""

    requires_calibration = False

    def get_weight_conversions(self):
        return [WeightConverter(["weight" + s for s in SUFFIXES], "weight", [Decode(self)])]

    def update_weight_conversions(self, weight_conversions, model=None):
        updated = []
        for conversion in weight_conversions:
            sources = getattr(conversion, "_original_source_patterns", conversion.source_patterns)
            if isinstance(conversion, WeightConverter) and all(s.endswith(".weight") for s in sources):
                names = [source + suffix for source in sources for suffix in SUFFIXES]
                conversion = WeightConverter(names, list(conversion.target_patterns), [Decode(self), *conversion.operations])
            updated.append(conversion)
        return updated + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model, **kwargs):
        model._weight_conversions = None  # what is saved from here on are plain weights, by the model's own table
        return model

    def is_serializable(self, *args, **kwargs):
        return True

    @property
    def is_trainable(self):
        return True


# Remote code is imported anew for every folder: the last one registered is the one that runs.
registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = NativeConfig
registry.AUTO_QUANTIZER_MAPPING[METHOD] = NativeQuantizer


def translated(config):
    """A copy of a MiMo-V2 configuration in which a stored "fp8" quantization_config goes by this file's method name."""
    config = copy.deepcopy(config)
    stored = config.quantization_config
    if isinstance(stored, dict) and stored.get("quant_method") == "fp8":
        config.quantization_config = {**stored, "quant_method": METHOD}
    return config
