"""Predictions with sampled weights: their mean and their spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree
from bcdl_jax.graph.example_inputs import as_inputs


class Prediction(NamedTuple):
    """The predictions of a network with sampled weights. Both are trees like its outputs.

    Attributes:
      mean: The mean over the samples.
      deviation: The standard deviation over the samples.
    """

    mean: PyTree
    deviation: PyTree


def predict(
    sampled: Callable[..., PyTree],
    params: PyTree,
    inputs: Any,
    key: jax.Array,
    *,
    samples: int = 30,
    transform: Callable[[PyTree], PyTree] | None = None,
) -> Prediction:
    """The mean and the spread of the predictions over sampled weights. It works under ``jit``.

    Args:
      sampled: The network with sampled weights: a function (params, *inputs, key) -> outputs, such as ``model.sample`` of a
        ``VariationalModel``, or the small function that ``shrink(model.sample, params, (*inputs, key))`` returns.
      params: Its params.
      inputs: The inputs: a tuple, or a single array.
      key: A PRNG key.
      samples: The number of samples, at least 1.
      transform: A function of the outputs that is applied before the mean, such as ``jax.nn.softmax`` for the mean of probabilities. None for
        the outputs themselves.

    Returns:
      The mean and the standard deviation. The latter does not include the noise of the targets.

    Raises:
      ValueError: ``samples`` is not positive.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1.")

    def one(number: jax.Array | int) -> PyTree:
        outputs = sampled(params, *as_inputs(inputs), jax.random.fold_in(key, number))
        return outputs if transform is None else transform(outputs)

    def add(number: jax.Array, moments: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        mean, squares = moments
        values = one(number)
        # Welford's update: sums of squares would lose the small deviations of large outputs.
        moved = jax.tree.map(lambda old, value: old + (value - old) / (number + 1), mean, values)
        squares = jax.tree.map(
            lambda total, old, new, value: total + (value - old) * (value - new), squares, mean, moved, values
        )
        return moved, squares

    shapes = jax.eval_shape(one, 0)
    zeros = jax.tree.map(lambda struct: jnp.zeros(struct.shape, jnp.promote_types(struct.dtype, jnp.float32)), shapes)
    mean, squares = jax.lax.fori_loop(0, samples, add, (zeros, zeros))
    return Prediction(mean, jax.tree.map(lambda total: jnp.sqrt(total / max(1, samples - 1)), squares))
