"""A JAX function as a flat list of primitive steps, the form in which ``shrink`` reads and rewrites networks.

Calls (``jit``, ``checkpoint``, custom derivatives) are opened up, so that one list of steps remains. Only elementwise functions with
a custom derivative stay whole, to keep that derivative.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

PyTree = Any

# Primitives whose output element i depends on element i of each operand alone; operands may also be scalars, or of size 1 along an axis.
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
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_CALLS = {
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


# Primitives that are made of others.
_REPLACED: dict[str, Callable[..., Any]] = {"stack": _stack, "unstack": _unstack}

Atom = int  # number of a value in ``Program.shapes``


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive applied to values.

    Attributes:
      equation: of the jaxpr: primitive and parameters.
      inputs: numbers of the values it reads.
      outputs: numbers of the values it makes.
      elementwise: whether each output element depends on the same element of the inputs alone.
    """

    equation: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]
    elementwise: bool

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params

    def bind(self, *values: Any) -> list[Any]:
        """The outputs for values of the traced shapes, or, for most primitives, of others that fit."""
        primitive = self.equation.primitive
        params: Any = primitive.get_bind_params(self.params)
        functions, params = params if isinstance(params, tuple) else ((), params)  # jax < 0.10 passes functions apart
        outputs = primitive.bind(*functions, *values, **params)
        return list(outputs) if primitive.multiple_results else [outputs]

    def bind_at_any_size(self, *values: Any) -> list[Any]:
        """Like ``bind``; an elementwise function with a custom derivative, which knows one size, loses it at another."""
        traced = [variable.aval.shape for variable in self.equation.invars]
        if self.name not in CUSTOM or not self.elementwise or [np.shape(value) for value in values] == traced:
            return self.bind(*values)
        jaxpr, constants = _inner(self.equation) or (None, ())
        return evaluate_elementwise(jaxpr, constants, values, max(map(np.shape, values), key=len))


Rule = Callable[..., Any]  # (step, *operands) -> the step's single output, or None


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
      shapes: shape and dtype of every value.
      inputs: numbers of the flattened arguments.
      constants: value by number, of literals and of arrays that the function closes over.
      steps: in order.
      outputs: numbers of the flattened results.
      result_tree: how the results are put together again.
    """

    shapes: tuple[jax.ShapeDtypeStruct, ...]
    inputs: tuple[Atom, ...]
    constants: dict[Atom, Any]
    steps: tuple[Step, ...]
    outputs: tuple[Atom, ...]
    result_tree: Any

    def evaluate(self, *arguments: Any, without: frozenset[Atom] = frozenset()) -> list[Any]:
        """The values of the program, by number, for flattened arguments; zeros, which take no memory, for those ``without`` (or None for keys).

        What the others hold where they depend on those has no meaning then.
        """
        wanted = [number for number in range(len(self.shapes)) if number not in without]

        def run(arguments: Sequence[Any]) -> list[Any]:
            values = self._run(arguments, {}, without)
            return [values[number] for number in wanted]

        found = dict(zip(wanted, compile_quickly(run, arguments)(arguments), strict=True))
        return [found[number] if number in found else _zeros(shape) for number, shape in enumerate(self.shapes)]

    def run(self, arguments: Sequence[Any], rules: Mapping[str, Rule]) -> PyTree:
        """The results for flattened arguments.

        Args:
          arguments: arrays of the traced shapes.
          rules: by name of a primitive, what to compute in its place. A rule that returns None leaves a step as it is.
        """
        values = self._run(arguments, rules)
        return jax.tree.unflatten(self.result_tree, [values[number] for number in self.outputs])

    def _run(
        self, arguments: Sequence[Any], rules: Mapping[str, Rule], without: frozenset[Atom] = frozenset()
    ) -> dict[Atom, Any]:
        values: dict[Atom, Any] = dict(zip(self.inputs, arguments, strict=True)) | self.constants
        zeros = {number: _zeros(self.shapes[number]) for number in without if number not in values}
        values |= {number: jnp.asarray(value) for number, value in zeros.items() if value is not None}
        for step in self.steps:
            if without.issuperset(step.outputs):
                continue
            operands = [values[number] for number in step.inputs]
            rule = rules.get(step.name)
            result = None if rule is None else rule(step, *operands)
            results = step.bind_at_any_size(*operands) if result is None else [result]
            values |= dict(zip(step.outputs, results, strict=True))
        return values

    def signature(self) -> list[tuple[str, tuple[Atom, ...], tuple[Atom, ...]]]:
        """What two traces of one function at different batch sizes have in common."""
        return [(step.name, step.inputs, step.outputs) for step in self.steps]


def compile_quickly(function: Callable[..., Any], *arguments: PyTree) -> Callable[..., Any]:
    """The compiled function, for a call or two: not worth optimising for."""
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=quick)


def _zeros(struct: jax.ShapeDtypeStruct) -> np.ndarray | None:
    if jnp.issubdtype(struct.dtype, jax.dtypes.extended):
        return None
    return np.broadcast_to(np.zeros((), struct.dtype), struct.shape)


def dtype_of(leaf: Any) -> Any:
    """The type that JAX gives an array: without x64, int64 becomes int32."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return dtype if jnp.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)


def trace(function: Callable[..., Any], *arguments: PyTree) -> Program:
    """Traces a function of pytrees of arrays (or ShapeDtypeStructs) and lists its steps.

    With one symbolic size among the shapes it is traced at some sizes, and what differs is extended to any: JAX traces indexing
    differently with symbolic sizes, and what it makes then is no longer the program that ``shrink`` has looked at.
    """
    symbols = {size for leaf in jax.tree.leaves(arguments) for size in np.shape(leaf) if not isinstance(size, int)}
    if len(symbols) == 1:
        (size,) = symbols
        symbolic = _trace(function, *arguments)  # fails where the program depends on the size
        try:
            extended = _extended([_trace(function, *_resized(arguments, number)) for number in _SIZES], size)
        except Exception:  # whatever a model says to one of the sizes; or its steps depend on the size
            return symbolic
        results = [[program.shapes[number].shape for number in program.outputs] for program in (extended, symbolic)]
        return extended if results[0] == results[1] else symbolic
    return _trace(function, *arguments)


_SIZES = (2, 3, 7, 2**16 + 1)  # the last shows a size that is capped


def _resized(arguments: PyTree, size: int) -> PyTree:
    """The arguments with a size in place of the symbolic one."""

    def resized(leaf: Any) -> Any:
        shape = np.shape(leaf)
        if all(isinstance(each, int) for each in shape):
            return leaf
        return jax.ShapeDtypeStruct(tuple(each if isinstance(each, int) else size for each in shape), leaf.dtype)

    return jax.tree.map(resized, arguments)


def _extended(programs: Sequence[Program], size: Any) -> Program:
    """The program at any size, from those at ``_SIZES``. Raises ValueError if they differ in more than sizes that grow evenly."""

    def combined(*values: Any) -> Any:
        first, *others = values
        if all(other is first for other in others):
            return first
        if any(type(other) is not type(first) for other in others):
            raise ValueError
        if isinstance(first, tuple | list) and {len(value) for value in values} == {len(first)}:
            parts = [combined(*entries) for entries in zip(*values, strict=True)]
            return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
        if isinstance(first, core.ClosedJaxpr):
            return _as_jaxpr(_extended([_trace(core.jaxpr_as_fun(each), *each.in_avals) for each in values], size))
        if all(other is first or np.all(np.asarray(other == first)) for other in others):
            return first
        if not isinstance(first, int) or isinstance(first, bool):
            raise ValueError
        slope = values[1] - first  # the first two sizes differ by one
        constant = first - slope * _SIZES[0]
        if any(value != slope * number + constant for number, value in zip(_SIZES, values, strict=True)):
            raise ValueError
        return slope * size + constant

    def step(*steps: Step) -> Step:
        first = steps[0]
        if first.name in CUSTOM and first.elementwise:
            # Evaluated at any shape as it is, unless the size is one of its numbers.
            combined(*(each.params["call_jaxpr"] for each in steps))
            return first
        params = {name: combined(*(each.params[name] for each in steps)) for name in first.params}
        return dataclasses.replace(first, equation=first.equation.replace(params=params))

    first, *others = programs
    if any(other.signature() != first.signature() for other in others):
        raise ValueError
    for number, value in first.constants.items():
        for other in others:
            if other.constants[number] is not value and not _equal(other.constants[number], value):
                raise ValueError
    shapes = zip(*(program.shapes for program in programs), strict=True)
    return dataclasses.replace(
        first,
        shapes=tuple(
            jax.ShapeDtypeStruct(combined(*(value.shape for value in values)), values[0].dtype) for values in shapes
        ),
        steps=tuple(step(*each) for each in zip(*(program.steps for program in programs), strict=True)),
    )


def _equal(first: Any, second: Any) -> bool:
    """Whether two constants are the same, where they are not numbers too."""
    inexact = all(jnp.issubdtype(jnp.result_type(value), jnp.inexact) for value in (first, second))
    return np.array_equal(first, second, equal_nan=inexact)


def _as_jaxpr(program: Program) -> core.ClosedJaxpr:
    arguments = [program.shapes[number] for number in program.inputs]
    return jax.make_jaxpr(lambda *arguments: program.run(arguments, {}))(*arguments)


def _trace(function: Callable[..., Any], *arguments: PyTree) -> Program:
    # By shape and dtype alone: a weakly typed array would give other steps than the small one that replaces it.
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)), arguments)
    closed, result = jax.make_jaxpr(function, return_shape=True)(*structs)
    shapes: list[jax.ShapeDtypeStruct] = []
    constants: dict[Atom, Any] = {}
    steps: list[Step] = []

    def new(shape: tuple[int, ...], dtype: Any) -> Atom:
        shapes.append(jax.ShapeDtypeStruct(shape, dtype))
        return len(shapes) - 1

    def constant(value: Any) -> Atom:
        number = new(np.shape(value), getattr(value, "dtype", None) or np.asarray(value).dtype)
        constants[number] = value
        return number

    def run(jaxpr: Any, const_atoms: Sequence[Atom], arguments: Sequence[Atom]) -> list[Atom]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*const_atoms, *arguments], strict=True))

        def atom(variable: Any) -> Atom:
            return constant(variable.val) if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            inputs = [atom(variable) for variable in equation.invars]
            name = equation.primitive.name
            whole = name in CUSTOM and _is_elementwise_call(equation)
            inner = _inner(equation)
            if inner is not None and not whole:
                inside, values = inner
                results = run(inside, [constant(value) for value in values], inputs)
            else:
                results = [new(variable.aval.shape, variable.aval.dtype) for variable in equation.outvars]
                same_width = name == "bitcast_convert_type" and shapes[inputs[0]].shape == shapes[results[0]].shape
                elementwise = whole or same_width or name in ELEMENTWISE
                steps.append(Step(equation, tuple(inputs), tuple(results), elementwise))
            known |= dict(zip(equation.outvars, results, strict=True))
        return [atom(variable) for variable in jaxpr.outvars]

    inputs = [new(variable.aval.shape, variable.aval.dtype) for variable in closed.jaxpr.invars]
    outputs = run(closed.jaxpr, [constant(value) for value in closed.consts], inputs)
    return Program(tuple(shapes), tuple(inputs), constants, tuple(steps), tuple(outputs), jax.tree.structure(result))


def rewrite(function: Callable[..., PyTree], rules: Mapping[str, Rule]) -> Callable[..., PyTree]:
    """The same function with some primitives computed by other means, see ``Program.run``."""

    def rewritten(*arguments: PyTree) -> PyTree:
        return trace(function, *arguments).run(jax.tree.leaves(arguments), rules)

    return rewritten


def _inner(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that a call runs, or that takes the place of a primitive, and its constants; None for what is not a plain call."""
    name = equation.primitive.name
    if name in _REPLACED:
        avals = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
        inside = jax.make_jaxpr(functools.partial(_REPLACED[name], **equation.params))(*avals)
        return inside.jaxpr, inside.consts
    if name not in _CALLS and name not in CUSTOM:
        return None
    inside = equation.params["call_jaxpr" if name in CUSTOM else _CALLS[name]]
    return (inside.jaxpr, inside.consts) if isinstance(inside, core.ClosedJaxpr) else (inside, ())


def _is_elementwise_call(equation: Any) -> bool:
    shapes = {variable.aval.shape for variable in [*equation.invars, *equation.outvars]} - {()}
    inner = _inner(equation)
    return len(shapes) == 1 and inner is not None and is_elementwise(inner[0], shapes.pop())


def is_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    """Whether a jaxpr works element by element on arrays of one shape, and on scalars."""
    for equation in jaxpr.eqns:
        if any(variable.aval.shape not in ((), shape) for variable in [*equation.invars, *equation.outvars]):
            return False
        name, inner = equation.primitive.name, _inner(equation)
        if inner is not None:
            if not is_elementwise(inner[0], shape):
                return False
        elif name != "broadcast_in_dim" and name not in ELEMENTWISE:
            return False
    return True


def evaluate_elementwise(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], shape: tuple[int, ...]
) -> list[Any]:
    """Runs a jaxpr for which ``is_elementwise`` holds on arrays of another shape, which must have the same rank or more."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))

    def value(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        values = [value(variable) for variable in equation.invars]
        inner = _inner(equation)
        if inner is not None:
            results = evaluate_elementwise(inner[0], inner[1], values, shape)
        elif equation.primitive.name == "broadcast_in_dim":
            broad = equation.outvars[0].aval.shape != ()
            results = [jax.numpy.broadcast_to(values[0], shape) if broad else values[0]]
        else:
            results = Step(equation, (), (), True).bind(*values)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def data_dependent(program: Program, num_params: int) -> set[int]:
    """Numbers of the values that depend on the inputs, which follow the params."""
    depends = set(program.inputs[num_params:])
    for step in program.steps:
        if depends & set(step.inputs):
            depends |= set(step.outputs)
    return depends


def multiply_adds(program: Program) -> int:
    """Multiplications of all matrix products and convolutions of a program, at the batch size it was traced for.

    Those within a loop count once for each time that it runs, where that is known, else once; of branches that with the most counts.
    """
    return sum(_equation_multiply_adds(step.equation) for step in program.steps)


def multiply_adds_by_owner(program: Program, owners: Sequence[int | None]) -> dict[int | None, int]:
    """The same, by whose arguments a product reads.

    Args:
      program: traced.
      owners: of each flattened argument; None for data.

    Returns:
      By owner the products of data with something that was made of that owner's arguments alone; by None all others.
    """
    # What a value was made of: some owners, or data, which is None in the set.
    made_of = {number: {owner} for number, owner in zip(program.inputs, owners, strict=True)}
    totals: dict[int | None, int] = dict.fromkeys([None, *owners], 0)
    for step in program.steps:
        sources = [made_of.get(number, set()) for number in step.inputs]
        if count := _equation_multiply_adds(step.equation):
            # Of a loop, all that it reads: one layer may have several arguments there.
            weights = set().union(*(source for source in sources if None not in source))
            owner = weights.pop() if len(weights) == 1 and any(None in source for source in sources) else None
            totals[owner] += count
        for number in step.outputs:
            made_of[number] = set().union(*sources)
    return totals


def _equation_multiply_adds(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        sizes = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * math.prod(sizes[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return equation.outvars[0].aval.size * (kernel.size // max(features, 1))
    if name not in ("scan", "while", "cond", *_CALLS, *CUSTOM):
        return 0
    counts = [sum(map(_equation_multiply_adds, inner.eqns)) for value in params.values() for inner in _jaxprs_of(value)]
    if name == "cond":
        return max(counts)
    return sum(counts) * (params["length"] if name == "scan" else 1)


def _jaxprs_of(value: Any) -> list[Any]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [inner for part in value for inner in _jaxprs_of(part)] if isinstance(value, tuple | list) else []
