"""Traces a network so that the trace holds for any batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.primitives import is_plain
from bcdl_jax.graph.program import Atom, Program, dtype_of
from bcdl_jax.graph.tracing import trace


@dataclasses.dataclass(frozen=True)
class TracedNetwork:
    """A network, traced at one batch size.

    Attributes:
      program: The program.
      moving_axes: The axes of each value whose size depends on the batch size.
      moving_constants: Numbers of the constants that depend on the batch size.
    """

    program: Program
    moving_axes: Sequence[frozenset[int]]
    moving_constants: frozenset[Atom]

    def fits(self, traced: Program) -> bool:
        """Whether another trace of the network differs in the batch size alone."""
        return (
            traced.signature() == self.program.signature()
            and all(map(is_like, traced.shapes, self.program.shapes, self.moving_axes))
            and all(
                number in self.moving_constants or _same(value, self.program.constants[number])
                for number, value in traced.constants.items()
            )
        )


def trace_for_any_batch(
    apply: Callable[..., PyTree], params: PyTree, inputs: tuple[PyTree, ...]
) -> tuple[TracedNetwork, PyTree]:
    """Traces a network with two examples, or with all given examples if the network depends on the batch size.

    Args:
      apply: The network, ``apply(params, *inputs)``.
      params: Its params.
      inputs: Example inputs. The leading axis of the first array that has one is the batch.

    Returns:
      The traced network, and inputs of the traced shapes.
    """
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs) if np.ndim(leaf)]
    if sizes and sizes[0]:
        try:
            two, three = (trace(apply, params, *_resized(inputs, sizes[0], size)) for size in (2, 3))
        except Exception:  # The network rejects another batch size, with an error of any type.
            pass
        else:
            given = trace(apply, params, *_resized(inputs, sizes[0], sizes[0]))
            if two.signature() == three.signature() == given.signature():
                network = TracedNetwork(two, *_differences(two, three))
                if network.fits(given):
                    return network, _resized(inputs, sizes[0], 2)
    program = trace(apply, params, *inputs)
    return TracedNetwork(program, [frozenset()] * len(program.shapes), frozenset()), inputs


def _resized(inputs: PyTree, batch: int, size: int) -> PyTree:
    """The inputs with ``size`` examples. Examples repeat if there are too few."""

    def resized(leaf: Any) -> Any:
        is_batch = np.ndim(leaf) and np.shape(leaf)[0] == batch
        return jnp.take(leaf, np.arange(size) % batch, axis=0) if is_batch else leaf

    return jax.tree.map(resized, inputs)


def _differences(two: Program, three: Program) -> tuple[list[frozenset[int]], frozenset[Atom]]:
    """``moving_axes`` and ``moving_constants`` of a network, from traces at two batch sizes."""
    axes = [
        frozenset(axis for axis, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if len({*sizes}) > 1)
        for one, other in zip(two.shapes, three.shapes, strict=True)
    ]
    constants = frozenset(
        number for number, value in two.constants.items() if not _same(value, three.constants[number])
    )
    return axes, constants


def is_like(new: jax.ShapeDtypeStruct, old: jax.ShapeDtypeStruct, moving: frozenset[int]) -> bool:
    """Whether two values have the same shape, but for the moving axes, and the same dtype."""
    return (
        len(new.shape) == len(old.shape)
        and new.dtype == old.dtype
        and all(
            axis in moving or sizes[0] == sizes[1] for axis, sizes in enumerate(zip(new.shape, old.shape, strict=True))
        )
    )


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if not all(is_plain(dtype_of(value)) for value in (first, second)):
        return False
    return np.shape(first) == np.shape(second) and np.array_equal(first, second, equal_nan=False)
