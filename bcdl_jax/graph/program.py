"""A traced JAX function as a flat list of primitive steps.

This is the form in which ``shrink``, ``for_cpu`` and the exports read and rewrite a network. Calls (``jit``, ``checkpoint``, custom
derivatives) are opened, so that one list of steps remains. Only an elementwise function with a custom derivative stays one step, which
keeps that derivative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.primitives import (
    CUSTOM,
    ELEMENTWISE,
    bind,
    bodies,
    evaluate_elementwise,
    inner_jaxpr,
    is_elementwise_call,
    is_plain,
)

Atom = int  # The number of a value: its index in ``Program.shapes``.
Rule = Callable[..., Any]  # (step, *operands) -> the single output of the step, or None to run the step unchanged.


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive applied to values.

    Attributes:
      equation: The equation of the jaxpr, which holds the primitive and its parameters.
      inputs: Numbers of the values that the step reads.
      outputs: Numbers of the values that the step computes.
      elementwise: True if each output element depends on the same element of the inputs alone.
      scope: The place of the step in the model, such as "Network/Dense_0": the named scopes around it, joined by "/".
      own_bodies: The value of ``bodies``, or None to read it from the equation.
    """

    equation: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]
    elementwise: bool
    scope: str = ""
    own_bodies: tuple[Program, ...] | None = None

    @functools.cached_property
    def name(self) -> str:
        """The name of the primitive."""
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the primitive."""
        return self.equation.params

    @functools.cached_property
    def bodies(self) -> tuple[Program, ...]:
        """The programs within a loop or branch: the body of a scan, condition and body of a while, the branches of a cond. Else none."""
        if self.own_bodies is not None:
            return self.own_bodies
        return tuple(program_of(closed, self.scope) for closed in bodies(self.equation))

    def bind(self, *values: Any) -> list[Any]:
        """The outputs for operands of the traced shapes. Most primitives take operands of other shapes, too."""
        return bind(self.equation, *values)

    def bind_at_any_size(self, *values: Any) -> list[Any]:
        """Like ``bind``, but elementwise functions take any shape. At other shapes than the traced, they lose a custom derivative."""
        traced = [variable.aval.shape for variable in self.equation.invars]
        if self.name not in CUSTOM or not self.elementwise or [np.shape(value) for value in values] == traced:
            return self.bind(*values)
        jaxpr, constants = inner_jaxpr(self.equation) or (None, ())
        return evaluate_elementwise(jaxpr, constants, values, max(map(np.shape, values), key=len))


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function.

    Attributes:
      shapes: Shape and dtype of every value.
      inputs: Numbers of the flattened arguments.
      constants: Literals, and arrays that the function closes over, by number. With a symbolic size, a number that grows with the size is
        an expression.
      steps: The steps in their order.
      outputs: Numbers of the flattened results.
      result_tree: The tree structure of the results.
    """

    shapes: tuple[jax.ShapeDtypeStruct, ...]
    inputs: tuple[Atom, ...]
    constants: dict[Atom, Any]
    steps: tuple[Step, ...]
    outputs: tuple[Atom, ...]
    result_tree: Any

    def run(self, arguments: Sequence[Any], rules: Mapping[str, Rule]) -> PyTree:
        """Runs the program.

        Args:
          arguments: The flattened arguments: arrays of the traced shapes.
          rules: Replacements by name of the primitive. A rule takes the step and its operands, and returns the step's single output. If
            a rule returns None, the step runs unchanged.

        Returns:
          The results, in the tree structure of the traced function.
        """
        values: dict[Atom, Any] = dict(zip(self.inputs, arguments, strict=True)) | self.constant_values()
        for step in self.steps:
            operands = [values[number] for number in step.inputs]
            rule = rules.get(step.name)
            result = None if rule is None else rule(step, *operands)
            results = step.bind_at_any_size(*operands) if result is None else [result]
            values |= dict(zip(step.outputs, results, strict=True))
        return jax.tree.unflatten(self.result_tree, [values[number] for number in self.outputs])

    def constant_values(self) -> dict[Atom, Any]:
        """The constants, with arrays in place of expressions."""
        return {
            number: jnp.asarray(value).astype(self.shapes[number].dtype) if is_expression(value) else value
            for number, value in self.constants.items()
        }

    def evaluate(self, *arguments: Any) -> list[Any]:
        """Computes all values of the program for flattened arguments. Returns them by number."""
        numbers = range(len(self.shapes))
        everything = dataclasses.replace(self, outputs=tuple(numbers), result_tree=jax.tree.structure([*numbers]))
        run = compile_quickly(lambda arguments: everything.run(arguments, {}), arguments)
        return run(arguments)

    @functools.cached_property
    def live_steps(self) -> frozenset[int]:
        """The indices of the steps on which the results depend. Flax's recurrent layers, for one, trace other steps, too."""
        needed, live = set(self.outputs), set[int]()
        for index in reversed(range(len(self.steps))):
            if needed.intersection(self.steps[index].outputs):
                live.add(index)
                needed.update(self.steps[index].inputs)
        return frozenset(live)

    def signature(self) -> list[tuple[str, tuple[Atom, ...], tuple[Atom, ...]]]:
        """Primitives and values of all steps, without shapes. Two traces of one function at different batch sizes should have the same."""
        return [(step.name, step.inputs, step.outputs) for step in self.steps]


def trace_fixed_sizes(function: Callable[..., Any], *arguments: PyTree) -> Program:
    """Traces a function at the sizes of its arguments. Use ``tracing.trace`` if a size may be symbolic.

    Raises:
      ValueError: The function uses the value of an argument in Python.
    """
    # A weakly typed array would lead to other steps than the small array that replaces it, so only shape and dtype count.
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)), arguments)
    try:
        closed, result = jax.make_jaxpr(function, return_shape=True)(*structs)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(
            f"The function {name} uses the value of an array in Python, such as in if, float or a NumPy function; it must run under jax.jit. "
            "The error above names the place."
        ) from error
    return dataclasses.replace(program_of(closed), result_tree=jax.tree.structure(result))


def program_of(closed: core.ClosedJaxpr, scope: str = "") -> Program:
    """The program of a jaxpr. Its results are a list.

    Args:
      closed: The jaxpr.
      scope: The place of the jaxpr in the model.
    """
    steps = _StepList([], {}, [])
    inputs = [steps.new_value(variable.aval.shape, variable.aval.dtype) for variable in closed.jaxpr.invars]
    constants = [steps.new_constant(value) for value in closed.consts]
    outputs = steps.append(closed.jaxpr, constants, inputs, scope)
    return Program(
        tuple(steps.shapes),
        tuple(inputs),
        steps.constants,
        tuple(steps.steps),
        tuple(outputs),
        jax.tree.structure(outputs),
    )


@dataclasses.dataclass(frozen=True)
class _StepList:
    """A program under construction. Its fields become the fields of a ``Program``."""

    shapes: list[jax.ShapeDtypeStruct]
    constants: dict[Atom, Any]
    steps: list[Step]

    def new_value(self, shape: tuple[int, ...], dtype: Any) -> Atom:
        self.shapes.append(jax.ShapeDtypeStruct(shape, dtype))
        return len(self.shapes) - 1

    def new_constant(self, value: Any) -> Atom:
        number = self.new_value(np.shape(value), getattr(value, "dtype", None) or np.asarray(value).dtype)
        self.constants[number] = value
        return number

    def append(self, jaxpr: Any, const_atoms: Sequence[Atom], arguments: Sequence[Atom], scope: str = "") -> list[Atom]:
        """Appends the steps of a jaxpr, including the steps of all calls in it. Returns the numbers of its outputs."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*const_atoms, *arguments], strict=True))

        def atom(variable: Any) -> Atom:
            return self.new_constant(variable.val) if isinstance(variable, core.Literal) else known[variable]

        for equation in jaxpr.eqns:
            inputs = [atom(variable) for variable in equation.invars]
            inside_scope = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
            inner = inner_jaxpr(equation)
            stays_whole = equation.primitive.name in CUSTOM and is_elementwise_call(equation)
            if inner is not None and not stays_whole:
                inside, values = inner
                results = self.append(inside, [self.new_constant(value) for value in values], inputs, inside_scope)
            else:
                results = self._append_step(equation, inputs, stays_whole, inside_scope)
            known |= dict(zip(equation.outvars, results, strict=True))
        return [atom(variable) for variable in jaxpr.outvars]

    def _append_step(self, equation: Any, inputs: Sequence[Atom], elementwise_call: bool, scope: str) -> list[Atom]:
        name = equation.primitive.name
        results = [self.new_value(variable.aval.shape, variable.aval.dtype) for variable in equation.outvars]
        same_width = name == "bitcast_convert_type" and self.shapes[inputs[0]].shape == self.shapes[results[0]].shape
        elementwise = elementwise_call or same_width or name in ELEMENTWISE
        self.steps.append(Step(equation, tuple(inputs), tuple(results), elementwise, scope))
        return results


def is_expression(constant: Any) -> bool:
    """Whether a constant is an expression of a symbolic size."""
    return not isinstance(constant, (int, float, complex)) and not hasattr(constant, "dtype")


def data_dependent(program: Program, num_params: int) -> set[Atom]:
    """Numbers of the values that depend on data.

    Args:
      program: A program whose first inputs are params. All other inputs are data.
      num_params: The number of inputs that are params.
    """
    return dependent(program, program.inputs[num_params:])


def dependent(program: Program, sources: Iterable[Atom]) -> set[Atom]:
    """Numbers of the values that depend on given values, and these values."""
    depends = set(sources)
    for step in program.steps:
        if depends & set(step.inputs):
            depends |= set(step.outputs)
    return depends


def compile_quickly(function: Callable[..., Any], *arguments: PyTree) -> Callable[..., Any]:
    """Compiles a function without optimisations, which do not pay for one or two calls."""
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
    return jax.jit(function).lower(*arguments).compile(compiler_options=quick)


def dtype_of(leaf: Any) -> Any:
    """The dtype that JAX gives to an array. Without x64, JAX turns int64 into int32."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return dtype if not is_plain(dtype) else jax.dtypes.canonicalize_dtype(dtype)
