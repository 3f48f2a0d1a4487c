"""Example inputs of a network: as a tuple, and with another number of examples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree


def as_inputs(example_inputs: Any) -> tuple[PyTree, ...]:
    """The inputs of a network as a tuple, from a tuple or a single input."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def check_arguments(apply: Callable[..., PyTree], inputs: tuple[PyTree, ...]) -> None:
    """Raises ValueError if ``apply`` cannot be called with params and this number of inputs."""
    try:
        signature = inspect.signature(apply)
    except (TypeError, ValueError):  # Some callables have none.
        return
    try:
        signature.bind(None, *inputs)
    except TypeError as error:
        count = f"{len(inputs)} input{'s' * (len(inputs) != 1)}"
        raise ValueError(
            f"apply cannot be called with params and {count}: {error}. Several inputs are a tuple, and a list is one input."
        ) from error


def resized(inputs: tuple[PyTree, ...], batch: int, size: int) -> tuple[PyTree, ...]:
    """The inputs with another number of examples. Examples repeat if there are too few.

    Args:
      inputs: The inputs. Each array whose leading axis has the length of the batch is resized.
      batch: The number of examples in the inputs.
      size: The number of examples in the result.
    """

    def with_size(leaf: Any) -> Any:
        is_batch = np.ndim(leaf) and np.shape(leaf)[0] == batch
        return jnp.take(leaf, np.arange(size) % batch, axis=0) if is_batch else leaf

    return jax.tree.map(with_size, inputs)
