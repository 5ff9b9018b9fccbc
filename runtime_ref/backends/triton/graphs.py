"""Steps and drafts as CUDA graphs: the launches of ops, recorded once per shape and replayed.

A graph has fixed sizes: rows, blocks, widths of page tables, chunks of attention. Tables are padded with page 0 and lengths
rounded up, so that a conversation meets few shapes; each is recorded when it first comes. Op by op on several ranks, sums go
through collectives, which graphs of NCCL can hold and those of gloo cannot.

Not measured: this project had no GPU when it was written. `launch.choose_launch` compares every bit before it serves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch

from runtime_ref.backends.base import Drafter
from runtime_ref.backends.triton.backend import TritonBackend
from runtime_ref.backends.triton.drafter import TritonDrafter
from runtime_ref.backends.triton.steps import Blocks, KernelStep, StepRunner
from runtime_ref.core.batch import KIND, DraftRequest
from runtime_ref.core.kv_cache import PAGE
from runtime_ref.core.program import Op
from runtime_ref.kernels.attention import CHUNK_PAGES
from runtime_ref.kernels.experts import MAX_TOKENS

GRAPHS = 64  # of each kind; the one that was used longest ago goes


class _Recorded(StepRunner):
    """Graphs by shape, with the tensors that they read."""

    def __init__(self, what: str, device: str):
        if device != "cuda":
            raise ValueError(f"CUDA graphs of {what} need a GPU, torch sees none; expected --launch auto, persistent or ops")
        self._known: OrderedDict[tuple, tuple] = OrderedDict()

    def replay(self, key: tuple, inputs: list[torch.Tensor], body: Callable[[list[torch.Tensor]], dict]) -> dict:
        """What `body` makes of `inputs`, copied out of the graph's own memory."""
        if key not in self._known:
            own = [t.clone() for t in inputs]
            body(own)  # compiles, and grows scratch
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = body(own)
            self._known[key] = graph, own, outputs
            if len(self._known) > GRAPHS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        graph, own, outputs = self._known[key]
        for here, given in zip(own, inputs, strict=True):
            here.copy_(given)
        graph.replay()
        return {name: t.clone() for name, t in outputs.items()}

    def flags(self) -> list[torch.Tensor]:
        return []  # of ops only the experts wait, and the backend reads their flags


def rounded_up(blocks: Blocks) -> Blocks:
    """The blocks with a table width of a power of two and a length of whole chunks: few different shapes."""
    n, width = blocks.tables.shape
    wide = 1 << (width - 1).bit_length()
    tables = torch.nn.functional.pad(blocks.tables, (0, wide - width))
    chunk = CHUNK_PAGES * PAGE
    return replace(blocks, tables=tables, longest=-(-blocks.longest // chunk) * chunk)


def _columns(blocks: Blocks) -> list[torch.Tensor]:
    return [blocks.tables, blocks.first, blocks.start, blocks.count, blocks.row, blocks.slots]


class GraphedSteps(_Recorded):
    """A program's steps of up to 64 rows.

    Raises:
        ValueError: no GPU; ranks that sum over gloo.
    """

    def __init__(self, backend: TritonBackend, program: list[Op]):
        super().__init__("steps", backend.device)
        if backend.ranks.count > 1 and "nccl" not in torch.distributed.get_backend():
            raise ValueError(f"CUDA graphs on {backend.ranks.count} ranks need NCCL, a GPU for each rank")
        self.backend, self.source = backend, program

    def serves(self, program: list[Op], step: KernelStep) -> bool:
        return program is self.source and step.real <= MAX_TOKENS

    def run(self, step: KernelStep) -> dict[str, torch.Tensor]:
        """Logits and target hidden states, as `TritonBackend.run` returns them."""
        blocks = {kind: rounded_up(own) for kind, own in step.blocks.items()}
        key = (step.real, step.head_rows.shape[0], *((kind, *own.tables.shape, own.longest) for kind, own in blocks.items()))
        inputs = [step.ids, step.positions, step.head_rows, *(t for own in blocks.values() for t in _columns(own))]

        def body(own: list[torch.Tensor]) -> dict:
            held = {kind: Blocks(*own[3 + 6 * i:9 + 6 * i], blocks[kind].longest) for i, kind in enumerate(blocks)}
            made = self.backend.launch_ops(self.source, KernelStep(*own[:3], step.real, step.wanted, held))
            return {name: t for name, t in made.items() if name == "logits" or name.startswith("target_hidden.")}

        return self.replay(key, inputs, body)


class GraphedDrafter(_Recorded, Drafter):
    """Rounds of a drafter; features enter its context launch by launch before them."""

    def __init__(self, drafter: TritonDrafter):
        super().__init__("drafts", drafter.backend.device)
        self.drafter, self.block, self.target_layers, self.pool = drafter, drafter.block, drafter.target_layers, drafter.pool
        self.extend_tables = drafter.extend_tables

    @torch.inference_mode()
    def logits(self, requests: list[DraftRequest]) -> list[torch.Tensor]:
        for w in requests:
            if w.target_hidden is not None and w.target_hidden.shape[0]:
                self.extend_tables(w.target_hidden, w.position - w.target_hidden.shape[0], w.tables[KIND])
        ids, positions, picked, blocks = self.drafter.plan(requests)
        blocks = rounded_up(blocks)
        key = ids.shape[0], picked.shape[0], *blocks.tables.shape, blocks.longest

        def body(own: list[torch.Tensor]) -> dict:
            return {"logits": self.drafter.block_logits(*own[:3], Blocks(*own[3:], blocks.longest))}

        found = self.replay(key, [ids, positions, picked, *_columns(blocks)], body)["logits"]
        return list(found.split([w.count for w in requests]))
