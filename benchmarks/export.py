#!/usr/bin/env python
"""Speed and memory of an export beside a plain copy of the same bytes: `python benchmarks/export.py [--gb 8] [--json FILE]`.

A synthetic training checkpoint (fused bf16 experts on the MXFP4 grid) is written to --folder, copied file by file (written
through to the disk, as the export does), and exported by one writer and by two. Each export runs in a process of its own, so
that its peak memory can be read. "writing" is the time until all weight files are on disk; "in all" includes the card, the
checksums and the verification, which reads sources and result once more and decodes every expert. All contestants take
turns, --repeats times; figures are medians, with the processor seconds of each beside the wall clock, which says little on a
machine with other jobs.

Nothing is printed if an export does not verify. The page cache is warm for all contestants alike.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Launched by path, Python puts this script's folder first on sys.path.
sys.path[0] = str(Path(__file__).resolve().parents[1])

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, INNER, EXPERTS = 2048, 1024, 64
RECIPE = """
name: benchmark
output: {folder}/runs
model: {{path: {folder}/weights}}
data: {{train: [none], heldout: [none]}}
qat: {{steps: 1}}
"""


def build(folder: Path, layers: int) -> int:
    """Writes the checkpoint, a file per layer; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from modeling.configuration_mimo_v2 import MiMoV2Config
    from modeling.names import published_tensors
    from mxfp4 import fake_quantize

    config = MiMoV2Config(
        vocab_size=4096, hidden_size=HIDDEN, num_hidden_layers=layers, hybrid_layer_pattern=[i % 2 for i in range(layers)],
        moe_layer_freq=[1] * layers, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=INNER, n_routed_experts=EXPERTS, num_experts_per_tok=4, add_swa_attention_sink_bias=True,
        attention_projection_layout="fused_qkv", partial_rotary_factor=0.5)
    weights = folder / "weights"
    weights.mkdir(parents=True)
    settings = {k: v for k, v in config.to_dict().items() if v is not None} | {"model_type": "mimo_v2"}
    (weights / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    up = fake_quantize(torch.randn(2 * INNER, HIDDEN, generator=generator).bfloat16())
    down = fake_quantize(torch.randn(HIDDEN, INNER, generator=generator).bfloat16())
    files: dict[str, dict] = {}
    for tensor in published_tensors(config, experts="bf16", dense="bf16", router="BF16"):
        match = re.search(r"layers\.(\d+)\.", tensor.name)
        file = files.setdefault(f"model-{match[1] if match else 'rest'}.safetensors", {})
        if ".experts." not in tensor.name:
            dtype = torch.float32 if tensor.dtype == "F32" else torch.bfloat16
            file[tensor.name] = torch.randn(tensor.shape, generator=generator).to(dtype)
    for layer in range(layers):
        prefix, file = f"model.layers.{layer}.mlp.experts", files[f"model-{layer}.safetensors"]
        file[f"{prefix}.gate_up_proj"] = torch.stack([up.roll(32 * e, 1) for e in range(EXPERTS)])
        file[f"{prefix}.down_proj"] = torch.stack([down.roll(32 * e, 1) for e in range(EXPERTS)])
        save_file(file, weights / f"model-{layer}.safetensors")
        files[f"model-{layer}.safetensors"] = dict.fromkeys(file)
    save_file(files["model-rest.safetensors"], weights / "model-rest.safetensors")
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "benchmark.yaml").write_text(RECIPE.format(folder=folder))
    return sum(p.stat().st_size for p in weights.glob("*.safetensors"))


def plain_copy(folder: Path) -> tuple[float, float]:
    """Seconds to copy all weight files, written through, by the clock and of processor time."""
    target = folder / "copy"
    target.mkdir()
    began, worked = time.perf_counter(), time.process_time()
    for path in sorted((folder / "weights").glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    shutil.rmtree(target)
    return seconds, worked


def export(folder: Path, processes: int) -> dict:
    """Seconds of writing and in all, and peak memory of the largest process.

    Raises:
        RuntimeError: the export did not verify.
    """
    out = folder / f"out-{processes}"
    command = [sys.executable, str(ROOT / "export/to_hf.py"), str(folder / "benchmark.yaml"), "--weights",
               str(folder / "weights"), "--out", str(out), "--processes", str(processes), "export.shard_bytes=500000000"]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this process and of the writers it waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    match = re.search(r"([\d.]+) s writing, ([\d.]+) s in all", text)
    if process.returncode or match is None:
        raise RuntimeError(f"export with {processes} processes failed: {text[-1000:]}")
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return {"processes": processes, "writing_seconds": float(match[1]), "seconds": float(match[2]), "written_bytes": written,
            "peak_bytes": 1024 * usage.ru_maxrss, "processor_seconds": usage.ru_utime + usage.ru_stime}


def medians(rows: list[dict]) -> dict:
    """The median of every figure."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/export.py", description="Export against a plain copy.")
    parser.add_argument("--gb", type=float, default=1.6, help="size of the synthetic checkpoint (default 1.6; target: 8)")
    parser.add_argument("--folder", type=Path, default=Path("build/export-benchmark"), help="scratch folder")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant (default 3)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)
    layers = max(1, round(args.gb * 1e9 / (EXPERTS * 3 * HIDDEN * INNER * 2)))
    free = shutil.disk_usage(args.folder.parent if args.folder.parent.is_dir() else Path(".")).free
    if free < 3 * args.gb * 1e9:
        print(f"error: --gb {args.gb}: needs {3 * args.gb:.0f} GB of disk, {free / 1e9:.0f} GB are free", file=sys.stderr)
        return 2
    shutil.rmtree(args.folder, ignore_errors=True)
    try:
        # In a process of its own: a child's peak memory begins with what its parent has.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size = pool.apply(build, (args.folder.resolve(), layers))
        folder, copies, exports = args.folder.resolve(), [], {1: [], 2: []}
        for _ in range(args.repeats):
            copies.append(plain_copy(folder))
            for processes, runs in exports.items():
                runs.append(export(folder, processes))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    copy, worked = (statistics.median(figures) for figures in zip(*copies, strict=True))
    rows = [medians(runs) for runs in exports.values()]
    print(f"{size / 1e9:.2f} GB training checkpoint; plain copy {copy:.1f} s = {size / copy / 1e6:,.0f} MB/s, processor "
          f"{worked:.1f} s; medians of {args.repeats}")
    for row in rows:
        writing = row["writing_seconds"]
        print(f"{row['processes']} writer(s): writing {writing:.1f} s = {size / writing / 1e6:,.0f} MB/s = "
              f"{100 * copy / writing:.0f} % of the copy; verified {row['seconds']:.1f} s in all = "
              f"{100 * copy / row['seconds']:.0f} % of the copy; processor {row['processor_seconds']:.1f} s; peak memory "
              f"{row['peak_bytes'] / 1e9:.2f} GB")
    if args.json is not None:
        from training.report import environment

        facts = {k: v for k, v in environment().items() if k != "command"}
        figures = {"environment": facts, "load_average": os.getloadavg()[0], "bytes": size, "copy_seconds": copy,
                   "copy_processor_seconds": worked, "repeats": args.repeats,
                   "exports": rows, "command": " ".join(["python", "benchmarks/export.py", *argv])}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
