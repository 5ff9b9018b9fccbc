"""The drafter on the compiled ops: the passes of `drafter.Drafter`, each in one call.

A block attends to one run of positions: context within the window before the anchor, then the block itself (up to the row's
own position if the drafter is causal). That is a lowest and a highest position per row, as for the target.

With `int8` (an option: `--drafter-precision int8`, for processors with AVX512-VNNI) its matrices are held in int8, each row
with a scale of its own, and activations are rounded to int8 where they enter a product: half the time of a block. The target
verifies every draft, so tokens cannot change; how many drafts it accepts can, so it is never taken unasked.
"""

from __future__ import annotations

from array import array

import torch

from runtime_ref.backends.c import structs
from runtime_ref.backends.c.backend import CStep, Rows, attention_fields, dense_fields, in_halves, padded_pointer, submit
from runtime_ref.backends.c.structs import OP, Layer, Memory, Workspace, up
from runtime_ref.backends.torch.drafter import TorchDrafter
from runtime_ref.core.batch import KIND, DraftRequest
from runtime_ref.core.kv_cache import Pool


class CDrafter(TorchDrafter):
    """See the module's text."""

    def __init__(self, model, backend, pages: int, *, int8: bool = False):
        if int8 and not backend.bf16_dot:
            raise ValueError("--drafter-precision int8: the compiled ops multiply int8 on processors with AVX512-BF16 and "
                             "-VNNI and in dtype bfloat16 only; expected bf16")
        super().__init__(model, backend, pages)
        widths = dict.fromkeys(range(len(self.layers)), (self.K, up(self.D), up(self.V)))
        self.pool = in_halves(Pool(widths, pages, backend.dtype, self.window), backend.bf16_dot)
        self.memory = memory = Memory(backend.bf16_dot, int8=int8)
        self.layer_structs = (Layer * len(self.layers))(*(self._layer(i) for i in range(len(self.layers))))
        shared = {"layers": self.layer_structs, "embed": backend.step.embed, "mask": memory.pointer(self.mask),
                  "head": self._head(), "H": self.mask.shape[0], "bf16": backend.step.bf16, "bf16_dot": backend.step.bf16_dot,
                  "epsilon": self.epsilon}
        self.block_step = structs.Step(norm=memory.pointer(self.norm), **shared)
        self.context_step = structs.Step(norm=memory.pointer(self.hidden_norm), fc=memory.matrix(self.fc[0].T), **shared)
        self.block_work, self.context_work = (Workspace(self.layer_structs, self.mask.shape[0]) for _ in range(2))
        self._reached = 0
        self.one_call = backend.ranks.count == 1 and self.markov is None
        self.block_step.vocabulary = backend.vocabulary
        layers = range(len(self.layers))
        self.block_code = _code([("embed", 0), *((op, i) for i in layers for op in self._ops(i)),
                                 ("pick_rows", 0), ("final_norm", 0), ("head", 0), ("best", 0)])
        self.context_code = _code([("fuse", 0), *((op, i) for i in layers for op in ("project_kv", "write"))])

    def _head(self) -> structs.Matrix:
        """The target's, or a copy of it in int8."""
        step, head = self.backend.step, self.backend.weights.head
        return self.memory.matrix(head.transpose(1, 2).flatten(0, 1)) if self.memory.int8 else step.head

    def _ops(self, layer: int) -> list[str]:
        attention, mlp = ([name] * (pair is not None) for name, pair in zip(
            ("convolve_attention", "convolve_mlp"), self.layers[layer]["convolutions"], strict=True))
        return ["input_norm", *attention, "project", "write", "attend", "merge_heads", "add_attention", "post_norm", *mlp,
                "dense_mlp", "add_mlp"]

    def _layer(self, index: int) -> Layer:
        own, memory = self.layers[index], self.memory
        o = own["o"].view(self.Q, self.V, -1)
        layer = attention_fields(memory, own["qk"], own["v"], [structs.pad(o, 1).flatten(0, 1).T], self.Q)
        context = [structs.pad(t.transpose(1, 2), 1).flatten(0, 1) for t in (own["qk"][self.Q:], own["v"])]
        layer.kv = memory.matrix(torch.cat(context))
        for name, value in {
                "input_norm": memory.pointer(own["input_norm"]), "post_norm": memory.pointer(own["post_norm"]),
                "q_norm": padded_pointer(memory, own["qk_norm"][0, 0]),
                "k_norm": padded_pointer(memory, own["qk_norm"][self.Q, 0]),
                "sink": memory.pointer(own["sink"]), "rotated": self.rotary.rotated,
                "keys": self.pool.keys[index].data_ptr(), "values": self.pool.values[index].data_ptr(),
                "slots": self.pool.keys[index].shape[1], "q_scale": self.D**-0.5, "epsilon": self.epsilon,
                "value_scale": 1.0 if self.value_scale is None else self.value_scale}.items():
            setattr(layer, name, value)
        dense_fields(layer, memory, own["gate_up"], own["down"])
        if any(own["convolutions"]):
            empty = (torch.zeros(1, self.mask.shape[0], 1), torch.zeros(1, 1, self.mask.shape[0]))
            pairs = [pair or empty for pair in own["convolutions"]]
            # The first product's rows are padded to whole vectors, so the second has as many columns.
            layer.convolutions = memory.matrices([w for down, upper in pairs for w in (down[0].T, structs.pad(upper[0].T, 1))])
        return layer

    def _begin(self, step: structs.Step, work: Workspace, planned: CStep) -> None:
        work.fit(step, planned.real, planned.highest + self.block)
        if planned.highest >= self._reached:
            self.rotary.rows(torch.zeros(1, dtype=torch.long), planned.highest)
            self._reached = self.rotary._cos.shape[0]
            for layer in self.layer_structs:
                layer.cos, layer.sin = self.rotary._cos.data_ptr(), self.rotary._sin.data_ptr()
        submit(step, planned)

    def _begin_context(self, target_hidden: torch.Tensor, positions: list[int], slots: list[int]) -> None:
        n, target_hidden = len(positions), target_hidden.contiguous()
        numbers = array("i", [*[0] * n, *positions, *[0] * (4 * n), *slots])
        planned = CStep(n, 0, numbers, kinds=1, pages=0, picks=False, highest=max(positions))
        self.context_step.features, self._held = target_hidden.data_ptr(), (target_hidden, planned)
        self._begin(self.context_step, self.context_work, planned)

    def extend(self, target_hidden: torch.Tensor, positions: list[int], slots: list[int]) -> None:
        self._begin_context(target_hidden, positions, slots)
        self.backend.run_code(self.context_step, self.context_code.buffer_info()[0], len(self.context_code) // 2)

    def _begin_block(self, requests: list[DraftRequest]) -> CStep:
        rows = Rows([self.window])
        for w in requests:
            at = len(rows.ids)
            rows.head += range(at + 1, at + w.count + 1)
            rows.add([w.anchor] + [-1] * w.count, w.position, [w.tables[KIND]], last_low=w.position,
                     high=None if self.causal else w.position + w.count)
        planned, step = rows.step(), self.block_step
        self.drafts = torch.empty(planned.wanted, step.head.n)
        self.best, self.chance = (array(kind, bytes(4 * planned.wanted)) for kind in "if")
        step.logits = self.drafts.data_ptr()
        step.best, step.chance = self.best.buffer_info()[0], self.chance.buffer_info()[0]
        self._begin(step, self.block_work, planned)
        return planned

    def begin_round(self, requests: list[DraftRequest]) -> tuple:
        """Both passes, ready to run: what `run_round` of ops.c takes of them. It leaves the drafts in `best` and their
        probabilities in `chance`, one request after the other."""
        pending = self._pending(requests)
        if pending is not None:
            self._begin_context(*pending)
        self._planned = self._begin_block(requests)
        return (self.context_step, self.context_code.buffer_info()[0], 0 if pending is None else len(self.context_code) // 2,
                self.block_step, self.block_code.buffer_info()[0], len(self.block_code) // 2)

    def logits(self, requests: list[DraftRequest]) -> list[torch.Tensor]:
        self._catch_up(requests)
        planned, ranks = self._begin_block(requests), self.backend.ranks
        self.backend.run_code(self.block_step, self.block_code.buffer_info()[0], len(self.block_code) // 2 - 1)
        logits = self.drafts[:, :self.backend.vocabulary]
        if ranks.count > 1:
            logits = ranks.gather(logits[None].contiguous()).transpose(0, 1).reshape(planned.wanted, -1)
        return list(logits.split([w.count for w in requests]))


def _code(instructions: list[tuple[str, int]]) -> array:
    return array("i", [n for op, layer in instructions for n in (OP[op], layer)])
