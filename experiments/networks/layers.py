"""The layers of the experiments' networks: variational for a family, plain Flax layers for ``family=None``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bcdl_jax
from experiments.runtime import backend

Layer = Callable[[jax.Array], jax.Array]
NormPairs = tuple[tuple[str, str], ...]
DEFAULT_FAMILY = bcdl_jax.GroupNormalJeffreys()


def scaled(images: jax.Array) -> jax.Array:
    """The images of uint8, scaled to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def clipped(family: Any, clip_var: float | None) -> Any:
    """The family with the limit ``clip_var`` of its variances. Families that prune single weights are trained without a limit.

    The limit belongs to the group priors of [L17]; the log-uniform prior of single weights [M17] has none.
    """
    if family is None or family.posterior_type.prunes_weights:
        return family
    return dataclasses.replace(family, clip_var=clip_var)


def dense(features: int, family: bcdl_jax.Family | None, deterministic: bool, dtype: Any) -> Layer:
    """A dense layer.

    Args:
      features: The number of outputs.
      family: The family of the layer; None for a plain Flax layer.
      deterministic: True for the posterior means of the weights, False for a sample.
      dtype: The dtype of the computation; None for float32.
    """
    if family is None:
        return nn.Dense(features, dtype=dtype)
    layer = bcdl_jax.Dense(features, family=family, dtype=dtype)
    return lambda inputs: layer(inputs, deterministic=deterministic)


def convolution(
    features: int,
    window: tuple[int, int],
    family: bcdl_jax.Family | None,
    deterministic: bool,
    padding: str,
    dtype: Any,
) -> Layer:
    """A convolution.

    Args:
      features: The number of output channels.
      window: The height and width of the kernel.
      family: The family of the layer; None for a plain Flax layer.
      deterministic: True for the posterior means of the weights, False for a sample.
      padding: The padding, "SAME" or "VALID".
      dtype: The dtype of the computation; None for float32.
    """
    if family is None:
        product = None if deterministic else _convolution_in_training
        return nn.Conv(features, window, padding=padding, dtype=dtype, conv_general_dilated=product)
    layer = bcdl_jax.Conv(features, window, family=family, padding=padding, dtype=dtype)
    return lambda inputs: layer(inputs, deterministic=deterministic)


def dropped(hidden: jax.Array, rate: float, deterministic: bool) -> jax.Array:
    """The hidden units after dropout with this rate."""
    return nn.Dropout(rate)(hidden, deterministic=deterministic) if rate else hidden


def normalized_relu(images: jax.Array, train: bool, dtype: Any) -> jax.Array:
    """Batch norm over the last axis, the channels, then ReLU.

    Args:
      images: The images, [examples, height, width, channels].
      train: True for the statistics of the batch, False for their moving averages.
      dtype: The dtype of the computation; None for float32.
    """
    if not backend.on_cpu():
        return nn.relu(nn.BatchNorm(use_running_average=not train, dtype=dtype)(images))
    # On a CPU, a convolution returns its axes in this order in memory. In another order, copying the gradients would take half of the time
    # of a training step.
    rows = jnp.moveaxis(images, (0, -1), (-1, 0))
    rows = nn.BatchNorm(use_running_average=not train, axis=0, dtype=dtype)(rows)
    return jnp.moveaxis(nn.relu(rows), (0, -1), (-1, 0))


class HasBatchNorm:
    """A network with a field ``batch_norm`` that adds batch norms."""

    @property
    def norm_pairs(self) -> NormPairs:
        """The name of each convolution with the name of the batch norm after it."""
        raise NotImplementedError


def norm_pairs(network: nn.Module) -> NormPairs:
    """The names of each convolution and of the batch norm after it; none for a network without such norms."""
    return network.norm_pairs if isinstance(network, HasBatchNorm) else ()


def pool(images: jax.Array, deterministic: bool) -> jax.Array:
    """The maxima over windows of 2 x 2. Training uses ``bcdl_jax.max_pool``, whose gradient is fast; exports use Flax's form, which other runtimes support."""
    return nn.max_pool(images, (2, 2), (2, 2)) if deterministic else bcdl_jax.max_pool(images, (2, 2))


def _convolution_in_training(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    precision: Any = None,
    **_: Any,
) -> jax.Array:
    """A replacement of ``jax.lax.conv_general_dilated`` for one feature group and channels last."""
    product = bcdl_jax.nn.ConvolutionMap(window_strides, padding, lhs_dilation, rhs_dilation, precision=precision)
    return product.in_training(images, kernel)
