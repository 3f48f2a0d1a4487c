"""Computes the known elements of values, on compact arrays, outside of any compiled program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax.graph.program import Step

# Common elementwise primitives in numpy. JAX would compile a program for each shape.
_IN_NUMPY: Mapping[str, Callable[..., np.ndarray]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "copy": np.asarray,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "log": np.log,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": np.asarray,
    "sub": np.subtract,
    "tanh": np.tanh,
}


def elementwise_values(step: Step, operands: Sequence[np.ndarray], dtypes: Sequence[Any]) -> list[np.ndarray]:
    """The outputs of an elementwise step.

    Args:
      step: The step.
      operands: Compact arrays, which broadcast against each other.
      dtypes: The dtypes of the outputs.
    """
    shape = np.broadcast_shapes(*(operand.shape for operand in operands))
    if step.name == "convert_element_type":
        with np.errstate(all="ignore"):
            return [operands[0].astype(dtypes[0], copy=False)]
    if step.name in _IN_NUMPY:
        with np.errstate(all="ignore"):
            return [np.asarray(_IN_NUMPY[step.name](*operands)).astype(dtypes[0], copy=False)]
    arrays = [jnp.asarray(np.broadcast_to(operand, shape) if operand.ndim else operand) for operand in operands]
    return [np.asarray(value) for value in step.bind_at_any_size(*arrays)]


def values_of(step: Step, operands: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of a step for operands of any shapes that its primitive takes."""
    return [np.asarray(value) for value in step.bind_at_any_size(*map(jnp.asarray, operands))]


def without_checks() -> Any:
    """A context in which JAX does not check for NaN: the placeholders of unknown elements may lead to some."""
    return jax.debug_nans(False)
