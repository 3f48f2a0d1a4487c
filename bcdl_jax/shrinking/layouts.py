"""Layouts: which indices of a value its small array holds.

A layout has one entry for each axis: an array of ascending indices, or None for all indices. A value can be brought from one layout to
another: indices are dropped, and missing indices are filled with their known constants. So every layout that holds all live elements is
valid, and each primitive may request its operands in the layout that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Axis = np.ndarray | None
Layout = tuple[Axis, ...]


def indices(axis: Axis, size: int) -> np.ndarray:
    """The indices that an axis of the given size holds, as an array."""
    return np.arange(size) if axis is None else axis


def as_axis(kept: np.ndarray, size: int) -> Axis:
    """The layout of an axis of the given size that holds the given indices."""
    return None if len(kept) == size else kept


def same_axis(first: Axis, second: Axis) -> bool:
    """Whether two layouts agree along an axis."""
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)


def small_sizes(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the small array of a value."""
    return tuple(size if axis is None else len(axis) for axis, size in zip(layout, shape, strict=True))


def flattened(axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """The layout of the one axis that several axes form after a reshape."""
    if all(axis is None for axis in axes):
        return None
    flat = np.zeros(1, int)
    for axis, size in zip(axes, sizes, strict=True):
        flat = (flat[:, None] * size + indices(axis, size)[None, :]).ravel()
    return flat


def kept_indices(layout: Layout | None, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The indices along each axis that the small array holds. A value without a layout keeps none."""
    if layout is None:
        return tuple(np.zeros(0, int) for _ in shape)
    return tuple(indices(axis, size) for axis, size in zip(layout, shape, strict=True))


def union(axes: Sequence[Axis]) -> Axis:
    """The layout of an axis that holds all indices of several layouts."""
    kept = [axis for axis in axes if axis is not None]
    return np.unique(np.concatenate(kept)) if len(kept) == len(axes) else None
