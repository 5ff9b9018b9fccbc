"""A Triton backend whose device is this machine's CPU: kernels are launched as on a GPU, and compiled from their TTIR to C.

    from runtime_ref.triton_cpu.backend import use_host
    use_host()                       # from here on kernel[grid](...) takes tensors on the CPU

Front end, specialization, caches and launches are Triton's; options and passes up to TTIR are those of its backend for sm_90,
so what runs here is the IR that a Hopper GPU's compiler would start from, inline PTX included. `c_code` says what the C does
and what it cannot show.

Speed: a step of one row of the embedded model takes 14 ms, in Triton's interpreter 6.3 s. The first launch of a kernel with new
constants compiles it for half a second; Triton keeps the result in its cache folder.

Rejected: the interpreter for whole engines (seconds per token), triton-cpu (not published as a wheel).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from runtime_ref.triton_cpu import c_code, c_prelude, elements, emitter, ptx_code, ttir

# The GPU whose front end and passes are used.
LIKE = GPUTarget("cuda", 90, 32)
TARGET = GPUTarget("host", 90, 1)
FLAGS = ("-O1", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native", "-fno-math-errno", "-ffp-contract=off",
         "-fno-trapping-math", "-std=gnu11", "-shared", "-fPIC", "-pthread")
# FP4_KERNEL_BOUNDS=1: an access outside of a kernel's tensors is an error that says where, at a fifth of the speed.
BOUNDS = os.environ.get("FP4_KERNEL_BOUNDS") == "1"
if BOUNDS:
    FLAGS += ("-DBOUNDS",)
MOST_THREADS = 1 << 20  # per program, as the check of Triton's launcher counts them


def compiler() -> str:
    """Path of the C compiler (`CC`, else cc).

    Raises:
        ValueError: there is none.
    """
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None:
        raise ValueError(f"kernels on the CPU need a C compiler, and {os.environ.get('CC', 'cc')} is not on PATH; expected gcc")
    return found


@functools.cache
def _made_of() -> str:
    """What the C of a kernel, and what becomes of it, depends on beside the kernel."""
    modules = ttir, c_code, c_prelude, elements, emitter, ptx_code
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
    return hashlib.sha256("\n".join((*texts, *FLAGS, version)).encode()).hexdigest()


def compile_c(source: str) -> bytes:
    """A shared library. Kernels that differ only in what Triton promises of their arguments have the same C, compiled once.

    Raises:
        RuntimeError: the compiler refuses the source (a mistake of `c_code`).
    """
    kept, name = get_cache_manager(hashlib.sha256((source + _made_of()).encode()).hexdigest()), "kernel.so"
    found = kept.get_file(name)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
            file, made = Path(folder, "kernel.c"), Path(folder, name)
            file.write_text(source, encoding="utf-8")
            done = subprocess.run([compiler(), *FLAGS, str(file), "-o", str(made), "-lm"], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError("the C of a kernel does not compile: " + "\n".join(done.stderr.splitlines()[:5]))
            found = kept.put(made.read_bytes(), name)
    return Path(found).read_bytes()


class HostBackend(CUDABackend):
    """TTIR as for `LIKE`, then C, then a shared library."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "so"
        self.like = CUDABackend(LIKE)

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == TARGET.backend

    def hash(self) -> str:
        return f"host-{_made_of()}"

    def parse_options(self, opts: dict):
        return self.like.parse_options(opts)

    def get_codegen_implementation(self, options):
        return self.like.get_codegen_implementation(options)

    def add_stages(self, stages: dict, options, language) -> None:
        def to_ttir(module, metadata: dict):
            return self.like.make_ttir(module, metadata, options, LIKE.arch)

        def to_c(module, metadata: dict) -> str:
            function = ttir.parse(module.str_nodebug())
            metadata |= {"name": function.name, "shared": 0}
            return c_code.c_source(function)

        stages |= {"ttir": to_ttir, "c": to_c, "so": lambda source, metadata: compile_c(source)}


class _Utils:
    """What Triton asks of a driver about binaries and devices."""

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
        handle, path = tempfile.mkstemp(prefix="kernel-", suffix=".so")
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        loaded = ctypes.CDLL(path)
        os.unlink(path)
        loaded.launch.argtypes, loaded.launch.restype = [ctypes.c_int] * 5 + [ctypes.c_void_p], ctypes.c_int
        if BOUNDS:
            loaded.set_bounds.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
            loaded.found_fault.restype = ctypes.POINTER(ctypes.c_int64)
        loaded.launch.loaded = loaded
        return loaded, loaded.launch, 0, 0, MOST_THREADS

    @staticmethod
    def get_device_properties(device: int) -> dict:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": os.cpu_count() or 1, "warpSize": 1}


class _Slot(ctypes.Union):
    _fields_ = [("i", ctypes.c_int64), ("f", ctypes.c_double), ("p", ctypes.c_void_p)]


class HostLauncher:
    """Called by Triton for every launch of one compiled kernel.

    only: (program, programs) if this process is to be one program of every launch, as a harness wants that makes programs of
    processes.
    """

    only: tuple[int, int] | None = None

    def __init__(self, source, metadata):
        self.name, self.names, self.kinds = metadata.name, list(source.signature), list(source.signature.values())
        self.together = bool(metadata.launch_cooperative_grid)
        self.slots = _Slot * max(1, sum(kind != "constexpr" for kind in self.kinds))

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        slots, at = self.slots(), 0
        for kind, value in zip(self.kinds, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind[0] == "*":
                slots[at].p = 0 if value is None else value.data_ptr()
            elif kind[0] in "fb":
                slots[at].f = float(value)
            else:
                slots[at].i = int(value)
            at += 1
        program, x = self.only or (-1, x)
        if BOUNDS:
            ends = self._bound(function.loaded, arguments)
        if function(program, x, y, z, self.together, ctypes.addressof(slots)):
            raise RuntimeError(f"{x * y * z} programs at once: the system does not give as many threads")
        if BOUNDS:
            self._check(function.loaded, ends)

    def _bound(self, loaded, arguments) -> list[tuple[str, int, int]]:
        """Tells the kernel where its tensors lie; returns name, first and last address of each."""
        ends = [(name, t.data_ptr(), t.data_ptr() + t.element_size() * (1 + sum(
            (n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))))
            for name, t in zip(self.names, arguments, strict=True) if hasattr(t, "data_ptr") and t.numel()]
        loaded.set_bounds(len(ends), (ctypes.c_int64 * (2 * len(ends)))(*(end for _, *pair in ends for end in pair)))
        return ends

    def _check(self, loaded, ends: list[tuple[str, int, int]]) -> None:
        """Raises IndexError if the launch has left its tensors."""
        kind, at, size, *program = loaded.found_fault()[:6]
        if not kind:
            return
        name, low, high = min(ends, key=lambda end: max(end[1] - at, at + size - end[2]))
        where = f"{at + size - high} bytes behind the end" if at + size > high else f"{low - at} bytes before the beginning"
        raise IndexError(f"{self.name}, program {tuple(program)}: {c_code.ACCESSES[kind]} of {size} bytes {where} of {name}, "
                         "the nearest tensor")


class HostDriver(DriverBase):
    utils = _Utils
    launcher_cls = HostLauncher

    @staticmethod
    def is_active() -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("times of kernels on a CPU say nothing about a GPU")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return elements.c_type(ty.replace("*", "ptr:"))


def use_host() -> None:
    """Kernels launched from now on in this process run on the CPU. With TRITON_INTERPRET=1 the interpreter keeps them.

    Raises:
        ValueError: no C compiler.
    """
    compiler()
    backends[TARGET.backend] = Backend(HostBackend, HostDriver)
    driver.set_active(HostDriver())


@contextlib.contextmanager
def on_host():
    """`use_host` for a while."""
    before = driver._active
    use_host()
    try:
        yield
    finally:
        driver._active = before
