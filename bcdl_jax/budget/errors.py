"""Errors of single examples, for ``compress``, and their comparison between two networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.example_inputs import as_inputs

# (outputs, targets) -> the errors of the examples [examples, ...].
Error = Callable[[Any, Any], jax.Array]

_CHUNK = 500


def wrong_class(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """100 for each example whose class is predicted wrongly, and 0 for the others. The mean is the error in percent.

    Args:
      outputs: The scores of the classes, [..., classes].
      targets: The classes, integers [...].

    Raises:
      ValueError: The shapes do not fit.
    """
    if outputs.shape[:-1] != targets.shape:
        raise ValueError(
            f"wrong_class has outputs of shape {outputs.shape} and targets of shape {targets.shape}; the targets must be {outputs.shape[:-1]}."
        )
    return 100.0 * (jnp.argmax(outputs, axis=-1) != targets)


def wrong_label(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """100 for each label that is predicted wrongly, and 0 for the others. The mean is the error in percent.

    Args:
      outputs: The logits of the labels. A label is predicted if its logit is above 0.
      targets: The labels, 1 for true and 0 for false, of the same shape.

    Raises:
      ValueError: The shapes differ.
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"wrong_label has outputs of shape {outputs.shape} and targets of shape {targets.shape}; both must be the same."
        )
    return 100.0 * ((outputs > 0) != (targets > 0.5))


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The squares of the differences, of the shape of ``outputs``.

    Args:
      outputs: The predictions.
      targets: The numbers to predict, of the same shape.

    Raises:
      ValueError: The shapes differ.
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"squared_error has outputs of shape {outputs.shape} and targets of shape {targets.shape}; both must be the same."
        )
    return (outputs - targets) ** 2


@dataclasses.dataclass(frozen=True)
class Increase:
    """The error of a network, and its increase over the error of another one on the same examples.

    Attributes:
      error: The mean error.
      increase: The mean of the differences.
      standard_error: The standard error of the increase.
      examples: The number of examples.
    """

    error: float
    increase: float
    standard_error: float
    examples: int

    def __str__(self) -> str:
        return f"{self.error:.4g} ({self.increase:+.2g} ± {self.standard_error:.2g} on {self.examples:,} examples)"


def increase_from(before: np.ndarray, after: np.ndarray) -> Increase:
    """The increase of the mean error.

    Args:
      before: The errors of the examples, [examples].
      after: The errors of another network on the same examples.
    """
    differences, count = after - before, len(before)
    deviation = float(np.std(differences, ddof=1)) if count > 1 else math.inf
    return Increase(float(after.mean()), float(differences.mean()), deviation / math.sqrt(count), count)


class ExampleErrors:
    """The errors of a network on the examples of a part of the validation data, as a function of its params."""

    def __init__(self, apply: Callable[..., PyTree], error: Error, inputs: Any, targets: Any) -> None:
        """Computes nothing yet.

        Args:
          apply: The network.
          error: The error of examples.
          inputs: The inputs: a tuple, or a single tree of arrays [examples, ...].
          targets: A tree of arrays [examples, ...].
        """
        self._parts = as_inputs(inputs), targets
        self.examples = len(jax.tree.leaves(self._parts)[0])

        @jax.jit
        def errors(params: PyTree, inputs: tuple[PyTree, ...], targets: Any) -> jax.Array:
            found = jnp.asarray(error(apply(params, *inputs), targets), jnp.float32)
            count = len(jax.tree.leaves(inputs)[0])
            if not found.ndim or len(found) != count:
                raise ValueError(
                    f"error returns an array of shape {found.shape} for {count} examples; it must return [{count}, ...], one error or more for "
                    "each example."
                )
            return found.reshape(count, -1).mean(1)

        self._errors = errors

    def __call__(self, params: PyTree) -> np.ndarray:
        """The error of each example, [examples] of float64."""
        chunks = []
        for start in range(0, self.examples, _CHUNK):
            inputs, targets = jax.tree.map(lambda array, at=start: array[at : at + _CHUNK], self._parts)
            chunks.append(np.asarray(self._errors(params, inputs, targets), np.float64))
        return np.concatenate(chunks)
