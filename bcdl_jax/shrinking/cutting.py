"""Cuts trees that are parallel to the params, such as gradients, and expands them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.shrinking.report import LeafReport, ShrinkReport


def cut(tree: PyTree, report: ShrinkReport) -> PyTree:
    """Cuts a tree in the same way as ``shrink`` cut the params.

    Args:
      tree: Any tree. Each part with the structure of the params (gradients, the moments in an optimiser state) is cut; the rest stays
        unchanged. If Flax variables with a collection "params" were shrunk, parts with the structure of that collection are cut, too.
      report: The report of ``shrink``.

    Returns:
      The tree with small arrays.

    Raises:
      ValueError: An array in such a part has another shape than the same array of the params, or there is no such part.
    """

    def cut_entry(entry: LeafReport, leaf: Any) -> jax.Array:
        _check_shape(entry, leaf, entry.before)
        return cut_leaf(leaf, entry.kept)

    return _map_parts(cut_entry, report, tree)


def expand(tree: PyTree, report: ShrinkReport, into: PyTree) -> PyTree:
    """Undoes ``cut``: writes the kept elements back to their places.

    Args:
      tree: A tree from ``cut`` or ``shrink``, possibly trained since.
      report: The report of ``shrink``.
      into: The tree before it was cut. It gives the values of the elements that were cut away.

    Returns:
      A tree with the shapes of ``into``. Arrays that ``cut`` leaves unchanged come from ``tree``.

    Raises:
      ValueError: An array has another shape than the report states, or there is nothing to expand.
    """

    def expand_entry(entry: LeafReport, leaf: Any, whole: Any) -> jax.Array:
        _check_shape(entry, leaf, entry.after)
        _check_shape(entry, whole, entry.before)
        if entry.before == entry.after:
            return jnp.asarray(leaf)
        expanded = np.array(whole)
        expanded[np.ix_(*entry.kept)] = np.asarray(leaf)
        return jnp.asarray(expanded)

    return _map_parts(expand_entry, report, tree, into)


def cut_leaf(leaf: Any, kept: tuple[np.ndarray, ...]) -> jax.Array:
    """The kept indices of an array along each axis."""
    if np.shape(leaf) == tuple(len(axis) for axis in kept):
        return jnp.asarray(leaf)
    return jnp.asarray(np.asarray(leaf)[np.ix_(*kept)])


def _check_shape(entry: LeafReport, leaf: Any, shape: tuple[int, ...]) -> None:
    if np.shape(leaf) != shape:
        raise ValueError(f"The array at {entry.path} has shape {np.shape(leaf)}; it must be {shape}.")


def _map_parts(function: Callable[..., Any], report: ShrinkReport, tree: PyTree, *others: PyTree) -> PyTree:
    """Applies a function to each array in the parts of a tree that have the structure of the params.

    Args:
      function: A function ``function(entry, leaf, *leaves_of_the_others)``, where the entry is the report on the array.
      report: The report of ``shrink``.
      tree: The tree. The rest of it stays unchanged.
      *others: Trees with the structure of ``tree``.

    Raises:
      ValueError: There is no such part.
    """
    numbers = jax.tree.unflatten(report.structure, range(len(report.leaves)))
    collection = numbers.get("params") if isinstance(numbers, Mapping) else None
    # The numbers of the leaves of a part, by the structure of the part.
    parts = {jax.tree.structure(part): jax.tree.leaves(part) for part in (collection, numbers) if part is not None}
    found = False

    def map_part(part: PyTree, *other_parts: PyTree) -> PyTree:
        nonlocal found
        structure: Any = jax.tree.structure(part)
        if structure not in parts:
            return part
        found = True
        leaves = zip(parts[structure], jax.tree.leaves(part), *map(structure.flatten_up_to, other_parts), strict=True)
        return jax.tree.unflatten(structure, [function(report.leaves[number], *rest) for number, *rest in leaves])

    result = jax.tree.map(map_part, tree, *others, is_leaf=lambda part: jax.tree.structure(part) in parts)
    if not found:
        raise ValueError(
            "tree has no part with the structure of the params that were shrunk, so there is nothing to cut or expand."
        )
    return result
