"""What the Bayesian way adds: the likelihood and the calibration of predictions, from sampled weights and from their means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bcdl_jax
from experiments.io.data import pieces

SAMPLES = 30
_BINS = 15
_AT_A_TIME = 500


def sampled_probabilities(
    model: nn.Module, params: Any, images: jax.Array, key: jax.Array, samples: int = SAMPLES
) -> jax.Array:
    """The mean of the predicted probabilities over sampled weights, [examples, classes].

    Args:
      model: variational.
      params: its variational_layers; what is masked is left out first.
      images: to predict.
      key: of the samples.
      samples: how many.
    """

    def logits(params: Any, images: jax.Array, key: jax.Array) -> Any:
        return model.apply({"params": params}, images, deterministic=False, rngs={"noise": key})

    small_logits, small, _ = bcdl_jax.shrink(logits, params, (images[:2], key))

    @jax.jit
    def piece(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            return total + jax.nn.softmax(small_logits(params, images, jax.random.fold_in(key, number)))

        start = jnp.zeros(jax.eval_shape(small_logits, params, images, key).shape)
        return jax.lax.fori_loop(0, samples, add, start) / samples

    starts = range(0, len(images), _AT_A_TIME)
    return jnp.concatenate(
        [piece(small, images[first : first + _AT_A_TIME], jax.random.fold_in(key, first)) for first in starts]
    )


def mean_probabilities(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """From params and images to the probabilities at the mean weights, [examples, classes]."""

    @jax.jit
    def piece(params: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return jax.nn.softmax(logits)

    def probabilities(params: Any, images: jax.Array) -> jax.Array:
        return jnp.concatenate([piece(params, images[some]) for some in pieces(len(images))])

    return probabilities


@jax.jit
def quality(probabilities: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """How good predicted probabilities are.

    Args:
      probabilities: [examples, classes].
      labels: [examples], ints.

    Returns:
      "error" in percent; "nll", the mean negative log-likelihood in nats; and "ece", the expected calibration error in percent: over 15 bins of
      equal width of the largest probability, the mean distance between it and the share of right predictions, weighted by the bins' examples
      [Guo et al. 2017, eq. 3].
    """
    confidence, predicted = jnp.max(probabilities, axis=-1), jnp.argmax(probabilities, axis=-1)
    right = (predicted == labels).astype(jnp.float32)
    likelihood = jnp.take_along_axis(probabilities, labels[:, None].astype(jnp.int32), axis=-1)[:, 0]
    # A bin includes its upper end: (0, 1/15], (1/15, 2/15] and so on.
    bins = jnp.clip(jnp.ceil(confidence * _BINS).astype(jnp.int32) - 1, 0, _BINS - 1)
    gaps = jax.ops.segment_sum(confidence - right, bins, _BINS)
    return {
        "error": 100 * (1 - jnp.mean(right)),
        "nll": -jnp.mean(jnp.log(jnp.maximum(likelihood, jnp.finfo(likelihood.dtype).tiny))),
        "ece": 100 * jnp.sum(jnp.abs(gaps)) / len(labels),
    }
