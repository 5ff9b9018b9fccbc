"""The compiled ops (`ops.c`): their functions and the structures that they read.

Where they cannot be compiled (`storage.compiled`), the torch backend serves, and `compiled_ops` says why.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path

import torch

from storage.compiled import FLAGS, load_compiled

SOURCES = tuple(Path(__file__).with_name(name) for name in ("ops.c", "experts.h", "bf16_dots.h"))
LANES = 16
TOGETHER = 32  # rows whose rounded copies lie side by side, as in ops.c
ALIGNED, LARGE_PAGE = 64, 1 << 21
BLOCK_BYTES = 1 << 24  # of what holds matrices one behind the other
OPS = ("embed", "input_norm", "post_norm", "final_norm", "project", "write", "attend", "merge_heads", "add_attention",
       "add_mlp", "dense_mlp", "route", "experts", "target_hidden", "pick_rows", "head", "fuse", "project_kv",
       "convolve_attention", "convolve_mlp", "best")
OP = {name: i for i, name in enumerate(OPS)}

_pointer, _integer, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Matrix(ctypes.Structure):
    _fields_ = [("data", _pointer), ("scales", _pointer), *((name, _integer) for name in ("form", "n", "k"))]


class PackedMatrix(ctypes.Structure):
    _fields_ = [("codes", _pointer), ("scales", _pointer), ("code_stride", _integer), ("scale_stride", _integer)]


class Expert(ctypes.Structure):
    _fields_ = [(name, PackedMatrix) for name in ("gate", "up", "down")]


class Layer(ctypes.Structure):
    _fields_ = [("qkv", Matrix), ("kv", Matrix), ("o", ctypes.POINTER(Matrix)), ("gate_up", Matrix),
                ("down", ctypes.POINTER(Matrix)), ("router", Matrix), ("convolutions", ctypes.POINTER(Matrix)),
                *((name, _pointer) for name in ("input_norm", "post_norm", "q_norm", "k_norm", "sink", "cos", "sin",
                                                "correction", "keys", "values")),
                ("experts", ctypes.POINTER(Expert)),
                *((name, _integer) for name in ("slots", "kind", "Q", "K", "D", "V", "Dp", "Vp", "rotated", "parts",
                                                "mlp_parts", "inner", "width", "column", "count", "top", "softmax",
                                                "normalize", "groups", "group_top")),
                *((name, _real) for name in ("q_scale", "value_scale", "epsilon", "factor"))]


class Step(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(Layer)), ("embed", _pointer), ("mask", _pointer), ("norm", _pointer),
                ("head", Matrix), ("fc", Matrix),
                *((name, _integer) for name in ("H", "R", "bf16", "bf16_dot", "wanted", "gathered_parts")),
                ("epsilon", _real), ("unused", _real),
                *((name, _pointer) for name in ("ids", "positions", "low", "high", "table_at", "table_first", "tables", "slots",
                                                "head_rows", "x", "y", "qkv", "heads", "partial", "inner", "weight", "scratch",
                                                "logits", "gathered", "features", "target_hidden", "index", "list",
                                                "halves")),
                ("hidden_stride", _integer), ("hidden_place", _pointer), ("numbers", _pointer),
                *((name, _integer) for name in ("rows", "kinds", "pages", "picks")),
                ("best", _pointer), ("chance", _pointer), ("vocabulary", _integer)]


class Drafted(ctypes.Structure):
    _fields_ = [("row", _integer), ("drafts", _integer), ("worth", _real), ("kept", ctypes.c_int32), ("truth", _pointer)]


@functools.cache
def compiled_ops(flags: tuple[str, ...] = FLAGS) -> tuple[ctypes.CDLL | None, str]:
    """(the compiled ops, "") or (None, why there are none, in one line)."""
    found, reason = load_compiled(SOURCES, flags)
    return (None if found is None else _declared(found)), reason


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' types, prepared."""
    found.run.argtypes = [ctypes.POINTER(Step), ctypes.c_void_p, ctypes.c_int64]
    found.run.restype = None
    found.run_round.argtypes = [*(ctypes.POINTER(Step), ctypes.c_void_p, ctypes.c_int64) * 3, ctypes.POINTER(Drafted),
                                ctypes.c_int64, ctypes.c_void_p]
    found.run_round.restype = None
    found.decode_rows.argtypes = [ctypes.POINTER(PackedMatrix), _integer, _integer, _pointer]
    found.decode_rows.restype = None
    found.prepare()
    found.has_dots.restype = ctypes.c_int
    if found.has_dots():
        found.decode_panels.argtypes, found.decode_panels.restype = found.decode_rows.argtypes, None
    return found


def has_bf16_dot(dtype: torch.dtype) -> bool:
    """Whether an engine in this dtype multiplies by bf16 dot products here."""
    return dtype is torch.bfloat16 and bool(compiled_ops()[0].has_dots())


def up(n: int) -> int:
    """The next multiple of a vector's lanes."""
    return -(-n // LANES) * LANES


def pad(w: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros behind `dim` up to a multiple of the lanes."""
    missing = up(w.shape[dim]) - w.shape[dim]
    if not missing:
        return w
    shape = list(w.shape)
    shape[dim] = missing
    return torch.cat((w, w.new_zeros(shape)), dim)


class Memory:
    """Builds structures and keeps what they point to.

    `bf16_dot`: in the forms that bf16 dot products read; `int8`: matrices rounded to bytes, each row by its own scale.
    """

    def __init__(self, bf16_dot: bool = False, int8: bool = False):
        self.held: list = []
        self.bf16_dot, self.int8 = bf16_dot, int8
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def _place(self, *parts: torch.Tensor) -> list[int]:
        """Addresses of copies, one behind the other in the order of the calls: the ops fetch ahead, beyond a matrix's end."""
        addresses = []
        for part in parts:
            raw = part.contiguous().view(-1).view(torch.uint8)
            size = -(-raw.numel() // ALIGNED) * ALIGNED
            if self._used + size > self._block.numel():
                self._block, self._used = _huge(max(BLOCK_BYTES, size)), 0
                self.held.append(self._block)
            self._block[self._used:self._used + raw.numel()] = raw
            addresses.append(self._block.data_ptr() + self._used)
            self._used += size
        return addresses

    def pointer(self, t: torch.Tensor | None) -> int | None:
        """Address of a float32 tensor's data (None: none)."""
        if t is None:
            return None
        t = t.detach().contiguous()
        self.held.append(t)
        return t.data_ptr()

    def matrix(self, w: torch.Tensor) -> Matrix:
        """Panels of w [n, k] float32, in bf16 if every value is exact there."""
        n, k = w.shape
        if self.int8 and k % LANES == 0:
            return self._int8_panels(pad(w, 0))
        panels = pad(w, 0).view(-1, LANES, k).transpose(1, 2).contiguous()
        kept = panels.to(torch.bfloat16)
        form = 2 if self.bf16_dot and k % LANES == 0 else 1
        if not bool((kept.float() == panels).all()):
            kept, form = panels, 0
        if form == 2:
            kept = kept.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
        return Matrix(*self._place(kept), None, form, up(n), k)

    def _int8_panels(self, w: torch.Tensor) -> Matrix:
        """Panels of w [n, k] rounded to bytes."""
        n, k = w.shape
        scales = w.abs().amax(1) / 127
        codes = (w / scales.clamp_min(torch.finfo(w.dtype).tiny)[:, None]).round().to(torch.int8)
        panels = codes.view(-1, LANES, k // 4, 4).transpose(1, 2).contiguous()
        beside = torch.cat((scales.view(torch.int32), 128 * codes.sum(1, dtype=torch.int32)))
        self.held.append(beside)
        return Matrix(*self._place(panels), beside.data_ptr(), 3, n, k)

    def matrices(self, parts: list[torch.Tensor]):
        array = (Matrix * len(parts))(*(self.matrix(w) for w in parts))
        self.held.append(array)
        return array

    def experts(self, matrices: list[dict]):
        """Expert structures over packed matrices (`host_weights.Packed`), in place, or a copy of the same codes in panels. Rows
        are padded to whole vectors with codes of zero."""
        array = (Expert * len(matrices))()
        for expert, named in zip(array, matrices, strict=True):
            codes, scales = ([pad(getattr(named[kind], what), 0) for kind in ("gate", "up", "down")]
                             for what in ("codes", "scales"))
            if self.bf16_dot:
                codes, scales = [coded_panels(t) for t in codes], [scale_panels(t) for t in scales]
                code_at, scale_at = self._place(*codes), self._place(*scales)
            else:
                code_at, scale_at = ([t.data_ptr() for t in part] for part in (codes, scales))
                self.held += codes + scales
            for i, kind in enumerate(("gate", "up", "down")):
                setattr(expert, kind, PackedMatrix(code_at[i], scale_at[i], codes[i].stride(0), scales[i].stride(0)))
        self.held.append(array)
        return array


def _huge(size: int) -> torch.Tensor:
    """Memory [size] bytes in large pages where the system has them: a step reads all of it."""
    pages = mmap.mmap(-1, size + LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -whole.data_ptr() % LARGE_PAGE
    return whole[begin:begin + size]


def coded_panels(codes: torch.Tensor) -> torch.Tensor:
    """Packed codes [n, k / 2] as panels [n / 16, 8 * k] for dot products (see bf16_dots.h)."""
    one = torch.stack((codes & 15, codes >> 4), dim=-1).view(codes.shape[0] // LANES, LANES, -1, 4, 2)  # of each eight of k
    one = one.permute(0, 2, 1, 4, 3)
    return (one[..., 0::2] | one[..., 1::2] << 4).flatten(1).contiguous()


def scale_panels(scales: torch.Tensor) -> torch.Tensor:
    """Scale bytes [n, k / 32] as panels [n / 16, k / 32 * 16]."""
    return scales.view(-1, LANES, scales.shape[1]).transpose(1, 2).flatten(1).contiguous()


class Workspace:
    """Scratch memory of one step, grown when a step has more rows or a longer context than any before."""

    NAMES = ("x", "y", "qkv", "heads", "partial", "inner", "weight", "scratch", "index", "list", "halves")

    def __init__(self, layers, H: int):
        self.H, self.rows, self.context = H, 0, 0
        at = [layers[i] for i in range(len(layers))]
        self.qkv = max(layer.qkv.n for layer in at)
        self.heads = max(layer.Q * layer.Vp for layer in at)
        self.parts = max(max(layer.parts, layer.mlp_parts) for layer in at)
        self.top = max(1, *(layer.top for layer in at), 1)
        self.group = max(layer.Q // layer.K for layer in at)
        self.head = max(layer.Dp for layer in at)
        self.width = max(H, self.heads, *(layer.inner + layer.width + LANES for layer in at))
        self.inner = max(max(8 * layer.gate_up.n, 8 * H + 16 * layer.inner + 9 * (layer.width + 64), 10 * layer.router.n + 64)
                         for layer in at)
        self.tensors: dict[str, torch.Tensor] = {}

    def fit(self, step: Step, rows: int, context: int) -> None:
        """Points `step` at enough memory."""
        if rows <= self.rows and context <= self.context:
            return
        self.rows, self.context = max(rows, self.rows, 16), max(2 * context, self.context, 512)
        sizes = {"x": self.rows * self.H, "y": self.rows * self.H, "qkv": self.rows * self.qkv, "heads": self.rows * self.heads,
                 "partial": self.parts * self.rows * self.H, "inner": self.inner, "weight": self.rows * self.top,
                 "scratch": max(max(self.group, 8) * (up(self.context) + 2 * LANES), 4 * up(self.H) + 1024),
                 "index": self.rows * self.top, "list": self.rows * self.top,
                 "halves": self.rows * self.H + 2 * TOGETHER * max(self.width, step.fc.k, self.group * self.head)}
        kinds = {"index": torch.int32, "list": torch.int32, "halves": torch.int16}
        for name in self.NAMES:
            self.tensors[name] = torch.zeros(sizes[name], dtype=kinds.get(name, torch.float32))
            setattr(step, name, self.tensors[name].data_ptr())
