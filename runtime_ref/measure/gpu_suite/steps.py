"""Whole steps for `bench.py --suite gpu`: checks first, then a rank's step at full geometry.

One of eight ranks is a model of its own with an eighth of the heads, of every expert and of the vocabulary (`rank_config`), so
its step and its drafter's round are timed on one GPU without the other seven; what is missing is the communication, which is
added as a stated assumption (`projected`). Weights are random: 66 GB of experts at 1.02 trillion parameters.

Every function also runs in Triton's interpreter at toy size (`device` "cpu"), where times mean nothing and are not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import triton
import triton.language as tl

from modeling.configuration_mimo_v2 import MiMoV2Config
from modeling.drafter import DFlashDraftModel, drafter_config, released_drafter
from mxfp4.codec import scale_bump
from mxfp4.fake_quant import fake_quantize_
from mxfp4.fake_quant_triton import BLOCKS_PER_PROGRAM, fake_quantize_fused_, fake_quantize_kernel
from mxfp4.format import ScaleRule
from runtime_ref.backends.triton.backend import TritonBackend, default_tiling
from runtime_ref.backends.triton.drafter import TritonDrafter
from runtime_ref.backends.triton.megakernel import Megakernel
from runtime_ref.backends.triton.megakernel_drafter import MegakernelDrafter
from runtime_ref.backends.triton.steps import BLOCK
from runtime_ref.checkpoints.device_weights import random_weights
from runtime_ref.core.batch import KIND, DraftRequest, SequenceChunk
from runtime_ref.core.fusion import fused
from runtime_ref.core.kv_cache import PAGE, KvCache
from runtime_ref.core.program import run_op, target_program
from runtime_ref.core.tensor_parallel import SHARES, SINGLE_RANK
from runtime_ref.kernels.experimental.megakernel import BARRIER, WARPS, Tuning
from runtime_ref.kernels.launches import Tiling
from runtime_ref.kernels.sampling import verify
from runtime_ref.kernels.sync import grid_barrier
from runtime_ref.measure.gpu_suite.plan import kept

RANKS = 8
BARRIERS = 200
QUANTIZED = 1 << 29  # bfloat16 weights
ALL_REDUCE_SECONDS = (3e-6, 5e-6, 8e-6, 12e-6)
ACCEPTANCE = 6.30
# Relative difference of a row of a layer, made from the same input by a megakernel and by launches, above which the megakernel
# is wrong. Sums within a row are made in another order (8 warps, 4 warps), so a value near a tie may be rounded to its other
# bf16 neighbour, which is at most 2^-8 away: as if all of them were. A few in ten thousand are; a wrong op is off by far more.
MEGAKERNEL_DIFFERENCE = 2.0**-8
# The same of a draft's logits, through all its layers: such values then differ in what every further product reads.
DRAFT_DIFFERENCE = 2.0**-5
TOY = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "hybrid_layer_pattern": [0, 1, 0],
       "moe_layer_freq": [0, 1, 1], "num_attention_heads": 2, "num_key_value_heads": 1, "swa_num_attention_heads": 2,
       "swa_num_key_value_heads": 1, "head_dim": 48, "v_head_dim": 32, "swa_head_dim": 48, "swa_v_head_dim": 32,
       "sliding_window": 16, "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8,
       "num_experts_per_tok": 2, "partial_rotary_factor": 0.334, "add_swa_attention_sink_bias": True,
       "attention_value_scale": 0.7, "rope_theta": 10000, "swa_rope_theta": 1000}


@triton.jit
def barrier_kernel(counter, failed, COUNT: tl.constexpr, POLLS: tl.constexpr, FLAG: tl.constexpr):
    """COUNT grid barriers and nothing else."""
    for i in range(0, COUNT):
        grid_barrier(counter, i + 1, failed, POLLS, FLAG)


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
    """A backend with random weights, and steps over a sequence whose cache is random, too, up to `position`.

    Args:
        shares: parts of a sum over ranks; 1 for a model that stands for one of eight ranks, which has one part of each.
        tiling: by default what a backend has.
    """

    def __init__(self, config: MiMoV2Config, device: str, position: int, shares: int, tiling: Tiling | None = None):
        self.config, self.program = config, target_program(config, [config.num_hidden_layers - 1])
        pages = position // PAGE + 2
        weights = random_weights(config, SINGLE_RANK, device=device, shares=shares)
        self.backend = TritonBackend(weights, pages={"full": pages, "window": pages}, positions=position + 2 * PAGE,
                                    tiling=tiling)
        generator = torch.Generator(device).manual_seed(1)
        for pool in self.backend.pools.values():  # zeros would hide what attention does wrong
            for store in (pool.all_keys, pool.all_values):
                store.normal_(generator=generator)
        self.position, self.device = position, device
        self.tables = KvCache(self.backend.pools, prefix=False).tables()
        KvCache(self.backend.pools, prefix=False).extend(self.tables, list(self.tables), position + 8)

    def step(self, rows: int, offset: int = 0):
        """A step of so many tokens, `offset` after the position."""
        ids = torch.arange(offset, offset + rows).mul(37).remainder(self.config.vocab_size).tolist()
        return self.backend.plan([SequenceChunk(self.tables, self.position + offset, ids)])


@torch.inference_mode()
def compare_megakernel(ready: Prepared, programs: int) -> dict:
    """The megakernel on eight rows against the launches, each layer from what the megakernel itself gave it.

    Why not only the logits: routers of random weights are full of near ties, so one value that is rounded to its other
    neighbour sends a row to another expert, and some layers later nothing is alike. From equal inputs each layer can be judged
    by itself, and a fault is named by the layer where it arises.

    Returns:
        difference: relative (norms of a row), of the worst row of the worst layer, None if not finite; layer: that one, -1 for
        the logits. equal: whether all bits are. repeated: whether a second launch has the bits of the first. failed: a wait was
        given up. distinct_experts: per layer, on average (None without any): they decide what a step reads. wrong: why the
        megakernel is, or None.
    """
    backend, step, config = ready.backend, ready.step(8), ready.config
    program = target_program(config, range(config.num_hidden_layers))
    megakernel = Megakernel(backend, program, programs)
    first, again = megakernel.run(step), megakernel.run(step)
    buffers, distinct = {"ids": step.ids}, []
    rows = []  # of every layer and of the logits: difference of the worst row, layer
    equal = repeated = True
    for op in fused(program):
        run_op(op, backend.ops, step, buffers)
        if op.name == "norm_route":
            distinct.append(buffers["index"].unique().numel())
        for name in set(op.writes) & first.keys():
            rows.append((float(_row_differences(first[name], buffers[name]).max()), op.layer))
            equal &= torch.equal(first[name], buffers[name])
            repeated &= torch.equal(first[name], again[name])
            buffers["x"] = first[name] if op.name == "target_hidden" else buffers["x"]
    finite = all(difference < float("inf") for difference, _ in rows)
    worst, layer = max(rows) if finite else next(row for row in rows if not row[0] < float("inf"))
    wrong = [words for words, is_so in (
        (f"not finite after {_where(layer)}", not finite), ("a wait was given up", megakernel.failed()),
        ("two megakernel launches differ", not repeated),
        (f"{worst:.1e} from the launches at {_where(layer)}, expected at most {MEGAKERNEL_DIFFERENCE:.1e}",
         finite and worst > MEGAKERNEL_DIFFERENCE)) if is_so]
    return {"difference": worst if finite else None, "layer": layer, "equal": equal, "repeated": repeated,
            "failed": megakernel.failed(), "distinct_experts": sum(distinct) / len(distinct) if distinct else None,
            "wrong": "; ".join(wrong) or None}


def _row_differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """float32 [rows], relative; infinite where either is not finite."""
    found, expected = found.float(), expected.float()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).nan_to_num(float("inf"), float("inf"))


def _where(layer: int) -> str:
    return "the logits" if layer < 0 else f"layer {layer}"


def check_steps(device: str, programs: int) -> list[dict]:
    """Eight rows against one row at a time, and the megakernel against the launches, on a toy with every feature.

    The megakernel is held against launches with its own number of warps, so that sums within a row are made in one order and
    all bits should be equal. Whether they are is said; red is what is further away than roundings are, because compilers may
    still fuse a product and a sum in one of two kernels.
    """
    served = Prepared(MiMoV2Config(**TOY), device, 70, SHARES)
    launched = served.backend.run(served.program, served.step(8))["logits"].cpu()
    alone = [0, 3, 7]  # their predecessors' keys are in the cache by now
    rows = torch.cat([served.backend.run(served.program, served.step(1, i))["logits"].cpu() for i in alone])
    same, fine = torch.equal(launched[alone], rows), bool(launched.isfinite().all())
    found = compare_megakernel(Prepared(MiMoV2Config(**TOY), device, 70, SHARES, replace(default_tiling(), warps=WARPS)),
                               programs)
    return [{"name": "step, 8 rows and 1 row", "passed": same and fine, "detail": f"bits {'equal' if same else 'DIFFER'}"},
            {"name": "megakernel", "passed": found["wrong"] is None,
             "detail": found["wrong"] or f"bits of the launches {'equal' if found['equal'] else 'not equal'}, relative "
                                         f"difference {found['difference']:.1e}, two megakernel launches equal"}]


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


def measure_fake_quantize(time_graph, copy: float | None) -> dict:
    """G4: bfloat16 weights of one GiB, without the flag's synchronization; `copy`: bytes per second of a copy, if known."""
    w = torch.randn(QUANTIZED, device="cuda", dtype=torch.bfloat16)
    out, unsafe, blocks = torch.empty_like(w), torch.zeros(1, dtype=torch.int32, device="cuda"), w.numel() // 32
    grid = (triton.cdiv(blocks, BLOCKS_PER_PROGRAM),)
    timed = time_graph([lambda: fake_quantize_kernel[grid](w, out, unsafe, blocks, 1, scale_bump(ScaleRule.EVEN), 27 << 23,
                                                           227 << 23, SATURATES=False, BLOCKS=BLOCKS_PER_PROGRAM)])
    rate = 2 * w.numel() * w.element_size() / timed["seconds"]
    return {"bytes_per_second": rate, "share_of_copy": rate / copy if copy else None, **timed}


def count_launches(call: Callable[[], object]) -> int | None:
    """Kernels that a call launches, as the profiler sees them, torch's own fills included; None if it sees none or fails: a
    machine may forbid it, and what was measured without it counts."""
    from torch.profiler import ProfilerActivity, profile

    def counted() -> int:
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            call()
            torch.cuda.synchronize()
        on_card = torch.autograd.DeviceType.CUDA
        return sum(event.device_type == on_card and "kernel" in event.name for event in trace.events())

    return kept(counted, "launches", []) or None


def measure_steps(config: MiMoV2Config, time_graph, problems: list[str], *, position: int = 8192, reductions: int = 140,
                  enough: Callable[[], bool] = lambda: True) -> dict:
    """G2 and G3 on this GPU; a megakernel that is wrong has no speed ("refused" says why).

    Args:
        config: of one rank (`rank_config`). time_graph: seconds of a list of calls (`gpu_suite`).
        problems: is told what failed; its place in the report is None.
        reductions: all-reduces of a step, for the projection.
        enough: whether there is time for another variant of the megakernel.
    """
    def part(what: str, call: Callable[[], object]):
        return kept(call, f"a rank's step, {what}", problems)

    programs = torch.cuda.get_device_properties(0).multi_processor_count
    ready = Prepared(config, "cuda", position, 1)
    step, backend, program = ready.step(8), ready.backend, ready.program
    compared = part("megakernel against launches", lambda: compare_megakernel(ready, programs))
    wrong = compared["wrong"] if compared else "not compared with the launches"
    report = {"weights_bytes": backend.kernel_weights.arena.used, "position": position, "compared": compared,
              "op_by_op": part("op by op", lambda: time_graph([lambda: backend.run(program, step, host=False)])),
              "walk": {"refused": wrong} if wrong else part(
                  "megakernel", lambda: _measure_megakernel(ready, programs, time_graph)),
              "barriers": {name: part(f"barriers, {name}", lambda f=flag: measure_barrier(programs, time_graph, f))
                           for name, flag in (("counter", False), ("release flag", True))},
              "verify": part("verdict", lambda: measure_verify(config, time_graph)),
              "draft": part("draft", lambda: measure_draft(ready, programs, time_graph)),
              "launches_op_by_op": count_launches(lambda: backend.run(program, step, host=False))}
    report["barrier_seconds"] = min((s for s in report["barriers"].values() if s is not None), default=None)
    if report["walk"] and "seconds" in report["walk"]:
        plain = report["walk"]["seconds"]
        report["untuned_seconds"] = plain
        report["tuning"] = part("tuning", lambda: tune_megakernel(ready, programs, time_graph, plain, problems, enough)) or []
        faster = [row for row in report["tuning"] if row["equal"] and row["seconds"] < plain]
        report["walk"] |= min(faster, key=lambda row: row["seconds"], default={})
    steps = [row["seconds"] for row in (report["op_by_op"], report["walk"]) if row and "seconds" in row]
    draft = report["draft"]
    if steps and draft and "seconds" in draft:
        report["step_and_draft_seconds"] = min(steps) + draft["seconds"]
        report["projected"] = projected(report["step_and_draft_seconds"], reductions + draft["reductions"])
    return report


def _measure_megakernel(ready: Prepared, programs: int, time_graph) -> dict:
    step, megakernel = ready.step(8), Megakernel(ready.backend, ready.program, programs)
    timed = time_graph([lambda: megakernel.run(step)])
    launches = count_launches(lambda: megakernel.run(step))
    if megakernel.failed():
        return {"refused": "a wait was given up"}
    return timed | {"launches": launches, "barriers": len(megakernel.program), "refused": None}


# One switch of the megakernel after the other, each on top of what was found faster before.
SWITCHES = ({"release_flag": True}, {"ahead": 4096}, {"ahead": 16384}, {"packed": False})


def tune_megakernel(ready: Prepared, programs: int, time_graph, plain: float, problems: list[str],
                    enough: Callable[[], bool] = lambda: True) -> list[dict]:
    """The megakernel's switches (`Tuning`), one by one: a switch stays on if it makes the step faster, and the bits are those
    of the untuned one.

    Args:
        plain: seconds of the untuned step. problems: is told what failed. enough: whether there is time for another.

    Returns:
        Rows of tuning, seconds, runs, equal; those that failed are left out.
    """
    step, best, least, rows = ready.step(8), Tuning(), plain, []
    expected = Megakernel(ready.backend, ready.program, programs).run(step)
    for switch in SWITCHES:
        tuning = replace(best, **switch)
        if not enough():
            problems.append(f"a rank's step, {asdict(tuning)}: no time")
            continue
        row = kept(lambda t=tuning: _measure_tuned(ready, programs, time_graph, step, expected, t),
                   f"a rank's step, {asdict(tuning)}", problems)
        if row is None:
            continue
        rows.append(row)
        if not row["equal"]:
            problems.append(f"a rank's step, {asdict(tuning)}: other bits than untuned, or a wait was given up")
        elif row["seconds"] < least:
            best, least = tuning, row["seconds"]
    return rows


def _measure_tuned(ready: Prepared, programs: int, time_graph, step, expected: dict, tuning: Tuning) -> dict:
    megakernel = Megakernel(ready.backend, ready.program, programs, tuning=tuning)
    found = megakernel.run(step)
    equal = all(torch.equal(found[name], t) for name, t in expected.items())
    timed = time_graph([lambda: megakernel.run(step)])
    return timed | {"tuning": asdict(tuning), "equal": equal and not megakernel.failed()}


def measure_barrier(programs: int, time_graph, flag: bool = False) -> float:
    """Seconds of a grid barrier among so many programs. flag: of its form with a release flag.

    Raises:
        RuntimeError: one was given up.
    """
    counter, failed = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (BARRIER, 1))

    def barriers():
        counter.zero_()
        barrier_kernel[(programs,)](counter, failed, COUNT=BARRIERS, POLLS=1 << 22, FLAG=flag, num_warps=WARPS,
                                    launch_cooperative_grid=True)

    seconds = time_graph([barriers])["seconds"] / BARRIERS
    if bool(failed):
        raise RuntimeError("a wait was given up")
    return seconds


def measure_verify(config: MiMoV2Config, time_graph) -> dict:
    """The verdict on a block of eight rows over all ranks' logits, half of whose tokens are drawn: the third launch."""
    rows = {"device": "cuda", "dtype": torch.int32}
    logits = torch.randn(BLOCK, config.vocab_size * RANKS, device="cuda")
    drafts, first, count = (torch.tensor(c, **rows) for c in ([3] * BLOCK, [0], [BLOCK - 1]))
    temperatures = torch.tensor([0.0, 0.8] * (BLOCK // 2), dtype=torch.float64, device="cuda")
    numbers = torch.full((BLOCK,), 0.5, dtype=torch.float64, device="cuda")

    def verdict():
        verify(logits, drafts, first, count, temperature=temperatures, uniform=numbers)

    return time_graph([verdict]) | {"launches": count_launches(verdict)}


def measure_draft(ready: Prepared, programs: int, time_graph) -> dict:
    """The megakernel of a rank's drafter: features of seven accepted tokens, then a block of seven drafts, in one launch; its
    logits against those of the drafter launch by launch."""
    backend, position = ready.backend, ready.position
    model = rank_drafter(ready.config, RANKS, ready.device)
    drafter = TritonDrafter(model, backend, position // PAGE + 2, position + 2 * PAGE, shares=1)
    megakernel = MegakernelDrafter(drafter, programs)
    cache = KvCache({KIND: drafter.pool}, prefix=False)
    tables = cache.tables()
    cache.extend(tables, [KIND], position + BLOCK)
    width = len(drafter.target_layers) * ready.config.hidden_size
    features = torch.randn(BLOCK - 1, width, device=ready.device).to(torch.bfloat16)
    requests = [DraftRequest(tables, 5, position, BLOCK - 1, features)]
    arguments = megakernel.prepare(requests)
    megakernel.launch(arguments)
    difference = float(_row_differences(arguments["logits"], drafter.logits(requests)[0]).max())
    finite = difference < float("inf")
    # A rank of eight would read an eighth of the features' product; here it is read whole.
    beyond = drafter.fc.w.numel() * drafter.fc.w.element_size() * (RANKS - 1) // RANKS
    report = {"weights_bytes": drafter.arena.used, "bytes_beyond_a_rank": beyond, "reductions": 2 * len(drafter.layers),
              "difference": difference if finite else None}
    if not finite:
        return report | {"refused": "not finite"}
    if difference > DRAFT_DIFFERENCE:
        return report | {"refused": f"{difference:.1e} from the launches, expected at most {DRAFT_DIFFERENCE:.1e}"}
    timed = time_graph([lambda: megakernel.launch(arguments)])
    launches = count_launches(lambda: megakernel.launch(arguments))
    if megakernel.failed():
        return report | {"refused": "a wait was given up"}
    return report | timed | {"launches": launches, "refused": None}


def projected(seconds: float, reductions: int) -> dict:
    """Tokens per second of eight ranks from one rank's step and draft: not measured, the all-reduce time is an assumption."""
    return {"note": "projected: no communication but the stated all-reduces", "acceptance": ACCEPTANCE,
            "reductions": reductions, "tokens_per_second": {f"{1e6 * t:.0f} us": ACCEPTANCE / (seconds + reductions * t)
                                                           for t in ALL_REDUCE_SECONDS}}


def use_megakernel(engine, programs: int) -> None:
    """Makes an engine of the Triton backend run its steps and its drafter's rounds as megakernels."""
    engine.backend.runner = Megakernel(engine.backend, engine.program, programs)
    if engine.drafter is not None:
        engine.drafter = MegakernelDrafter(engine.drafter, programs)
