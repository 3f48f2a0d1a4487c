"""Facts about the values of a program, the result of ``analyze``."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

Flags = np.ndarray  # An array of bool.


@dataclasses.dataclass
class Fact:
    """The facts about one value. All arrays have the traced shape of the value.

    Attributes:
      unknown: Flags of the elements that depend on the inputs.
      value: The known elements; 0 where an element is unknown.
      fixed: True if the value is computed from params and constants alone. The small program still computes it, so that it can be trained.
      live: Flags of the elements that the small program needs.
    """

    unknown: Flags
    value: np.ndarray
    fixed: bool
    live: Flags

    @property
    def nonzero(self) -> Flags:
        """Flags of the elements that may differ from 0."""
        return self.unknown | (self.value != 0)


@dataclasses.dataclass(frozen=True)
class Product:
    """The facts about a matrix product or convolution.

    Attributes:
      needed: Flags of the indices that contribute to a live result, per contracted axis.
      folded: Flags over the contracted axes. They mark known elements of one operand that can be left out of the product, if a constant is
        added to its result instead. None if there are none.
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
    """

    facts: list[Fact]
    products: dict[int, Product]
    opaque: frozenset[int]


def unknown_fact(shape: tuple[int, ...]) -> Fact:
    """A value that depends on the inputs in all elements."""
    return Fact(np.ones(shape, bool), np.broadcast_to(np.float32(0), shape), False, np.zeros(shape, bool))


def known_fact(unknown: Flags, value: Any, fixed: bool) -> Fact:
    """A value that is known where ``unknown`` is False."""
    return Fact(unknown, np.where(unknown, 0, np.asarray(value)), fixed, np.zeros(unknown.shape, bool))


def compact(fact: Fact) -> Fact:
    """The same fact with less memory: an array of equal elements becomes a broadcast scalar. A small function keeps its facts forever."""
    return Fact(_compact(fact.unknown), _compact(fact.value), fact.fixed, _compact(fact.live))


def _compact(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    same = array.size > 1 and (array == array.flat[0]).all()
    return np.broadcast_to(array.flat[0], array.shape) if same else array
