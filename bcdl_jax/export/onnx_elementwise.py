"""Elementwise primitives as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bcdl_jax.export.onnx_graph import Graph, Tensor, UnsupportedError, broadcast

Rule = Callable[[Graph, Mapping[str, Any], Sequence[Tensor]], Tensor]

_BOOL = np.dtype(bool)


def _unary(op: str) -> Rule:
    return lambda graph, _, operands: graph.unary(op, operands[0])


def _arithmetic(op: str, for_bool: str | None = None) -> Rule:
    def rule(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
        first, second = operands
        if first.dtype == _BOOL and for_bool is None:
            raise UnsupportedError(f"{op} of bools has no counterpart in ONNX")
        return graph.binary(for_bool if first.dtype == _BOOL and for_bool else op, first, second)

    return rule


def _comparison(op: str, negated: bool = False) -> Rule:
    def rule(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
        first, second = (graph.cast(each, np.int32) if each.dtype == _BOOL else each for each in operands)
        result = graph.binary(op, first, second, _BOOL)
        return graph.unary("Not", result) if negated else result

    return rule


def _bitwise(op: str) -> Rule:
    def rule(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
        prefix = "" if operands[0].dtype == _BOOL else "Bitwise"
        if len(operands) == 1:
            return graph.unary(prefix + op, operands[0])
        return graph.binary(prefix + op, *operands)

    return rule


def _power_of(graph: Graph, base: Tensor, exponent: float) -> Tensor:
    return graph.binary("Pow", base, graph.scalar(exponent, base.dtype))


def _integer_pow(graph: Graph, params: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    (base,), exponent = operands, params["y"]
    if exponent == 2:
        return graph.binary("Mul", base, base)
    if exponent == -1:
        return graph.unary("Reciprocal", base)
    return _power_of(graph, base, exponent)


def _pow(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    base, exponent = operands
    return graph.binary("Pow", base, graph.cast(exponent, base.dtype))


def _round(graph: Graph, params: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    (value,) = operands
    if int(params["rounding_method"]) == 1:  # To the nearest even number.
        return graph.unary("Round", value)
    away = graph.unary("Floor", graph.binary("Add", graph.unary("Abs", value), graph.scalar(0.5, value.dtype)))
    return graph.binary("Mul", away, graph.unary("Sign", value))


def select(graph: Graph, condition: Tensor, when_true: Tensor, when_false: Tensor) -> Tensor:
    """The elements of one tensor where a condition holds, and of another one elsewhere."""
    if when_true.dtype == _BOOL:  # onnxruntime has no kernel for a selection of bools.
        yes = graph.binary("And", condition, when_true)
        no = graph.binary("And", graph.unary("Not", condition), when_false)
        return graph.binary("Or", yes, no)
    sizes = broadcast(condition.sizes, when_true.sizes, when_false.sizes)
    return graph.add("Where", [condition, when_true, when_false], sizes, when_true.dtype)


def _select_n(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    which, *cases = operands
    if which.dtype == _BOOL:
        return cases[0] if len(cases) == 1 else select(graph, which, cases[1], cases[0])
    result = cases[0]
    for number, case in enumerate(cases[1:], 1):
        result = select(graph, graph.binary("Equal", which, graph.scalar(number, which.dtype), _BOOL), case, result)
    return result


def _clamp(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    low, value, high = operands
    return graph.binary("Max", graph.binary("Min", value, high), low)


def _expm1(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    """2 tanh(x / 2) / (1 - tanh(x / 2)) for small x, where exp(x) - 1 cancels."""
    (value,) = operands
    one, half = graph.scalar(1, value.dtype), graph.scalar(0.5, value.dtype)
    tanh = graph.unary("Tanh", graph.binary("Mul", value, half))
    small = graph.binary("Div", graph.binary("Add", tanh, tanh), graph.binary("Sub", one, tanh))
    is_small = graph.binary("Less", graph.unary("Abs", value), half, _BOOL)
    return select(graph, is_small, small, graph.binary("Sub", graph.unary("Exp", value), one))


def _log1p(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    """log(u) x / (u - 1) with u = 1 + x as rounded, and x where u is 1 [K87]."""
    (value,) = operands
    one = graph.scalar(1, value.dtype)
    rounded = graph.binary("Add", value, one)
    is_one = graph.binary("Equal", rounded, one, _BOOL)
    divisor = select(graph, is_one, one, graph.binary("Sub", rounded, one))
    ratio = graph.binary("Div", graph.binary("Mul", graph.unary("Log", rounded), value), divisor)
    is_infinite = graph.unary("IsInf", rounded, _BOOL)
    return select(graph, is_one, value, select(graph, is_infinite, rounded, ratio))


def _is_finite(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    (value,) = operands
    value = graph.cast(value, np.float32) if value.dtype == np.float16 else value
    either = graph.binary("Or", graph.unary("IsInf", value, _BOOL), graph.unary("IsNaN", value, _BOOL))
    return graph.unary("Not", either)


def _cbrt(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    (value,) = operands
    return graph.binary("Mul", graph.unary("Sign", value), _power_of(graph, graph.unary("Abs", value), 1 / 3))


def _atan2(graph: Graph, _: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    y, x = operands
    zero, pi = graph.scalar(0, x.dtype), graph.scalar(np.pi, x.dtype)
    above = select(graph, graph.binary("Less", y, zero, _BOOL), graph.unary("Neg", pi), pi)
    is_axis = graph.binary("Equal", x, zero, _BOOL)
    angle = graph.unary("Atan", graph.binary("Div", y, select(graph, is_axis, graph.scalar(1, x.dtype), x)))
    angle = select(graph, graph.binary("Less", x, zero, _BOOL), graph.binary("Add", angle, above), angle)
    on_axis = graph.binary("Mul", graph.unary("Sign", y), graph.scalar(np.pi / 2, x.dtype))
    return select(graph, is_axis, on_axis, angle)


def _reduce_precision(graph: Graph, params: Mapping[str, Any], operands: Sequence[Tensor]) -> Tensor:
    (value,) = operands
    types = {(5, 10): np.float16, (8, 7): jnp.bfloat16, (8, 23): np.float32}
    bits = (params["exponent_bits"], params["mantissa_bits"])
    if bits not in types:
        raise UnsupportedError(f"reduce_precision to {bits[0]} and {bits[1]} bits has no counterpart in ONNX")
    return graph.cast(graph.cast(value, types[bits]), value.dtype)


RULES: dict[str, Rule] = {
    **{
        name: _unary(name.capitalize())
        for name in (
            *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "floor"),
            *("log", "neg", "sign", "sin", "sinh", "sqrt", "tan", "tanh"),
        )
    },
    "logistic": _unary("Sigmoid"),
    "add": _arithmetic("Add", "Or"),
    "add_any": _arithmetic("Add", "Or"),
    "sub": _arithmetic("Sub"),
    "mul": _arithmetic("Mul", "And"),
    "div": _arithmetic("Div"),
    "max": _arithmetic("Max", "Or"),
    "min": _arithmetic("Min", "And"),
    "rem": lambda graph, _, operands: graph.add(
        "Mod", operands, broadcast(*(each.sizes for each in operands)), operands[0].dtype, fmod=1
    ),
    "and": _bitwise("And"),
    "or": _bitwise("Or"),
    "xor": _bitwise("Xor"),
    "not": _bitwise("Not"),
    "eq": _comparison("Equal"),
    "ne": _comparison("Equal", negated=True),
    "lt": _comparison("Less"),
    "le": _comparison("LessOrEqual"),
    "gt": _comparison("Greater"),
    "ge": _comparison("GreaterOrEqual"),
    "integer_pow": _integer_pow,
    "pow": _pow,
    "square": lambda graph, _, operands: graph.binary("Mul", operands[0], operands[0]),
    "rsqrt": lambda graph, _, operands: graph.unary("Reciprocal", graph.unary("Sqrt", operands[0])),
    "erfc": lambda graph, _, operands: graph.binary(
        "Sub", graph.scalar(1, operands[0].dtype), graph.unary("Erf", operands[0])
    ),
    "exp2": lambda graph, _, operands: graph.binary("Pow", graph.scalar(2, operands[0].dtype), operands[0]),
    "expm1": _expm1,
    "log1p": _log1p,
    "cbrt": _cbrt,
    "atan2": _atan2,
    "round": _round,
    "is_finite": _is_finite,
    "select_n": _select_n,
    "clamp": _clamp,
    "reduce_precision": _reduce_precision,
    **dict.fromkeys(("copy", "copy_p", "stop_gradient"), lambda graph, _, operands: operands[0]),
}
