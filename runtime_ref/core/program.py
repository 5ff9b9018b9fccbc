"""A step of the target as a list of ops: the schedule is data.

`target_program` writes down, once per model, which op reads and writes which buffer of which layer. The torch backend
(`TorchBackend.run`) executes it op by op; a backend that runs a whole step in one launch reads the same one, and a
test can compare the two after any op. Ops are looked up by name, so a backend may also replace single ones.

Buffers by name: x (residual stream), y (normed), q, k, v, heads, partial, index, weight (routing), logits,
target_hidden.<layer>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """One op of a layer (-1: outside the layers), the buffers that it reads and those that it writes."""

    name: str
    layer: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def __str__(self) -> str:
        where = f"layer {self.layer}: " if self.layer >= 0 else ""
        return f"{where}{self.name}({', '.join(self.reads)}) -> {', '.join(self.writes) or 'cache'}"


def target_program(config, target_layers: Iterable[int] = ()) -> list[Op]:
    """The ops of one step, in an order in which every buffer is written before it is read."""
    target_layers = set(target_layers)
    program = [Op("embed", -1, ("ids",), ("x",))]
    for i in range(config.num_hidden_layers):
        kind = "window" if config.hybrid_layer_pattern[i] else "full"
        program += [Op("input_norm", i, ("x",), ("y",)),
                  Op(f"project_{kind}", i, ("y",), ("q", "k", "v")),
                  Op(f"write_{kind}", i, ("k", "v"), ()),
                  Op(f"attend_{kind}", i, ("q",), ("heads",)),
                  Op("merge_heads", i, ("heads",), ("partial",)),
                  Op("add_parts", i, ("x", "partial"), ("x",)),
                  Op("post_norm", i, ("x",), ("y",))]
        if config.moe_layer_freq[i]:
            program += [Op("route", i, ("y",), ("index", "weight")),
                      Op("experts", i, ("y", "index", "weight"), ("partial",))]
            if getattr(config, "shared_width", 0):
                program.append(Op("shared_experts", i, ("y", "partial"), ("partial",)))
        else:
            program.append(Op("dense_mlp", i, ("y",), ("partial",)))
        program.append(Op("add_parts", i, ("x", "partial"), ("x",)))
        if i in target_layers:
            program.append(Op("target_hidden", i, ("x",), (f"target_hidden.{i}",)))
    return [*program, Op("pick_rows", -1, ("x",), ("x",)), Op("final_norm", -1, ("x",), ("y",)),
            Op("head", -1, ("y",), ("logits",))]


def check_program(program: list[Op]) -> None:
    """Asserts that every buffer is written before it is read."""
    known = {"ids"}
    for op in program:
        assert known.issuperset(op.reads), f"{op}: {set(op.reads) - known} was never written"
        known |= set(op.writes)




def run_op(op: Op, ops: dict[str, Callable], step, buffers: dict) -> None:
    """Runs one op on the buffers that it reads, and keeps what it makes under the names that it writes."""
    made = ops[op.name](step, op.layer, *[buffers[name] for name in op.reads])
    buffers.update({op.writes[0]: made} if len(op.writes) == 1 else zip(op.writes, made or (), strict=True))


def run_ops(program: list[Op], ops: dict[str, Callable], step, watch: Callable[[Op, dict], None] | None = None) -> dict:
    """Runs a program op by op; returns its buffers, which `watch` sees after each op."""
    buffers = {"ids": step.ids}
    for op in program:
        run_op(op, ops, step, buffers)
        if watch is not None:
            watch(op, buffers)
    return buffers
