"""Batch norms in pre-training. They make a deep network trainable, and are folded into the convolutions before them afterwards.

The variational network starts from the folded network. It has no batch norms, so its channels can be pruned and its weights coded like those
of any other network.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.networks.layers import HasBatchNorm, NormPairs, norm_pairs
from experiments.pipeline.measures import mean_cross_entropy

# The largest number of batches that the statistics are computed from, and the number of images in each.
_BATCHES, _BATCH_SIZE = 8, 500


def with_batch_norm(twin: nn.Module) -> nn.Module | None:
    """The plain network with the batch norms that ``twin`` leaves out; None for a network without batch norms."""
    return twin.clone(batch_norm=True) if isinstance(twin, HasBatchNorm) else None  # type: ignore[call-arg]


def cross_entropy(learner: nn.Module, params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """The mean cross-entropy in nats, with norms by the statistics of the batch itself; ``key`` is the key of the dropout, if there is any."""
    logits, _ = _apply(learner, params, {}, images, {"dropout": key})
    return mean_cross_entropy(logits, labels)


def fold(learner: nn.Module, params: Any, images: jax.Array) -> Any:
    """Folds the batch norms into the convolutions.

    The statistics of the norms are means over batches of images under the final params. Moving averages would lag behind the params.

    Args:
      learner: The network with batch norms, whose ``norm_pairs`` names them.
      params: The params of ``learner``.
      images: The training images, in any order. At most 4,000 of them are used.

    Returns:
      The params of the network without batch norms that computes the same function.
    """
    return _fold(norm_pairs(learner), params, _statistics(learner, params, images))


def _apply(learner: nn.Module, params: Any, statistics: Any, images: jax.Array, rngs: Any = None) -> Any:
    variables = {"params": params, **statistics}
    has_dropout = rngs is not None
    return learner.apply(
        variables, images, deterministic=not has_dropout, train=True, rngs=rngs, mutable=["batch_stats"]
    )


def _statistics(learner: nn.Module, params: Any, images: jax.Array) -> Any:
    # A batch takes every stride-th image, since the images may be sorted by class.
    size = min(_BATCH_SIZE, len(images))
    stride = len(images) // size
    batches = [images[first::stride][:size] for first in range(min(_BATCHES, stride))]
    statistics = [_batch_statistics(learner, params, batch) for batch in batches]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).mean(0), *statistics)


@functools.partial(jax.jit, static_argnums=0)
def _batch_statistics(learner: nn.Module, params: Any, images: jax.Array) -> Any:
    shapes = jax.eval_shape(lambda: _apply(learner, params, {}, images)[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # From zero, one step of the moving average is the statistics of the batch times 1 - momentum.
    _, averages = _apply(learner, params, zeros, images)
    return jax.tree.map(lambda leaf: leaf / (1 - nn.BatchNorm.momentum), averages["batch_stats"])


@functools.partial(jax.jit, static_argnums=0)
def _fold(pairs: NormPairs, params: Any, statistics: Any) -> Any:
    folded = dict(params)
    for name, norm_name in pairs:
        convolution, norm = params[name], folded.pop(norm_name)
        factor = norm["scale"] / jnp.sqrt(statistics[norm_name]["var"] + nn.BatchNorm.epsilon)
        folded[name] = {
            "kernel": convolution["kernel"] * factor,
            "bias": (convolution["bias"] - statistics[norm_name]["mean"]) * factor + norm["bias"],
        }
    return folded
