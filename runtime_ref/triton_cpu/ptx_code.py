"""C of inline PTX: a function of one group of packed elements, instruction by instruction.

Knows the instructions that the kernels of this repository use and refuses any other, as `ptx_emulator` does, which runs the
same texts on arrays of words. Elements of a group share 32-bit registers, the first one in the lowest bits, in the order of the
operands; whether the compiler for GPUs packs the same neighbours is what the static gates check.
"""

from __future__ import annotations

import re

_BITS = {"i8": 8, "i16": 16, "bf16": 16, "f16": 16, "i32": 32, "f32": 32, "i64": 64}
_INSTRUCTIONS = {"and.b32": "{0} & {1}", "or.b32": "{0} | {1}", "shl.b32": "{0} << {1}", "shr.b32": "{0} >> {1}",
                 "mov.u32": "{0}", "mul.rn.bf16x2": "mul_pair({0}, {1})"}
_PREFETCH = "prefetch.global.L2"  # does nothing, but must lie inside of the kernel's tensors where that is checked
MULTIPLY = """
#ifndef PTX
#define PTX
static inline uint32_t mul_pair(uint32_t a, uint32_t b) {
  return narrow(wide(a & 0xFFFF) * wide(b & 0xFFFF)) | (uint32_t)narrow(wide(a >> 16) * wide(b >> 16)) << 16;
}
#endif
"""


def _registers(elements: list[str], pack: int) -> list[int]:
    """How many 32-bit registers each operand's group takes; a pointer is one of 64 bits (0 here)."""
    return [0 if e.startswith("ptr:") else -(-pack * _BITS[e] // 32) for e in elements]


def ptx_body(name: str, rest: str, sources: list[str], results: list[str], pack: int) -> str:
    """A C function `name`(results' elements, sources' elements).

    Args:
        rest: the operation's text, with the assembly in its first pair of quotes.

    Raises:
        ValueError: an instruction that is not known.
    """
    assembly = re.search(r'"((?:[^"\\]|\\.)*)"', rest).group(1).replace("\\0A", "\n")
    into, out_of = _registers(results, pack), _registers(sources, pack)
    first = sum(into)
    lines, at = [], 0
    parameters = [f"void *o{i}" for i in range(len(results))] + [f"const void *s{i}" for i in range(len(sources))]
    lines.append(f"static inline void {name}({', '.join(parameters)}) {{")
    lines.append(f"uint32_t r[{first + sum(out_of) + len(sources)}] = {{0}};")
    places = []
    at = first
    for i, count in enumerate(out_of):
        if count:
            lines.append(f"memcpy(r + {at}, s{i}, {pack * _BITS[sources[i]] // 8});")
        places.append(at)
        at += max(count, 1)
    for line in re.split(r"[;\n{}]+", assembly):
        line = line.strip()
        if not line:
            continue
        if line.startswith(".reg"):
            lines.append(f"uint32_t {line.split(None, 1)[1].removeprefix('.b32 ')};")
            continue
        instruction, operands = line.split(None, 1)
        if instruction == _PREFETCH:
            source = int(re.search(r"\$(\d+)", operands)[1]) - len(results)
            lines.append(f"prefetched(*(const void *const *)s{source});")
            continue
        if instruction not in _INSTRUCTIONS:
            raise ValueError(f"PTX {instruction} in {line!r}: expected one of {', '.join((*_INSTRUCTIONS, _PREFETCH))}")
        target, *inputs = (re.sub(r"\$(\d+)", r"r[\1]", operand.strip()) for operand in operands.split(","))
        lines.append(f"{target} = {_INSTRUCTIONS[instruction].format(*inputs)};")
    at = 0
    for i, count in enumerate(into):
        lines.append(f"memcpy(o{i}, r + {at}, {pack * _BITS[results[i]] // 8});")
        at += count
    return MULTIPLY + "\n".join(lines) + "\n}\n"
