"""C of single elements: types, constants, arithmetic, comparisons, conversions."""

from __future__ import annotations

import struct
from collections.abc import Callable

from runtime_ref.triton_cpu.ttir import Operation, Type

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
ELEMENTWISE = {*_BINARY, *_UNSIGNED, *_CHOICES, *_MATH, *_CASTS, "arith.cmpi", "arith.cmpf", "arith.select", "arith.shrsi",
                "arith.negf", "math.rsqrt", "tt.addptr"}


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


def undefined(element: str) -> str:
    """What an element becomes that a masked load leaves undefined."""
    return {"f32": "NAN", "f64": "NAN", "bf16": "0x7FC0", "f16": "(_Float16)NAN", "f8E4M3FN": "0x7F"}.get(element, "0x55")


def literal(text: str, element: str) -> str:
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


def to_float(expression: str, element: str) -> str:
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
    return to_float(expression, element) if element in ("bf16", "f8E4M3FN") else expression


def elementwise(operation: Operation, kinds: list[Type], wraps: bool) -> Callable[..., str]:
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
