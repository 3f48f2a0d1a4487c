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
      bodies: The same for the programs within a loop or branch, by the index of its step. A step is missing if more
        than sizes depend on the batch size within it: then a trace for any batch size has other steps in it.
    """

    axes: Sequence[frozenset[int]]
    constants: frozenset[Atom]
    bodies: dict[int, tuple[Moving, ...]]


def differences(two: Program, three: Program) -> Moving:
    """The parts that differ between traces of one network with the same signature at two batch sizes.

    With the same program twice, nothing differs.
    """
    axes = [
        frozenset(axis for axis, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if len({*sizes}) > 1)
        for one, other in zip(two.shapes, three.shapes, strict=True)
    ]
    constants = frozenset(
        number for number, value in two.constants.items() if not same_constant(value, three.constants[number])
    )
    bodies = {}
    for index, (first, second) in enumerate(zip(two.steps, three.steps, strict=True)):
        pairs = list(zip(first.bodies, second.bodies, strict=True))
        if pairs and all(_grow_linearly(*each) for each in pairs):
            bodies[index] = tuple(differences(*each) for each in pairs)
    return Moving(axes, constants, bodies)


def _grow_linearly(two: Program, three: Program) -> bool:
    """Whether two programs differ in nothing but sizes, so that a program for any batch size has the same steps."""
    try:
        extend([two, three], (2, 3), 4)
    except ValueError:
        return False
    return True
