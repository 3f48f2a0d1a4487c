"""The parts of a program that depend on the batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bcdl_jax.graph.matching import same_constant
from bcdl_jax.graph.program import Atom, Program
from bcdl_jax.graph.tracing import extend


@dataclasses.dataclass(frozen=True)
class Moving:
    """The parts of a program that depend on the batch size.

    Attributes:
      axes: The axes of each value whose size depends on the batch size.
      constants: Numbers of the constants that depend on the batch size.
      bodies: The batch-dependent parts of each loop body or branch, by the index of its step. A step is missing if more than sizes in its
        bodies depend on the batch size: its bodies then run other steps at other batch sizes.
    """

    axes: Sequence[frozenset[int]]
    constants: frozenset[Atom]
    bodies: dict[int, tuple[Moving, ...]]


def differences(first: Program, second: Program) -> Moving:
    """The parts that differ between traces of one network with the same signature at two batch sizes.

    With the same program twice, nothing differs.
    """
    return _differences(first, second, _batch_sizes(first, second))


def _batch_sizes(first: Program, second: Program) -> tuple[int, int]:
    """The batch sizes of two traces: the sizes of the first axis of an input that differs."""
    for number in first.inputs:
        for sizes in zip(first.shapes[number].shape, second.shapes[number].shape, strict=True):
            if sizes[0] != sizes[1]:
                return sizes
    return 0, 1  # Without such an axis, no size differs.


def _differences(first: Program, second: Program, sizes: tuple[int, int]) -> Moving:
    axes = [
        frozenset(axis for axis, pair in enumerate(zip(one.shape, other.shape, strict=True)) if len({*pair}) > 1)
        for one, other in zip(first.shapes, second.shapes, strict=True)
    ]
    constants = frozenset(
        number for number, value in first.constants.items() if not same_constant(value, second.constants[number])
    )
    bodies = {}
    for index, (one, other) in enumerate(zip(first.steps, second.steps, strict=True)):
        pairs = list(zip(one.bodies, other.bodies, strict=True))
        if pairs and all(_grow_linearly(*pair, sizes) for pair in pairs):
            bodies[index] = tuple(_differences(*pair, sizes) for pair in pairs)
    return Moving(axes, constants, bodies)


def _grow_linearly(first: Program, second: Program, sizes: tuple[int, int]) -> bool:
    """Whether two programs differ in nothing but sizes, so that a program for any batch size has the same steps."""
    try:
        extend([first, second], sizes, max(sizes) + 1)
    except ValueError:
        return False
    return True
