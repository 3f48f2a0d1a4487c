"""LeNet-300-100 and LeNet-5-Caffe, for digits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bcdl_jax
from experiments.networks import layers

# The largest posterior variance of the first layer's weights [L17 appendix]: standard deviations of 0.2 for LeNet-300-100 and of 0.5 for
# LeNet-5-Caffe.
FIRST_LAYER_CLIP_VAR = 0.04
FIRST_CONVOLUTION_CLIP_VAR = 0.25


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10, with 266,610 weights and biases.

    Attributes:
      family: The family of all layers; None for plain Flax layers.
      clip_var: The largest posterior variance of the first layer's weights. It replaces the family's own.
      dtype: The dtype of the computation; None for float32. Parameters and class scores are float32.
      dropout: The dropout rate of the hidden units in training. It has an effect on plain layers only.
    """

    family: bcdl_jax.Family | None = layers.DEFAULT_FAMILY
    clip_var: float | None = FIRST_LAYER_CLIP_VAR
    dtype: Any = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """The class scores of images.

        Args:
          images: The images, [examples, 28, 28, 1] of uint8. They are scaled to [-1, 1].
          deterministic: True for the posterior means of the weights and no dropout, False for a sample.

        Returns:
          The class scores, [examples, 10] of float32.
        """
        hidden = layers.scaled(images).reshape(images.shape[0], -1)
        dropout = 0 if self.family else self.dropout
        first_family = layers.clipped(self.family, self.clip_var)
        hidden = nn.relu(layers.dense(300, first_family, deterministic, self.dtype)(hidden))
        hidden = layers.dropped(hidden, dropout, deterministic)
        hidden = nn.relu(layers.dense(100, self.family, deterministic, self.dtype)(hidden))
        hidden = layers.dropped(hidden, dropout, deterministic)
        return layers.dense(10, self.family, deterministic, self.dtype)(hidden).astype(jnp.float32)


class LeNet5(nn.Module):
    """LeNet-5-Caffe: two convolutions of 5 x 5 with pooling, then 800-500-10. It has 431,080 weights and biases at the default widths.

    Attributes:
      family: The family of all layers; None for plain Flax layers.
      widths: The widths of the two convolutions and of the hidden dense layer.
      clip_var: The largest posterior variance of the first layer's weights. It replaces the family's own.
      dtype: The dtype of the computation; None for float32. Parameters and class scores are float32.
      dropout: The dropout rate of the hidden dense layer in training. It has an effect on plain layers only.
    """

    family: bcdl_jax.Family | None = layers.DEFAULT_FAMILY
    widths: tuple[int, int, int] = (20, 50, 500)
    clip_var: float | None = FIRST_CONVOLUTION_CLIP_VAR
    dtype: Any = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """The class scores of images, as in ``LeNet300``."""
        hidden = layers.scaled(images)
        families = layers.clipped(self.family, self.clip_var), self.family
        for width, family in zip(self.widths, families, strict=False):
            convolution = layers.convolution(width, (5, 5), family, deterministic, "VALID", self.dtype)
            hidden = nn.relu(layers.pool(convolution(hidden), deterministic))
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = nn.relu(layers.dense(self.widths[2], self.family, deterministic, self.dtype)(hidden))
        hidden = layers.dropped(hidden, 0 if self.family else self.dropout, deterministic)
        return layers.dense(10, self.family, deterministic, self.dtype)(hidden).astype(jnp.float32)
