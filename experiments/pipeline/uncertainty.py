"""Probabilities that a network predicts, from sampled weights and from mean weights, and their likelihood and calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bcdl_jax
from experiments.io.data import chunks

SAMPLES = 30
_BINS = 15
_CHUNK = 500


def sampled_probabilities(
    model: nn.Module, params: Any, images: jax.Array, key: jax.Array, samples: int = SAMPLES
) -> jax.Array:
    """The predicted probabilities, averaged over sampled weights.

    Args:
      model: The variational network.
      params: Its params. Masked groups are left out before the samples are drawn, which is faster.
      images: The images to predict, [examples, height, width, channels].
      key: The PRNG key of the samples.
      samples: The number of samples per image.

    Returns:
      The mean probabilities, [examples, classes].
    """

    def logits(params: Any, images: jax.Array, key: jax.Array) -> Any:
        return model.apply({"params": params}, images, deterministic=False, rngs={"noise": key})

    small_logits, small, _ = bcdl_jax.shrink(logits, params, (images[:2], key))

    @jax.jit
    def predict(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            return total + jax.nn.softmax(small_logits(params, images, jax.random.fold_in(key, number)))

        start = jnp.zeros(jax.eval_shape(small_logits, params, images, key).shape)
        return jax.lax.fori_loop(0, samples, add, start) / samples

    starts = range(0, len(images), _CHUNK)
    return jnp.concatenate(
        [predict(small, images[first : first + _CHUNK], jax.random.fold_in(key, first)) for first in starts]
    )


def mean_probabilities(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Builds ``mean_probabilities(model)(params, images)``, the probabilities at the mean weights, [examples, classes]."""

    @jax.jit
    def predict(params: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, images)
        return jax.nn.softmax(logits)

    def probabilities(params: Any, images: jax.Array) -> jax.Array:
        return jnp.concatenate([predict(params, images[rows]) for rows in chunks(len(images))])

    return probabilities


@jax.jit
def quality(probabilities: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The error, the likelihood and the calibration of predicted probabilities.

    The expected calibration error [G17 eq. 3] groups the
    predictions by their largest probability, the confidence, into 15 bins of equal width. It is the mean over the bins, weighted by their
    numbers of examples, of the distance between the mean confidence and the share of right predictions.

    Args:
      probabilities: The predicted probabilities, [examples, classes].
      labels: The classes of the examples, ints, [examples].

    Returns:
      Scalars by name: "error", the share of wrong predictions in percent; "nll", the mean negative log-likelihood in nats; "ece", the
      expected calibration error in percent.
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
