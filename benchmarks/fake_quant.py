"""Speed and memory of MXFP4 fake quantization on a CPU, beside the installed peers.

    python benchmarks/fake_quant.py [--threads 2] [--json docs/results/fake-quant.json]

Weights N(0, 0.02) of 4096 x 2048. Each implementation and dtype runs alone in a process of its own, so that neither another
one's memory nor its compiler threads count. Every output is compared with the reference codec bit for bit (peers: under
their own rule); when ours differs, no number is printed. Times are medians of the whole call including the allocation of
its result, except `into existing memory`, which is what a training step does; processor time on one thread, by the clock on
several. Whether the allocator keeps large blocks (the Makefile's jobs tell it to, by MALLOC_MMAP_THRESHOLD_) decides what a
new result costs, so those settings are recorded. Extra memory is the peak of resident memory
above the start, the result included.

Rejected: one process for all (the peaks and the heap of one peer show up in the next); float64 accuracy instead of bits
(an off-by-one scale on one block in a thousand is invisible in a mean).
"""

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository root instead of this file's folder, so that the project is importable

SHAPE = (4096, 2048)
DTYPES = ("bfloat16", "float32")
OURS = [f"ours {rule}" for rule in ("floor", "rceil", "even", "mse")]
INTO = [f"{name}, into existing memory" for name in OURS]
PEERS = {
    "torchao rceil, torch.compile": ("torchao", "rceil"),
    "torchao rceil": ("torchao", "rceil"),
    "torchao even": ("torchao", "even"),
    "torchao floor": ("torchao", "floor"),
    "compressed-tensors even": ("compressed-tensors", "even"),
}
COPY = "plain copy"


def implementation(name: str, w):
    """A function of no arguments that returns the fake-quantized `w`, and the rule it follows (None for the copy)."""
    import torch

    if name == COPY:
        out = torch.empty_like(w)
        return (lambda: out.copy_(w)), None
    if name in OURS:
        from mxfp4 import fake_quantize

        rule = name.split()[1]
        return (lambda: fake_quantize(w, scale_rule=rule)), rule
    if name in INTO:
        from mxfp4 import fake_quantize_

        rule = name.removesuffix(", into existing memory").split()[1]
        out = torch.empty_like(w)
        return (lambda: fake_quantize_(out, w, scale_rule=rule)), rule
    package, rule = PEERS[name]
    return (torchao(w, rule, "compile" in name) if package == "torchao" else compressed_tensors(w)), rule


def torchao(w, rule: str, compiled: bool):
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    def call(x):
        scales, codes = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[rule.upper()])
        return to_dtype(codes, scales, torch.float4_e2m1fn_x2, 32, x.dtype)

    function = torch.compile(call) if compiled else call
    return lambda: function(w)


def compressed_tensors(w):
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8,
        zp_dtype=torch.uint8,
    )

    def call():
        low, high = torch.aminmax(w.unflatten(-1, (-1, 32)), dim=-1)
        scale, zero_point = calculate_qparams(low, high, args)
        return fake_quantize(w, scale, zero_point, args)

    return call


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM of this process in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def run_worker(name: str, dtype: str, threads: int, seconds: float) -> dict:
    """Measures one implementation in this process."""
    import torch

    from mxfp4 import dequantize, quantize

    torch.set_num_threads(threads)
    w = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02).to(getattr(torch, dtype))
    call, rule = implementation(name, w)
    expected = w if rule is None else dequantize(*quantize(w, scale_rule=rule), dtype=w.dtype)
    bits = torch.int16 if w.element_size() == 2 else torch.int32
    differing = int((call().view(bits) != expected.view(bits)).sum())
    del expected
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    call()
    extra = memory_mib("VmHWM") - before
    times, clock = [], time.process_time if threads == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = clock()
        call()
        times.append((clock() - start) * 1e3)
    return {
        "name": name, "dtype": dtype, "rule": rule, "median_ms": statistics.median(times), "min_ms": min(times),
        "repetitions": len(times), "extra_mib": extra, "tensor_mib": w.nbytes / 2**20,
        "differing_elements": differing,
    }


def measure(name: str, dtype: str, threads: int, seconds: float) -> dict | None:
    """Runs one worker process; None where the peer is not installed."""
    if name in PEERS:
        try:
            importlib.metadata.version(PEERS[name][0])
        except importlib.metadata.PackageNotFoundError:
            return None
    command = [sys.executable, __file__, "--worker", name, "--dtype", dtype, "--threads", str(threads),
               "--seconds", str(seconds)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{name}, {dtype} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def add_ratios(rows: list[dict]) -> None:
    """Adds, per dtype, the ratios to the fastest peer and to the copy."""
    for dtype in DTYPES:
        same = [row for row in rows if row["dtype"] == dtype]
        copy = next(row for row in same if row["name"] == COPY)
        fastest = min((row for row in same if row["name"] in PEERS), key=lambda row: row["median_ms"], default=None)
        for row in same:
            row["times_copy"] = row["median_ms"] / copy["median_ms"]
            row["speedup_over_fastest_peer"] = fastest["median_ms"] / row["median_ms"] if fastest else math.nan
            row["extra_over_tensor"] = row["extra_mib"] / row["tensor_mib"]


def environment(threads: int) -> dict:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine())
    return {
        "command": "python benchmarks/fake_quant.py " + " ".join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": f"{model}, {os.cpu_count()} cores", "threads": threads,
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "torchao", "compressed-tensors")},
        "git_revision": git("rev-parse", "HEAD"),
        "git_modified": bool(git("status", "--porcelain", "--", "mxfp4", "benchmarks/fake_quant.py")),
    }


def show(rows: list[dict], shape: tuple[int, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"MXFP4 fake quantization, {shape[0]} x {shape[1]}")
    for column in ("implementation", "dtype", "median ms", "x fastest peer", "x copy", "extra / tensor", "equals codec"):
        table.add_column(column, justify="left" if column in ("implementation", "dtype") else "right")
    for row in rows:
        differing = row["differing_elements"]
        equal = "-" if row["rule"] is None else f"{differing} differ" if differing else "yes"
        table.add_row(row["name"], row["dtype"], f"{row['median_ms']:.2f}", f"{row['speedup_over_fastest_peer']:.1f}",
                      f"{row['times_copy']:.1f}", f"{row['extra_over_tensor']:.2f}", equal)
    Console(width=120).print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed and memory of MXFP4 fake quantization beside installed peers.")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each implementation and dtype")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(run_worker(args.worker, args.dtype, args.threads, args.seconds)))
        return 0
    facts = environment(args.threads)
    rows = []
    for dtype in DTYPES:
        for name in [COPY, *OURS, *INTO, *PEERS]:
            row = measure(name, dtype, args.threads, args.seconds)
            if row:
                rows.append(row)
    wrong = [row for row in rows if row["name"] in (*OURS, *INTO) and row["differing_elements"]]
    if wrong:
        for row in wrong:
            print(f"{row['name']}, {row['dtype']}: {row['differing_elements']} elements differ from the reference codec",
                  file=sys.stderr)
        return 1
    add_ratios(rows)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.json.with_suffix(".tmp")
        temporary.write_text(json.dumps({**facts, "shape": SHAPE, "rows": rows}, indent=1) + "\n")
        temporary.replace(args.json)
    show(rows, SHAPE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
