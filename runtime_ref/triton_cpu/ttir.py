"""Reads the text of a Triton module (TTIR) into operations with types and regions.

The text is what Triton's front end and target-independent passes leave of a kernel, for any target: what the compiler for GPUs
starts from. One operation per line, regions in braces. Only the forms that kernels of this repository (and most plain ones)
have are read; anything else is refused with its line.

Rejected: reading the operations through Triton's Python bindings, which do not show regions' arguments and most attributes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Type:
    """shape () is a scalar; element is "f32", "i1", ..., or "ptr:" and what is pointed to."""

    shape: tuple[int, ...]
    element: str

    @property
    def pointee(self) -> str:
        assert self.element.startswith("ptr:"), self.element
        return self.element[4:]

    def of(self, element: str) -> Type:
        return Type(self.shape, element)


@dataclass
class Block:
    arguments: list[tuple[str, Type]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    """`rest` is the line without results, name and types: constants, predicates, attributes. types: what stands after the last
    colon in order, operands' before results'."""

    name: str
    results: list[str]
    operands: list[str]
    types: list[Type]
    result_types: list[Type]
    rest: str
    regions: list[Block] = field(default_factory=list)

    def integer(self, attribute: str) -> int:
        """An attribute of the form `name = 3 : i32`."""
        found = re.search(rf"\b{attribute} = (-?\d+)", self.rest)
        assert found, f"{self.name}: no {attribute} in {self.rest!r}"
        return int(found.group(1))


@dataclass
class Function:
    name: str
    arguments: list[tuple[str, Type]]
    body: Block


_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_TYPE = re.compile(r"tensor<((?:\d+x)*)(!tt\.ptr<[\w]+>|\w+)>|!tt\.ptr<(\w+)(?:, \d+)?>|\b(i\d+|f\d+\w*|bf16|index)\b")


def types_of(text: str) -> list[Type]:
    """All types in a text, in order."""
    found = []
    for shape, element, pointee, scalar in _TYPE.findall(text):
        if element:
            inside = re.fullmatch(r"!tt\.ptr<(\w+)>", element)
            found.append(Type(tuple(int(n) for n in shape.split("x") if n), f"ptr:{inside.group(1)}" if inside else element))
        else:
            found.append(Type((), f"ptr:{pointee}" if pointee else scalar))
    return found


def parse(text: str) -> Function:
    """The only function of a module.

    Raises:
        ValueError: a line that is not understood, or several functions.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "module", "//"))]
    heads = [i for i, line in enumerate(lines) if line.startswith("tt.func")]
    if len(heads) != 1:
        raise ValueError(f"module of {len(heads)} functions; expected one (device functions are inlined)")
    head = lines[heads[0]]
    name = re.search(r"@\"?([\w.]+)", head).group(1)
    inside = head[head.index("(") + 1:head.rindex(") attributes") if ") attributes" in head else head.rindex(")")]
    arguments = [(value, types_of(kind)[0]) for value, kind in re.findall(r"(%\w+): (!tt\.ptr<\w+>|\w+)", inside)]
    reader = _Reader(lines, heads[0] + 1)
    body = reader.block()
    return Function(name, arguments, body)


def _results(name: str, types: list[Type], count: int) -> list[Type]:
    """Types of the results of an operation on one line."""
    if not count:
        return []
    if name == "tt.addptr":
        return types[:1]
    if name == "tt.load":
        return [types[0].of(types[0].pointee)]
    if name in ("arith.cmpi", "arith.cmpf"):
        return [types[0].of("i1")]
    return types[len(types) - count:]


class _Reader:
    def __init__(self, lines: list[str], at: int):
        self.lines, self.at = lines, at

    def block(self) -> Block:
        """Operations up to the line that closes the region; leaves that line as `self.closing`."""
        found = Block()
        while True:
            line = self.lines[self.at]
            self.at += 1
            if line.startswith("}"):
                self.closing = line
                return found
            if line.startswith("^"):
                found.arguments = self._arguments(line)
                continue
            found.operations.append(self._operation(line))

    @staticmethod
    def _arguments(line: str) -> list[tuple[str, Type]]:
        return [(value, types_of(kind)[0]) for value, kind in
                re.findall(r"(%\w+): (tensor<[^%]*?>(?=[,)])|!tt\.ptr<\w+>|\w+)", line)]

    def _operation(self, line: str) -> Operation:
        results, text = [], line
        if line.startswith("%"):
            left, text = line.split(" = ", 1)
            for name in left.split(", "):
                base, _, count = name.partition(":")
                results += [f"{base}#{i}" for i in range(int(count))] if count else [base]
        name = re.match(r'"?([\w.]+)"?', text).group(1)
        rest = text[re.match(r'"?[\w.]+"?', text).end():]
        if name == "scf.for":
            return self._for(results, rest)
        if name == "scf.if":
            return self._if(results, rest)
        if name == "scf.while":
            return self._while(results, rest)
        if rest.endswith("({"):
            return self._with_region(name, results, rest)
        if text.endswith("{"):
            raise ValueError(f"operation not understood: {line}")
        return self._plain(name, results, rest)

    def _plain(self, name: str, results: list[str], rest: str) -> Operation:
        quoted = re.sub(r'"(?:[^"\\]|\\.)*"', lambda m: m.group(0).replace(" : ", " \x00 "), rest)
        body, colon, kinds = quoted.rpartition(" : ")
        # Attributes in braces have colons of their own; types stand outside.
        while colon and kinds.count("}") > kinds.count("{"):
            body, colon, more = body.rpartition(" : ")
            kinds = f"{more} : {kinds}"
        if not colon:
            body, kinds = quoted, ""
        body = body.replace("\x00", ":")
        types = types_of(kinds)
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", body)
        return Operation(name, results, _VALUE.findall(outside), types, _results(name, types, len(results)), body)

    def _with_region(self, name: str, results: list[str], rest: str) -> Operation:
        block = self.block()
        after = self.closing.split(" : ", 1)[1]
        before, arrow = after.split(" -> ")
        return Operation(name, results, _VALUE.findall(rest), types_of(before), types_of(arrow), rest, [block])

    def _for(self, results: list[str], rest: str) -> Operation:
        bounds = re.match(r" (%\w+) = (\S+) to (\S+) step (\S+)", rest)
        variable, *operands = bounds.groups()
        carried = re.search(r"iter_args\((.*?)\) ->", rest)
        pairs = re.findall(r"(%\w+) = (%[\w#]+)", carried.group(1)) if carried else []
        kinds = types_of(rest[carried.end():rest.rindex(" : ")] if carried else "")
        kind = types_of(rest[rest.rindex(" : "):])
        block = self.block()
        block.arguments = [(variable, (kind or [Type((), "i32")])[0])] + [
            (name, kind) for (name, _), kind in zip(pairs, kinds, strict=True)]
        return Operation("scf.for", results, operands + [value for _, value in pairs], [], kinds, rest, [block])

    def _if(self, results: list[str], rest: str) -> Operation:
        kinds = types_of(rest.split("->", 1)[1]) if "->" in rest else []
        regions = [self.block()]
        if self.closing.startswith("} else {"):
            regions.append(self.block())
        return Operation("scf.if", results, _VALUE.findall(rest.split("->")[0]), [], kinds, rest, regions)

    def _while(self, results: list[str], rest: str) -> Operation:
        pairs = re.findall(r"(%\w+) = (%[\w#]+)", rest.split(" : ")[0])
        before, after = rest.split(" : ", 1)[1].split(" -> ")
        first = self.block()
        first.arguments = [(name, kind) for (name, _), kind in zip(pairs, types_of(before), strict=True)]
        if not self.closing.startswith("} do {"):
            raise ValueError(f"scf.while without a body: {self.closing}")
        second = self.block()
        return Operation("scf.while", results, [value for _, value in pairs], [], types_of(after), rest, [first, second])
