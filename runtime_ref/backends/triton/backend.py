"""Runs programs with the Triton kernels: the same ops, the same buffers, the same caches as `TorchBackend`.

Every op of a program has a kernel; none falls back to torch. A program is fused first (`core/fusion.py`); a caller that watches
buffers gets it as it is, op by op. On a machine without a GPU the kernels are compiled for the CPU (`triton_cpu/`), or
run in Triton's interpreter if TRITON_INTERPRET=1 is set: for tests and checks.

Numbers: bf16 only. Operands of products are rounded to bf16, which the torch backend does not do, so logits of the two agree
within a tolerance. Where experts lie in hw_fp4 pages (backend "triton-mxfp8") their activations are rounded to MXFP8. What they
share is C4: no kernel lets a row see the others of its batch.

With several ranks, the parts of a sum leave the kernels, are gathered (NCCL or gloo) and added in order; a rank that has all
parts adds them in the same order inside the kernel (`kernels/tp_reduction.py`): bits do not depend on the number of ranks (C5).
A megakernel (`megakernel.py`) sums over ranks without leaving the kernel.

Rejected: torch ops for the small steps in between, which is what makes decoding wait for launches.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from modeling.drafter import load_drafter
from runtime_ref.backends.base import Backend, Capabilities, Drafter
from runtime_ref.backends.triton.steps import BLOCK, KernelPool, KernelStep, RotaryTable, StepRunner, plan_blocks
from runtime_ref.checkpoints.device_shapes import interpreted
from runtime_ref.checkpoints.device_weights import KernelWeights, load_kernel_weights
from runtime_ref.checkpoints.host_weights import TargetWeights
from runtime_ref.checkpoints.load import load_target
from runtime_ref.core.batch import SequenceChunk, lay_out
from runtime_ref.core.fusion import fused
from runtime_ref.core.kv_cache import KvCache
from runtime_ref.core.launch_report import LaunchReport
from runtime_ref.core.program import Op, run_ops
from runtime_ref.core.tensor_parallel import SINGLE_RANK, Ranks
from runtime_ref.kernels import launches
from runtime_ref.kernels.attention import attend
from runtime_ref.kernels.experts import MAX_TOKENS, Launch, Workspace, run_experts
from runtime_ref.kernels.launches import Tiling

# How the experts' work is handed out in calls of up to so many tokens: changes of `experts.Launch` ("tickets", "packed",
# "ahead"). Nothing is changed until the GPU suite has measured it (its table of tokens).
DISPATCH: dict[int, dict] = {BLOCK: {}, MAX_TOKENS: {}}


class TritonBackend(Backend):
    """One rank's weights and caches, and the ops of a program.

    Args:
        pages: pages by kind ("full", "window"); a kind that the model does not have gets no pool.
        positions: the longest sequence (rotary tables).
        tiling, launch: sizes of tiles and of the experts' launch.
        folder: where the torch form of the weights can be read for comparisons (`weights`).
    """

    dtype = torch.bfloat16

    def __init__(self, weights: KernelWeights, *, pages: dict[str, int], positions: int, tiling: Tiling | None = None,
                 launch: Launch | None = None, folder: str | Path | None = None):
        self.kernel_weights, self.config, self.ranks = weights, weights.config, weights.ranks
        self.device = weights.arena.data.device.type
        self.tiling, self.launch = tiling or default_tiling(), launch or default_launch()
        self.folder = folder
        self.pools = self._pools(pages)
        config, factor = self.config, self.config.partial_rotary_factor
        names = {"full": ("rope_theta", "head_dim"), "window": ("swa_rope_theta", "swa_head_dim")}
        bases = {kind: [getattr(config, name) for name in names[kind]] for kind in self.pools}
        self.rotary = {kind: RotaryTable(base, int(width * factor), positions + BLOCK, self.device,
                                         getattr(config, "rotary", (None, 1.0))).table
                       for kind, (base, width) in bases.items()}
        self.epsilon = config.layernorm_epsilon
        self.ops: dict[str, Callable] = {name.removeprefix("op_"): getattr(self, name)
                                         for name in dir(type(self)) if name.startswith("op_")}
        self._spaces: dict[int, Workspace] = {}
        self._mxfp8 = any(layer.pages is not None and layer.pages.hw_fp4 for layer in weights.layers)
        self.runner: StepRunner | None = None  # takes over the steps that it serves (`launch.choose_launch`)

    @cached_property
    def weights(self) -> TargetWeights:
        """The same rank's weights in the torch backend's form, read from the folder when first asked for."""
        if self.folder is None:
            raise ValueError("this backend was not made from a folder: there are no torch weights to compare with")
        return load_target(self.folder, self.ranks)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("triton-mxfp8" if self._mxfp8 else "triton", float32=False, verifies_on_device=True,
                            packed_weights=True, mxfp8_activations=self._mxfp8)

    def load_drafter(self, folder: str | Path, pages: int, context: int, *, precision: str = "bf16") -> Drafter:
        self.only_bf16_drafts(precision)
        from runtime_ref.backends.triton.drafter import TritonDrafter

        return TritonDrafter(load_drafter(folder, torch.float32), self, pages, context)

    def _pools(self, pages: dict[str, int]) -> dict[str, KernelPool]:
        pools = {}
        for kind, window in (("full", None), ("window", self.config.sliding_window)):
            own = {i: (layer.heads.keys, layer.heads.d, layer.heads.v) for i, layer in enumerate(self.kernel_weights.layers)
                   if layer.kind == kind}
            if own:
                pools[kind] = KernelPool(own, pages[kind], window, self.device)
        return pools

    def plan(self, chunks: list[SequenceChunk]) -> KernelStep:
        """The step that computes the tokens of `chunks`, whose tables must reach to their ends."""
        ids, positions, head = lay_out(chunks)
        ids, positions, rows = (torch.tensor(c, dtype=torch.int32, device=self.device) for c in (ids, positions, head or [0]))
        step = KernelStep(ids, positions, rows, ids.shape[0], len(head))
        for kind, pool in self.pools.items():
            places = [(chunk.tables[kind], chunk.start + begin, min(BLOCK, len(chunk.tokens) - begin), chunk.row + begin)
                      for chunk in chunks for begin in range(0, len(chunk.tokens), BLOCK)]
            step.blocks[kind] = plan_blocks(pool, places, self.device)
        return step

    def plan_of_rows(self) -> KernelStep:
        """A step of eight rows without a sequence, for ops that look at rows only."""
        rows = torch.zeros(BLOCK, dtype=torch.int32, device=self.device)
        return KernelStep(rows, rows, rows, BLOCK, 0)

    @torch.inference_mode()
    def run(self, program: list[Op], step: KernelStep, watch: Callable[[Op, dict], None] | None = None, *,
            host: bool = True) -> dict[str, torch.Tensor]:
        """Executes the ops in order; returns the buffers, logits on the host unless `host` is False. `watch` sees the buffers
        after each op of the program, which is not fused then."""
        if watch is None and self.runner is not None and self.runner.serves(program, step):
            buffers = self.runner.run(step)
        else:
            buffers = self.launch_ops(program, step, watch)
        if host and "logits" in buffers:
            buffers["logits"] = buffers["logits"].cpu()
        return buffers

    @torch.inference_mode()
    def launch_ops(self, program: list[Op], step: KernelStep, watch: Callable[[Op, dict], None] | None = None, *,
                   fuse: bool = False) -> dict[str, torch.Tensor]:
        """Buffers of a step, op by op. fuse: also where somebody watches."""
        whole = program if watch is not None and not fuse else fused(program, self.ranks.count)
        return run_ops(whole, self.ops, step, watch)

    def choose_launch(self, asked: str, program: list[Op], drafter: Drafter | None, cache: KvCache, running: int,
                      context: int) -> tuple[LaunchReport, Drafter | None]:
        from runtime_ref.backends.triton.launch import choose_launch

        return choose_launch(asked, self, program, drafter, cache, running, context)

    def wait_flags(self, drafter: Drafter | None) -> list[torch.Tensor]:
        flags = [t for runner in (self.runner, drafter) if isinstance(runner, StepRunner) for t in runner.flags()]
        return flags + [space.control[2:] for space in self._spaces.values()]

    def _layer(self, index: int):
        return self.kernel_weights.layers[index]

    def _empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def op_embed(self, step, layer, ids):
        return launches.gather(self.kernel_weights.embed, ids, self.tiling)

    def op_input_norm(self, step, layer, x):
        return launches.norm(x, self._layer(layer).input_norm, self.epsilon, self.tiling)[0]

    def op_post_norm(self, step, layer, x):
        return launches.norm(x, self._layer(layer).post_norm, self.epsilon, self.tiling)[0]

    def op_final_norm(self, step, layer, x):
        return launches.norm(x, self.kernel_weights.norm, self.epsilon, self.tiling)[0]

    def _project(self, step, layer, x, k, v, slots, norm=None):
        own = self._layer(layer)
        q = self._empty(own.heads.queries, x.shape[0], own.heads.d)
        launches.project(x, own.qkv, own.heads, self.rotary[own.kind], step.positions, slots, q, k, v, self.tiling, norm=norm,
                         head_norm=None if own.head_norm is None else (own.head_norm, self.epsilon),
                         value_scale=self.config.attention_value_scale)
        return q

    def op_project_full(self, step, layer, y):
        heads, R = self._layer(layer).heads, y.shape[0]
        k, v = self._empty(heads.keys, R, heads.d), self._empty(heads.keys, R, heads.v)
        return self._project(step, layer, y, k, v, torch.arange(R, dtype=torch.int32, device=self.device)), k, v

    op_project_window = op_project_full

    def op_write_full(self, step, layer, k, v):
        kind = self._layer(layer).kind
        for source, store in ((k, self.pools[kind].keys), (v, self.pools[kind].values)):
            launches.write(source, store[layer], step.blocks[kind].slots, self.tiling)

    op_write_window = op_write_full

    def op_enter_full(self, step, layer, x):
        own, pool = self._layer(layer), self.pools[self._layer(layer).kind]
        return self._project(step, layer, x, pool.keys[layer], pool.values[layer], step.blocks[own.kind].slots,
                             (own.input_norm, self.epsilon))

    op_enter_window = op_enter_full

    def op_attend_full(self, step, layer, q):
        own = self._layer(layer)
        pool, blocks = self.pools[own.kind], step.blocks[own.kind]
        return attend(q, pool.keys[layer], pool.values[layer], own.sink, blocks.tables, blocks.first, blocks.start,
                      blocks.count, blocks.row, rows=BLOCK, window=pool.window, longest=blocks.longest,
                      float_dot=self.tiling.float_dot)

    op_attend_window = op_attend_full

    def op_merge_heads(self, step, layer, heads):
        own = self._layer(layer)
        return launches.product(heads, own.o, self._partial(step, own.parts.o), self.tiling, parts=own.parts.o)

    def _partial(self, step, parts: int) -> torch.Tensor:
        return self._empty(parts, step.real, self.config.hidden_size, dtype=torch.float32)

    def op_merge_add(self, step, layer, x, heads):
        own = self._layer(layer)
        return launches.product(heads, own.o, torch.empty_like(x), self.tiling, residual=x, parts=own.parts.o)

    def op_add_parts(self, step, layer, x, partial):
        return launches.add(x, self.ranks.gather(partial), self.tiling)

    def op_dense_mlp(self, step, layer, y):
        return self.op_down(step, layer, launches.swiglu(y, self._layer(layer).gate_up, self.tiling))

    def op_norm_gate_up(self, step, layer, x):
        own = self._layer(layer)
        return launches.swiglu(x, own.gate_up, self.tiling, norm=(own.post_norm, self.epsilon))

    def op_down(self, step, layer, inner):
        own = self._layer(layer)
        return launches.product(inner, own.down, self._partial(step, own.parts.down), self.tiling, parts=own.parts.down)

    def op_down_add(self, step, layer, x, inner):
        own = self._layer(layer)
        return launches.product(inner, own.down, torch.empty_like(x), self.tiling, residual=x, parts=own.parts.down)

    def op_route(self, step, layer, y):
        return launches.route(y, self._layer(layer).router, self.tiling)[:2]

    def op_norm_route(self, step, layer, x):
        own = self._layer(layer)
        index, weight, y = launches.route(x, own.router, self.tiling, norm=(own.post_norm, self.epsilon))
        return y, index, weight

    def op_experts(self, step, layer, y, index, weight):
        return self._experts(layer, y, index, weight, self._partial(step, self._layer(layer).parts.experts))

    def op_experts_add(self, step, layer, x, y, index, weight):
        return self._experts(layer, y, index, weight, torch.empty_like(x), residual=x)

    def _experts(self, layer, y, index, weight, out, residual=None):
        """Up to 64 tokens a call."""
        y = launches.rounded(y, self.tiling) if y.dtype is torch.float32 else y
        pages = self._layer(layer).pages
        for begin in range(0, y.shape[0], MAX_TOKENS):
            rows = slice(begin, begin + MAX_TOKENS)
            run_experts(y[rows], index[rows], weight[rows], pages, self.space(pages, y[rows].shape[0]), out[..., rows, :],
                        None if residual is None else residual[rows])
        return out

    def space(self, pages, tokens: int) -> Workspace:
        """Scratch of the experts for so many tokens, shared by all layers."""
        size = next(n for n in DISPATCH if n >= tokens)
        if size not in self._spaces:
            launch = replace(self.launch, **DISPATCH[size])
            self._spaces[size] = Workspace(pages, size, self.config.num_experts_per_tok, launch)
        return self._spaces[size]

    def op_target_hidden(self, step, layer, x):
        return x

    def op_pick_rows(self, step, layer, x):
        return launches.gather(x, step.head_rows, self.tiling)

    def op_head(self, step, layer, y):
        return self.head_logits(y, y.shape[0])

    def op_pick_norm_head(self, step, layer, x):
        return self.head_logits(x, step.head_rows.shape[0], norm=(self.kernel_weights.norm, self.epsilon), rows=step.head_rows)

    def head_logits(self, x: torch.Tensor, count: int, **options) -> torch.Tensor:
        """float32 logits [count, vocabulary] through the head; options as of `launches.product`."""
        head = self.kernel_weights.head
        return self.whole_vocabulary(
            launches.product(x, head, self._empty(count, head.w.shape[0], dtype=torch.float32), self.tiling, **options))

    def whole_vocabulary(self, own: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] from each rank's [rows, its share]."""
        if self.ranks.count == 1:
            return own
        return self.ranks.gather(own[None]).transpose(0, 1).reshape(own.shape[0], -1)


def kernel_device() -> str:
    """Where kernels run: "cuda" where there is a GPU, else "cpu": compiled for it (`kernels/host`), or interpreted if
    TRITON_INTERPRET=1 is set.

    Raises:
        ValueError: no GPU, no interpreter, no C compiler.
    """
    if interpreted():
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    from runtime_ref.triton_cpu.backend import use_host

    try:
        use_host()
    except ValueError as error:
        raise ValueError(f"backend 'triton': torch sees no GPU, and {error}") from None
    warnings.warn("backend 'triton': torch sees no GPU; the kernels are compiled for this CPU, each at its first launch: their "
                  "answers count, their speed does not", stacklevel=2)
    return "cpu"


def default_tiling() -> Tiling:
    """Wide tiles in the interpreter (`kernel_shapes.interpreted`)."""
    return Tiling(columns=256, router_depth=256, block=2048, float_dot=True) if interpreted() else Tiling()


def default_launch() -> Launch:
    """One program in the interpreter; compiled for the CPU, four that come one after another; else four per multiprocessor."""
    if interpreted():
        return Launch(programs=1, ptx=False, float_dot=True, prefetch=0)
    return Launch(programs=4 * (torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 1))


def load_triton_backend(folder: str | Path, ranks: Ranks = SINGLE_RANK, *, dtype: torch.dtype = torch.bfloat16,
                        pages: dict[str, int], positions: int, hw_fp4: bool = False,
                        progress: Callable[[int, int], None] | None = None) -> TritonBackend:
    """A backend on an exported folder. hw_fp4: experts for tensor cores that read E2M1
    (`kernels/experimental/blackwell_mxfp4.py`).

    Raises:
        ValueError: no GPU and no interpreter, a dtype other than bfloat16, a folder that the kernels cannot run.
    """
    device = kernel_device()
    if device == "cuda" and ranks.count > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", ranks.rank)) % torch.cuda.device_count())
    if dtype is not torch.bfloat16:
        raise ValueError(f"backend 'triton': dtype {str(dtype).removeprefix('torch.')}, expected bfloat16")
    weights = load_kernel_weights(folder, ranks, device=device, hw_fp4=hw_fp4, progress=progress)
    return TritonBackend(weights, pages=pages, positions=positions, folder=folder)
