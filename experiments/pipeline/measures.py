"""Measures of a network on images: error, change of predictions, and the loss of training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import bcdl_jax
from experiments.io.data import Split, chunks
from experiments.pipeline.augmentation import augmented
from experiments.pipeline.recipe import Recipe

# Images and labels as JAX arrays.
Batch = tuple[jax.Array, jax.Array]


def on_device(split: Split) -> Batch:
    """The images and labels of a split as JAX arrays."""
    return jnp.asarray(split.images), jnp.asarray(split.labels)


def error_percent(model: nn.Module, params: Any, data: Batch) -> jax.Array:
    """The share of wrong predictions at the mean weights, in percent."""
    images, labels = data
    logits: Any = model.apply({"params": params}, images)
    wrong = jnp.argmax(logits, axis=-1) != labels
    return 100 * jnp.mean(wrong)


def error_in_chunks(model: nn.Module) -> Callable[[Any, Batch], float]:
    """``error_percent`` as a function of params and data that processes the images in chunks. It must not be compiled."""
    measure = jax.jit(functools.partial(error_percent, model))

    def in_chunks(params: Any, data: Batch) -> float:
        parts = [tuple(array[rows] for array in data) for rows in chunks(len(data[1]))]
        return sum(len(part[1]) * float(measure(params, part)) for part in parts) / len(data[1])

    return in_chunks


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of class scores [examples, classes] and classes [examples], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def score_of(recipe: Recipe) -> bcdl_jax.compression.Score:
    """The score that the recipe's thresholds apply to."""
    return getattr(bcdl_jax.compression, recipe.score)


def sampled_cross_entropy(
    model: nn.Module, params: Any, batch: Batch, key: jax.Array, *, mirror: bool = False, shift: int = 0
) -> jax.Array:
    """The mean cross-entropy of a batch in nats, with weights sampled per example and randomly changed images, see ``augmented``."""
    images, labels = batch
    images = augmented(images, key, mirror=mirror, shift=shift)
    logits: Any = model.apply({"params": params}, images, deterministic=False, rngs={"noise": key})
    return mean_cross_entropy(logits, labels)


def measure_change(
    model: nn.Module, images: jax.Array, masked: Any = None
) -> Callable[[Any], Callable[[Any], jax.Array]]:
    """Builds ``measure_change(model, images)(before)(after)``: KL(predictions before || predictions after) at the mean weights.

    The result is a scalar in nats per example. Thresholds and precision are chosen by it, for two reasons. It grows smoothly with the damage,
    while the error on a few thousand images moves in steps of whole images. And it shows damage that the cross-entropy of an overconfident
    network hides.

    Args:
      model: The variational network.
      images: The images to predict.
      masked: Params whose masked groups are masked in all measured params too. Those groups are left out, which is faster. Nothing is left
        out where single weights are pruned: a unit without inputs is constant and would be folded into its readers, which may be pruned later.
    """

    def logits(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    predict: Callable[..., Any] = logits
    report = None
    if masked is not None and not any(layer.prunes_weights for layer in bcdl_jax.variational_layers(masked).values()):
        predict, _, report = bcdl_jax.shrink(logits, masked, images[:2])

    @jax.jit
    def log_probabilities(params: Any, images: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(predict(params, images))

    @jax.jit
    def difference(old: jax.Array, params: Any, images: jax.Array) -> jax.Array:
        new = log_probabilities(params, images)
        return jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))

    def shrunk(params: Any) -> Any:
        return params if report is None else bcdl_jax.cut(params, report)

    def from_before(params: Any) -> Callable[[Any], jax.Array]:
        old = log_probabilities(shrunk(params), images)
        return lambda after: difference(old, shrunk(after), images)

    return from_before
