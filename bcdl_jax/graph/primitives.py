"""Kinds of primitives: calls, which hold a program of their own, and elementwise functions, which run on arrays of any shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

# Primitives whose output element i depends on element i of each operand alone. Operands may also be scalars, or have size 1 along an axis.
# fmt: off
ELEMENTWISE = frozenset(
    [
        "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
        "bessel_i1e", "cbrt", "ceil", "clamp", "clz", "conj", "convert_element_type", "copy", "copy_p", "cos", "cosh",
        "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "imag",
        "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
        "neg", "nextafter", "not", "optimization_barrier", "or", "population_count", "pow", "real",
        "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "shift_left",
        "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient",
        "sub", "tan", "tanh", "xor",
    ]
)
# fmt: on

# Primitives that only move the elements of their only operand.
MOVES = frozenset(["broadcast_in_dim", "copy", "expand_dims", "reshape", "rev", "squeeze", "transpose"])

# Functions with a custom derivative. Their parameter "call_jaxpr" holds the function.
CUSTOM = ("custom_jvp_call", "custom_vjp_call")

# Other calls, with the name of the parameter that holds the function.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


def _stack(*arrays: jax.Array, axis: int) -> jax.Array:
    return lax.concatenate([lax.expand_dims(array, (axis,)) for array in arrays], axis)


def _unstack(array: jax.Array, *, axis: int) -> list[jax.Array]:
    return [lax.index_in_dim(array, place, axis, keepdims=False) for place in range(array.shape[axis])]


# Primitives that a program replaces by simpler ones.
_REPLACED: dict[str, Callable[..., Any]] = {"stack": _stack, "unstack": _unstack}


def bind(equation: Any, *values: Any) -> list[Any]:
    """The outputs of an equation's primitive for other operands: arrays of the traced shapes, or of any shapes that the primitive allows."""
    primitive = equation.primitive
    params: Any = primitive.get_bind_params(equation.params)
    # JAX before 0.10 returns the functions of a call beside its parameters.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = primitive.bind(*functions, *values, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def inner_jaxpr(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that a call runs, or that replaces a primitive, with its constants. None for every other primitive."""
    name = equation.primitive.name
    if name in _REPLACED:
        avals = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
        inside = jax.make_jaxpr(functools.partial(_REPLACED[name], **equation.params))(*avals)
        return inside.jaxpr, inside.consts
    if name not in CALLS and name not in CUSTOM:
        return None
    inside = equation.params["call_jaxpr" if name in CUSTOM else CALLS[name]]
    return (inside.jaxpr, inside.consts) if isinstance(inside, core.ClosedJaxpr) else (inside, ())


def bodies(equation: Any) -> tuple[core.ClosedJaxpr, ...]:
    """The jaxprs of a loop or branch: the body of a scan, condition and body of a while, the branches of a cond. Else none."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return (params["jaxpr"],)
    if name == "while":
        return params["cond_jaxpr"], params["body_jaxpr"]
    return tuple(params["branches"]) if name == "cond" else ()


def is_elementwise_call(equation: Any) -> bool:
    """Whether the function that a call runs is elementwise."""
    shapes = {variable.aval.shape for variable in [*equation.invars, *equation.outvars]} - {()}
    inner = inner_jaxpr(equation)
    return len(shapes) == 1 and inner is not None and is_elementwise(inner[0], shapes.pop())


def is_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    """Whether a jaxpr is elementwise: it works element by element on arrays of one shape, and on scalars."""
    for equation in jaxpr.eqns:
        if any(variable.aval.shape not in ((), shape) for variable in [*equation.invars, *equation.outvars]):
            return False
        name, inner = equation.primitive.name, inner_jaxpr(equation)
        if inner is not None:
            if not is_elementwise(inner[0], shape):
                return False
        elif name != "broadcast_in_dim" and name not in ELEMENTWISE:
            return False
    return True


def evaluate_elementwise(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], shape: tuple[int, ...]
) -> list[Any]:
    """Runs an elementwise jaxpr on arrays of another shape, of the same rank as the traced shape or more.

    Args:
      jaxpr: A jaxpr for which ``is_elementwise`` holds.
      constants: The constants of the jaxpr.
      arguments: Arrays of the new shape, or scalars.
      shape: The new shape.

    Returns:
      The outputs of the jaxpr.
    """
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        values = [value(variable) for variable in equation.invars]
        inner = inner_jaxpr(equation)
        if inner is not None:
            results = evaluate_elementwise(inner[0], inner[1], values, shape)
        elif equation.primitive.name == "broadcast_in_dim":
            broad = equation.outvars[0].aval.shape != ()
            results = [jnp.broadcast_to(values[0], shape) if broad else values[0]]
        else:
            results = bind(equation, *values)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


@functools.cache
def is_plain(dtype: Any) -> bool:
    """Whether a dtype is a dtype of numbers. PRNG keys have an extended dtype."""
    return not jnp.issubdtype(dtype, jax.dtypes.extended)
