"""The parts of a program that depend on the batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bcdl_jax.graph.matching import same_constant
from bcdl_jax.graph.program import Atom, Program


@dataclasses.dataclass(frozen=True)
class Moving:
    """The parts of a program that depend on the batch size.

    Attributes:
      axes: The axes of each value whose size depends on the batch size.
      constants: Numbers of the constants that depend on the batch size.
      bodies: The same for the programs within a loop or branch, by the index of its step.
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
        inner = tuple(differences(*each) for each in zip(first.bodies, second.bodies, strict=True))
        if inner:
            bodies[index] = inner
    return Moving(axes, constants, bodies)
