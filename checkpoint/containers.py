"""How a tensor is stored, whatever the folder: told tensor by tensor from names and dtypes, decoded exactly.

    stored as                                   is
    name F32, BF16, F16                         itself
    name F8_E4M3 + name_scale_inv               FP8 in blocks of 128 x 128 (`checkpoint.fp8`)
    name U8 + name_scale U8                     MXFP4, native layout
    name I8 + name_scale_inv U8                 MXFP4, hf-fp8 layout
    name_packed U8 + name_scale U8              MXFP4, compressed-tensors layout
    name_blocks U8 + name_scales U8             MXFP4 of a fused tensor [experts, in, out], gpt-oss layout (stored transposed)

Codes and scales that are stored are handed on as they are, so converting one layout into another rounds nothing.
"""

from __future__ import annotations

import torch

from checkpoint.fp8 import dequantize_fp8, require_grid
from checkpoint.sources import DTYPES, Source
from modeling.names import FP8_BLOCK, qkv_scale_rows
from mxfp4 import BLOCK_SIZE, dequantize

FLOATS = ("F32", "BF16", "F16", "F64")
# suffixes of (codes, scales), dtype of the codes
_MXFP4 = {"native": ("", "_scale", "U8"), "hf-fp8": ("", "_scale_inv", "I8"), "compressed-tensors": ("_packed", "_scale", "U8"),
          "gpt-oss": ("_blocks", "_scales", "U8")}
_COMPANIONS = ("_scale_inv", "_scale", "_packed", "_blocks", "_scales", "_shape", "_zero_point", "_global_scale",
               ".input_scale")


def container(source: Source, name: str) -> str | None:
    """How `name` is stored: "plain", "fp8", a layout whose experts are MXFP4, or None if it is not there, or otherwise."""
    infos = source.infos
    for layout, (codes, scales, dtype) in _MXFP4.items():
        if infos.get(name + codes, (0, None))[1] == dtype and infos.get(name + scales, (0, None))[1] == "U8":
            return layout
    dtype = infos.get(name, (0, None))[1]
    if dtype == "F8_E4M3":
        return "fp8"
    return "plain" if dtype in FLOATS or dtype in ("I64", "I32", "BOOL") else None


def plain_infos(source: Source) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, container) of every tensor, by the name and in the shape that it has in plain numbers.

    Raises:
        ValueError: a tensor that is stored in a way that is not read here.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for stored in source.infos:
        name = stored
        for suffix in ("_packed", "_blocks"):
            name = name.removesuffix(suffix)
        kind = container(source, name)
        if stored.endswith("_scale_inv") and container(source, stored.removesuffix("_scale_inv")) == "fp8":
            continue
        if kind is not None:
            found[name] = plain_shape(source, name, kind), kind
        elif not stored.endswith(_COMPANIONS):
            raise ValueError(f"{source.folder}: {stored}: {source.infos[stored][1]} without scales that are known here")
    for stored, (_, dtype) in source.infos.items():
        if stored.endswith("_packed") and stored.removesuffix("_packed") not in found:
            raise ValueError(f"{source.folder}: {stored}: {dtype} codes of another format than MXFP4")
    return found


def plain_shape(source: Source, name: str, kind: str) -> tuple[int, ...]:
    """Shape of a tensor in plain numbers."""
    if kind == "gpt-oss":
        experts, out, blocks, _ = source.infos[name + "_blocks"][0]
        return experts, blocks * BLOCK_SIZE, out
    shape = source.infos[name + (_MXFP4[kind][0] if kind in _MXFP4 else "")][0]
    return (*shape[:-1], shape[-1] * 2) if kind in _MXFP4 else tuple(shape)


def stored_codes(source: Source, name: str, expert: int | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes uint8 [out, in / 2] and scales uint8 [out, in / 32] of a matrix that is stored in MXFP4; None if it is not.

    Args:
        expert: of a fused tensor (gpt-oss), which one.
    """
    kind = container(source, name)
    if kind not in _MXFP4:
        return None
    codes, scales, _ = (name + suffix for suffix in (*_MXFP4[kind][:2], ""))
    if kind == "gpt-oss":
        return source.read(codes)[expert].flatten(-2), source.read(scales)[expert]
    return source.read(codes).view(torch.uint8), source.read(scales)


def read_plain(source: Source, name: str, dtype: torch.dtype, config=None, rows: range | None = None) -> torch.Tensor:
    """A tensor in plain numbers, decoded in float32 and then cast.

    Args:
        rows: of dimension 0, which alone are read (of FP8 matrices, whole blocks of 128 rows); None: all.

    Raises:
        ValueError: it is not there, or stored in a way that is not read here.
    """
    kind = container(source, name)
    if kind is None:
        if source.infos.get(name, (0, None))[1] == "U8":
            source.shape(name + "_scale")  # says that it is missing
        raise ValueError(f"{source.folder}: {name}: dtype {source.read(name).dtype}, expected a float, FP8 E4M3 or packed "
                         "MXFP4")
    if kind == "fp8":
        return _read_fp8(source, name, config, rows).to(dtype)

    def read(stored: str) -> torch.Tensor:
        return source.read(stored) if rows is None else source.run(stored, 0, rows.start, len(rows))

    if kind == "plain":
        tensor = read(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor
    codes, scales = (read(name + suffix) for suffix in _MXFP4[kind][:2])
    if kind == "gpt-oss":
        out = torch.empty(len(codes), codes.shape[2] * BLOCK_SIZE, codes.shape[1], dtype=dtype)
        for expert, whole in enumerate(out):
            whole.copy_(dequantize(codes[expert].flatten(-2), scales[expert], dtype=dtype).T)
        return out
    return dequantize(codes.view(torch.uint8), scales, dtype=dtype)


def _read_fp8(source: Source, name: str, config, rows: range | None) -> torch.Tensor:
    height = source.shape(name)[0]
    if rows is None or len(qkv_scale_rows(name, height, config)) > 1:  # the grid restarts within the rows
        whole = dequantize_fp8(name, source.read(name), source.read(name + "_scale_inv"), config)
        return whole if rows is None else whole[rows.start:rows.stop].clone()
    require_grid(name, source.shape(name + "_scale_inv"), [height], source.shape(name)[1])
    first, last = rows.start // FP8_BLOCK, -(-rows.stop // FP8_BLOCK)
    top, bottom = first * FP8_BLOCK, min(last * FP8_BLOCK, height)
    weight, scales = source.run(name, 0, top, bottom - top), source.run(name + "_scale_inv", 0, first, last - first)
    return dequantize_fp8(name, weight, scales)[rows.start - top:rows.stop - top].clone()


class Decoded:
    """A tensor that is decoded when somebody takes it: `tensor[...]`, as transformers' loader takes a file's slices.

    Of a slice of the first dimension only those rows are read.
    """

    def __init__(self, source: Source, name: str):
        kind = container(source, name)
        stored = {"plain": DTYPES.get(source.infos.get(name, (0, ""))[1]), "fp8": torch.float32}
        self.dtype = stored.get(kind, torch.bfloat16)  # which holds MXFP4 exactly
        self.shape = torch.Size(plain_shape(source, name, kind))
        self.source, self._of = source, (source, name, self.dtype)

    def __getitem__(self, index) -> torch.Tensor:
        first = index[0] if isinstance(index, tuple) and index else index
        if not self.shape or not isinstance(first, slice) or first.step not in (None, 1):
            return read_plain(*self._of)[index]
        start, stop, _ = first.indices(self.shape[0])
        rows = read_plain(*self._of, rows=None if stop - start == self.shape[0] else range(start, max(start, stop)))
        return rows[(slice(None), *index[1:])] if isinstance(index, tuple) else rows

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


class DecodedExperts:
    """A fused expert tensor [experts, ., .] of a checkpoint that has one matrix per expert, put together when somebody takes
    experts of it: nothing else is read.

    Args:
        parts: of each expert, the names of its matrices and the rows of [., .] that they are.
    """

    def __init__(self, source: Source, parts: list[list[tuple[str, slice]]], shape: tuple[int, ...], dtype: torch.dtype):
        self.source, self.parts, self.shape, self.dtype = source, parts, torch.Size(shape), dtype

    def __getitem__(self, index) -> torch.Tensor:
        first, *rest = index if isinstance(index, tuple) and index else (slice(None),)
        chosen = self.parts[first]
        out = torch.empty((len(chosen), *self.shape[1:]), dtype=self.dtype)
        for expert, parts in zip(out, chosen, strict=True):
            for name, rows in parts:
                expert[rows] = read_plain(self.source, name, self.dtype)
        return out[(slice(None), *rest)]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
