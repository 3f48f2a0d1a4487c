"""The values of a small program while it runs, each in its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from bcdl_jax.graph.facts import compact
from bcdl_jax.graph.primitives import is_plain
from bcdl_jax.graph.program import Atom, Program
from bcdl_jax.shrinking.layouts import Axis, Layout, indices, same_axis, small_sizes, union
from bcdl_jax.shrinking.plan import Plan


@dataclasses.dataclass(frozen=True)
class Machine:
    """The state of a run of the small program.

    Attributes:
      program: The program of the whole network, traced at the batch size of the run.
      plan: The plan.
      values: The values computed so far with their layouts, by number.
    """

    program: Program
    plan: Plan
    values: dict[Atom, tuple[Any, Layout]] = dataclasses.field(default_factory=dict)

    def shape(self, number: Atom) -> tuple[int, ...]:
        """The shape of a value in the whole network."""
        return self.program.shapes[number].shape

    def whole(self, number: Atom) -> Layout:
        """The layout that holds all indices of a value."""
        return (None,) * len(self.shape(number))

    def layout(self, number: Atom) -> Layout:
        """The planned layout of a value. A value that is not needed, but computed together with others, is whole."""
        return self.plan.layouts[number] or self.whole(number)

    def shared_layout(self, numbers: Sequence[Atom]) -> Layout:
        """One layout for several values of the same shape. It holds every index that one of them needs."""
        needed = [layout for number in numbers if (layout := self.plan.layouts[number]) is not None]
        return tuple(union(axis) for axis in zip(*needed, strict=True))

    def current_layout(self, number: Atom) -> Layout:
        """The layout that a value has now, or its planned layout if it is not computed yet."""
        return self.values[number][1] if number in self.values else self.layout(number)

    def is_needed(self, number: Atom) -> bool:
        """Whether the plan needs a value."""
        return self.plan.layouts[number] is not None

    def put(self, number: Atom, value: Any, layout: Layout) -> None:
        """Stores the small array of a value."""
        self.values[number] = (value, layout)

    def get(self, number: Atom, want: Layout) -> Any:
        """A value in the wanted layout."""
        if number not in self.values:  # The whole value is known, or no result depends on it.
            return self.fill(number, want)
        value, have = self.values[number]
        found: list[np.ndarray | None] = []
        for axis, (old, new) in enumerate(zip(have, want, strict=True)):
            value, present = take_axis(value, axis, old, new, self.shape(number)[axis])
            found.append(present)
        return value if all(present is None for present in found) else self._fill_in(number, value, want, found)

    def fill(self, number: Atom, layout: Layout) -> Any:
        """The known constants of a value in a layout, and 1 in place of unknown elements.

        No result depends on the unknown elements. They are not 0, since the logarithm and the inverse of 0 are not finite.
        """
        fact, dtype = self.plan.facts[number], self.program.shapes[number].dtype
        sizes = small_sizes(layout, self.shape(number))
        if not is_plain(dtype):
            return jnp.zeros(sizes, dtype)
        value = fact.filled
        for axis, kept in enumerate(layout):
            if value.shape[axis] > 1:
                if axis in self.plan.moving_axes[number]:
                    value = np.take(value, [0], axis)
                elif kept is not None:
                    value = np.take(value, kept, axis)
        # The traced function contains this array. It is kept small where it does not change along an axis.
        value = compact(value)
        return jnp.broadcast_to(jnp.asarray(value, dtype), sizes)

    def _fill_in(self, number: Atom, value: Any, layout: Layout, found: Sequence[np.ndarray | None]) -> Any:
        flags = np.ones((1,) * len(layout), bool)
        for axis, present in enumerate(found):
            if present is not None:
                flags = flags & present.reshape([-1 if other == axis else 1 for other in range(len(layout))])
        return jnp.where(flags, value, self.fill(number, layout))


def take_axis(value: Any, axis: int, old: Axis, new: Axis, size: int) -> tuple[Any, np.ndarray | None]:
    """Brings one axis of an array from one layout to another.

    Args:
      value: The array.
      axis: The axis.
      old: The layout of the axis now.
      new: The wanted layout.
      size: The size of the axis in the whole network.

    Returns:
      The array, and flags of the wanted indices that the old layout holds, or None if it holds all of them. At other indices the array has
      no meaning.
    """
    if same_axis(old, new):
        return value, None
    have, want = indices(old, size), indices(new, size)
    if not len(have):
        sizes = [*value.shape]
        sizes[axis] = len(want)
        return jnp.zeros(sizes, value.dtype), np.zeros(len(want), bool)
    places = np.minimum(np.searchsorted(have, want), len(have) - 1)
    present = have[places] == want
    return _take(value, places, axis), None if present.all() else present


def _take(value: Any, places: np.ndarray, axis: int) -> Any:
    """The given places along one axis. A slice does it if they are consecutive."""
    if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
        return lax.slice_in_dim(value, int(places[0]), int(places[0]) + len(places), axis=axis)
    unique = bool((np.diff(places) > 0).all())
    return jnp.take(value, places, axis=axis, mode="clip", unique_indices=unique, indices_are_sorted=unique)
