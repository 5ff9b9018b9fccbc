"""Lines of C and the values that they make: what `c_code` writes with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from runtime_ref.triton_cpu.elements import BYTES, c_type
from runtime_ref.triton_cpu.ttir import Operation, Type


class Value:
    """A value of the IR as C: `at(indices)` is the C expression of an element.

    array: the name of the flat array that holds it, if one does. free: whether reading it twice costs nothing. steps:
    operations on scalars and places that an element takes, None if it reads an array. foreign: a pointer made of an integer,
    of which no argument says where it may point.
    """

    def __init__(self, kind: Type, at: Callable[[Sequence[str]], str], *, array: str | None = None, free: bool = True,
                 steps: int | None = 0, foreign: bool = False):
        self.foreign = foreign
        self.type, self.at, self.array, self.free, self.steps = kind, at, array, free, None if array else steps

    @property
    def scalar(self) -> str:
        return self.at(())


def linear(shape: tuple[int, ...], indices: Sequence[str]) -> str:
    """Place of an element in a flat array, last axis fastest."""
    out = indices[0] if indices else "0"
    for size, index in zip(shape[1:], indices[1:], strict=True):
        out = f"({out}) * {size} + {index}" if out != "0" else index
    return out


class Emitter:
    """Lines, names, and the values of the IR by name. bytes: of all arrays so far."""

    def __init__(self):
        self.lines: list[str] = []
        self.names = itertools.count()
        self.values: dict[str, Value] = {}
        self.bytes = 0

    def _fresh(self, stem: str = "v") -> str:
        return f"{stem}{next(self.names)}"

    def _emit(self, line: str) -> None:
        self.lines.append(line)

    def _get(self, name: str) -> Value:
        # A name without number stands for the first of several results.
        return self.values[name] if name in self.values else self.values[f"{name}#0"]

    def _set(self, operation: Operation, values: list[Value]) -> None:
        for name, value in zip(operation.results, values, strict=True):
            self.values[name] = value

    def _scalar(self, name: str, kind: Type, expression: str) -> Value:
        variable = self._fresh()
        self._emit(f"const {c_type(kind.element)} {variable} = ({c_type(kind.element)})({expression});"
                   if not kind.element.startswith("ptr:") else
                   f"{c_type(kind.element)} const {variable} = ({c_type(kind.element)})({expression});")
        self.values[name] = Value(kind, lambda _: variable)
        return self.values[name]

    def _array(self, kind: Type) -> str:
        name = self._fresh("t")
        size = math.prod(kind.shape)
        self.bytes += size * (8 if kind.element.startswith("ptr:") else BYTES[kind.element])
        self._emit(f"{c_type(kind.element)} {name}[{size}] __attribute__((aligned(64)));")
        return name

    def _held(self, kind: Type, array: str) -> Value:
        return Value(kind, lambda indices: f"{array}[{linear(kind.shape, indices)}]", array=array)

    def _loops(self, shape: tuple[int, ...], body: Callable[[list[str]], list[str]]) -> None:
        indices = [self._fresh("i") for _ in shape]
        for index, size in zip(indices, shape, strict=True):
            self._emit(f"for (int {index} = 0; {index} < {size}; {index}++) {{")
        for line in body(indices):
            self._emit(line)
        self._emit("}" * len(shape))

    def _filled(self, value: Value, kind: Type | None = None, convert: Callable[[str], str] = lambda e: e) -> Value:
        """`value` as an array of its own (of another element type, if given)."""
        kind = kind or value.type
        array = self._array(kind)
        self._loops(kind.shape, lambda i: [f"{array}[{linear(kind.shape, i)}] = {convert(value.at(i))};"])
        return self._held(kind, array)

    def _as_array(self, value: Value) -> Value:
        return value if value.array else self._filled(value)
