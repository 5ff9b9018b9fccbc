"""The compiled ops (`ops.c`): how they are built, and the structures that they read.

The source is compiled once per machine with the system's C compiler (GCC; `CC` overrides it) and kept in the user's cache
folder, under a name that says which source, compiler, flags and processor made it. Where that is not possible, the torch
backend serves, and `compiled_ops` says why. Rejected: a wheel with binaries (the kernels are for the CPU at hand); torch's
extension loader (it takes half a minute to include headers that these ops do not need).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from storage.cache import is_own_file, user_cache
from storage.files import write_text
from storage.reading import first_line, sha256

SOURCE = Path(__file__).with_name("ops.c")
SOURCES = (SOURCE, SOURCE.with_name("experts.h"), SOURCE.with_name("bf16_dots.h"))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
LANES = 16
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
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None, f"no C compiler ({os.environ.get('CC', 'cc')}) on this machine"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    made_of = "\n".join((*(file.read_text(encoding="utf-8") for file in SOURCES), " ".join(flags), version, _processor()))
    name = f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:20]}.so"
    try:
        home, temporary = user_cache(), False
    except OSError:  # nothing can be kept, or what is kept could be another user's
        home, temporary = Path(tempfile.mkdtemp(prefix="fp4-dflash-")), True
    try:
        file = home / name
        reason = None if _is_whole(file) else _compile(compiler, flags, file)
        return (_declared(ctypes.CDLL(str(file))), "") if reason is None else (None, reason)
    except (OSError, AttributeError) as error:  # for example a folder that programs may not be loaded from
        return None, f"{file}: cannot be loaded: {first_line(error)}"
    finally:
        if temporary:  # what is loaded stays loaded
            shutil.rmtree(home, ignore_errors=True)


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


def _sum_file(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _is_whole(file: Path) -> bool:
    """Whether `file` is what was compiled, by this user: to load half a library ends the process (SIGBUS)."""
    known = _sum_file(file)
    return is_own_file(file) and is_own_file(known) and known.read_bytes().decode("ascii", "replace") == sha256(file)


def has_bf16_dot(dtype: torch.dtype) -> bool:
    """Whether an engine in this dtype multiplies by bf16 dot products here."""
    return dtype is torch.bfloat16 and bool(compiled_ops()[0].has_dots())


def _processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU ")))


def _compile(compiler: str, flags: tuple[str, ...], file: Path) -> str | None:
    """Builds `file`; what went wrong, or None. Several processes may do so at once: each renames its own."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        done = subprocess.run([compiler, *flags, "-o", str(aside), str(SOURCE), "-lm"], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
            return f"{compiler} cannot compile {SOURCE.name}: {lines[0].strip()}"
        aside.chmod(0o700)
        write_text(_sum_file(file), sha256(aside))
        _sum_file(file).chmod(0o600)
        aside.replace(file)
    except OSError as error:
        return f"{file.parent}: {error.strerror}"
    return None


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
                 "halves": self.rows * self.H + 16 * max(self.width, step.fc.k, self.group * self.head)}
        kinds = {"index": torch.int32, "list": torch.int32, "halves": torch.int16}
        for name in self.NAMES:
            self.tensors[name] = torch.zeros(sizes[name], dtype=kinds.get(name, torch.float32))
            setattr(step, name, self.tensors[name].data_ptr())
