"""Facts about the values of a program, the result of ``analyze``.

The arrays of a fact are *compact*: along each axis, they have the size of the value, or size 1 if they do not change along the axis. The
facts about a batch of images are therefore as small as the facts about one pixel, unless pixels differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

Flags = np.ndarray  # An array of bool.
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fact:
    """The facts about one value. All arrays are compact, each in its own way.

    Attributes:
      unknown: Flags of the elements that depend on the inputs.
      value: The known elements; 0 where an element is unknown.
      fixed: True if the value is computed from params and constants alone. The small program still computes it, so that it can be trained.
        In the body of a loop, elements of a fixed value are unknown if they differ between iterations.
      live: Flags of the elements that the small program needs.
    """

    unknown: Flags
    value: np.ndarray
    fixed: bool
    live: Flags

    @functools.cached_property
    def nonzero(self) -> Flags:
        """Flags of the elements that may differ from 0."""
        if self.value.size == 1 and not self.value.any():
            return self.unknown
        return compact(self.unknown | (self.value != 0))

    @property
    def filled(self) -> np.ndarray:
        """The known elements, and 1 in place of unknown elements. The logarithm and the inverse of 1 are finite."""
        if not self.unknown.any():
            return self.value
        return np.where(self.unknown, np.ones((), self.value.dtype), self.value)

    def with_live(self, live: Flags) -> Fact:
        """The fact with other live flags."""
        return Fact(self.unknown, self.value, self.fixed, live)


@dataclasses.dataclass(frozen=True)
class Product:
    """The facts about a matrix product or convolution.

    Attributes:
      needed: Flags of the indices that contribute to a live result, per contracted axis, in full size.
      folded: Flags over the contracted axes, in full size. They mark known elements of one operand that can be left out of the product, if
        a constant is added to its result instead. None if there are none.
      folded_side: The operand of the folded elements, 0 or 1; None if there are none.
    """

    needed: tuple[Flags, ...]
    folded: Flags | None = None
    folded_side: int | None = None


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The result of ``analyze``.

    Attributes:
      facts: The facts about each value, by number.
      products: The facts about products, by the index of their step.
      opaque: Indices of the steps whose primitive has no rule. They read their operands whole.
      bodies: The analyses of the programs within a loop or branch, by the index of its step.
    """

    facts: tuple[Fact, ...]
    products: dict[int, Product]
    opaque: frozenset[int]
    bodies: dict[int, tuple[Analysis, ...]]


@functools.cache
def unknown_fact(rank: int, dtype: Any) -> Fact:
    """A value that depends on the inputs in all elements."""
    ones = (1,) * rank
    return Fact(np.ones(ones, bool), np.zeros(ones, dtype), False, np.zeros(ones, bool))


def known_fact(unknown: Flags, value: Any, fixed: bool) -> Fact:
    """A value that is known where ``unknown`` is False."""
    value = np.asarray(value)
    if unknown.any():
        value = np.where(unknown, np.zeros((), value.dtype), value)
    return Fact(unknown, value, fixed, np.zeros((1,) * unknown.ndim, bool))


def as_data(fact: Fact) -> Fact:
    """The fact about a fixed value that becomes a part of data, such as a class token.

    Params stay params: their elements must not become folded constants, so only zeros are known.
    """
    return only_zeros(fact) if fact.fixed else fact


def only_zeros(fact: Fact) -> Fact:
    """The fact about a value that is not fixed, and of which only the zeros are known."""
    return dataclasses.replace(
        fact, unknown=fact.nonzero, value=np.zeros((1,) * fact.value.ndim, fact.value.dtype), fixed=False
    )


def in_full(array: np.ndarray, shape: Sequence[int], axes: Sequence[int] | None = None) -> np.ndarray:
    """A compact array in full size along the given axes, or along all axes."""
    chosen = range(len(shape)) if axes is None else axes
    sizes = tuple(shape[axis] if axis in chosen else size for axis, size in enumerate(array.shape))
    return np.broadcast_to(array, sizes)


def compact(array: np.ndarray) -> np.ndarray:
    """The array with size 1 along all axes along which it does not change."""
    if array.size == 1:
        return array
    for axis, size in enumerate(array.shape):
        if size > 1:
            first = np.take(array, [0], axis)
            if (array == first).all():
                array = first
    return array


def same_flags(first: Flags, second: Flags) -> bool:
    """Whether two compact arrays of one value have the same flags."""
    return bool((first == second).all())


def any_along(flags: Flags, axes: Sequence[int]) -> Flags:
    """Whether any flag is set along the given axes, which get size 1."""
    axes = tuple(axis for axis in axes if flags.shape[axis] != 1)
    return np.asarray(flags.any(axes, keepdims=True)) if axes else flags


def along(flags: Flags, axis: int, size: int) -> Flags:
    """For each index of one axis, whether any flag is set at it. The axis has the given size in full."""
    return np.broadcast_to(
        any_along(flags, [other for other in range(flags.ndim) if other != axis]).reshape(-1), (size,)
    )
