"""Many seeds: trees that are stacked along a leading axis, and functions of one seed that run for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._backend import on_cpu
from bcdl_jax._tree import PyTree


def stack_seeds(trees: Sequence[PyTree]) -> PyTree:
    """Stacks trees of arrays, such as states or params, along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def select_seed(tree: PyTree, index: int) -> PyTree:
    """The tree of one seed: entry ``index`` of the leading axis of every array."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def each_seed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a function of one seed's state into a function of stacked states: a loop over the seeds on a CPU, ``jax.vmap`` elsewhere.

    An accelerator computes many seeds at once. One seed fills a CPU: a matrix product with a further axis is slower there than one
    product after the other, and the state of one seed fits the cache.

    Args:
      function: A function (state, *shared), such as an epoch or a loop from ``make_train_loop``.

    Returns:
      A function (states, *shared), to be compiled for one device. Its results are stacked along a new leading axis. For seeds that are
      spread over the devices of a mesh, use ``jax.vmap``.
    """

    def for_each(states: PyTree, *shared: Any) -> Any:
        if on_cpu():
            return jax.lax.map(lambda state: function(state, *shared), states)
        return jax.vmap(lambda state: function(state, *shared))(states)

    return for_each
