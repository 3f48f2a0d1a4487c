"""Compares programs: two traces of one function may differ in steps that change nothing.

JAX leaves out such steps at some sizes. Broadcasting an array over a batch of one, for example, is no step at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from bcdl_jax.graph.primitives import is_plain
from bcdl_jax.graph.program import Atom, Program, Step, dtype_of


@dataclasses.dataclass(frozen=True)
class _Outline:
    """A program without the steps that change nothing.

    Attributes:
      steps: The primitive, the operands, and the shapes and dtypes of the results, for each step.
      results: The results of the program.
      loops: The loops and branches among the steps.
      constants: The numbers of the constants, in the order in which the steps read them.
    """

    steps: list[Any]
    results: list[int]
    loops: list[Step]
    constants: list[Atom]


def match_constants(first: Program, second: Program) -> dict[Atom, Atom] | None:
    """Matches two programs that run the same steps on values of the same shapes, apart from steps that change nothing.

    Args:
      first: A program.
      second: Another program.

    Returns:
      The number of each constant of ``second`` by the number of the same constant of ``first``, or None if the programs do not match. The
      values of the constants may differ.
    """
    one, two = _outline(first), _outline(second)
    if (one.steps, one.results, len(one.constants)) != (two.steps, two.results, len(two.constants)):
        return None
    loops = zip(one.loops, two.loops, strict=True)
    if not all(_are_same(*bodies) for loop in loops for bodies in zip(*(step.bodies for step in loop), strict=True)):
        return None
    return dict(zip(one.constants, two.constants, strict=True))


def _are_same(first: Program, second: Program) -> bool:
    """Whether two programs match and have equal constants."""
    matched = match_constants(first, second)
    return matched is not None and all(
        same_constant(first.constants[one], second.constants[two]) for one, two in matched.items()
    )


def same_constant(first: Any, second: Any) -> bool:
    """Whether two constants are equal. NaN equals NaN. Arrays of keys are equal only if they are the same object."""
    if first is second:
        return True
    if not all(is_plain(dtype_of(value)) for value in (first, second)):
        return False
    inexact = all(jnp.issubdtype(dtype_of(value), jnp.inexact) for value in (first, second))
    return np.shape(first) == np.shape(second) and np.array_equal(first, second, equal_nan=inexact)


def _outline(program: Program) -> _Outline:
    places = {number: place for place, number in enumerate(program.inputs)}
    same: dict[Atom, Atom] = {}
    constants: list[Atom] = []
    steps: list[Any] = []
    loops: list[Step] = []

    def place(number: Atom) -> int:
        number = same.get(number, number)
        if number not in places:  # A constant that no step has read so far.
            places[number] = len(places)
            constants.append(number)
        return places[number]

    for step in program.steps:
        if _changes_nothing(step, program):
            same[step.outputs[0]] = same.get(step.inputs[0], step.inputs[0])
            continue
        operands = [place(number) for number in step.inputs]
        results = [(program.shapes[number].shape, program.shapes[number].dtype) for number in step.outputs]
        steps.append((step.name, operands, results))
        if step.bodies:
            loops.append(step)
        places |= {number: len(places) + index for index, number in enumerate(step.outputs)}
    return _Outline(steps, [place(number) for number in program.outputs], loops, constants)


def _changes_nothing(step: Step, program: Program) -> bool:
    if len(step.inputs) != 1 or len(step.outputs) != 1:
        return False
    before, after = program.shapes[step.inputs[0]], program.shapes[step.outputs[0]]
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    axes = tuple(range(len(before.shape)))
    if step.name == "broadcast_in_dim":
        return step.params["broadcast_dimensions"] == axes
    if step.name == "transpose":
        return step.params["permutation"] == axes
    return step.name in ("reshape", "squeeze", "slice", "concatenate", "tile", "copy")
