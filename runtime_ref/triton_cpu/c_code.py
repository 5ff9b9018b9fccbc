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

import math
from collections import Counter
from collections.abc import Callable, Sequence

from runtime_ref.triton_cpu.c_prelude import LAUNCHER, PREAMBLE
from runtime_ref.triton_cpu.elements import ELEMENTWISE, c_type, elementwise, literal, to_float, undefined
from runtime_ref.triton_cpu.emitter import Emitter, Value, linear
from runtime_ref.triton_cpu.ptx_code import ptx_body
from runtime_ref.triton_cpu.ttir import Block, Function, Operation, Type

# What places of elements, addresses and masks are made of; so many steps are cheaper than an array.
_OF_PLACES = {"arith.addi", "arith.subi", "arith.muli", "arith.andi", "arith.ori", "arith.cmpi", "arith.extsi", "arith.divsi",
              "arith.remsi", "tt.addptr"}
MOST_STEPS = 8
LARGE = 60  # operations of a branch that becomes a function
_ORDERS = {"relaxed": "__ATOMIC_RELAXED", "acquire": "__ATOMIC_ACQUIRE", "release": "__ATOMIC_RELEASE",
           "acq_rel": "__ATOMIC_ACQ_REL"}


def c_source(function: Function) -> str:
    """A C file with `launch`.

    Raises:
        ValueError: an operation that has no C here.
    """
    return _Writer(function).source()


class _Writer(Emitter):
    def __init__(self, function: Function):
        super().__init__()
        self.function = function
        self.uses = _uses(function.body)
        self.inline: list[str] = []

    def source(self) -> str:
        for i, (name, kind) in enumerate(self.function.arguments):
            member = "p" if kind.element.startswith("ptr:") else "f" if kind.element[0] in "fb" else "i"
            self._scalar(name, kind, f"slots[{i}].{member}")
        self._block(self.function.body)
        body = "\n".join(self.lines)
        stack = f"#define STACK {2 * self.bytes + (1 << 16)}\n"
        return (PREAMBLE + "\n".join(self.inline) + stack + "static void program(const Place *place, const Slot *slots) {\n"
                + body + "\n}\n" + LAUNCHER)

    def _block(self, block: Block) -> None:
        for operation in block.operations:
            self._operation(operation, block)

    def _operation(self, operation: Operation, block: Block) -> None:
        name = operation.name
        if name in ELEMENTWISE:
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
        of_elements = elementwise(operation, [o.type for o in operands], wraps=not places)

        def at(indices: Sequence[str]) -> str:
            return of_elements(*[o.at(indices if o.type.shape else ()) for o in operands])

        result = operation.results[0]
        foreign = operation.name == "tt.int_to_ptr" or any(o.foreign for o in operands)
        if not kind.shape:
            self._scalar(result, kind, at(())).foreign = foreign
            return
        steps = None if any(o.steps is None for o in operands) else 1 + sum(o.steps for o in operands)
        of_places = steps is not None and steps <= MOST_STEPS and operation.name in _OF_PLACES
        lazy = Value(kind, at, free=of_places, steps=steps if of_places else None, foreign=foreign)
        own, everywhere = self.uses[result]
        pointer = operation.name in ("tt.addptr", "tt.bitcast") and kind.element.startswith("ptr:")
        if of_places or pointer or everywhere == 1 and own == id(block):
            self.values[result] = lazy
        else:
            self.values[result] = self._filled(lazy)
            self.values[result].foreign = foreign

    def _arith_constant(self, operation: Operation) -> None:
        text = operation.rest.strip()
        kind = operation.types[0] if operation.types else Type((), "i1")
        inside = text[text.index("<") + 1:text.rindex(">")] if text.startswith("dense<") else text.split(" ")[-1]
        if "[" in inside or '"' in inside:
            raise ValueError(f"constant {text[:60]}: expected one value for all elements")
        number = literal(inside, kind.element)
        self._set(operation, [Value(kind, lambda _: number)])

    def _tt_make_range(self, operation: Operation) -> None:
        start = operation.integer("start")
        self._set(operation, [Value(operation.result_types[0], lambda i: f"({i[0]} + {start})" if start else i[0])])

    def _tt_splat(self, operation: Operation) -> None:
        source = self._get(operation.operands[0])
        text = source.scalar
        self._set(operation, [Value(operation.result_types[0], lambda _: text, foreign=source.foreign)])

    def _spread(self, operation: Operation) -> Value:
        """The operand, made an array if reading an element of it several times would cost."""
        source = self._get(operation.operands[0])
        return source if source.free else self._filled(source)

    def _tt_expand_dims(self, operation: Operation) -> None:
        source, axis = self._get(operation.operands[0]), operation.integer("axis")
        self._set(operation, [Value(operation.result_types[0], lambda i: source.at([*i[:axis], *i[axis + 1:]]),
                                    free=source.free, steps=source.steps, foreign=source.foreign)])

    def _tt_broadcast(self, operation: Operation) -> None:
        source = self._spread(operation)
        shape = source.type.shape
        self._set(operation, [Value(operation.result_types[0],
                                    lambda i: source.at(["0" if n == 1 else x for n, x in zip(shape, i, strict=True)]),
                                    steps=source.steps, foreign=source.foreign)])

    def _tt_trans(self, operation: Operation) -> None:
        source = self._get(operation.operands[0])
        order = [int(n) for n in operation.rest.split("i32:")[1].split(">")[0].split(",")]
        self._set(operation, [Value(operation.result_types[0],
                                    lambda i: source.at([i[order.index(d)] for d in range(len(order))]),
                                    free=source.free, steps=source.steps, foreign=source.foreign)])

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

    def _now(self, operation: Operation, kind: Type, at: Callable[[Sequence[str]], str]) -> None:
        """The result of an operation on memory, whose elements are made here and not where they are used."""
        if kind.shape:
            self._set(operation, [self._filled(Value(kind, at))])
        else:
            self._scalar(operation.results[0], kind, at(()))

    def _tt_load(self, operation: Operation) -> None:
        pointer, *others = (self._get(name) for name in operation.operands)
        kind = pointer.type.of(pointer.type.pointee)
        mask, other = [*others, None, None][:2]

        def loaded(i: Sequence[str]) -> str:
            value = f"({_inside(pointer, i, 1)} ? *(volatile {c_type(kind.element)} *)({pointer.at(i)}) : 0)" if not i else (
                f"({_inside(pointer, i, 1)} ? *({pointer.at(i)}) : {undefined(kind.element)})")
            if mask is None:
                return value
            return f"{mask.at(i)} ? {value} : {undefined(kind.element) if other is None else other.at(i)}"

        self._now(operation, kind, loaded)

    def _tt_store(self, operation: Operation) -> None:
        pointer, value, *rest = (self._get(name) for name in operation.operands)
        self._loops(pointer.type.shape, lambda i: [
            f"if (({rest[0].at(i) if rest else 1}) && {_inside(pointer, i, 2)}) *({pointer.at(i)}) = {value.at(i)};"])

    def _tt_atomic_rmw(self, operation: Operation) -> None:
        kind_of, order = operation.rest.strip().split(", ")[:2]
        pointer, value, *rest = (self._get(name) for name in operation.operands)
        kind = value.type
        mask = (lambda i: rest[0].at(i)) if rest else (lambda i: "1")
        calls = {"add": "__atomic_fetch_add", "and": "__atomic_fetch_and", "or": "__atomic_fetch_or",
                 "xor": "__atomic_fetch_xor", "exch": "__atomic_exchange_n"}
        if kind.element == "i32":
            calls |= {"max": "fetch_max", "min": "fetch_min"}
        if kind_of not in calls or kind.element not in ("i32", "i64"):
            raise ValueError(f"atomic {kind_of} of {kind.element}: expected {', '.join(calls)} of i32 (i64: no max, min)")

        def done(i: Sequence[str]) -> str:
            call = f"{calls[kind_of]}({pointer.at(i)}, {value.at(i)}, {_ORDERS[order]})"
            return f"({mask(i)}) && {_inside(pointer, i, 3)} ? {call} : 0"

        self._now(operation, kind, done)

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
        left, right = (self._filled(x, x.type.of("f32"), lambda e, x=x: to_float(e, x.type.element)) for x in (a, b))
        if c.type.element != "f32":
            raise ValueError(f"tt.dot into {c.type.element}: expected f32")
        out = self._filled(c)
        self._product(operation, (M, N, K), left, right, out)

    def _product(self, operation: Operation, sizes: tuple[int, int, int], left: Value, right: Value, out: Value) -> None:
        """out [M, N] += left [M, K] right [K, N], all float32 arrays; out becomes the result."""
        M, N, K = sizes
        if M % 4 or N % 8:
            raise ValueError(f"{operation.name} of {M} x {N}: expected multiples of 4 and 8")
        self._emit(f"multiply({M}, {N}, {K}, {left.array}, {right.array}, {out.array});")
        self._set(operation, [out])

    def _tt_dot_scaled(self, operation: Operation) -> None:
        """E2M1 by E4M3, both with scale bytes per 32 of K: exact products, summed in float32."""
        left, left_scale, right, right_scale, c = (self._get(name) for name in operation.operands)
        kinds = "lhs = e2m1 rhs = e4m3"
        if kinds not in operation.rest or right.type.element != "f8E4M3FN" or c.type.element != "f32":
            raise ValueError(f"tt.dot_scaled{operation.rest[:80]}: expected {kinds}")
        (M, half), N = left.type.shape, right.type.shape[1]
        codes, left_scale, right_scale = (x if x.free else self._as_array(x) for x in (left, left_scale, right_scale))

        def weight(i: Sequence[str]) -> str:
            code = f"{codes.at([i[0], f'{i[1]} / 2'])} >> {i[1]} % 2 * 4 & 15"
            return f"fp4_values[{code}] * e8m0({left_scale.at([i[0], f'{i[1]} / 32'])})"

        def activation(i: Sequence[str]) -> str:
            return f"{to_float(right.at(i), 'f8E4M3FN')} * e8m0({right_scale.at([i[1], f'{i[0]} / 32'])})"

        a, b = (self._filled(Value(Type(shape, "f32"), at))
                for shape, at in (((M, 2 * half), weight), ((2 * half, N), activation)))
        self._product(operation, (M, N, 2 * half), a, b, self._filled(c))

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
                    self._emit(f"{array}[{linear(kind.shape, indices)}] = {total};")

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
            # The compiler's time grows faster than a function: a megakernel, all ops in one kernel, is cut at its branches.
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


ACCESSES = (None, "load", "store", "atomic", "prefetch")


def _inside(pointer: Value, indices: Sequence[str], kind: int) -> str:
    """Whether an access (a place in ACCESSES) stays inside the arguments; where that is not compiled in, true."""
    size = f"sizeof({c_type(pointer.type.pointee)})"
    return "1" if pointer.foreign else f"inside({pointer.at(indices)}, {size}, {kind}, place)"


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
