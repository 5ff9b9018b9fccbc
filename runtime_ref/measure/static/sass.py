"""What a compiled kernel consists of: registers, spills, wide loads, matrix instructions, instructions per weight.

Read from the binary with the tools that come with triton (`cuobjdump`, `nvdisasm`), so no GPU is needed. A loop is a
branch backwards; the hot loops are the innermost ones with a matrix instruction in them, and their length times the threads of
a program, over the weights of one turn, is the number of lane-instructions per weight. Memory at full speed leaves 3.7
of those on an H200 (`roofline.lane_instructions_per_weight`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|QGMMA)\b")
_WIDE_LOAD = re.compile(r"\b(LDG|LDGSTS)\.\S*128\b|\bUTMALDG\b")
_LOCAL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Loop:
    """Instructions [first, last] of a listing."""

    first: int
    last: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class Binary:
    """The facts of one compiled kernel."""

    registers: int
    stack: int
    instructions: list[str]
    loops: list[Loop]

    @property
    def local_accesses(self) -> int:
        return sum(bool(_LOCAL.search(i)) for i in self.instructions)

    @property
    def wide_loads(self) -> int:
        """128-bit loads in the hot loops, or in all of a kernel that has none."""
        places = self.hot_loops() or [Loop(0, len(self.instructions) - 1)]
        return sum(bool(_WIDE_LOAD.search(i)) for loop in places for i in self.instructions[loop.first:loop.last + 1])

    @property
    def matrix_instructions(self) -> int:
        return sum(bool(_MATRIX.search(i)) for i in self.instructions)

    def hot_loops(self) -> list[Loop]:
        """Innermost loops with a matrix instruction, in the order of the program."""
        hot = [loop for loop in self.loops if any(_MATRIX.search(i) for i in self.instructions[loop.first:loop.last + 1])]
        return [loop for loop in hot if not any(loop.holds(other) for other in hot)]


def read_listing(text: str) -> tuple[list[str], list[Loop]]:
    """Instructions of an `nvdisasm -c` listing and its loops."""
    labels, instructions = {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
    loops = []
    for at, instruction in enumerate(instructions):
        branch = _BRANCH.search(instruction)
        # A branch to itself is the padding behind the last instruction.
        if branch and labels.get(branch[1], at) < at:
            loops.append(Loop(labels[branch[1]], at))
    return instructions, loops


def read_binary(cubin: bytes) -> Binary:
    """Disassembles a cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, listing = (subprocess.run([str(tools / tool[0]), *tool[1:], str(path)], capture_output=True, text=True,
                                         check=True).stdout for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Binary(int(used[1]), int(used[2]), *read_listing(listing))
