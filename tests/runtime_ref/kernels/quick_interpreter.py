"""Triton's interpreter, several times as fast: the same NumPy operations, without its bookkeeping around each of them.

Of a step's time in the interpreter, nine tenths are spent on types that are made and named anew for every result, operands that
are written out at full size before they meet, a second computation of every integer sum in 64 bits whose finding nobody asks
for, and on patching the language again for every device function that a kernel calls. Here types are remembered, NumPy
broadcasts, and a launch patches once. What this does not know (other dtypes, blocks of different rank) is left to the
interpreter. Two differences: bf16 becomes float32 exactly, subnormals too, which the interpreter gets wrong; and float32 matrix
products are summed in float64, where sums of products of bf16 values are exact, because NumPy's float32 bits depend on how many
rows there are, which on a GPU they do not (and with them on the number of ranks, which share heads).

`test_quick_interpreter` compares the two.
"""

import contextlib
import dataclasses
import math
import threading

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

INTEGERS = {"int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16, "int32": np.int32, "uint32": np.uint32,
            "int64": np.int64, "uint64": np.uint64}
LIMITS = {name: (int(np.iinfo(kind).min), int(np.iinfo(kind).max)) for name, kind in INTEGERS.items()}
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
BITWISE = {"and_": np.bitwise_and, "or_": np.bitwise_or, "xor_": np.bitwise_xor, "shl": np.left_shift, "lshr": np.right_shift}
COMPARISONS = {"less_than": np.less, "less_equal": np.less_equal, "greater_than": np.greater,
               "greater_equal": np.greater_equal, "equal": np.equal, "not_equal": np.not_equal}


@contextlib.contextmanager
def quick_interpreter():
    """While it is open, interpreted kernels run with the shortcuts of this module."""
    with contextlib.ExitStack() as stack:
        for module, name, new in (*_one_launch_at_a_time(), *_patched_once(), *_remembered_types(), *_plain_operations()):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, new)
        yield


def _one_launch_at_a_time():
    """The language is patched for all threads, so two servers' engines would take each other's patches away."""
    launch, alone = interpreter.GridExecutor.__call__, threading.Lock()

    def launched(self, *args, **kwargs):
        with alone:
            return launch(self, *args, **kwargs)

    yield interpreter.GridExecutor, "__call__", launched


class _Nothing:
    def restore(self):
        pass


def _patched_once():
    """Nested calls patch once per launch for each module that they come from."""
    original, seen = interpreter._patch_lang, set()

    def patch(fn):
        outermost, where = not seen, id(fn.__globals__)
        if where in seen:
            return _Nothing()
        scope = original(fn)
        seen.add(where)
        if outermost:
            restore = scope.restore

            def ended():
                seen.clear()
                restore()

            scope.restore = ended
        return scope

    def patch_attribute(owner, name, member, builder, scope):
        plain, semantic = getattr(member, "__wrapped__", member), TritonSemantic(builder)

        def called(*args, _semantic=None, **kwargs):
            return plain(*args, _semantic=semantic, **kwargs)

        scope.set_attr(owner, name, called)

    yield interpreter, "_patch_lang", patch
    yield interpreter, "_patch_attr", patch_attribute


def _remembered_types():
    """Block types by element and shape, with the constants that every tensor of the type has; NumPy's dtypes by name."""
    make_block, of_numpy, unwrap = core.block_type.__init__, interpreter._get_np_dtype, core._unwrap_if_constexpr
    blocks, dtypes = {}, {}
    scalar = core.tuple([]), core.constexpr(1)

    def block_type(self, element_ty, shape):
        sizes = [s.value if type(s) is core.constexpr else s for s in (shape.values if type(shape) is core.tuple else shape)]
        key = (id(element_ty), *sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            self.of_tensors = core.tuple([core.constexpr(s) for s in sizes]), core.constexpr(math.prod(sizes))
            blocks[key] = dict(self.__dict__)  # which keeps the element type, so that its id stays its own
        self.__dict__.update(blocks[key])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else scalar

    def numpy_dtype(type):
        name = type.scalar.name
        if name not in dtypes:
            dtypes[name] = of_numpy(type)
        return dtypes[name]

    def unwrap_if_constexpr(value):
        kind = type(value)
        return value if kind is int or kind is core.tensor else value.value if kind is core.constexpr else unwrap(value)

    yield core.block_type, "__init__", block_type
    yield core.tensor, "__init__", tensor
    yield interpreter, "_get_np_dtype", numpy_dtype
    yield core, "_unwrap_if_constexpr", unwrap_if_constexpr


def _tensor(data, dtype, type):
    return core.tensor(interpreter.TensorHandle(data, dtype), type)


def _common_type(a, b):
    """Type of what two tensors of one element type make together; None where that takes more than NumPy's broadcasting."""
    if a.shape is b.shape or not b.type.is_block():
        return a.type
    if not a.type.is_block():
        return b.type.with_element_ty(a.dtype)
    if len(a.shape) != len(b.shape):
        return None
    return core.block_type(a.dtype, list(np.broadcast_shapes(a.handle.data.shape, b.handle.data.shape)))


def _operands(a, b):
    """(data, data, element type, type) of two tensors, or a tensor and a number, of one dtype; None for all others."""
    if type(a) is not core.tensor:
        swapped = _operands(b, a) if type(b) is core.tensor else None
        return swapped and (swapped[1], swapped[0], *swapped[2:])
    dtype = a.dtype
    if type(b) is core.tensor:
        if b.dtype is not dtype or dtype.name not in INTEGERS and dtype.name not in ("fp32", "int1"):
            return None
        common = _common_type(a, b)
        return common and (a.handle.data, b.handle.data, dtype, common)
    if dtype.name == "fp32" and type(b) in (int, float):
        return a.handle.data, np.float32(b), dtype, a.type
    if dtype.name in INTEGERS and type(b) is int and LIMITS[dtype.name][0] <= b <= LIMITS[dtype.name][1]:
        return a.handle.data, INTEGERS[dtype.name](b), dtype, a.type
    return None


def _plain_operations():
    """Operations on operands of one dtype are NumPy's own; the interpreter's come after, with what these do not know."""
    for name, operation in (ARITHMETIC | BITWISE | COMPARISONS).items():
        yield TritonSemantic, name, _short(getattr(TritonSemantic, name), name, operation)
    cast, broadcast, convert = TritonSemantic.cast, TritonSemantic.broadcast_impl_value, interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def quick_cast(self, input, dst_ty, fp_downcast_rounding=None):
        return input if input.dtype is dst_ty else cast(self, input, dst_ty, fp_downcast_rounding)

    def quick_broadcast(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        common = _common_type(lhs, rhs)
        if common is None:
            return broadcast(self, lhs, rhs)
        shape = tuple(common.shape.values)
        return tuple(t if t.shape is common.of_tensors[0] else
                     _tensor(np.broadcast_to(t.handle.data, shape), t.handle.dtype, common.with_element_ty(t.dtype))
                     for t in (lhs, rhs))

    def quick_convert(input, input_dtype, output_dtype, rounding_mode):
        if (input_dtype.name, output_dtype.name) == ("bf16", "fp32"):
            return input.astype(np.uint32) << np.uint32(16)
        if (input_dtype.name, output_dtype.name, rounding_mode) == ("fp32", "bf16", None):
            return (input.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return convert(input, input_dtype, output_dtype, rounding_mode)

    def exact_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    yield interpreter.InterpreterBuilder, "create_dot", exact_dot
    yield TritonSemantic, "cast", quick_cast
    yield TritonSemantic, "broadcast_impl_value", quick_broadcast
    yield interpreter, "_convert_float", quick_convert
    yield (interpreter.interpreter_builder, "options",
           dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False))


def _short(original, name, operation):
    """`original`, a method of TritonSemantic, by one NumPy operation where the operands allow it."""
    wanted = INTEGERS.keys() | {"int1"} if name in ("and_", "or_", "xor_") else INTEGERS.keys() if name in BITWISE else \
        INTEGERS.keys() | {"fp32"}

    def short(self, a, b, *checked, **by_name):
        found = _operands(a, b)
        if found is None or found[2].name not in wanted:
            if name == "add" and type(a) is type(b) is core.tensor and _steps(a, b):
                bytes_ = max(8, a.dtype.element_ty.primitive_bitwidth) // 8
                return _tensor(a.handle.data + np.uint64(bytes_) * b.handle.data.astype(np.uint64), a.handle.dtype,
                               _common_type(a, b))
            return original(self, a, b, *checked, **by_name)
        x, y, dtype, kind = found
        if name in COMPARISONS:
            return _tensor(operation(x, y), core.int1, kind.with_element_ty(core.int1) if kind.is_block() else core.int1)
        return _tensor(operation(x, y), dtype, kind)

    return short


def _steps(pointer, offset) -> bool:
    return pointer.dtype.is_ptr() and offset.dtype.name in ("int32", "int64") and _common_type(pointer, offset) is not None
