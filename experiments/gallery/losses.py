"""The losses of the gallery, each with the measure that its users report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.gallery.entry import Examples

Values = Callable[[jax.Array, jax.Array], jax.Array]
# The number of examples that are measured at once.
_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and a measure, both means over the targets that count.

    Attributes:
      values: A function (outputs, targets) that returns the loss of each target, in nats or as a squared difference.
      measured: A function (outputs, targets) that returns the value of each target whose mean is measured.
      measure: The name of the measure.
      from_mean: A function that turns this mean into the measure.
    """

    values: Values
    measured: Values
    measure: str
    from_mean: Callable[[float], float] = float

    def mean(self, outputs: jax.Array, examples: Examples) -> jax.Array:
        """The loss of a batch."""
        values = self.values(outputs, examples.targets)
        return jnp.mean(values) if examples.mask is None else jnp.sum(values * examples.mask) / jnp.sum(examples.mask)

    def measure_of(self, predict: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, Examples], float]:
        """A function (variables, examples) that returns the measure of a network, which it computes in chunks."""

        @jax.jit
        def sums(variables: Any, chunk: Examples) -> tuple[jax.Array, jax.Array]:
            values = self.measured(predict(variables, chunk.inputs), chunk.targets)
            weights = jnp.ones_like(values) if chunk.mask is None else chunk.mask
            return jnp.sum(values * weights), jnp.sum(weights)

        def measure(variables: Any, examples: Examples) -> float:
            starts = range(0, examples.size, _CHUNK)
            chunks = [jax.tree.map(lambda array, at=at: array[at : at + _CHUNK], examples) for at in starts]
            totals = [[float(each) for each in sums(variables, chunk)] for chunk in chunks]
            total, weight = map(math.fsum, zip(*totals, strict=True))
            return self.from_mean(total / weight)

        return measure


def _wrong(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, -1) != labels).astype(jnp.float32)


def _percent(mean: float) -> float:
    return 100 * mean


LOSSES = {
    "softmax": Loss(optax.softmax_cross_entropy_with_integer_labels, _wrong, "error in percent", _percent),
    "token_softmax": Loss(
        optax.softmax_cross_entropy_with_integer_labels,
        optax.softmax_cross_entropy_with_integer_labels,
        "nats per token",
    ),
    "squared_error": Loss(
        lambda outputs, targets: jnp.square(outputs - targets),
        lambda outputs, targets: jnp.square(outputs - targets),
        "root mean squared error",
        math.sqrt,
    ),
}
