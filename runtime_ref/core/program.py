"""A step of the target as a list of tasks: the schedule is data.

`target_tasks` writes down, once per model, which op reads and writes which buffer of which layer. The torch backend
(`TorchBackend.run`) executes the list task by task; a backend that runs a whole step in one launch reads the same list, and a
test can compare the two after any task. Ops are looked up by name, so a backend may also replace single ones.

Buffers by name: x (residual stream), y (normed), q, k, v, heads, partial, index, weight (routing), logits, tap.<layer>.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One op of a layer (-1: outside the layers), the buffers that it reads and those that it writes."""

    op: str
    layer: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def __str__(self) -> str:
        where = f"layer {self.layer}: " if self.layer >= 0 else ""
        return f"{where}{self.op}({', '.join(self.reads)}) -> {', '.join(self.writes) or 'cache'}"


def target_tasks(config, taps: Iterable[int] = ()) -> list[Task]:
    """The tasks of one step, in an order in which every buffer is written before it is read."""
    taps = set(taps)
    tasks = [Task("embed", -1, ("ids",), ("x",))]
    for i in range(config.num_hidden_layers):
        kind = "window" if config.hybrid_layer_pattern[i] else "full"
        tasks += [Task("input_norm", i, ("x",), ("y",)),
                  Task(f"project_{kind}", i, ("y",), ("q", "k", "v")),
                  Task(f"write_{kind}", i, ("k", "v"), ()),
                  Task(f"attend_{kind}", i, ("q",), ("heads",)),
                  Task("merge_heads", i, ("heads",), ("partial",)),
                  Task("add_parts", i, ("x", "partial"), ("x",)),
                  Task("post_norm", i, ("x",), ("y",))]
        if config.moe_layer_freq[i]:
            tasks += [Task("route", i, ("y",), ("index", "weight")),
                      Task("experts", i, ("y", "index", "weight"), ("partial",))]
        else:
            tasks.append(Task("dense_mlp", i, ("y",), ("partial",)))
        tasks.append(Task("add_parts", i, ("x", "partial"), ("x",)))
        if i in taps:
            tasks.append(Task("tap", i, ("x",), (f"tap.{i}",)))
    return [*tasks, Task("pick_rows", -1, ("x",), ("x",)), Task("final_norm", -1, ("x",), ("y",)),
            Task("head", -1, ("y",), ("logits",))]


def check_tasks(tasks: list[Task]) -> None:
    """Asserts that every buffer is written before it is read."""
    known = {"ids"}
    for task in tasks:
        assert known.issuperset(task.reads), f"{task}: {set(task.reads) - known} was never written"
        known |= set(task.writes)


