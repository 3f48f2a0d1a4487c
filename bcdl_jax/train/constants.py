"""Arrays of the params that training must not change: integers, Flax's other collections, and arrays that the user names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, path_name
from bcdl_jax.train.parts import is_posterior


def split_constants(params: PyTree, frozen: Sequence[str]) -> tuple[PyTree, PyTree]:
    """Splits params into those to train and the others.

    Integers are constant. Of the variables of Flax, only the collection "params" is trained.

    Args:
      params: A tree with variational layers.
      frozen: Regular expressions. A plain array is constant if one of them is found in its path.

    Returns:
      Two trees like ``params``, each with None in place of the arrays of the other one.

    Raises:
      ValueError: An expression is found in no path of a plain array that could be trained.
    """
    found = set[str]()
    of_flax = isinstance(params, Mapping) and "params" in params

    def is_constant(path: tuple[object, ...], leaf: object) -> bool:
        if is_posterior(leaf):
            return False
        if of_flax and not path_name(path).startswith("params/"):
            return True
        names = [pattern for pattern in frozen if re.search(pattern, path_name(path))]
        found.update(names)
        return bool(names) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)

    flags = jax.tree_util.tree_map_with_path(is_constant, params, is_leaf=is_posterior)
    if missing := [pattern for pattern in frozen if pattern not in found]:
        raise ValueError(f"frozen holds {missing[0]!r}, which is found in no path of a plain array of the params.")
    trained = jax.tree.map(lambda flag, leaf: None if flag else leaf, flags, params)
    constant = jax.tree.map(lambda flag, leaf: leaf if flag else None, flags, params)
    return trained, constant


def merge_constants(trained: PyTree, constant: PyTree) -> PyTree:
    """The whole params, the inverse of ``split_constants``."""
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        trained,
        constant,
        is_leaf=lambda leaf: leaf is None or is_posterior(leaf),
    )
