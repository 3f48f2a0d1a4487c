"""The networks of the experiments, variational by default, plain with ``family=None``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bcdl_jax
from bcdl_jax.nn.layers import Family
from bcdl_jax.nn.linear_maps import ConvolutionMap
from experiments.pipeline.recipe import Recipe, Training

# Largest posterior variance of the first layer's weights [Louizos et al. 2017, appendix]: a standard deviation of 0.2 for
# LeNet-300-100, of 0.5 for LeNet-5-Caffe.
FIRST_LAYER_CLIP_VAR = 0.04
FIRST_CONVOLUTION_CLIP_VAR = 0.25

Layer = Callable[[jax.Array], jax.Array]
_DEFAULT = bcdl_jax.GroupNormalJeffreys()


def family(method: str, recipe: Training) -> Family:
    """The family of a method; for those that compress plain networks, the one in whose form they are scored."""
    if method == "gnj":
        return bcdl_jax.GroupNormalJeffreys()
    if method == "ghs" and isinstance(recipe, Recipe):
        return bcdl_jax.GroupHorseshoe(tau0=recipe.tau0)
    return bcdl_jax.SparseVariationalDropout()


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10, 266,610 weights and biases.

    Attributes:
      family: of all layers; None for plain Flax layers.
      clip_var: largest posterior variance of the first layer's weights, in place of the family's own.
      dtype: of the computation; float32 if None. Parameters and class scores are float32.
      dropout: share of the hidden units that plain layers leave out, at random, in training.
    """

    family: Family | None = _DEFAULT
    clip_var: float | None = FIRST_LAYER_CLIP_VAR
    dtype: Any = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Class scores [examples, 10] of images [examples, 28, 28, 1] of uint8, which are scaled to [-1, 1]."""
        hidden = _scaled(images).reshape(images.shape[0], -1)
        dropout = 0 if self.family else self.dropout
        hidden = nn.relu(_dense(300, _clipped(self.family, self.clip_var), deterministic, self.dtype)(hidden))
        hidden = _dropped(hidden, dropout, deterministic)
        hidden = nn.relu(_dense(100, self.family, deterministic, self.dtype)(hidden))
        hidden = _dropped(hidden, dropout, deterministic)
        return _dense(10, self.family, deterministic, self.dtype)(hidden).astype(jnp.float32)


class LeNet5(nn.Module):
    """LeNet-5-Caffe: two convolutions of 5 x 5 with pooling, 800-500-10; 431,080 weights and biases by default.

    Attributes:
      family: of all layers; None for plain Flax layers.
      widths: of the two convolutions and the hidden dense layer.
      clip_var: largest posterior variance of the first layer's weights, in place of the family's own.
      dtype: of the computation, as for ``LeNet300``.
      dropout: likewise, of the units of the hidden dense layer.
    """

    family: Family | None = _DEFAULT
    widths: tuple[int, int, int] = (20, 50, 500)
    clip_var: float | None = FIRST_CONVOLUTION_CLIP_VAR
    dtype: Any = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Class scores [examples, 10] of images [examples, 28, 28, 1] of uint8, which are scaled to [-1, 1]."""
        hidden = _scaled(images)
        for width, family in zip(self.widths, (_clipped(self.family, self.clip_var), self.family), strict=False):
            convolution = _convolution(width, (5, 5), family, deterministic, "VALID", self.dtype)
            hidden = nn.relu(_pool(convolution(hidden), deterministic))
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = nn.relu(_dense(self.widths[2], self.family, deterministic, self.dtype)(hidden))
        hidden = _dropped(hidden, 0 if self.family else self.dropout, deterministic)
        return _dense(10, self.family, deterministic, self.dtype)(hidden).astype(jnp.float32)


# Output channels of the convolutions; a pooling of 2 x 2 follows after each tuple.
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


# Largest posterior variances of the weights at each resolution [Louizos et al. 2017, appendix]: standard deviations of 0.1 and 0.2.
VGG_CLIP_VARS = (0.01, 0.01, 0.04, None, None)


class VGG(nn.Module):
    """The paper's VGG for CIFAR-10: 13 convolutions of 3 x 3 with batch norm, 512-512-10; 14.98 million weights and biases.

    Attributes:
      family: of all layers; None for plain Flax layers.
      widths: of the convolutions, a tuple per resolution.
      hidden: width of the hidden dense layer.
      clip_vars: largest posterior variances of the convolutions at each resolution, in place of the family's own.
      batch_norm: False leaves the batch norms out, see ``experiments.batch_norm``.
      dtype: of the computation, as for ``LeNet300``.
      dropout: likewise, of the units of the hidden dense layer.
    """

    family: Family | None = _DEFAULT
    widths: Sequence[Sequence[int]] = VGG_WIDTHS
    hidden: int = 512
    clip_vars: Sequence[float | None] = VGG_CLIP_VARS
    batch_norm: bool = True
    dtype: Any = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True, train: bool = False) -> jax.Array:
        """Class scores [examples, 10] of images [examples, 32, 32, 3] of uint8, which are scaled to [-1, 1].

        With ``train`` the batch norms use the statistics of the batch and move their averages ("batch_stats").
        """
        hidden = _scaled(images)
        for widths, clip_var in itertools.zip_longest(self.widths, self.clip_vars[: len(self.widths)]):
            family = _clipped(self.family, clip_var)
            for width in widths:
                hidden = _convolution(width, (3, 3), family, deterministic, "SAME", self.dtype)(hidden)
                hidden = _normalized_relu(hidden, train, self.dtype) if self.batch_norm else nn.relu(hidden)
            hidden = _pool(hidden, deterministic)
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = nn.relu(_dense(self.hidden, self.family, deterministic, self.dtype)(hidden))
        hidden = _dropped(hidden, 0 if self.family else self.dropout, deterministic)
        return _dense(10, self.family, deterministic, self.dtype)(hidden).astype(jnp.float32)


def vgg(family: Family | None, width: float) -> VGG:
    """The VGG of the experiment: layers so many times as wide as the paper's, without batch norms."""
    return VGG(family, **vgg_widths(width), batch_norm=False)


def vgg_widths(factor: float) -> dict[str, Any]:
    """Arguments of a ``VGG`` whose layers are so many times as wide as the paper's; each keeps a channel at least."""
    widths = tuple(tuple(max(1, round(factor * width)) for width in part) for part in VGG_WIDTHS)
    return {"widths": widths, "hidden": max(1, round(factor * 512))}


def _scaled(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1


def _clipped(family: Any, clip_var: float | None) -> Any:
    # The limit is the paper's for its group priors; the log-uniform prior of single weights is trained without.
    if family is None or isinstance(family, bcdl_jax.SparseVariationalDropout):
        return family
    return dataclasses.replace(family, clip_var=clip_var)


def _dropped(hidden: jax.Array, rate: float, deterministic: bool) -> jax.Array:
    return nn.Dropout(rate)(hidden, deterministic=deterministic) if rate else hidden


def _normalized_relu(images: jax.Array, train: bool, dtype: Any) -> jax.Array:
    """Batch norm of the channels, which come last, and relu."""
    if jax.default_backend() != "cpu":
        return nn.relu(nn.BatchNorm(use_running_average=not train, dtype=dtype)(images))
    # In the order of axes that the convolution gives on a CPU: without, copying the gradients takes half of a training step there.
    rows = jnp.moveaxis(images, (0, -1), (-1, 0))
    rows = nn.BatchNorm(use_running_average=not train, axis=0, dtype=dtype)(rows)
    return jnp.moveaxis(nn.relu(rows), (0, -1), (-1, 0))


def _pool(images: jax.Array, deterministic: bool) -> jax.Array:
    """Maxima over windows of 2 x 2, when training in the form with the fast gradient, else in that which other runtimes know."""
    return nn.max_pool(images, (2, 2), (2, 2)) if deterministic else bcdl_jax.max_pool(images, (2, 2))


def _dense(features: int, family: Family | None, deterministic: bool, dtype: Any) -> Layer:
    if family is None:
        return nn.Dense(features, dtype=dtype)
    layer = bcdl_jax.Dense(features, family=family, dtype=dtype)
    return lambda inputs: layer(inputs, deterministic=deterministic)


def _convolution(
    features: int, window: tuple[int, int], family: Family | None, deterministic: bool, padding: str, dtype: Any
) -> Layer:
    if family is None:
        by = None if deterministic else _convolution_in_training
        return nn.Conv(features, window, padding=padding, dtype=dtype, conv_general_dilated=by)
    layer = bcdl_jax.Conv(features, window, family=family, padding=padding, dtype=dtype)
    return lambda inputs: layer(inputs, deterministic=deterministic)


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
    """In place of ``jax.lax.conv_general_dilated``, for one group and channels last."""
    convolution = ConvolutionMap(window_strides, padding, lhs_dilation, rhs_dilation, precision=precision)
    return convolution.in_training(images, kernel)
