"""Batch norm in the pre-training alone: it makes a deep network trainable, and is then made part of the convolutions before it.

The variational network is the plain one that results. So it can lose channels, be coded and be run as any other, without further arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

# Flax's own, which is not told in the params.
_EPSILON, _MOMENTUM = 1e-5, 0.99
_PIECES, _AT_A_TIME = 8, 500


def with_batch_norm(twin: nn.Module) -> nn.Module | None:
    """The plain network as it is pre-trained: with the batch norms that ``twin`` leaves out; None if it knows none."""
    known = {field.name for field in dataclasses.fields(twin)}
    return twin.clone(batch_norm=True) if "batch_norm" in known else None  # type: ignore[call-arg]


def cross_entropy(learner: nn.Module, params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats, normalised by the statistics of the batch itself; ``key`` is that of the dropout, if there is any."""
    logits, _ = _apply(learner, params, {}, images, {"dropout": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fold(learner: nn.Module, params: Any, images: jax.Array) -> Any:
    """The params of the network without batch norms that computes the same.

    The statistics are means over batches of the images under these params: nothing lags behind, as moving averages do.

    Args:
      learner: with batch norms, each named "BatchNorm_i" and following after "Conv_i".
      params: of it.
      images: of the training data, in any order; at most 4,000 of them are used.
    """
    return _fold(params, _statistics(learner, params, images))


def _apply(learner: nn.Module, params: Any, statistics: Any, images: jax.Array, rngs: Any = None) -> Any:
    variables = {"params": params, **statistics}
    drops = rngs is not None
    return learner.apply(variables, images, deterministic=not drops, train=True, rngs=rngs, mutable=["batch_stats"])


def _statistics(learner: nn.Module, params: Any, images: jax.Array) -> Any:
    # Every so many-th image, since they may be sorted by class.
    size = min(_AT_A_TIME, len(images))
    stride = len(images) // size
    batches = [images[first::stride][:size] for first in range(min(_PIECES, stride))]
    found = [_of_batch(learner, params, batch) for batch in batches]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *found)


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(learner: nn.Module, params: Any, images: jax.Array) -> Any:
    shapes = jax.eval_shape(lambda: _apply(learner, params, {}, images)[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    _, moved = _apply(learner, params, zeros, images)
    return jax.tree.map(lambda leaf: leaf / (1 - _MOMENTUM), moved["batch_stats"])


@jax.jit
def _fold(params: Any, statistics: Any) -> Any:
    folded = {name: layer for name, layer in params.items() if not name.startswith("BatchNorm")}
    for name, norm in params.items():
        if not name.startswith("BatchNorm"):
            continue
        before = name.replace("BatchNorm", "Conv")
        convolution = params[before]
        factor = norm["scale"] / jnp.sqrt(statistics[name]["var"] + _EPSILON)
        folded[before] = {
            "kernel": convolution["kernel"] * factor,
            "bias": (convolution["bias"] - statistics[name]["mean"]) * factor + norm["bias"],
        }
    return folded
