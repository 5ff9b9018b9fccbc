"""An exported folder through the engine, for `bench.py --suite gpu`: does drafting give the tokens of plain decoding, op by op
and in one megakernel launch, and how fast is each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoint.tensor_files import TensorFiles
from runtime_ref.backends.triton.megakernel_drafter import MegakernelDrafter
from runtime_ref.checkpoints.device_weights import require_kernels
from runtime_ref.checkpoints.folder import read_geometry
from runtime_ref.core.sampling_params import SamplingParams
from runtime_ref.engine.engine import Engine, EngineOptions
from runtime_ref.measure.gpu_suite.plan import kept
from runtime_ref.measure.gpu_suite.steps import use_megakernel


def check_folder(folder: Path) -> None:
    """Of what can be said before anything is loaded: a folder that the Triton backend runs.

    Raises:
        ValueError: it is none, and why.
    """
    config, _ = read_geometry(folder)
    require_kernels(folder, config)
    TensorFiles(folder)


def measure_engine(folder, problems: list[str], seconds_left: Callable[[], float], tokens: int = 128) -> dict:
    """G5: an exported folder through the engine, op by op and as megakernels, each without and with its drafter.

    Everything is generated twice and the second pass counts, because the first compiles what steps of these lengths need; so
    that the second computes as much as the first, no beginnings of prompts are kept.

    Args:
        problems: is told what failed or found no time. seconds_left: until no further pass is to begin.

    Returns:
        greedy_equal: by way, whether drafting gave the tokens of plain decoding. `walked_as_op_by_op`: for each prompt, how
        many tokens from the first on are those of the other way; two orders of sums, so fewer than all is no error. failed:
        whose waits were given up: then the megakernel has no speed. tokens_per_second, timeline (drafting), acceptance_length.
    """
    engine = Engine.from_folder(folder, backend="triton", options=EngineOptions(prefix_cache=False), launch="ops")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, engine.backend.config.vocab_size, (n,), generator=generator).tolist() for n in (5, 40)]
    programs = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1
    report, answers = {"tokens": tokens, "greedy_equal": {}, "tokens_per_second": {}, "timeline": {}, "failed": []}, {}
    for way, plain in ((way, plain) for way in ("op by op", "walked") for plain in (True, False)):
        name = f"{'plain' if plain else 'drafting'}, {way}"
        if not plain and engine.drafter is None:
            continue
        if seconds_left() < 0:
            problems.append(f"the engine, {name}: no time")
            continue
        measured = kept(lambda n=name, w=way, p=plain: _measure_way(engine, prompts, n, w, p, programs, report, problems),
                        f"the engine, {name}", problems)
        if measured is None:
            break
        answers[name] = measured
    for way in ("op by op", "walked"):
        pair = [answers.get(f"{kind}, {way}") for kind in ("plain", "drafting")]
        if None not in pair:
            report["greedy_equal"][way] = pair[0] == pair[1]
    pair = [answers.get(f"plain, {way}") for way in ("op by op", "walked")]
    report["walked_as_op_by_op"] = None if None in pair else [alike(*both) for both in zip(*pair, strict=True)]
    failed = kept(lambda: given_up(engine), "the engine, waits", problems)
    report["failed"] = failed or []
    if failed != []:
        report["tokens_per_second"] = {name: rate for name, rate in report["tokens_per_second"].items() if "walked" not in name}
    return report | {"acceptance_length": engine.stats()["acceptance_length"]}


def _measure_way(engine, prompts: list, name: str, way: str, plain: bool, programs: int, report: dict,
                 problems: list[str]) -> list[list[int]]:
    """Answers; one pass unmeasured, one by the clock, and of drafting one in the profiler."""
    if way == "walked" and engine.backend.runner is None:
        use_megakernel(engine, programs)
    params = SamplingParams(max_tokens=report["tokens"], ignore_eos=True, speculate=not plain)
    for _ in range(2):
        began = time.perf_counter()
        answers = [engine.generate([prompt], params)[0] for prompt in prompts]
        seconds = time.perf_counter() - began
    report["tokens_per_second"][name] = len(prompts) * report["tokens"] / seconds
    spans = None if plain else kept(lambda: timeline(lambda: engine.generate([prompts[0]], params)),
                                    f"the timeline, {way}", problems)
    if spans:
        report["timeline"][way] = spans
    return answers


def alike(one: list[int], other: list[int]) -> int:
    """Tokens until the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def given_up(engine) -> list[str]:
    """Whose megakernel gave up a wait: "step", "draft"."""
    megakernels = {"step": engine.backend.runner, "draft": engine.drafter if isinstance(engine.drafter,
                                                                                      MegakernelDrafter) else None}
    return [name for name, one in megakernels.items() if one is not None and one.failed()]


def timeline(call, most: int = 400) -> list[list]:
    """[name, begin, seconds] of the GPU's activities at the end of a call, at most so many, the first at 0."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in trace.events()
                   if event.device_type == torch.autograd.DeviceType.CUDA)[-most:]
    return [[name, 1e-6 * (begin - spans[0][0]), 1e-6 * (end - begin)] for begin, end, name in spans]
