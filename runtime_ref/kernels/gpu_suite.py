"""`bench.py --suite gpu`: every kernel checked on this machine's GPU, then measured; one JSON, under ten minutes.

Correctness first: if a check is red the file holds the checks and no speed. Then pure-read and copy bandwidth of the same
minutes, which are the denominators, then the expert kernel: launch variants at 8 tokens, the token sweep with the best.

A measurement is a CUDA graph of calls with different routings over one layer of 384 experts (850 MB, 17 times the cache), so
that no call finds its experts cached; its time per call includes the gaps between launches. The median of several replays
counts, and all of them are kept. What did not fit into the minutes is listed, not guessed.

Peers (`peers.py`) are measured where they are installed, on the same weights and routings, and last of all: a fault of theirs
that takes the device with it must not take what was measured. The baseline that is always there is torch on the decoded bf16
weights of the same experts.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from modeling.released import released_config
from runtime_ref import roofline
from runtime_ref.kernels import gpu_checks, gpu_steps, peers
from runtime_ref.kernels.experts import Launch, Workspace, run_experts
from runtime_ref.kernels.gpu_page import write_page
from runtime_ref.kernels.gpu_steps import RANKS
from runtime_ref.kernels.repack import SCALE_OFFSET, ExpertPages, Tile
from runtime_ref.written import revision, write

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 540
# Parts of the suite in their order, and seconds that each needs: an earlier one ends where later ones would not fit any more.
PARTS = {"experts": 40, "quantize": 5, "training": 45, "steps": 110, "engine": 35, "peers": 80}
TOKENS = 8
SWEEP = (1, 2, 4, 8, 16, 32, 64)
CALLS, REPLAYS = 32, 7
BANDWIDTH_BYTES = 4 << 30


@triton.jit
def read_kernel(data, out, blocks, BLOCK: tl.constexpr):
    """Reads uint8 [blocks * BLOCK] and writes one sum per program: the pure-read denominator."""
    total = tl.zeros((BLOCK // 4,), tl.int32)
    words = data.to(tl.pointer_type(tl.int32), bitcast=True)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=4):
        total += tl.load(words + block.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
    tl.store(out + tl.program_id(0), tl.sum(total, 0).to(tl.float32))


class Plan:
    """Which parts are wanted, and until when each may begin something; `skipped` is what did not fit."""

    def __init__(self, only: Sequence[str] = ()):
        """only: parts that are wanted, by default all.

        Raises:
            ValueError: a part that is not known.
        """
        unknown = [name for name in only if name not in PARTS]
        if unknown:
            raise ValueError(f"--only: {unknown[0]!r}, expected some of {', '.join(PARTS)}")
        self.wanted, self.skipped = [name for name in PARTS if not only or name in only], []
        self.end = time.monotonic() + SECONDS

    def seconds_left(self, part: str) -> float:
        """Until what comes after `part` would not fit any more."""
        later = [name for name in self.wanted if list(PARTS).index(name) > list(PARTS).index(part)]
        return self.end - time.monotonic() - sum(PARTS[name] for name in later)

    def begins(self, part: str, what: str) -> bool:
        """Whether a part is wanted and fits; if it does not fit, `what` was skipped."""
        if part in self.wanted and self.seconds_left(part) < PARTS[part]:
            self.skipped.append(what)
            return False
        return part in self.wanted


def run(path: Path, checkpoint: Path | None = None, page_path: Path | None = None, only: Sequence[str] = ()) -> int:
    """Runs the suite and writes `path`, and a page if asked to; 1 if a check is red.

    Args:
        checkpoint: an exported folder for the engine end to end.
        only: parts to measure, for whoever tunes one; the checks are always made.

    Raises:
        ValueError: no GPU that runs the kernels, an unknown part.
    """
    if not torch.cuda.is_available():
        raise ValueError("--suite gpu: torch sees no GPU on this machine; --static and --roofline need none")
    if torch.cuda.get_device_capability()[0] < 9:
        raise ValueError(f"--suite gpu: {torch.cuda.get_device_name()} lacks bf16x2 products; expected Hopper or newer")
    plan = Plan(only)
    report = {"device": torch.cuda.get_device_name(), "command": " ".join([Path(sys.executable).name, *sys.argv]),
              "revision": revision(), "date": datetime.datetime.now().isoformat(timespec="seconds"),
              "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
              "parts": plan.wanted, "checks": gpu_checks.check_kernels(), "skipped": plan.skipped}
    red = [check for check in report["checks"] if not check["passed"]]
    for check in report["checks"]:
        print(f"{'ok ' if check['passed'] else 'RED'} {check['name']}: {check['detail']}")
    if not red:
        count = torch.cuda.get_device_properties(0).multi_processor_count
        report["bandwidth"] = _bandwidths(count)
        print(f"pure read {report['bandwidth']['read'] / 1e12:.2f} TB/s, copy {report['bandwidth']['copy'] / 1e12:.2f} TB/s")
        if plan.begins("experts", "experts"):
            report |= measure(plan, count, report["bandwidth"]["read"])
        if plan.begins("quantize", "fused fake quantization"):
            report["fake_quantize"] = gpu_steps.measure_fake_quantize(_time_graph, report["bandwidth"]["copy"])
        if plan.begins("training", "a training step"):
            report["qat_step"] = measure_training(plan)
        report |= measure_whole(plan, checkpoint)
        _write(report, path, page_path)
        if plan.begins("peers", "peers"):
            report |= measure_peers(report.get("sweep", []))
    _write(report, path, page_path)
    print(f"{len(red)} of {len(report['checks'])} checks are red" + (": no speed was measured" if red else f"; {path}"))
    return 1 if red else 0


def _write(report: dict, path: Path, page_path: Path | None) -> None:
    write(path, json.dumps(report, indent=1) + "\n")
    if page_path is not None:
        write_page(report, page_path)


def measure_peers(sweep: list[dict]) -> dict:
    """Peers on the routings of our `sweep`, and ours against the fastest of them."""
    found = peers.available()
    if all(isinstance(peer, str) for _, peer in found):
        return {"peers": {name: {"missing": why} for name, why in found}, "against": []}
    torch.cuda.empty_cache()
    config = released_config("MiMo-V2.5-Pro")
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"] // RANKS, config["n_routed_experts"]
    choices, pages = config["num_experts_per_tok"], _random_pages(experts, hidden, inner, Tile())
    report = peers.measure_peers(
        *peers.checkpoint_layer(pages),
        lambda n: [gpu_checks.random_tokens(n, hidden, experts, choices, seed, "cuda") for seed in range(CALLS)], SWEEP,
        _time_graph, lambda *inputs: gpu_checks.reference(*inputs, pages), found)
    return {"peers": report, "against": peers.against(sweep, report)}


def measure_training(plan: Plan) -> dict:
    """A training step with and without expert QAT, in a process of its own: training is none of the runtime's business."""
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "qat_step.py"), "--device", "cuda", "--json", str(out)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=plan.seconds_left("training"))
        except subprocess.TimeoutExpired as late:
            plan.skipped.append(f"a training step: not done in {late.timeout:.0f} s")
            return {}
        if ran.returncode:
            plan.skipped.append("a training step: " + (ran.stderr.strip().splitlines() or ["no reason given"])[-1])
            return {}
        return json.loads(out.read_text(encoding="utf-8"))


def measure(plan: Plan, count: int, read: float) -> dict:
    """Launch variants of the experts at 8 tokens, then the sweep with the best. read: bytes per second of a pure read."""
    config = released_config("MiMo-V2.5-Pro")
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"] // RANKS, config["n_routed_experts"]
    report = {"experts": [], "refused": [], "sweep": []}
    best = None
    for tile in gpu_checks.up_tiles():
        pages = _random_pages(experts, hidden, inner, tile)
        for launch in gpu_checks.launches(count, tile.rows):
            if not plan.begins("experts", f"8 tokens, {gpu_checks.words(tile, launch)}"):
                continue
            try:
                row = _measure_experts(pages, launch, TOKENS, read)
            except (RuntimeError, TritonError) as error:  # a variant that this card cannot launch ends only itself
                report["refused"].append(f"8 tokens, {gpu_checks.words(tile, launch)}: {error}")
                continue
            report["experts"].append(row)
            if not row["failed"] and (best is None or row["seconds"] < best[0]):
                best = row["seconds"], launch, tile
        del pages
    if best is None:
        return report
    _, launch, tile = best
    pages = _random_pages(experts, hidden, inner, tile)
    for tokens in SWEEP:
        if plan.seconds_left("experts") < 0:
            plan.skipped.append(f"sweep, {tokens} tokens")
            continue
        report["sweep"].append(_measure_experts(pages, launch, tokens, read))
    report["torch_bf16"] = _measure_torch(pages)
    return report


def measure_whole(plan: Plan, checkpoint: Path | None) -> dict:
    """G2, G3 and G5; each only if there is time, and for G5 a checkpoint."""
    report = {}
    torch.cuda.empty_cache()
    if plan.begins("steps", "a rank's step at full geometry"):
        config = gpu_steps.rank_config(released_config("MiMo-V2.5-Pro"), RANKS)
        report["step"] = gpu_steps.measure_steps(config, _time_graph)
    if plan.begins("engine", "the engine end to end"):
        if checkpoint is None:
            plan.skipped.append("the engine end to end: no --checkpoint")
        else:
            report["engine"] = gpu_steps.measure_engine(checkpoint)
    return report


def _random_pages(experts: int, hidden: int, inner: int, tile: Tile) -> ExpertPages:
    """Pages of random codes under scales of 2^-8 to 2^-5, made on the GPU (nothing is repacked)."""
    def fill(row_tiles: int, depth_tiles: int, of: Tile) -> torch.Tensor:
        pages = torch.randint(0, 256, (experts, row_tiles, depth_tiles, of.page_bytes), dtype=torch.uint8, device="cuda")
        tail = pages[..., of.rows * of.depth // 2:]
        least = 119 if of.native else SCALE_OFFSET + 119
        tail.copy_(torch.randint(least, least + 4, tail.shape, dtype=torch.uint8, device="cuda"))
        return pages

    down = gpu_checks.down_tile(tile)
    return ExpertPages(fill(-(-2 * inner // tile.rows), hidden // tile.depth, tile),
                       fill(hidden // down.rows, -(-inner // down.depth), down), tile, down, hidden, inner)


def _bandwidths(count: int) -> dict:
    """Bytes per second of a pure read and of a copy (read plus written)."""
    data = torch.empty(BANDWIDTH_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    other, sums = torch.empty_like(data), torch.empty(8 * count, device="cuda")
    read = [_time(lambda p=programs: read_kernel[(p * count,)](data, sums, data.numel() // 16384, BLOCK=16384), 3)
            for programs in (2, 4, 8)]
    copy = _time(lambda: other.copy_(data), 3)
    return {"read": data.numel() / min(t["seconds"] for t in read), "copy": 2 * data.numel() / copy["seconds"],
            "unit": "bytes per second", "read_runs": read, "copy_runs": copy}


def _time(call, calls: int) -> dict:
    """Median seconds per call of a graph of `calls` calls, and all replays."""
    return _time_graph([call] * calls)


def _time_graph(calls: list) -> dict:
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    runs = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        runs.append(start.elapsed_time(stop) * 1e-3 / len(calls))
    return {"seconds": statistics.median(runs), "runs": runs}


def _measure_experts(pages: ExpertPages, launch: Launch, tokens: int, read: float) -> dict:
    """Time of one call, its bytes, and the share of bandwidth that they are."""
    choices = released_config("MiMo-V2.5-Pro")["num_experts_per_tok"]
    space = Workspace(pages, tokens, choices, launch)
    inputs = [gpu_checks.random_tokens(tokens, pages.hidden, pages.experts, choices, seed, "cuda") for seed in range(CALLS)]
    out = torch.empty((tokens, pages.hidden), device="cuda")
    timed = _time_graph([lambda i=i: run_experts(*i, pages, space, out) for i in inputs])
    distinct = sum(i[1].unique().numel() for i in inputs) / CALLS
    size = distinct * (pages.up[0].numel() + pages.down[0].numel())
    row = {"tokens": tokens, "page_rows": pages.up_tile.rows, "native": pages.native, "launch": asdict(launch),
           "distinct": distinct, "bytes": size, "share_of_read": size / timed["seconds"] / read,
           "bytes_per_second": size / timed["seconds"], "failed": space.failed(), **timed}
    peak = {name: size / timed["seconds"] / bandwidth for name, bandwidth in roofline.BANDWIDTH.items()
            if name in torch.cuda.get_device_name()}
    print(f"experts, {tokens} tokens, {gpu_checks.words(pages.up_tile, launch)}: {timed['seconds'] * 1e6:.1f} us, "
          f"{distinct:.1f} experts, {row['bytes_per_second'] / 1e12:.2f} TB/s = {100 * row['share_of_read']:.0f} % of pure read"
          + "".join(f", {100 * share:.0f} % of the {name}'s" for name, share in peak.items()))
    return row | {"share_of_stated": peak}


def _measure_torch(pages: ExpertPages) -> dict:
    """bf16 weights of 64 experts, one matrix product per choice in one batched call each: what torch alone does."""
    x = torch.randn(64, 1, pages.hidden, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(64, pages.hidden, 2 * pages.inner, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(64, pages.inner, pages.hidden, device="cuda", dtype=torch.bfloat16)

    def call():
        gate, up_ = torch.bmm(x, up).chunk(2, -1)
        return torch.bmm(torch.nn.functional.silu(gate) * up_, down)

    return {"what": "64 choices, 64 experts, bf16, batched products without the weighted sum", **_time(call, 8)}
