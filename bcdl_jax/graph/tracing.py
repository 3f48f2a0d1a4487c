"""Traces functions to programs, at fixed sizes or with a symbolic batch size.

JAX traces indexing differently if a size is symbolic, and the result differs from the program that ``shrink`` has analysed. So a function
with a symbolic size is traced at several fixed sizes. All numbers in the steps that grow linearly with the size become expressions of the
symbolic size. If this is not possible, the program is the one that JAX traces with the symbolic size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.matching import same_constant
from bcdl_jax.graph.primitives import CUSTOM, is_plain
from bcdl_jax.graph.program import Atom, Program, Rule, Step, dtype_of, program_of, trace_fixed_sizes

# Sizes at which a function with a symbolic size is traced. The last reveals a size that the function caps.
_SIZES = (2, 3, 7, 2**16 + 1)


def trace(function: Callable[..., Any], *arguments: PyTree) -> Program:
    """Traces a function and lists its steps.

    Args:
      function: A JAX function of pytrees of arrays.
      *arguments: The arguments of the function: arrays or ``jax.ShapeDtypeStruct``. Sizes may be symbolic, see ``jax.export.symbolic_shape``.

    Returns:
      The program. With symbolic sizes it runs at any size.
    """
    symbols = {size for leaf in jax.tree.leaves(arguments) for size in np.shape(leaf) if not isinstance(size, int)}
    if len(symbols) != 1:
        return trace_fixed_sizes(function, *arguments)
    (symbol,) = symbols
    # JAX raises an error here if the program depends on the size.
    symbolic = trace_fixed_sizes(function, *arguments)
    try:
        programs = [trace_fixed_sizes(function, *_resized(arguments, size)) for size in _SIZES]
        extended = extend(programs, _SIZES, symbol, growing_constants=True)
    except (
        Exception
    ):  # The function rejects one of the sizes, with an error of any type, or its steps depend on the size.
        return symbolic
    shapes, expected = (
        [program.shapes[number].shape for number in program.outputs] for program in (extended, symbolic)
    )
    return extended if shapes == expected else symbolic


def rewrite(function: Callable[..., PyTree], rules: Mapping[str, Rule]) -> Callable[..., PyTree]:
    """Replaces primitives of a function.

    Args:
      function: A JAX function of pytrees of arrays.
      rules: Replacements by name of the primitive, see ``Program.run``.

    Returns:
      A function of the same arguments. It is traced anew at each call.
    """

    def rewritten(*arguments: PyTree) -> PyTree:
        return trace(function, *arguments).run(jax.tree.leaves(arguments), rules)

    return rewritten


def _resized(arguments: PyTree, size: int) -> PyTree:
    """The arguments with a fixed size in place of the symbolic one."""

    def resized(leaf: Any) -> Any:
        shape = np.shape(leaf)
        if all(isinstance(each, int) for each in shape):
            return leaf
        return jax.ShapeDtypeStruct(tuple(each if isinstance(each, int) else size for each in shape), leaf.dtype)

    return jax.tree.map(resized, arguments)


def extend(
    programs: Sequence[Program],
    sizes: Sequence[int],
    size: Any,
    other_constants: Container[Atom] = (),
    growing_constants: bool = False,
) -> Program:
    """The program at another size, from traces of one function at two or more sizes.

    Args:
      programs: The traces.
      sizes: The sizes of the traces.
      size: The size of the new program, a number or a symbol.
      other_constants: Numbers of the constants that may differ. The new program has those of the first trace.
      growing_constants: True to allow scalars that grow linearly with the size. They become numbers or expressions of the symbol.

    Raises:
      ValueError: The programs differ in more than sizes that grow linearly.
    """
    first, *others = programs
    if any(other.signature() != first.signature() for other in others):
        raise ValueError
    constants = dict(first.constants)
    for number, value in first.constants.items():
        each = [program.constants[number] for program in programs]
        if number not in other_constants and not all(same_constant(other, value) for other in each):
            if not growing_constants:
                raise ValueError
            constants[number] = _combined_scalar(each, sizes, size)
    shapes = zip(*(program.shapes for program in programs), strict=True)
    steps = zip(*(program.steps for program in programs), strict=True)
    return dataclasses.replace(
        first,
        constants=constants,
        shapes=tuple(
            jax.ShapeDtypeStruct(_combined([value.shape for value in values], sizes, size), values[0].dtype)
            for values in shapes
        ),
        steps=tuple(_combined_step(each, sizes, size) for each in steps),
    )


def _combined_step(steps: Sequence[Step], sizes: Sequence[int], size: Any) -> Step:
    """The step at another size, from the same step at the sizes of the traces. Raises ValueError like ``extend``."""
    first = steps[0]
    if first.name in CUSTOM and first.elementwise:
        # The step runs at any shape without changes, unless the size is a number within the function.
        _combined([each.params["call_jaxpr"] for each in steps], sizes, size)
        return first
    params = {name: _combined([each.params[name] for each in steps], sizes, size) for name in first.params}
    # The steps of a body keep their numbers. The jaxpr of the new equation may have others.
    bodies = tuple(extend(each, sizes, size) for each in zip(*(step.bodies for step in steps), strict=True))
    return dataclasses.replace(first, equation=first.equation.replace(params=params), own_bodies=bodies)


def _combined(values: Sequence[Any], sizes: Sequence[int], size: Any) -> Any:
    """A parameter at another size, from its values at the sizes of the traces. Raises ValueError like ``extend``."""
    first, *others = values
    if all(other is first for other in others):
        return first
    if any(type(other) is not type(first) for other in others):
        raise ValueError
    if isinstance(first, tuple | list) and {len(value) for value in values} == {len(first)}:
        parts = [_combined(entries, sizes, size) for entries in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, core.ClosedJaxpr):
        return _as_jaxpr(extend([program_of(each) for each in values], sizes, size))
    if all(other is first or np.all(np.asarray(other == first)) for other in others):
        return first
    if not isinstance(first, int) or isinstance(first, bool):
        raise ValueError
    slope, rest = divmod(values[1] - first, sizes[1] - sizes[0])
    if rest:
        raise ValueError
    constant = first - slope * sizes[0]
    if any(value != slope * each + constant for each, value in zip(sizes, values, strict=True)):
        raise ValueError
    return slope * size + constant


def _combined_scalar(values: Sequence[Any], sizes: Sequence[int], size: Any) -> Any:
    """A constant at another size, from its values at the sizes of the traces. Raises ValueError like ``extend``."""
    if any(np.shape(value) or not is_plain(dtype_of(value)) or int(value) != value for value in values):
        raise ValueError
    return _combined([int(value) for value in values], sizes, size)


def _as_jaxpr(program: Program) -> core.ClosedJaxpr:
    arguments = [program.shapes[number] for number in program.inputs]
    return jax.make_jaxpr(lambda *arguments: program.run(arguments, {}))(*arguments)
