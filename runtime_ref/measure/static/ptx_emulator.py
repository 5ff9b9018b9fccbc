"""Runs the inline assembly of the kernels on a CPU, word by word: what Triton's interpreter cannot do.

A test tool. It takes the text that the kernel compiles, splits it into instructions and keeps a dictionary of registers
(arrays of uint32). It knows the instructions that the kernels use and refuses any other. bf16 products are computed in
float32, which holds them exactly, and rounded to nearest even; subnormal inputs and results are kept, as the PTX
manual states for `mul.bf16x2` (whether a card does is the first check of the GPU suite).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np


def _round_bf16(value: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits (uint32), nearest even."""
    bits = value.astype(np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits << np.uint32(16)).astype(np.uint32).view(np.float32)


def _mul_bf16x2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = _round_bf16(_bf16(a & 0xFFFF) * _bf16(b & 0xFFFF))
    high = _round_bf16(_bf16(a >> 16) * _bf16(b >> 16))
    return low | high << np.uint32(16)


_INSTRUCTIONS: dict[str, Callable] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "mul.rn.bf16x2": _mul_bf16x2,
}


def run_ptx(text: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Executes an inline-assembly text.

    Args:
        inputs: registers by name ("$4"), uint32 arrays of one shape.

    Returns:
        All registers after the last instruction.

    Raises:
        ValueError: an instruction or an operand that the emulator does not know.
    """
    registers = {name: np.asarray(value, dtype=np.uint32) for name, value in inputs.items()}
    for line in re.split(r"[;\n{}]+", text):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, operands = line.split(None, 1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        if name not in _INSTRUCTIONS:
            raise ValueError(f"{name} in {line!r} is not known; expected one of {', '.join(_INSTRUCTIONS)}")
        registers[target] = _INSTRUCTIONS[name](*(_operand(source, registers) for source in sources)).astype(np.uint32)
    return registers


def _operand(text: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    if text in registers:
        return registers[text]
    if not re.fullmatch(r"0x[0-9A-Fa-f]+|\d+", text):
        raise ValueError(f"operand {text!r} was never written")
    return np.uint32(int(text, 0))
