"""The program of `core/program.py`, run in one call of the compiled ops (`ops.c`).

The same ops in the same order as the torch backend; what it saves is the calls (a step of the embedded model is a hundred
ops of microseconds) and the bytes (weights in bf16 where that is exact, experts packed). With several ranks the program is
cut where a collective is needed. With `watch`, one call per op, and the buffers in the shapes of `backends/torch/ops.py`.

Numbers: there is one path for each dtype, on every processor. In bf16 the operands of products are rounded to bf16 (weights as
the file has them, activations where they enter a product), sums are float32. Processors with bf16 dot products do that in one
instruction (`bf16_dots.h`), twice as fast; others round and multiply, and add in another order. In float32 nothing is rounded.

Bits differ from the torch backend's (sums have another order), and are the same for any rows, batch, cut and number of ranks.
The float32 weights of `TargetWeights` stay in memory beside it: the torch backend, the checks and the drafter share them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from modeling.drafter import load_drafter
from runtime_ref.backends.base import Backend, Capabilities, Cut, Drafter
from runtime_ref.backends.c import structs
from runtime_ref.backends.c.structs import Layer, Memory, Workspace, compiled_ops, has_bf16_dot, pad, up
from runtime_ref.backends.torch.rotary import rotary_tables
from runtime_ref.checkpoints.host_weights import Dense, TargetWeights
from runtime_ref.core.batch import DraftRequest, SequenceChunk
from runtime_ref.core.kv_cache import PAGE, Pool, Table, untouched_zeros
from runtime_ref.core.program import Op

KINDS = ("full", "window")
KEEP = Cut(0.0, array("f", [1.0] * 16))


def refuses(weights: TargetWeights) -> str | None:
    """Why the compiled ops cannot run this model here, in one line; None if they can."""
    found, reason = compiled_ops()
    if found is None:
        return reason
    if weights.config.hidden_size % 32:
        return f"hidden_size {weights.config.hidden_size} is not a multiple of 32"
    for layer in weights.layers:
        if layer.attention.qk_bias is not None:
            return "projections with biases are the torch backend's alone"
        if getattr(layer.mlp, "shared", None) is not None:
            return "shared experts are the torch backend's alone"
    return None


@dataclass
class CStep:
    """Arrays of one step (`Step.numbers` of `ops.c`); `real` and `wanted` as in `model.Step`."""

    real: int
    wanted: int
    numbers: array
    kinds: int
    pages: int
    picks: bool
    highest: int

    @property
    def ids(self) -> torch.Tensor:
        """int64 [real]."""
        return torch.tensor(self.numbers[:self.real], dtype=torch.long)


class Rows:
    """The rows of a step, column by column: a chunk's positions follow each other, so most columns are ranges."""

    def __init__(self, windows: list[int | None]):
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.head: list[int] = []
        self.tables: list[int] = []
        self.windows = windows
        self.by_kind: list[tuple[list[int], ...]] = [([], [], [], [], []) for _ in windows]  # low, high, at, first, slots

    def add(self, tokens: list[int], start: int, tables: list[Table], last_low: int | None = None,
            high: int | None = None) -> None:
        """Rows of `tokens` from position `start` on, with a table of each kind.

        They see positions up to their own, or all up to `high`; from their window on, but at least from `last_low` on.
        """
        n = len(tokens)
        end = start + n
        own = range(start, end)
        self.ids += tokens
        self.positions += own
        for window, table, (low, to, at, first, slots) in zip(self.windows, tables, self.by_kind, strict=True):
            if window is None or end <= window:
                low += [0] * n
            else:
                most = end if last_low is None else last_low
                low += [max(0, min(most, position - window + 1)) for position in own]
            to += own if high is None else [high] * n
            at += [len(self.tables)] * n
            first += [table.first] * n
            self.tables += table.pages
            position = start
            while position < end:
                page, offset = divmod(position, PAGE)
                count = min(PAGE - offset, end - position)
                slot = table.page(page) * PAGE + offset
                slots += range(slot, slot + count)
                position += count

    def step(self) -> CStep:
        columns = [column for columns in zip(*self.by_kind, strict=True) for column in columns]
        n, picks = len(self.ids), len(self.head) != len(self.ids)
        numbers = array("i", [*self.ids, *self.positions, *chain.from_iterable(columns), *self.tables])
        if picks:
            numbers.extend(self.head)
        return CStep(n, len(self.head), numbers, len(self.windows), len(self.tables), picks, max(self.positions))


def submit(step: structs.Step, planned: CStep) -> None:
    """Points `step` at the arrays of a plan."""
    step.numbers = planned.numbers.buffer_info()[0]
    step.R = step.rows = planned.real
    step.wanted, step.kinds, step.pages, step.picks = planned.wanted, planned.kinds, planned.pages, planned.picks


class Buffers(dict):
    """What a step leaves; a single layer's target hidden states are cut out when somebody asks for them."""

    def __init__(self, width: int, places: dict[int, int]):
        super().__init__()
        self.cut = {f"target_hidden.{layer}": slice(i * width, (i + 1) * width) for layer, i in places.items()}

    def __missing__(self, name: str) -> torch.Tensor:
        return self["target_hidden"][:, self.cut[name]]


class CBackend(Backend):
    """See the module's text. Arguments as for `TorchBackend`, and `bf16_dot`: whether products are bf16 dot products (None:
    where the processor has them and the dtype is bf16). Matrices, codes and cache are then held in the order of `bf16_dots.h`.

    Raises:
        ValueError: the compiled ops cannot run this model (see `refuses`).
    """

    def __init__(self, weights: TargetWeights, *, dtype: torch.dtype = torch.bfloat16, pages: dict[str, int],
                 bf16_dot: bool | None = None):
        reason = refuses(weights)
        if reason is not None:
            raise ValueError(f"backend c: {reason}")
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype {dtype}: expected bfloat16 or float32")
        if bf16_dot and not has_bf16_dot(dtype):
            raise ValueError(f"bf16_dot: bf16 dot products need a processor that has them and dtype bfloat16, this is {dtype}")
        self.weights, self.config, self.dtype, self.ranks = weights, weights.config, dtype, weights.ranks
        self.bf16_dot = has_bf16_dot(dtype) if bf16_dot is None else bf16_dot
        self.run_code, self.round_code = compiled_ops()[0].run, compiled_ops()[0].run_round
        self.memory = Memory(self.bf16_dot)
        self.rotary = rotary_tables(self.config)
        self.pools = self._pools(pages)
        self.layers = (Layer * len(weights.layers))(*(self._layer(i) for i in range(len(weights.layers))))
        H, memory = self.config.hidden_size, self.memory
        head = memory.matrix(weights.head.transpose(1, 2).flatten(0, 1))
        self.vocabulary = weights.head.shape[0] * weights.head.shape[2]
        self.step = structs.Step(layers=self.layers, embed=memory.pointer(weights.embed), norm=memory.pointer(weights.norm),
                                head=head, H=H, bf16=int(dtype is torch.bfloat16), bf16_dot=int(self.bf16_dot),
                                epsilon=self.config.layernorm_epsilon, vocabulary=self.vocabulary)
        self.work = Workspace(self.layers, H)
        self._codes: dict[int, tuple] = {}
        self._reached = 0

    def _pools(self, pages: dict[str, int]) -> dict[str, Pool]:
        pools = {}
        for kind, window in (("full", None), ("window", self.config.sliding_window)):
            own = {i: (a.key_heads, up(a.qk_dim), up(a.v_dim)) for i, layer in enumerate(self.weights.layers)
                   if ((a := layer.attention).window is not None) == (kind == "window")}
            if own:
                pools[kind] = in_halves(Pool(own, pages[kind], self.dtype, window), self.bf16_dot)
        return pools

    def _layer(self, index: int) -> Layer:
        own, config, memory = self.weights.layers[index], self.config, self.memory
        a = own.attention
        kind = "window" if a.window is not None else "full"
        per_part = a.query_heads // a.o.shape[0]
        o = a.o.view(a.o.shape[0], per_part, a.v_dim, -1)
        layer = attention_fields(memory, a.qk, a.v, [pad(part, 1).flatten(0, 1).T for part in o], a.query_heads)
        pool = self.pools[kind]
        for name, value in {
                "input_norm": memory.pointer(own.input_norm), "post_norm": memory.pointer(own.post_norm),
                "sink": memory.pointer(a.sink), "kind": list(self.pools).index(kind), "rotated": self.rotary[kind].rotated,
                "q_norm": padded_pointer(memory, a.q_norm), "k_norm": padded_pointer(memory, a.k_norm),
                "keys": pool.keys[index].data_ptr(), "values": pool.values[index].data_ptr(),
                "slots": pool.keys[index].shape[1], "q_scale": a.qk_dim**-0.5, "epsilon": config.layernorm_epsilon,
                "value_scale": 1.0 if a.value_scale is None else a.value_scale}.items():
            setattr(layer, name, value)
        if isinstance(own.mlp, Dense):
            dense_fields(layer, memory, own.mlp.gate_up, own.mlp.down)
        else:
            self._moe_fields(layer, own.mlp)
        return layer

    def _moe_fields(self, layer: Layer, mlp) -> None:
        config, memory = self.config, self.memory
        layer.router = memory.matrix(mlp.router[0].T)
        layer.correction = memory.pointer(mlp.correction)
        layer.experts = memory.experts(mlp.experts.matrices)
        layer.mlp_parts, layer.count, layer.top = mlp.experts.parts, mlp.experts.count, config.num_experts_per_tok
        one = mlp.experts.matrices[0]
        rows, cut = one["gate"].codes.shape[0], one["down"].cut
        layer.inner, layer.width, layer.column = up(rows), rows // mlp.experts.parts, 0 if cut is None else cut.start
        layer.normalize, layer.groups, layer.group_top = int(config.norm_topk_prob), config.n_group, config.topk_group
        layer.softmax = int(mlp.scores == "softmax")
        layer.factor = 1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("c", single_ops=False, packed_weights=True)

    def load_drafter(self, folder: str | Path, pages: int, context: int, *, precision: str = "bf16") -> Drafter:
        from runtime_ref.backends.c.drafter import CDrafter

        return CDrafter(load_drafter(folder, torch.float32), self, pages, int8=precision == "int8")

    def plan(self, chunks: list[SequenceChunk]) -> CStep:
        """The step that computes the tokens of `chunks`, whose tables must reach to their ends."""
        rows = Rows([pool.window for pool in self.pools.values()])
        for chunk in chunks:
            chunk.row, n = len(rows.ids), len(chunk.tokens)
            if chunk.logits == "all":
                rows.head += range(chunk.row, chunk.row + n)
            elif chunk.logits == "last":
                rows.head.append(chunk.row + n - 1)
            rows.add(chunk.tokens, chunk.start, [chunk.tables[kind] for kind in self.pools])
        return rows.step()

    def _fit(self, planned: CStep) -> None:
        self.work.fit(self.step, planned.real, planned.highest + 1)
        if planned.highest >= self._reached:
            for kind, rotary in self.rotary.items():
                rotary.rows(torch.zeros(1, dtype=torch.long), planned.highest)
                self._reached = rotary._cos.shape[0]
                for layer, own in zip(self.layers, self.weights.layers, strict=True):
                    if (own.attention.window is not None) == (kind == "window"):
                        layer.cos, layer.sin = rotary._cos.data_ptr(), rotary._sin.data_ptr()

    def _code(self, program: list[Op]) -> tuple[array, list[tuple[int, int, str]], tuple | None]:
        """Instructions, the runs of them between collectives (begin, end, what is gathered then), and of the target hidden
        states, if there are any, how many layers they are of, where each layer's stand among them (as the ops read it), and the
        same as a dictionary."""
        known = self._codes.get(id(program))
        if known is not None:
            return known[1:]
        numbers, runs, began = array("i"), [], 0
        for i, op in enumerate(program):
            name = op.name.removesuffix("_full").removesuffix("_window")
            if name == "add_parts":
                name = "add_attention" if program[i - 1].name == "merge_heads" else "add_mlp"
                runs.append((began, i, name))
                began = i
            numbers.extend((structs.OP[name], op.layer))
        runs.append((began, len(program), "logits"))
        numbers.extend((structs.OP["best"], -1))
        if len(self._codes) > 64:
            self._codes.clear()
        layers = {op.layer: i for i, op in enumerate(t for t in program if t.name == "target_hidden")}
        places = array("i", [layers.get(i, 0) for i in range(len(self.layers))])
        self._codes[id(program)] = (program, numbers, runs, (len(layers), places, layers) if layers else None)
        return self._codes[id(program)][1:]

    @torch.inference_mode()
    def run(self, program: list[Op], planned: CStep, watch: Callable[[Op, dict], None] | None = None, *,
            host: bool = True) -> dict:
        """Executes the ops in order; returns the logits of the rows that want them and the target hidden states, side by side
        in the order of their layers (`target_hidden`) and by name (`target_hidden.0`). On one rank also `best`: the likeliest
        token of each row of the logits, -1 where they are not finite.

        `watch` sees all buffers after each op, in the shapes of `backends/torch/ops.py`.
        """
        numbers, runs, _ = self._code(program)
        step, ranks = self.step, self.weights.ranks
        buffers, logits = self._begin(program, planned)
        base = numbers.buffer_info()[0]
        if watch is None and ranks.count == 1:
            self.run_code(step, base, len(numbers) // 2)
        else:
            del buffers["best"]  # of a part of the vocabulary, or not computed
            for begin, end, gathered in runs:
                for at in range(begin, end) if watch else (begin,):
                    self.run_code(step, base + 8 * at, 1 if watch else end - begin)
                    step.gathered = None
                    if watch:
                        watch(program[at], {name: buffers[name] for name in buffers.cut} | self._buffers(program[at], planned)
                              | {"logits": logits[:, :self.vocabulary]})
                if gathered != "logits":
                    self._gather(program[end].layer, gathered, planned.real)
        logits = logits[:, :self.vocabulary]
        if ranks.count > 1:
            logits = ranks.gather(logits[None].contiguous()).transpose(0, 1).reshape(planned.wanted, -1)
        buffers["logits"] = logits
        return buffers

    def _begin(self, program: list[Op], planned: CStep) -> tuple[Buffers, torch.Tensor]:
        """Points the step at a plan and at new memory for what it leaves: (buffers, logits in whole vectors)."""
        step, caught = self.step, self._code(program)[2]
        self._fit(planned)
        submit(step, planned)
        logits = torch.empty(planned.wanted, step.head.n)
        step.logits = logits.data_ptr()
        buffers = Buffers(step.H, caught[2] if caught else {})
        buffers["best"] = best = array("i", bytes(4 * planned.wanted))
        step.best = best.buffer_info()[0]
        if caught is not None:
            buffers["target_hidden"] = target_hidden = torch.empty(planned.real, caught[0] * step.H)
            step.target_hidden, step.hidden_stride = target_hidden.data_ptr(), target_hidden.shape[1]
            step.hidden_place = caught[1].buffer_info()[0]
        return buffers, logits

    @torch.inference_mode()
    def run_round(self, program: list[Op], chunks: list[SequenceChunk], drafter, drafting: list[int],
                  requests: list[DraftRequest], cuts: list[Cut | None]) -> tuple[dict, list[list[float]]]:
        planned, passes = self.plan(chunks), drafter.begin_round(requests)
        numbers, kept = self._code(program)[0], array("i", bytes(4 * planned.real))
        own = (structs.Drafted * len(drafting))(*(
            (chunks[i].row, request.count, cut.worth, 0, cut.truth.buffer_info()[0])
            for i, request, cut in zip(drafting, requests, (cut or KEEP for cut in cuts), strict=True)))
        buffers, logits = self._begin(program, planned)
        self.round_code(*passes, self.step, numbers.buffer_info()[0], len(numbers) // 2, own, len(own), kept.buffer_info()[0])
        at, chances = 0, []
        for i, request, sequence in zip(drafting, requests, own, strict=True):
            chunks[i].tokens[1:] = drafter.best[at:at + sequence.kept]
            chances.append(drafter.chance[at:at + request.count].tolist())
            at += request.count
        row = 0
        for chunk in chunks:
            chunk.row, row = row, row + len(chunk.tokens)
        buffers["logits"] = logits[:self.step.wanted, :self.vocabulary]
        return buffers, chances

    def _gather(self, layer: int, name: str, rows: int) -> None:
        """All ranks' partial outputs for the next addition."""
        ranks = self.weights.ranks
        if ranks.count == 1:
            return
        parts = self.layers[layer].parts if name == "add_attention" else self.layers[layer].mlp_parts
        own = self.work.tensors["partial"][:parts * rows * self.step.H].view(parts, rows, -1)
        self._gathered = ranks.gather(own)
        self.step.gathered, self.step.gathered_parts = self._gathered.data_ptr(), self._gathered.shape[0]

    def _buffers(self, op: Op, planned: CStep) -> dict[str, torch.Tensor]:
        """Copies of what an op reads and writes, as the torch backend would have them."""
        R, H, held = planned.real, self.step.H, self.work.tensors
        layer = self.layers[max(op.layer, 0)]
        qkv = held["qkv"][:R * layer.qkv.n].view(R, -1)
        q, k, v = qkv.split((layer.Q * layer.Dp, layer.K * layer.Dp, layer.K * layer.Vp), dim=1)
        parts = layer.parts if op.name == "merge_heads" else layer.mlp_parts
        found = {"x": held["x"][:R * H].view(R, H), "y": held["y"][:R * H].view(R, H),
                 "q": q.unflatten(1, (layer.Q, -1)).transpose(0, 1)[..., :layer.D],
                 "k": k.unflatten(1, (layer.K, -1)).transpose(0, 1)[..., :layer.D],
                 "v": v.unflatten(1, (layer.K, -1)).transpose(0, 1)[..., :layer.V],
                 "heads": held["heads"][:R * layer.Q * layer.Vp].view(R, layer.Q, -1).transpose(0, 1)[..., :layer.V],
                 "partial": held["partial"][:parts * R * H].view(parts, R, H)}
        if layer.top:
            found |= {"index": held["index"][:R * layer.top].view(R, -1).long(),
                      "weight": held["weight"][:R * layer.top].view(R, -1)}
        return {name: found[name].clone() for name in (*op.reads, *op.writes) if name in found}


def padded_pointer(memory: Memory, weight: torch.Tensor | None) -> int | None:
    """A head's norm weight [D] in whole vectors."""
    return None if weight is None else memory.pointer(pad(weight, 0))


def in_halves(pool: Pool, bf16_dot: bool) -> Pool:
    """The pool, with storage in bf16 for dot products: a page's bytes are then the ops' own affair."""
    if bf16_dot:
        for store in (pool.keys, pool.values):
            store.update({layer: untouched_zeros(*t.shape, dtype=torch.bfloat16) for layer, t in store.items()})
    return pool


def attention_fields(memory: Memory, qk: torch.Tensor, v: torch.Tensor, o: list[torch.Tensor], queries: int) -> Layer:
    """A layer with the matrices of its attention: qk [heads, H, D], v [heads, H, V], o [parts] of [H, heads of it * Vp]."""
    rows = [pad(t.transpose(1, 2), 1).flatten(0, 1) for t in (qk, v)]
    return Layer(qkv=memory.matrix(torch.cat(rows)), o=memory.matrices(o), Q=queries, K=qk.shape[0] - queries, D=qk.shape[2],
                 V=v.shape[2], Dp=up(qk.shape[2]), Vp=up(v.shape[2]), parts=len(o), value_scale=1.0)


def dense_fields(layer: Layer, memory: Memory, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """The matrices of a dense MLP: gate_up [parts, H, 2 I / parts] and down [parts, I / parts, H] as in `weights`."""
    gate, upper = (pad(t.transpose(1, 2).flatten(0, 1), 0) for t in gate_up.chunk(2, dim=2))
    layer.gate_up = memory.matrix(torch.cat((gate, upper)))
    layer.down = memory.matrices([part.T for part in down])
    layer.mlp_parts, layer.inner, layer.width = down.shape[0], gate.shape[0], down.shape[1]

