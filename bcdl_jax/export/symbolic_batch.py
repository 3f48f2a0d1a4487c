"""Inputs with a batch axis of unknown size, and the sizes that depend on it, for exports that run at any batch size."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.example_inputs import as_inputs
from bcdl_jax.graph.program import dtype_of

# The name of the symbolic batch size.
_BATCH = "batch"


def symbolic_inputs(example_inputs: Any) -> tuple[PyTree, ...]:
    """The shapes and dtypes of the inputs, with a symbolic batch size.

    Args:
      example_inputs: A tuple of inputs, or a single array. Its first array begins with the batch axis.

    Returns:
      A tuple of trees of ``ShapeDtypeStruct``. Each leading axis that has the length of the batch axis is symbolic.

    Raises:
      ValueError: There is no array, or the first one is a scalar.
    """
    inputs = as_inputs(example_inputs)
    leaves = jax.tree.leaves(inputs)
    if not leaves or not np.ndim(leaves[0]):
        given = "begin with a scalar" if leaves else "are empty"
        raise ValueError(f"example_inputs {given}; they must begin with an array whose leading axis is the batch.")
    size = np.shape(leaves[0])[0]
    (batch,) = jax.export.symbolic_shape(_BATCH)

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = np.shape(leaf)
        return jax.ShapeDtypeStruct((batch, *shape[1:]) if shape and shape[0] == size else shape, dtype_of(leaf))

    return jax.tree.map(struct, inputs)


def size_at(size: Any, batch: int) -> int:
    """The value of an expression of the symbolic batch size for one batch size.

    JAX has no public function for this. So Python evaluates the expression that JAX prints, such as "floordiv(batch, 2) + 1".
    """
    functions = {"floordiv": operator.floordiv, "mod": operator.mod, "max": max, "min": min}
    return int(eval(str(size), {"__builtins__": {}}, functions | {_BATCH: batch}))


@contextlib.contextmanager
def batch_size_errors() -> Iterator[None]:
    """Turns every error of tracing with a symbolic batch size into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The network cannot be traced with a batch of unknown size, so it cannot be exported: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
