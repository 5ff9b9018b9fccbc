"""A megakernel is compiled once for all steps that its scratch serves: compiling in the middle of an answer costs seconds."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[dev]' on Linux")

from runtime_ref.backends.triton.megakernel import Megakernel
from runtime_ref.backends.triton.megakernel_drafter import MegakernelDrafter
from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.program import target_program
from runtime_ref.kernels import attention, dense, routing, sampling
from runtime_ref.kernels.experimental.megakernel import step_kernel
from runtime_ref.measure.static.kernel_arguments import ALIGNED, FLOATS
from tests.runtime_ref.kernels.at_once import INTERPRETED

compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
# Tokens of one or two sequences in a step.
BATCHES = [(1,), (2,), (8,), (1, 1), (2, 5), (8, 8), (16,), (3, 16)]


def compilations(kernel, run) -> int:
    """How often `run` has a kernel specialized."""
    kernel.device_caches.clear()
    run()
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def tables_of(pools):
    """Two sequences of 80 positions."""
    cache = KvCache(pools, prefix=False)
    found = [cache.tables() for _ in range(2)]
    for tables in found:
        cache.extend(tables, list(tables), 80)
    return found


@compiled_only
def test_the_targets_megakernel_is_compiled_once_per_scratch(small_engine):
    """Steps of one to 19 rows, at the beginning of a sequence and behind 60 positions, all logits or one: the scratch for eight
    rows and that for 64 have one kernel each."""
    backend = small_engine(drafter=False).backend
    tables, megakernel = tables_of(backend.pools), Megakernel(backend, target_program(backend.config, [0, 2]))

    def run(most):
        for batch in BATCHES:
            for start in (0, 60):
                for logits in ("all", "last"):
                    if sum(batch) <= most:
                        megakernel.run(backend.plan([SequenceChunk(own, start, list(range(1, n + 1)), logits)
                                                 for own, n in zip(tables, batch, strict=False)]))

    assert compilations(step_kernel, lambda: run(8)) == 1
    assert compilations(step_kernel, lambda: run(64)) == 2


@compiled_only
def test_the_drafters_megakernel_is_compiled_once(small_engine):
    """Blocks of one and two sequences, with pending features and without."""
    drafter = small_engine().drafter
    megakernel, tables = MegakernelDrafter(drafter), tables_of({"draft": drafter.pool})

    def run():
        for counts in ((1,), (7,), (3, 7), (7, 7)):
            for late in (0, 1, 8, 16):
                target_hidden = torch.zeros(late, 128, dtype=torch.bfloat16) if late else None
                megakernel.logits([DraftRequest(own, 5, 40, count, target_hidden) for own, count in zip(tables, counts,
                                                                                                    strict=False)])

    assert compilations(step_kernel, run) == 1


@compiled_only
@pytest.mark.parametrize("kernel", [step_kernel, dense.project_kernel, dense.product_kernel, dense.swiglu_kernel,
                                    dense.norm_kernel, dense.add_kernel, routing.route_kernel, attention.attend_kernel,
                                    sampling.verify_kernel])
def test_sizes_that_a_launch_specializes_on_are_those_that_the_static_gates_promise(kernel):
    """Otherwise the table would be that of another binary."""
    from runtime_ref.measure.static.kernel_arguments import POINTERS, ROW_POINTERS

    sizes = {p.name for p in kernel.params if not p.is_constexpr and p.name not in (*POINTERS, *ROW_POINTERS, *FLOATS)}
    kept = {p.name for p in kernel.params if p.name in sizes and not p.do_not_specialize}
    assert sizes and kept <= set(ALIGNED), kept - set(ALIGNED)
