"""C of a kernel's TTIR: one function per program of the grid, tensors as arrays, operations as loops over them.

Values are numbers of their own type, not of Python's or numpy's: bf16 and FP8 are bits, rounded where the IR rounds; products
of bf16 matrices are summed in float32; inline PTX is executed instruction by instruction (`ptx_code`). Programs are threads
when the launch is cooperative, so barriers, flags and tickets wait for each other as on a GPU. An element that a masked load
leaves undefined becomes NaN or a recognizable integer, so whoever uses one is seen.

What differs from a GPU: the order of sums (here from left to right), the last bits of exp and rsqrt, the memory model (x86
orders more than a GPU must), and that a program is one thread: barriers inside a program do nothing.

How: an elementwise operation with a single use in its own block stays an expression until that use, everything else becomes an
array when it is defined. Splats, ranges, broadcasts, transpositions never are arrays.

Rejected: LLVM IR by hand (loops are what C compilers are good at), everything as arrays (four times slower).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter
from collections.abc import Callable, Sequence

from runtime_ref.kernels.host.ptx_code import ptx_body
from runtime_ref.kernels.host.ttir import Block, Function, Operation, Type

C_TYPES = {"i1": "uint8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t", "f16": "_Float16",
           "bf16": "uint16_t", "f32": "float", "f64": "double", "f8E4M3FN": "uint8_t", "index": "int64_t"}
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f8E4M3FN": 1}
_BINARY = {"arith.addi": "+", "arith.subi": "-", "arith.muli": "*", "arith.addf": "+", "arith.subf": "-", "arith.mulf": "*",
           "arith.divf": "/", "arith.divsi": "/", "arith.remsi": "%", "arith.andi": "&", "arith.ori": "|", "arith.xori": "^"}
_UNSIGNED = {"arith.divui": "/", "arith.remui": "%", "arith.shrui": ">>", "arith.shli": "<<"}
_CHOICES = {"arith.maxsi": ("{a} > {b}", ""), "arith.minsi": ("{a} < {b}", ""), "arith.maxui": ("{a} > {b}", "u"),
            "arith.minui": ("{a} < {b}", "u"), "arith.maxnumf": ("{a} > {b} || {b} != {b}", ""),
            "arith.minnumf": ("{a} < {b} || {b} != {b}", ""), "arith.maximumf": ("{a} > {b} || {a} != {a}", ""),
            "arith.minimumf": ("{a} < {b} || {a} != {a}", "")}
_SIGNED = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">="}
_PREDICATES = {"ult": "<", "ule": "<=", "ugt": ">", "uge": ">="}
_ORDERED = {"oeq": "==", "ogt": ">", "oge": ">=", "olt": "<", "ole": "<=", "une": "!="}
_MATH = {"math.exp": "exp", "math.log": "log", "math.sqrt": "sqrt", "math.absf": "fabs", "math.floor": "floor",
         "math.ceil": "ceil", "math.exp2": "exp2", "math.log2": "log2"}
_CASTS = {"arith.extf", "arith.truncf", "arith.extsi", "arith.extui", "arith.trunci", "arith.sitofp", "arith.uitofp",
          "arith.fptosi", "tt.fp_to_fp", "tt.bitcast", "arith.bitcast", "tt.int_to_ptr", "tt.ptr_to_int"}
_ELEMENTWISE = {*_BINARY, *_UNSIGNED, *_CHOICES, *_MATH, *_CASTS, "arith.cmpi", "arith.cmpf", "arith.select", "arith.shrsi",
                "arith.negf", "math.rsqrt", "tt.addptr"}
# What places of elements, addresses and masks are made of; so many steps are cheaper than an array.
_OF_PLACES = {"arith.addi", "arith.subi", "arith.muli", "arith.andi", "arith.ori", "arith.cmpi", "arith.extsi", "arith.divsi",
              "arith.remsi", "tt.addptr"}
MOST_STEPS = 8
LARGE = 60  # operations of a branch that becomes a function
_ORDERS = {"relaxed": "__ATOMIC_RELAXED", "acquire": "__ATOMIC_ACQUIRE", "release": "__ATOMIC_RELEASE",
           "acq_rel": "__ATOMIC_ACQ_REL"}

PREAMBLE = r"""
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
static inline float wide(uint16_t b) { union { uint32_t u; float f; } x = {(uint32_t)b << 16}; return x.f; }
static inline uint16_t narrow(float f) {
  union { float f; uint32_t u; } x = {f};
  uint32_t rounded = (x.u + 0x7FFF + (x.u >> 16 & 1)) >> 16;
  return f != f ? 0x7FC0 : (uint16_t)rounded;
}
static float fp8_values[256];
__attribute__((constructor)) static void fill(void) {
  for (int i = 0; i < 256; i++) {
    int e = i >> 3 & 15, m = i & 7;
    float v = e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
    fp8_values[i] = (i & 127) == 127 ? NAN : i & 128 ? -v : v;
  }
}
static inline uint32_t bits_f32(float f) { union { float f; uint32_t u; } x = {f}; return x.u; }
static inline float f32_bits(uint32_t u) { union { uint32_t u; float f; } x = {u}; return x.f; }
static inline uint64_t bits_f64(double f) { union { double f; uint64_t u; } x = {f}; return x.u; }
static inline double f64_bits(uint64_t u) { union { uint64_t u; double f; } x = {u}; return x.f; }
static inline uint16_t bits_f16(_Float16 f) { union { _Float16 f; uint16_t u; } x = {f}; return x.u; }
static inline _Float16 f16_bits(uint16_t u) { union { uint16_t u; _Float16 f; } x = {u}; return x.f; }
#define EXTREME(name, sign) \
  static inline int32_t name(int32_t *at, int32_t value, int order) { \
    int32_t old = __atomic_load_n(at, __ATOMIC_RELAXED); \
    while (value sign old && !__atomic_compare_exchange_n(at, &old, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {} \
    return old; \
  }
EXTREME(fetch_max, >)
EXTREME(fetch_min, <)
typedef float Eight __attribute__((vector_size(32), aligned(4)));
// c [M, N] += a [M, K] b [K, N], K from first to last; M is a multiple of 4, N of 8.
static inline __attribute__((always_inline)) void multiply(int M, int N, int K, const float *a, const float *b, float *c) {
  for (int n = 0; n < N; n += 8)
    for (int m = 0; m < M; m += 4) {
      Eight s[4];
      for (int r = 0; r < 4; r++) s[r] = *(Eight *)(c + (m + r) * N + n);
      for (int k = 0; k < K; k++) {
        Eight row = *(const Eight *)(b + k * N + n);
        for (int r = 0; r < 4; r++) s[r] += a[(m + r) * K + k] * row;
      }
      for (int r = 0; r < 4; r++) *(Eight *)(c + (m + r) * N + n) = s[r];
    }
}
typedef struct { int at[3], count[3]; } Place;
typedef union { int64_t i; double f; void *p; } Slot;
"""

# All programs one after another, or at once as threads (with stacks of their own: tensors are arrays on it), or `only` one.
LAUNCHER = r"""
typedef struct { Place place; const Slot *slots; int alone; } Work;
static void *work(void *given) {
  Work *own = given;
  Place p = own->place;
  if (!own->alone) program(&p, own->slots);
  else
    for (p.at[2] = 0; p.at[2] < p.count[2]; p.at[2]++)
      for (p.at[1] = 0; p.at[1] < p.count[1]; p.at[1]++)
        for (p.at[0] = 0; p.at[0] < p.count[0]; p.at[0]++) program(&p, own->slots);
  return 0;
}
int launch(int only, int x, int y, int z, int together, const Slot *slots) {
  if (only >= 0) {
    Place p = {{only, 0, 0}, {x, y, z}};
    program(&p, slots);
    return 0;
  }
  int threads = together ? x * y * z : 1, failed = 0, started = 0;
  if (threads < 1) return 0;
  if (!together && STACK < 1 << 20) {
    Work own = {{{0, 0, 0}, {x, y, z}}, slots, 1};
    work(&own);
    return 0;
  }
  pthread_t ids[threads];
  Work works[threads];
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK + (1 << 20));
  for (int i = 0; i < threads; i++) {
    works[i] = (Work){{{i % x, i / x % y, i / (x * y)}, {x, y, z}}, slots, !together};
    if (pthread_create(&ids[i], &attributes, work, &works[i])) { failed = 1; break; }
    started++;
  }
  for (int i = 0; i < started; i++) pthread_join(ids[i], 0);
  pthread_attr_destroy(&attributes);
  return failed;
}
"""


class Value:
    """A value of the IR as C: `at(indices)` is the C expression of an element.

    array: the name of the flat array that holds it, if one does. free: whether reading it twice costs nothing. steps:
    operations on scalars and places that an element takes, None if it reads an array.
    """

    def __init__(self, kind: Type, at: Callable[[Sequence[str]], str], *, array: str | None = None, free: bool = True,
                 steps: int | None = 0):
        self.type, self.at, self.array, self.free, self.steps = kind, at, array, free, None if array else steps

    @property
    def scalar(self) -> str:
        return self.at(())


def c_type(element: str) -> str:
    """C type of an element.

    Raises:
        ValueError: a type that is not known here.
    """
    if element.startswith("ptr:"):
        return c_type(element[4:]) + " *"
    if element not in C_TYPES:
        raise ValueError(f"type {element}: expected one of {', '.join(C_TYPES)} and pointers")
    return C_TYPES[element]


def _linear(shape: tuple[int, ...], indices: Sequence[str]) -> str:
    out = indices[0] if indices else "0"
    for size, index in zip(shape[1:], indices[1:], strict=True):
        out = f"({out}) * {size} + {index}" if out != "0" else index
    return out


def _undefined(element: str) -> str:
    return {"f32": "NAN", "f64": "NAN", "bf16": "0x7FC0", "f16": "(_Float16)NAN", "f8E4M3FN": "0x7F"}.get(element, "0x55")


def c_source(function: Function) -> str:
    """A C file with `launch`.

    Raises:
        ValueError: an operation that has no C here.
    """
    return _Writer(function).source()


class _Writer:
    def __init__(self, function: Function):
        self.function = function
        self.lines: list[str] = []
        self.names = itertools.count()
        self.values: dict[str, Value] = {}
        self.uses = _uses(function.body)
        self.inline: list[str] = []
        self.bytes = 0

    def source(self) -> str:
        for i, (name, kind) in enumerate(self.function.arguments):
            member = "p" if kind.element.startswith("ptr:") else "f" if kind.element[0] in "fb" else "i"
            self._scalar(name, kind, f"slots[{i}].{member}")
        self._block(self.function.body)
        body = "\n".join(self.lines)
        stack = f"#define STACK {2 * self.bytes + (1 << 16)}\n"
        return (PREAMBLE + "\n".join(self.inline) + stack + "static void program(const Place *place, const Slot *slots) {\n"
                + body + "\n}\n" + LAUNCHER)

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
        return Value(kind, lambda indices: f"{array}[{_linear(kind.shape, indices)}]", array=array)

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
        self._loops(kind.shape, lambda i: [f"{array}[{_linear(kind.shape, i)}] = {convert(value.at(i))};"])
        return self._held(kind, array)

    def _as_array(self, value: Value) -> Value:
        return value if value.array else self._filled(value)

    def _block(self, block: Block) -> None:
        for operation in block.operations:
            self._operation(operation, block)

    def _operation(self, operation: Operation, block: Block) -> None:
        name = operation.name
        if name in _ELEMENTWISE:
            return self._elementwise(operation, block)
        method = getattr(self, "_" + name.replace(".", "_"), None)
        if method is None:
            raise ValueError(f"operation {name}: no C for it")
        method(operation)
        return None

    # Elements.

    def _elementwise(self, operation: Operation, block: Block) -> None:
        kind = operation.result_types[0]
        operands = [self._get(name) for name in operation.operands]
        places = bool(operation.result_types[0].shape) and all(o.steps is not None for o in operands)
        expression = _expression(operation, [o.type for o in operands], wraps=not places)

        def at(indices: Sequence[str]) -> str:
            return expression(*[o.at(indices if o.type.shape else ()) for o in operands])

        result = operation.results[0]
        if not kind.shape:
            self._scalar(result, kind, at(()))
            return
        steps = None if any(o.steps is None for o in operands) else 1 + sum(o.steps for o in operands)
        of_places = steps is not None and steps <= MOST_STEPS and operation.name in _OF_PLACES
        lazy = Value(kind, at, free=of_places, steps=steps if of_places else None)
        own, everywhere = self.uses[result]
        pointer = operation.name in ("tt.addptr", "tt.bitcast") and kind.element.startswith("ptr:")
        if of_places or pointer or everywhere == 1 and own == id(block):
            self.values[result] = lazy
        else:
            self.values[result] = self._filled(lazy)

    def _arith_constant(self, operation: Operation) -> None:
        text = operation.rest.strip()
        kind = operation.types[0] if operation.types else Type((), "i1")
        inside = text[text.index("<") + 1:text.rindex(">")] if text.startswith("dense<") else text.split(" ")[-1]
        if "[" in inside or '"' in inside:
            raise ValueError(f"constant {text[:60]}: expected one value for all elements")
        literal = _literal(inside, kind.element)
        self._set(operation, [Value(kind, lambda _: literal)])

    def _tt_make_range(self, operation: Operation) -> None:
        start = operation.integer("start")
        self._set(operation, [Value(operation.result_types[0], lambda i: f"({i[0]} + {start})" if start else i[0])])

    def _tt_splat(self, operation: Operation) -> None:
        source = self._get(operation.operands[0]).scalar
        self._set(operation, [Value(operation.result_types[0], lambda _: source)])

    def _spread(self, operation: Operation) -> Value:
        """The operand, made an array if reading an element of it several times would cost."""
        source = self._get(operation.operands[0])
        return source if source.free else self._filled(source)

    def _tt_expand_dims(self, operation: Operation) -> None:
        source, axis = self._get(operation.operands[0]), operation.integer("axis")
        self._set(operation, [Value(operation.result_types[0], lambda i: source.at([*i[:axis], *i[axis + 1:]]),
                                    free=source.free, steps=source.steps)])

    def _tt_broadcast(self, operation: Operation) -> None:
        source = self._spread(operation)
        shape = source.type.shape
        self._set(operation, [Value(operation.result_types[0],
                                    lambda i: source.at(["0" if n == 1 else x for n, x in zip(shape, i, strict=True)]),
                                    steps=source.steps)])

    def _tt_trans(self, operation: Operation) -> None:
        source = self._get(operation.operands[0])
        order = [int(n) for n in operation.rest.split("i32:")[1].split(">")[0].split(",")]
        self._set(operation, [Value(operation.result_types[0],
                                    lambda i: source.at([i[order.index(d)] for d in range(len(order))]),
                                    free=source.free, steps=source.steps)])

    def _tt_reshape(self, operation: Operation) -> None:
        source = self._get(operation.operands[0])
        self._set(operation, [self._held(operation.result_types[0], self._as_array(source).array)])

    def _tt_split(self, operation: Operation) -> None:
        source = self._spread(operation)
        self._set(operation, [Value(operation.result_types[0], lambda i, side=side: source.at([*i, side]), steps=None)
                              for side in "01"])

    def _tt_join(self, operation: Operation) -> None:
        left, right = (self._get(name) for name in operation.operands)
        lazy = Value(operation.result_types[0], lambda i: f"({i[-1]} ? {right.at(i[:-1])} : {left.at(i[:-1])})")
        self._set(operation, [self._filled(lazy)])

    # Memory.

    def _tt_load(self, operation: Operation) -> None:
        pointer, *others = (self._get(name) for name in operation.operands)
        kind = pointer.type.of(pointer.type.pointee)
        mask, other = [*others, None, None][:2]

        def loaded(i: Sequence[str]) -> str:
            if mask is None:
                return f"*({pointer.at(i)})"
            return f"{mask.at(i)} ? *({pointer.at(i)}) : {_undefined(kind.element) if other is None else other.at(i)}"

        if not kind.shape:
            volatile = f"*(volatile {c_type(kind.element)} *)({pointer.scalar})"
            self._scalar(operation.results[0], kind, volatile if mask is None else loaded(()))
            return
        array = self._array(kind)
        self._loops(kind.shape, lambda i: [f"{array}[{_linear(kind.shape, i)}] = {loaded(i)};"])
        self._set(operation, [self._held(kind, array)])

    def _tt_store(self, operation: Operation) -> None:
        pointer, value, *rest = (self._get(name) for name in operation.operands)
        self._loops(pointer.type.shape, lambda i: [
            (f"if ({rest[0].at(i)}) " if rest else "") + f"*({pointer.at(i)}) = {value.at(i)};"])

    def _tt_atomic_rmw(self, operation: Operation) -> None:
        kind_of, order = operation.rest.strip().split(", ")[:2]
        pointer, value, *rest = (self._get(name) for name in operation.operands)
        kind = value.type
        mask = (lambda i: rest[0].at(i)) if rest else (lambda i: "1")
        calls = {"add": "__atomic_fetch_add", "and": "__atomic_fetch_and", "or": "__atomic_fetch_or",
                 "xor": "__atomic_fetch_xor", "exch": "__atomic_exchange_n"} | ({"max": "fetch_max", "min": "fetch_min"} if kind.element == "i32" else {})
        if kind_of not in calls or kind.element not in ("i32", "i64"):
            raise ValueError(f"atomic {kind_of} of {kind.element}: expected {', '.join(calls)} of i32 (i64: no max, min)")

        def done(i: Sequence[str]) -> str:
            return f"{mask(i)} ? {calls[kind_of]}({pointer.at(i)}, {value.at(i)}, {_ORDERS[order]}) : 0"

        if not kind.shape:
            self._scalar(operation.results[0], kind, done(()))
            return
        array = self._array(kind)
        self._loops(kind.shape, lambda i: [f"{array}[{_linear(kind.shape, i)}] = {done(i)};"])
        self._set(operation, [self._held(kind, array)])

    def _gpu_barrier(self, operation: Operation) -> None:
        """A program is one thread."""

    _ttg_barrier = _gpu_barrier

    def _tt_get_program_id(self, operation: Operation) -> None:
        self._scalar(operation.results[0], operation.result_types[0], f"place->at[{'xyz'.index(operation.rest.strip()[0])}]")

    def _tt_get_num_programs(self, operation: Operation) -> None:
        self._scalar(operation.results[0], operation.result_types[0], f"place->count[{'xyz'.index(operation.rest.strip()[0])}]")

    def _tt_return(self, operation: Operation) -> None:
        """Kernels return nothing, and their last operation is this."""

    # Whole tensors.

    def _tt_dot(self, operation: Operation) -> None:
        a, b, c = (self._get(name) for name in operation.operands)
        (M, K), N = a.type.shape, b.type.shape[1]
        left, right = (self._filled(x, x.type.of("f32"), lambda e, x=x: _to_float(e, x.type.element)) for x in (a, b))
        if c.type.element != "f32":
            raise ValueError(f"tt.dot into {c.type.element}: expected f32")
        out = self._filled(c)
        if M % 4 or N % 8:
            raise ValueError(f"tt.dot of {M} x {N}: expected multiples of 4 and 8")
        self._emit(f"multiply({M}, {N}, {K}, {left.array}, {right.array}, {out.array});")
        self._set(operation, [out])

    def _combine(self, block: Block, left: list[str], right: list[str]) -> list[str]:
        """Emits a combiner's operations on two tuples of scalars; returns the C of its results."""
        for (name, kind), expression in zip(block.arguments, [*left, *right], strict=True):
            self.values[name] = Value(kind, lambda _, e=expression: e)
        for operation in block.operations[:-1]:
            self._operation(operation, block)
        return [self._get(name).scalar for name in block.operations[-1].operands]

    def _tt_reduce(self, operation: Operation) -> None:
        self._along(operation, operation.integer("axis"), each=False)

    def _tt_scan(self, operation: Operation) -> None:
        if "reverse = true" in operation.rest:
            raise ValueError("tt.scan from the end: no C for it")
        self._along(operation, operation.integer("axis"), each=True)

    def _along(self, operation: Operation, axis: int, each: bool) -> None:
        """Combines along an axis from its first element to its last; keeps each step (scan) or the last one (reduce)."""
        sources = [self._get(name) for name in operation.operands]
        sources = [s if s.free else self._as_array(s) for s in sources]
        shape = sources[0].type.shape
        kinds = operation.result_types
        rest = shape[:axis] + shape[axis + 1:]
        arrays = [self._array(kind) if kind.shape else None for kind in kinds]
        outer = [self._fresh("i") for _ in rest]
        totals = [self._fresh("total") for _ in kinds]
        if not kinds[0].shape:
            for total, kind in zip(totals, kinds, strict=True):
                self._emit(f"{c_type(kind.element)} {total};")
        self._emit("{")
        for index, size in zip(outer, rest, strict=True):
            self._emit(f"for (int {index} = 0; {index} < {size}; {index}++) {{")
        first, at = [*outer[:axis], "0", *outer[axis:]], self._fresh("i")
        for total, kind, source in zip(totals, kinds, sources, strict=True):
            declared = "" if not kind.shape else c_type(kind.element) + " "
            self._emit(f"{declared}{total} = {source.at(first)};")
        step = [*outer[:axis], at, *outer[axis:]]

        def keep(indices: Sequence[str]) -> None:
            for array, total, kind in zip(arrays, totals, kinds, strict=True):
                if array:
                    self._emit(f"{array}[{_linear(kind.shape, indices)}] = {total};")

        if each:
            keep(first)
        self._emit(f"for (int {at} = 1; {at} < {shape[axis]}; {at}++) {{")
        found = self._combine(operation.regions[0], totals, [s.at(step) for s in sources])
        news = [self._fresh("n") for _ in found]
        for new, kind, expression in zip(news, kinds, found, strict=True):
            self._emit(f"const {c_type(kind.element)} {new} = {expression};")
        for total, new in zip(totals, news, strict=True):
            self._emit(f"{total} = {new};")
        if each:
            keep(step)
        self._emit("}")
        if not each:
            keep(outer)
        self._emit("}" * len(outer) + "}")
        self._set(operation, [self._held(kind, array) if array else Value(kind, lambda _, t=total: t)
                              for kind, array, total in zip(kinds, arrays, totals, strict=True)])

    def _tt_elementwise_inline_asm(self, operation: Operation) -> None:
        """Calls a C function of the assembly for every group of packed elements, neighbours along the last axis."""
        pack = operation.integer("packed_element")
        sources = [self._as_array(self._get(name)) for name in operation.operands]
        kinds = operation.result_types
        name = self._fresh("ptx")
        self.inline.append(ptx_body(name, operation.rest, [s.type.element for s in sources], [k.element for k in kinds], pack))
        arrays = [self._array(kind) for kind in kinds]
        size, i = math.prod(kinds[0].shape), self._fresh("i")
        arguments = ", ".join(f"{array} + {i}" for array in [*arrays, *(s.array for s in sources)])
        self._emit(f"for (int {i} = 0; {i} < {size}; {i} += {pack}) {name}({arguments});")
        self._set(operation, [self._held(kind, array) for kind, array in zip(kinds, arrays, strict=True)])

    # Control flow.

    def _declare(self, kinds: list[Type]) -> list[Value]:
        """Variables that a region assigns: scalars or arrays."""
        found = []
        for kind in kinds:
            if kind.shape:
                found.append(self._held(kind, self._array(kind)))
            else:
                name = self._fresh()
                self._emit(f"{c_type(kind.element)} {name};")
                found.append(Value(kind, lambda _, n=name: n))
        return found

    def _assign(self, targets: list[Value], sources: list[Value]) -> None:
        """targets = sources, all at once: a source may read what another target loses."""
        held = {t.array for t in targets if t.array}
        ready = []
        for target, source in zip(targets, sources, strict=True):
            if target.type.shape:
                own = source.array is not None and (source.array == target.array or source.array not in held)
                ready.append(source if own else self._filled(source))
            else:
                name = self._fresh()
                self._emit(f"{c_type(target.type.element)} {name} = {source.scalar};")
                ready.append(Value(target.type, lambda _, n=name: n))
        for target, source in zip(targets, ready, strict=True):
            if not target.type.shape:
                self._emit(f"{target.scalar} = {source.scalar};")
            elif source.array != target.array:
                self._emit(f"memcpy({target.array}, {source.array}, sizeof {target.array});")

    def _scf_if(self, operation: Operation) -> None:
        results = self._declare(operation.result_types)
        condition = self._get(operation.operands[0]).scalar
        for word, region in zip((f"if ({condition}) {{", "else {"), operation.regions, strict=False):
            self._emit(word)
            # The compiler's time grows faster than a function: a walk, which is all ops in one kernel, is cut at its branches.
            apart = self._fresh("branch") if _size(region) > LARGE else None
            if apart:
                self._emit(f"__attribute__((noinline)) void {apart}(void) {{")
            self._block(region)
            self._leave(region, results)
            if apart:
                self._emit(f"}}\n{apart}();")
            self._emit("}")
        self._set(operation, results)

    def _leave(self, region: Block, targets: list[Value]) -> None:
        last = region.operations[-1] if region.operations else None
        if last is not None and last.name == "scf.yield" and targets:
            self._assign(targets, [self._get(name) for name in last.operands])

    def _scf_yield(self, operation: Operation) -> None:
        """Assigned by the operation that owns the region."""

    _scf_condition = _scf_yield

    def _scf_for(self, operation: Operation) -> None:
        block, kinds = operation.regions[0], operation.result_types
        low, high, step = (self._get(name).scalar for name in operation.operands[:3])
        carried = self._declare(kinds)
        self._assign(carried, [self._get(name) for name in operation.operands[3:]])
        (variable, kind), *arguments = block.arguments
        index = self._fresh()
        own = c_type(kind.element)
        self._emit(f"for ({own} {index} = {low}; {index} < {high}; {index} += {step}) {{")
        self.values[variable] = Value(kind, lambda _: index)
        for (name, _), value in zip(arguments, carried, strict=True):
            self.values[name] = value
        self._block(block)
        self._leave(block, carried)
        self._emit("}")
        self._set(operation, carried)

    def _scf_while(self, operation: Operation) -> None:
        before, after = operation.regions
        carried = self._declare([kind for _, kind in before.arguments])
        self._assign(carried, [self._get(name) for name in operation.operands])
        results = self._declare(operation.result_types)
        waits = any(o.name == "tt.atomic_rmw" for o in before.operations)
        spins = self._fresh("spins")
        self._emit(f"for (unsigned {spins} = 0;; {spins}++) {{")
        for (name, _), value in zip(before.arguments, carried, strict=True):
            self.values[name] = value
        self._block(before)
        condition, *forwarded = (self._get(name) for name in before.operations[-1].operands)
        self._assign(results, forwarded)
        self._emit(f"if (!{condition.scalar}) break;")
        if waits:  # more programs than cores: whoever is waited for must run
            self._emit(f"if ({spins} > 64) sched_yield();")
        for (name, _), value in zip(after.arguments, results, strict=True):
            self.values[name] = value
        self._block(after)
        self._leave(after, carried)
        self._emit("}")
        self._set(operation, results)


def _size(block: Block) -> int:
    return sum(1 + sum(map(_size, operation.regions)) for operation in block.operations)


def _uses(body: Block) -> dict[str, tuple[int, int]]:
    """Of each value: the block of its uses (0 if there are several) and their number."""
    counts, where = Counter(), {}

    def visit(block: Block) -> None:
        for operation in block.operations:
            for name in operation.operands:
                counts[name] += 1
                where[name] = id(block) if where.get(name, id(block)) == id(block) else 0
            for region in operation.regions:
                visit(region)

    visit(body)
    return _Default({name: (where[name], n) for name, n in counts.items()})


class _Default(dict):
    def __missing__(self, name: str) -> tuple[int, int]:
        return 0, 0


def _literal(text: str, element: str) -> str:
    if text in ("true", "false"):
        return "1" if text == "true" else "0"
    if element in ("f32", "f64", "bf16", "f16"):
        size = BYTES[element]
        if text.startswith("0x"):
            bits = int(text, 16)
        elif element == "bf16":
            exact = struct.unpack("<I", struct.pack("<f", float(text)))[0]
            assert exact & 0xFFFF == 0, f"constant {text} is not a bf16 number"
            bits = exact >> 16
        else:
            code = {"f32": "f", "f64": "d", "f16": "e"}[element]
            bits = int.from_bytes(struct.pack("<" + code, float(text)), "little")
        number = f"0x{bits:0{2 * size}X}"
        return number if element == "bf16" else f"{element}_bits({number}{'ull' if element == 'f64' else 'u'})"
    value = int(text)
    if element == "i64":
        return f"({value}ll)" if value != -(1 << 63) else "INT64_MIN"
    return f"({value})" if value != -(1 << 31) else "INT32_MIN"


def _to_float(expression: str, element: str) -> str:
    if element == "bf16":
        return f"wide({expression})"
    if element == "f8E4M3FN":
        return f"fp8_values[{expression}]"
    return f"(float)({expression})"


def _from_float(expression: str, element: str) -> str:
    if element == "bf16":
        return f"narrow((float)({expression}))"
    if element == "f8E4M3FN":
        raise ValueError("rounding to FP8: no C for it")
    return f"(({c_type(element)})({expression}))"


def _number(expression: str, element: str) -> str:
    """A float of any type as a C number that can be computed with."""
    return _to_float(expression, element) if element in ("bf16", "f8E4M3FN") else expression


def _expression(operation: Operation, kinds: list[Type], wraps: bool) -> Callable[..., str]:
    """C of an elementwise operation from the C of its operands. wraps: integers wrap around; places of elements do not."""
    name, rest = operation.name, operation.rest
    element = kinds[-1].element if name != "arith.select" else kinds[1].element
    result = operation.result_types[0].element
    unsigned = "u" + C_TYPES[element].removeprefix("u") if element.startswith("i") and element != "i1" else "uint8_t"
    packed = element in ("bf16", "f8E4M3FN")
    if name == "tt.addptr":
        return lambda p, i: f"({p} + {i})"
    if name in _BINARY:
        sign = _BINARY[name]
        if packed and name.endswith("f"):
            return lambda a, b: _from_float(f"{_number(a, element)} {sign} {_number(b, element)}", element)
        if name in ("arith.addi", "arith.subi", "arith.muli") and element != "i1" and wraps:
            return lambda a, b: f"(({c_type(element)})(({unsigned})({a}) {sign} ({unsigned})({b})))"
        return lambda a, b: f"({a} {sign} {b})" if element != "i1" else f"(({a} {sign} {b}) & 1)"
    if name in _UNSIGNED:
        return lambda a, b: f"(({c_type(element)})(({unsigned})({a}) {_UNSIGNED[name]} ({unsigned})({b})))"
    if name == "arith.shrsi":
        return lambda a, b: f"({a} >> {b})"
    if name in _CHOICES:
        test, sign = _CHOICES[name]
        cast = f"({unsigned})" if sign else ""
        helper = lambda a, b: f"({{ {c_type(element)} a_ = {a}, b_ = {b}; " + test.format(  # noqa: E731
            a=f"{cast}{_number('a_', element)}", b=f"{cast}{_number('b_', element)}") + " ? a_ : b_; })"
        return helper
    if name == "arith.select":
        return lambda c, a, b: f"({c} ? {a} : {b})"
    if name == "arith.cmpi":
        predicate = rest.strip().split(",")[0]
        if predicate in _SIGNED:
            return lambda a, b: f"({a} {_SIGNED[predicate]} {b})"
        return lambda a, b: f"(({unsigned})({a}) {_PREDICATES[predicate]} ({unsigned})({b}))"
    if name == "arith.cmpf":
        predicate = rest.strip().split(",")[0]
        if predicate not in _ORDERED:
            raise ValueError(f"arith.cmpf {predicate}: expected {', '.join(_ORDERED)}")
        return lambda a, b: f"({_number(a, element)} {_ORDERED[predicate]} {_number(b, element)})"
    if name == "arith.negf":
        return lambda a: _from_float(f"-{_number(a, element)}", element) if packed else f"(-{a})"
    if name == "math.rsqrt":
        return lambda a: f"(1.0f / sqrtf({a}))" if element == "f32" else f"(1.0 / sqrt({a}))"
    if name in _MATH:
        return lambda a: f"{_MATH[name]}{'f' if element == 'f32' else ''}({a})"
    return _cast(name, element, result, unsigned)


def _cast(name: str, element: str, result: str, unsigned: str) -> Callable[[str], str]:
    if name in ("tt.bitcast", "arith.bitcast"):
        if result.startswith("ptr:") or BYTES[result] == 1 or {element, result} <= {"i16", "bf16"}:
            return lambda a: f"(({c_type(result)})({a}))"
        if result.startswith("f"):
            return lambda a: f"{result}_bits({a})"
        return lambda a: f"(({c_type(result)})bits_{element}({a}))"
    if name in ("tt.int_to_ptr", "tt.ptr_to_int"):
        return lambda a: f"(({c_type(result)})({a}))"
    if name in ("arith.extf", "arith.truncf", "tt.fp_to_fp"):
        return lambda a: _from_float(_number(a, element), result)
    if name in ("arith.extui", "arith.uitofp"):
        if result == "bf16":
            return lambda a: _from_float(f"({unsigned})({a})", result)
        return lambda a: f"(({c_type(result)})({unsigned})({a}))"
    if name == "arith.trunci" and result == "i1":
        return lambda a: f"(({a}) & 1)"
    if name == "arith.sitofp" and result == "bf16":
        return lambda a: _from_float(a, result)
    if name == "arith.extsi" and element == "i1":
        return lambda a: f"(({c_type(result)})-(int)({a}))"
    return lambda a: f"(({c_type(result)})({_number(a, element)}))"
