"""`bench.py --suite gpu`: every kernel checked on this machine's GPU, then measured; one JSON, under ten minutes.

Correctness first: if a check is red the file holds the checks and no speed. Then pure-read and copy bandwidth of the same
minutes, which are the denominators, then the expert kernel: launch variants at 8 tokens, the token sweep with the best. The
file is written anew after every check and every part (`plan.py`), because the next may take the process with it.

A measurement is a CUDA graph of calls with different routings over one layer of 384 experts (850 MB, 17 times the cache), so
that no call finds its experts cached; its time per call includes the gaps between launches. The median of several replays
counts, and all of them are kept. What did not fit into the minutes is listed, not guessed.

Peers (`peers.py`) are measured where they are installed, on the same weights and routings, and last of all: a fault of theirs
that takes the device with it must not take what was measured. The baseline that is always there is torch on the decoded bf16
weights of the same experts.
"""

from __future__ import annotations

import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
import triton.language as tl

from modeling.published_geometries import released_config
from runtime_ref.kernels.experts import Launch, Workspace, run_experts
from runtime_ref.kernels.repack import SCALE_OFFSET, ExpertPages, Tile
from runtime_ref.measure import roofline
from runtime_ref.measure.gpu_suite import checks as gpu_checks
from runtime_ref.measure.gpu_suite import engine as gpu_engine
from runtime_ref.measure.gpu_suite import peers
from runtime_ref.measure.gpu_suite import steps as gpu_steps
from runtime_ref.measure.gpu_suite.page import percent, write_page
from runtime_ref.measure.gpu_suite.plan import PARTS, Plan, kept
from runtime_ref.measure.gpu_suite.steps import RANKS
from storage.files import write_text
from storage.revision import git_revision

ROOT = Path(__file__).resolve().parents[3]
TOKENS = 8
SWEEP = (1, 2, 4, 8, 16, 32, 64)
CALLS, REPLAYS = 32, 7
BANDWIDTH_BYTES = 4 << 30
TUNING_SECONDS = 15  # of a variant of the megakernel, which is mostly its compilation


@triton.jit
def read_kernel(data, out, blocks, BLOCK: tl.constexpr):
    """Reads uint8 [blocks * BLOCK] and writes one sum per program: the pure-read denominator."""
    total = tl.zeros((BLOCK // 4,), tl.int32)
    words = data.to(tl.pointer_type(tl.int32), bitcast=True)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=4):
        total += tl.load(words + block.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
    tl.store(out + tl.program_id(0), tl.sum(total, 0).to(tl.float32))


def run(path: Path, checkpoint: Path | None = None, page_path: Path | None = None, only: Sequence[str] = ()) -> int:
    """Runs the suite and writes `path`, and a page if asked to, anew after every part; 1 if a check is red or a part failed.

    Args:
        checkpoint: an exported folder for the engine end to end.
        only: parts to measure, for whoever tunes one; the checks are always made.

    Raises:
        ValueError: no GPU that runs the kernels, an unknown part, a folder that the kernels cannot run, a path that cannot be
            written; all before anything is checked.
    """
    if not torch.cuda.is_available():
        raise ValueError("--suite gpu: torch sees no GPU on this machine; --static and --roofline need none")
    if torch.cuda.get_device_capability()[0] < 9:
        raise ValueError(f"--suite gpu: {torch.cuda.get_device_name()} lacks bf16x2 products; expected Hopper or newer")
    plan = Plan(only)
    if checkpoint is not None:
        gpu_engine.check_folder(checkpoint)
    report = {"device": torch.cuda.get_device_name(), "command": " ".join([Path(sys.executable).name, *sys.argv]),
              "revision": git_revision(), "date": datetime.datetime.now().isoformat(timespec="seconds"),
              "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
              "complete": False, "parts": plan.requested, "checks": [], "skipped": plan.skipped, "refused": plan.refused}

    def save(found: dict | None = None) -> None:
        report.update(found or {})
        write_text(path, json.dumps(report, indent=1) + "\n")
        if page_path is not None:
            kept(lambda: write_page(report, page_path), "the page", [])

    try:
        save()
    except OSError as error:
        raise ValueError(f"--json {path}: {error.strerror}") from None
    unfit: dict[str, str] = {}
    for check in gpu_checks.check_kernels(plan, unfit):
        print(f"{'ok ' if check['passed'] else 'RED'} {check['name']}: {check['detail']}", flush=True)
        report["checks"].append(check)
        save()
    red = [check for check in report["checks"] if not check["passed"]]
    broken = 0
    for measured in [] if red else _parts(plan, report, checkpoint, unfit, save):
        broken += measured is None
        save(measured)
        _free()
    save({"complete": True})
    print(f"{len(red)} of {len(report['checks'])} checks are red" + (": no speed was measured" if red else f"; {path}")
          + (f"; {broken} parts failed, see \"refused\"" if broken else ""))
    return 1 if red or broken else 0


def _free() -> None:
    """Memory of what the last part made: backends hold their own methods, a cycle that only the collector ends."""
    gc.collect()
    torch.cuda.empty_cache()


def _parts(plan: Plan, report: dict, checkpoint: Path | None, unfit: dict[str, str], save: Callable) -> Iterator[dict | None]:
    """What each part adds to the report, part by part; None where it failed."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    yield kept(lambda: {"bandwidth": _bandwidths(count)}, "bandwidth", plan.refused)
    rates = report.get("bandwidth", {})
    if plan.begins("experts", "experts"):
        yield kept(lambda: measure(plan, count, rates.get("read"), unfit), "experts", plan.refused)
    if plan.begins("quantize", "fused fake quantization"):
        yield kept(lambda: {"fake_quantize": gpu_steps.measure_fake_quantize(_time_graph, rates.get("copy"))},
                   "fused fake quantization", plan.refused)
    if plan.begins("training", "a training step"):
        yield kept(lambda: {"qat_step": measure_training(plan)}, "a training step", plan.refused)
    if plan.begins("steps", "a rank's step at full geometry"):
        config = gpu_steps.rank_config(released_config("MiMo-V2.5-Pro"), RANKS)
        yield kept(lambda: {"step": gpu_steps.measure_steps(
            config, _time_graph, plan.refused, enough=lambda: plan.seconds_left("steps") >= TUNING_SECONDS)},
                   "a rank's step at full geometry", plan.refused)
    if plan.begins("engine", "the engine end to end"):
        if checkpoint is None:
            plan.skipped.append("the engine end to end: no --checkpoint")
        else:
            yield kept(lambda: {"engine": gpu_engine.measure_engine(checkpoint, plan.refused,
                                                                    lambda: plan.seconds_left("engine"))},
                       "the engine end to end", plan.refused)
    if plan.begins("peers", "peers"):
        yield kept(lambda: measure_peers(report.get("sweep", []), plan, save), "peers", plan.refused)


def measure_peers(sweep: list[dict], plan: Plan, save: Callable[[dict], None]) -> dict:
    """Peers on the routings of our `sweep`, and ours against the fastest of them; saved after each peer."""
    def with_ratios(report: dict) -> dict:
        return {"peers": report, "against": peers.against(sweep, report)}

    found = peers.available()
    if all(isinstance(peer, str) for _, peer in found):
        return with_ratios({name: {"missing": why} for name, why in found})
    config = released_config("MiMo-V2.5-Pro")
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"] // RANKS, config["n_routed_experts"]
    choices, pages = config["num_experts_per_tok"], _random_pages(experts, hidden, inner, Tile())
    return with_ratios(peers.measure_peers(
        *peers.checkpoint_layer(pages),
        lambda n: [gpu_checks.random_tokens(n, hidden, experts, choices, seed, "cuda") for seed in range(CALLS)], SWEEP,
        _time_graph, lambda *inputs: gpu_checks.reference(*inputs, pages), found, lambda: plan.seconds_left("peers"),
        lambda report: save(with_ratios(report))))


def measure_training(plan: Plan) -> dict:
    """A training step with and without expert QAT, in a process of its own: training is none of the runtime's business."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "qat_step.py"), "--device", "cuda", "--json", str(out)]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=plan.seconds_left("training"))
        except subprocess.TimeoutExpired as late:
            plan.skipped.append(f"a training step: not done in {late.timeout:.0f} s")
            return {}
        if ran.returncode:
            plan.refused.append("a training step: " + (ran.stderr.strip().splitlines() or ["no reason given"])[-1])
            return {}
        return json.loads(out.read_text(encoding="utf-8"))


def measure(plan: Plan, count: int, read: float | None, unfit: dict[str, str]) -> dict:
    """Launch variants of the experts at 8 tokens, the first in any case, then the best one for every number of tokens, in each
    way to hand out its work; the fastest of them is the sweep's.

    Args:
        read: bytes per second of a pure read, if that is known. unfit: why a variant is not to be measured, by its words.
    """
    config = released_config("MiMo-V2.5-Pro")
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"] // RANKS, config["n_routed_experts"]
    report = {"experts": [], "dispatch": [], "sweep": []}
    best, late = None, min(0.0, plan.seconds_left("experts") - PARTS["experts"])
    def pages_of(tile: Tile) -> ExpertPages | None:
        return kept(lambda: _random_pages(experts, hidden, inner, tile), f"pages of {tile.rows} rows", plan.refused)

    for tile in gpu_checks.up_tiles():
        pages = pages_of(tile)
        for launch in gpu_checks.launches(count, tile.rows) if pages else ():
            name = gpu_checks.words(tile, launch)
            if name in unfit:
                plan.refused.append(f"8 tokens, {name}: {unfit[name]}")
            elif best is None or plan.spares("experts", f"8 tokens, {name}"):
                row = kept(lambda p=pages, l=launch: _measure_experts(p, l, TOKENS, read), f"8 tokens, {name}", plan.refused)
                if row is not None:
                    report["experts"].append(row)
                    if not row["failed"] and (best is None or row["seconds"] < best[0]):
                        best = row["seconds"], launch, tile
        del pages
    if best is None:
        return report
    _, launch, tile = best
    pages = pages_of(tile)
    for tokens in SWEEP if pages else ():
        if plan.seconds_left("experts") < late:
            plan.skipped.append(f"sweep, {tokens} tokens: no time")
            continue
        rows = [kept(lambda n=name, l=own, t=tokens: _measure_dispatch(pages, n, l, t, read), f"sweep, {tokens} tokens, {name}",
                     plan.refused) for name, own in gpu_checks.dispatches(launch, count).items()]
        rows = [row for row in rows if row is not None]
        report["dispatch"] += rows
        right = [row for row in rows if not row["failed"]]
        report["sweep"] += [min(right, key=lambda row: row["seconds"])] if right else []
    report["torch_bf16"] = kept(lambda: _measure_torch(hidden, inner), "torch in bf16", plan.refused)
    return report


def _measure_dispatch(pages: ExpertPages, name: str, launch: Launch, tokens: int, read: float | None) -> dict:
    """A row of the sweep.

    Raises:
        ArithmeticError: other bits than with tickets.
    """
    if not _same_bits(pages, launch, tokens):
        raise ArithmeticError("other bits than with tickets")
    return _measure_experts(pages, launch, tokens, read) | {"dispatch": name}


def _same_bits(pages: ExpertPages, launch: Launch, tokens: int) -> bool:
    """Whether a call has the bits of one by tickets."""
    choices = released_config("MiMo-V2.5-Pro")["num_experts_per_tok"]
    x, index, weight = gpu_checks.random_tokens(tokens, pages.hidden, pages.experts, choices, 0, "cuda")
    return torch.equal(*(run_experts(x, index, weight, pages, Workspace(pages, tokens, choices, own),
                                     torch.empty((tokens, pages.hidden), device="cuda"))
                         for own in (launch, replace(launch, tickets=True, packed=True))))


def _random_pages(experts: int, hidden: int, inner: int, tile: Tile) -> ExpertPages:
    """Pages of random codes under scales of 2^-8 to 2^-5, made on the GPU (nothing is repacked)."""
    def fill(row_tiles: int, depth_tiles: int, of: Tile) -> torch.Tensor:
        pages = torch.randint(0, 256, (experts, row_tiles, depth_tiles, of.page_bytes), dtype=torch.uint8, device="cuda")
        tail = pages[..., of.rows * of.depth // 2:]
        least = 119 if of.hw_fp4 else SCALE_OFFSET + 119
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
    row = {"tokens": tokens, "page_rows": pages.up_tile.rows, "hw_fp4": pages.hw_fp4, "launch": asdict(launch),
           "distinct": distinct, "bytes": size, "share_of_read": size / timed["seconds"] / read if read else None,
           "bytes_per_second": size / timed["seconds"], "failed": space.failed(), **timed}
    peak = {name: size / timed["seconds"] / bandwidth for name, bandwidth in roofline.BANDWIDTH.items()
            if name in torch.cuda.get_device_name()}
    print(f"experts, {tokens} tokens, {gpu_checks.words(pages.up_tile, launch)}: {timed['seconds'] * 1e6:.1f} us, "
          f"{distinct:.1f} experts, {row['bytes_per_second'] / 1e12:.2f} TB/s = {percent(row['share_of_read'])} of pure read"
          + "".join(f", {100 * share:.0f} % of the {name}'s" for name, share in peak.items()))
    return row | {"share_of_stated": peak}


def _measure_torch(hidden: int, inner: int) -> dict:
    """bf16 weights of 64 experts, one matrix product per choice in one batched call each: what torch alone does."""
    x = torch.randn(64, 1, hidden, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(64, hidden, 2 * inner, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(64, inner, hidden, device="cuda", dtype=torch.bfloat16)

    def call():
        gate, up_ = torch.bmm(x, up).chunk(2, -1)
        return torch.bmm(torch.nn.functional.silu(gate) * up_, down)

    return {"what": "64 choices, 64 experts, bf16, batched products without the weighted sum", **_time(call, 8)}
