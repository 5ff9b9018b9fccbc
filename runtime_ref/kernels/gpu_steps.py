"""Whole steps for `bench.py --suite gpu`: checks first, then a rank's step at full geometry, and an engine end to end.

One of eight ranks is a model of its own with an eighth of the heads, of every expert and of the vocabulary (`rank_config`), so
its step and its drafter's round are timed on one GPU without the other seven; what is missing is the communication, which is
added as a stated assumption (`projected`). Weights are random: 66 GB of experts at 1.02 trillion parameters.

Every function also runs in Triton's interpreter at toy size (`device` "cpu"), where times mean nothing and are not taken.
"""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl

from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.drafter import DFlashDraftModel, drafter_config, released_drafter
from mxfp4.codec import scale_bump
from mxfp4.fake_quant import fake_quantize_
from mxfp4.fake_quant_triton import BLOCKS_PER_PROGRAM, fake_quantize_fused_, fake_quantize_kernel
from mxfp4.format import ScaleRule
from runtime_ref.drafter import KIND, Wanted
from runtime_ref.kernel_weights import random_weights
from runtime_ref.kernels.sampling import judge
from runtime_ref.kernels.sync import grid_barrier
from runtime_ref.kv_cache import PAGE, KvCache
from runtime_ref.model import Span
from runtime_ref.parallel import ALONE, SHARES
from runtime_ref.persistent import PersistentStep
from runtime_ref.persistent_draft import PersistentDraft
from runtime_ref.tasks import target_tasks
from runtime_ref.triton_backend import BLOCK, TritonBackend
from runtime_ref.triton_drafter import TritonDrafter

RANKS = 8
BARRIERS = 200
QUANTIZED = 1 << 29  # bfloat16 weights
ALL_REDUCE_SECONDS = (3e-6, 5e-6, 8e-6, 12e-6)
ACCEPTANCE = 6.30
TOY = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "hybrid_layer_pattern": [0, 1, 0],
       "moe_layer_freq": [0, 1, 1], "num_attention_heads": 2, "num_key_value_heads": 1, "swa_num_attention_heads": 2,
       "swa_num_key_value_heads": 1, "head_dim": 48, "v_head_dim": 32, "swa_head_dim": 48, "swa_v_head_dim": 32,
       "sliding_window": 16, "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8,
       "num_experts_per_tok": 2, "partial_rotary_factor": 0.334, "add_swa_attention_sink_bias": True,
       "attention_value_scale": 0.7, "rope_theta": 10000, "swa_rope_theta": 1000}


@triton.jit
def barrier_kernel(counter, failed, COUNT: tl.constexpr, POLLS: tl.constexpr):
    """COUNT grid barriers and nothing else."""
    for i in range(0, COUNT):
        grid_barrier(counter, i + 1, failed, POLLS)


def rank_config(config: dict, ranks: int) -> MiMoV2Config:
    """The model that one of `ranks` tensor-parallel ranks computes; with more ranks than key heads it has one of them.

    Raises:
        ValueError: a size that the ranks cannot share.
    """
    shared = ("num_attention_heads", "num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads",
              "intermediate_size", "moe_intermediate_size", "vocab_size")
    odd = [name for name in shared if config[name] % ranks and ("key_value" not in name or ranks % config[name])]
    if odd:
        raise ValueError(f"{odd[0]}: {config[odd[0]]}, expected a multiple of {ranks} ranks")
    drop = ("quantization_config", "model_type", "dtype", "torch_dtype")
    own = {name: value for name, value in config.items() if name not in drop}
    return MiMoV2Config.from_dict(own | {name: max(1, config[name] // ranks) for name in shared})


def rank_drafter(config: MiMoV2Config, ranks: int, device: str) -> DFlashDraftModel:
    """A random drafter of the published depth and widths as one of `ranks` has it, for the target `config` of one rank."""
    own, last = released_drafter("MiMo-V2.5-Pro"), config.num_hidden_layers - 1
    own = drafter_config(
        hidden_size=config.hidden_size, intermediate_size=own.intermediate_size // ranks,
        num_hidden_layers=own.num_hidden_layers, num_attention_heads=own.num_attention_heads // ranks,
        num_key_value_heads=max(1, own.num_key_value_heads // ranks), head_dim=own.head_dim, vocab_size=config.vocab_size,
        num_target_layers=config.num_hidden_layers,
        target_layer_ids=sorted({last * i // 4 for i in range(5)}), mask_token_id=config.vocab_size - 1,
        rotary_base=float(config.rope_theta), window=own.sliding_window,
        partial_rotary_factor=own.rope_parameters["partial_rotary_factor"],
        attention_value_scale=own.dflash_config["attention_value_scale"])
    with torch.device(device):
        model = DFlashDraftModel(own).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1]**-0.5)
    return model.eval()


class Prepared:
    """A backend with random weights, and steps over a sequence whose cache is taken as it is (zeros) up to `position`.

    Args:
        shares: parts of a sum over ranks; 1 for a model that stands for one of eight ranks, which has one part of each.
    """

    def __init__(self, config: MiMoV2Config, device: str, position: int, shares: int):
        self.config, self.tasks = config, target_tasks(config, [config.num_hidden_layers - 1])
        pages = position // PAGE + 2
        weights = random_weights(config, ALONE, device=device, shares=shares)
        self.backend = TritonBackend(weights, pages={"full": pages, "window": pages}, positions=position + 2 * PAGE)
        self.position, self.device = position, device
        self.tables = KvCache(self.backend.pools, prefix=False).tables()
        KvCache(self.backend.pools, prefix=False).extend(self.tables, list(self.tables), position + 8)

    def step(self, rows: int, offset: int = 0):
        """A step of so many tokens, `offset` after the position."""
        ids = torch.arange(offset, offset + rows).mul(37).remainder(self.config.vocab_size).tolist()
        return self.backend.plan([Span(self.tables, self.position + offset, ids)])


def check_steps(device: str, programs: int) -> list[dict]:
    """A walk against the launches one by one, and eight rows against one row at a time, on a toy with every feature."""
    ready = Prepared(MiMoV2Config(**TOY), device, 70, SHARES)
    step, walk = ready.step(8), PersistentStep(ready.backend, ready.tasks, programs)
    launched = ready.backend.run(ready.tasks, step)["logits"].cpu()
    alone = [0, 3, 7]  # their predecessors' keys are in the cache by now
    rows = torch.cat([ready.backend.run(ready.tasks, ready.step(1, i))["logits"].cpu() for i in alone])
    walked = [walk.run(step)["logits"].cpu() for _ in range(2)]
    same = torch.equal(launched[alone], rows)
    error = max(float((w - launched).norm() / launched.norm()) for w in walked)
    fine = bool(launched.isfinite().all())
    return [{"name": "step, 8 rows and 1 row", "passed": same and fine, "detail": f"bits {'equal' if same else 'DIFFER'}"},
            {"name": "persistent step", "passed": torch.equal(walked[0], walked[1]) and error < 1e-5 and not walk.failed(),
             "detail": f"relative difference from the launches {error:.1e}, two walks "
                       f"{'equal' if torch.equal(*walked) else 'DIFFER'}"
                       f"{', a wait was given up' if walk.failed() else ''}"}]


def check_fake_quantize(device: str) -> dict:
    """The fused fake quantization against the CPU's, bit for bit, on magnitudes around every grid point."""
    generator = torch.Generator().manual_seed(3)
    w = (torch.randn(512, 256, generator=generator) * 2.0 ** torch.randint(-8, 8, (512, 256), generator=generator))
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        for rule in ("floor", "rceil", "even"):
            here = w.to(dtype)
            own = here.to(device)
            found = fake_quantize_fused_(torch.empty_like(own), own, scale_rule=rule).cpu()
            expected = fake_quantize_(torch.empty_like(here), here, scale_rule=rule)
            wrong += int((found.float().view(torch.int32) != expected.float().view(torch.int32)).sum())
    return {"name": "fused fake quantization equals the reference", "passed": wrong == 0, "detail": f"{wrong} values differ"}


def measure_fake_quantize(time_graph, copy: float) -> dict:
    """G4: bfloat16 weights of one GiB, without the flag's synchronization; `copy`: bytes per second of a copy."""
    w = torch.randn(QUANTIZED, device="cuda", dtype=torch.bfloat16)
    out, unsafe, blocks = torch.empty_like(w), torch.zeros(1, dtype=torch.int32, device="cuda"), w.numel() // 32
    grid = (triton.cdiv(blocks, BLOCKS_PER_PROGRAM),)
    timed = time_graph([lambda: fake_quantize_kernel[grid](w, out, unsafe, blocks, 1, scale_bump(ScaleRule.EVEN), 27 << 23,
                                                           227 << 23, SATURATES=False, BLOCKS=BLOCKS_PER_PROGRAM)])
    rate = 2 * w.numel() * w.element_size() / timed["seconds"]
    return {"bytes_per_second": rate, "share_of_copy": rate / copy, **timed}


def count_launches(ready: Prepared, rows: int = 8) -> int:
    """Kernel launches of one step, op by op."""
    from torch.profiler import ProfilerActivity, profile

    step = ready.step(rows)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        ready.backend.run(ready.tasks, step)
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if "kernel" in event.key)


def measure_steps(config: MiMoV2Config, time_graph, *, position: int = 8192, reductions: int = 140) -> dict:
    """G2 and G3 on this GPU.

    Args:
        config: of one rank (`rank_config`). time_graph: seconds of a list of calls (`gpu_suite`).
        reductions: all-reduces of a step, for the projection.
    """
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    ready = Prepared(config, "cuda", position, 1)
    step = ready.step(8)
    walk = PersistentStep(ready.backend, ready.tasks, programs)
    report = {"weights_bytes": ready.backend.kernel_weights.arena.used, "position": position,
              "launches_op_by_op": count_launches(ready), "launches_walk": 1, "judge": measure_judge(config, time_graph),
              "barriers_of_a_walk": len(walk.tasks),
              "op_by_op": time_graph([lambda: ready.backend.run(ready.tasks, step, host=False)])}
    report["walk"] = time_graph([lambda: walk.run(step)]) | {"failed": walk.failed()}
    counter, failed = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))

    def barriers():
        counter.zero_()
        barrier_kernel[(programs,)](counter, failed, COUNT=BARRIERS, POLLS=1 << 22, num_warps=8, launch_cooperative_grid=True)

    report["barrier_seconds"] = time_graph([barriers])["seconds"] / BARRIERS
    report["draft"] = measure_draft(ready, programs, time_graph)
    best = min(report["op_by_op"]["seconds"], report["walk"]["seconds"])
    report["step_and_draft_seconds"] = best + report["draft"]["seconds"]
    report["projected"] = projected(report["step_and_draft_seconds"], reductions + report["draft"]["reductions"])
    return report


def measure_judge(config: MiMoV2Config, time_graph) -> dict:
    """The verdict on a block of eight rows over all ranks' logits, half of whose tokens are drawn: the third launch."""
    rows = {"device": "cuda", "dtype": torch.int32}
    logits = torch.randn(BLOCK, config.vocab_size * RANKS, device="cuda")
    drafts, first, count = (torch.tensor(c, **rows) for c in ([3] * BLOCK, [0], [BLOCK - 1]))
    heat = torch.tensor([0.0, 0.8] * (BLOCK // 2), dtype=torch.float64, device="cuda")
    numbers = torch.full((BLOCK,), 0.5, dtype=torch.float64, device="cuda")
    return time_graph([lambda: judge(logits, drafts, first, count, temperature=heat, uniform=numbers)])


def measure_draft(ready: Prepared, programs: int, time_graph) -> dict:
    """The walk of a rank's drafter: features of seven accepted tokens, then a block of seven drafts, in one launch."""
    backend, position = ready.backend, ready.position
    model = rank_drafter(ready.config, RANKS, ready.device)
    drafter = TritonDrafter(model, backend, position // PAGE + 2, position + 2 * PAGE, shares=1)
    walk = PersistentDraft(drafter, programs)
    cache = KvCache({KIND: drafter.pool}, prefix=False)
    tables = cache.tables()
    cache.extend(tables, [KIND], position + BLOCK)
    width = len(drafter.taps) * ready.config.hidden_size
    features = torch.randn(BLOCK - 1, width, device=ready.device).to(torch.bfloat16)
    arguments = walk.prepare([Wanted(tables, 5, position, BLOCK - 1, features)])
    timed = time_graph([lambda: walk.launch(arguments)])
    # A rank of eight would read an eighth of the features' product; here it is read whole.
    beyond = drafter.fc.w.numel() * drafter.fc.w.element_size() * (RANKS - 1) // RANKS
    return timed | {"weights_bytes": drafter.arena.used, "bytes_beyond_a_rank": beyond, "launches": 1,
                    "reductions": 2 * len(drafter.layers), "failed": walk.failed(),
                    "finite": bool(arguments["logits"].isfinite().all())}


def projected(seconds: float, reductions: int) -> dict:
    """Tokens per second of eight ranks from one rank's step and draft: not measured, the all-reduce time is an assumption."""
    return {"note": "projected: no communication but the stated all-reduces", "acceptance": ACCEPTANCE,
            "reductions": reductions, "tokens_per_second": {f"{1e6 * t:.0f} us": ACCEPTANCE / (seconds + reductions * t)
                                                           for t in ALL_REDUCE_SECONDS}}


def measure_engine(folder, tokens: int = 128) -> dict:
    """G5: an exported folder through the engine: greedy with the drafter and walked equals greedy; speed."""
    from runtime_ref.engine import Engine
    from runtime_ref.sampler import SamplingParams

    engine = Engine.from_folder(folder, backend="triton")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, engine.backend.config.vocab_size, (n,), generator=generator).tolist() for n in (5, 40)]
    answers, seconds, spans = {}, {}, {}
    for walked in (False, True):
        if walked:
            programs = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1
            walking(engine, programs)
        for speculate in (False, True):
            name = f"{'drafting' if speculate else 'plain'}, {'walked' if walked else 'op by op'}"
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, speculate=speculate)
            engine.generate([prompts[0]], SamplingParams(max_tokens=4, speculate=speculate))
            began = time.perf_counter()
            answers[name] = [engine.generate([p], params)[0] for p in prompts]
            seconds[name] = time.perf_counter() - began
            if speculate:
                spans["walked" if walked else "op by op"] = timeline(lambda p=params: engine.generate([prompts[0]], p))
    return {"greedy_equal": {name: found == answers["plain, op by op"] for name, found in answers.items()},
            "acceptance_length": engine.stats()["acceptance_length"], "timeline": spans,
            "tokens_per_second": {name: len(prompts) * tokens / s for name, s in seconds.items()}}


def timeline(call, most: int = 400) -> list[list]:
    """[name, begin, seconds] of the GPU's activities at the end of a call, at most so many, the first at 0."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in trace.events()
                   if event.device_type == torch.autograd.DeviceType.CUDA)[-most:]
    return [[name, 1e-6 * (begin - spans[0][0]), 1e-6 * (end - begin)] for begin, end, name in spans]


def walking(engine, programs: int) -> None:
    """Makes an engine of the Triton backend walk its steps and its drafter's rounds."""
    engine.backend.walk = PersistentStep(engine.backend, engine.tasks, programs)
    if engine.drafter is not None:
        engine.drafter = PersistentDraft(engine.drafter, programs)
