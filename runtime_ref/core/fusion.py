"""A program with neighbours joined: what a fused kernel does at once is one op.

`fused` looks for the runs of ops below and nothing else; every other op stays. The result is a program like any other
(`check_program` holds for it): the Triton backend runs it op by op, the megakernel encodes it as its table. Buffers that
only pass between joined ops (y of a projection, partial sums) disappear.

Op by op on several ranks, a sum over ranks stands between product and residual: those two stay apart (`ranks`). A megakernel
sums over ranks inside the op, so its program is that of one rank.
"""

from __future__ import annotations

from runtime_ref.core.program import Op

# Ops of a run -> ops that take its place, with what they read and write.
_RUNS: dict[tuple[str, ...], tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    ("input_norm", "project_full", "write_full"): (("enter_full", ("x",), ("q",)),),
    ("input_norm", "project_window", "write_window"): (("enter_window", ("x",), ("q",)),),
    ("post_norm", "route"): (("norm_route", ("x",), ("y", "index", "weight")),),
    ("post_norm", "dense_mlp", "add_parts"): (("norm_gate_up", ("x",), ("inner",)), ("down_add", ("x", "inner"), ("x",))),
    ("merge_heads", "add_parts"): (("merge_add", ("x", "heads"), ("x",)),),
    ("experts", "add_parts"): (("experts_add", ("x", "y", "index", "weight"), ("x",)),),
    ("pick_rows", "final_norm", "head"): (("pick_norm_head", ("x",), ("logits",)),),
}
# The same for one of several ranks.
_RUNS_OF_A_RANK = {
    ("post_norm", "dense_mlp"): (("norm_gate_up", ("x",), ("inner",)), ("down", ("inner",), ("partial",))),
}
_LONGEST = 3


def fused(program: list[Op], ranks: int = 1) -> list[Op]:
    """The list with every known run joined."""
    runs = {names: new for names, new in _RUNS.items() if ranks == 1 or "add_parts" not in names}
    if ranks > 1:
        runs |= _RUNS_OF_A_RANK
    out, at = [], 0
    while at < len(program):
        for length in range(_LONGEST, 1, -1):
            run = program[at:at + length]
            new = runs.get(tuple(op.name for op in run))
            if new is not None and len({op.layer for op in run}) == 1:
                out += [Op(op, run[0].layer, reads, writes) for op, reads, writes in new]
                at += length
                break
        else:
            out.append(program[at])
            at += 1
    return out
