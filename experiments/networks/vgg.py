"""The VGG of [L17] for CIFAR-10."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import bcdl_jax
from experiments.networks import layers

# The output channels of the convolutions. A pooling of 2 x 2 follows after each tuple.
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# The width of the hidden dense layer.
VGG_HIDDEN = 512
# The largest posterior variances of the weights at each resolution [L17 appendix]: standard deviations of 0.1, 0.1 and 0.2, then no limit.
VGG_CLIP_VARS = (0.01, 0.01, 0.04, None, None)


class VGG(nn.Module, layers.HasBatchNorm):
    """The VGG of [L17]: 13 convolutions of 3 x 3 with batch norm, then 512-512-10. It has 14.98 million weights and biases.

    Attributes:
      family: The family of all layers; None for plain Flax layers.
      widths: The output channels of the convolutions, one tuple for each resolution.
      hidden: The width of the hidden dense layer.
      clip_vars: The largest posterior variances of the convolutions at each resolution. They replace the family's own.
      batch_norm: True for a batch norm after each convolution, False for none, see ``experiments.pipeline.batch_norm``.
      dtype: The dtype of the computation; None for float32. Parameters and class scores are float32.
      dropout: The dropout rate of the hidden dense layer in training. It has an effect on plain layers only.
    """

    family: bcdl_jax.Family | None = layers.DEFAULT_FAMILY
    widths: Sequence[Sequence[int]] = VGG_WIDTHS
    hidden: int = VGG_HIDDEN
    clip_vars: Sequence[float | None] = VGG_CLIP_VARS
    batch_norm: bool = True
    dtype: Any = None
    dropout: float = 0.0

    @property
    def norm_pairs(self) -> layers.NormPairs:
        """The name of each convolution with the name of the batch norm after it, as Flax names them."""
        count = sum(map(len, self.widths)) if self.batch_norm else 0
        return tuple((f"Conv_{number}", f"BatchNorm_{number}") for number in range(count))

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True, train: bool = False) -> jax.Array:
        """The class scores of images.

        Args:
          images: The images, [examples, 32, 32, 3] of uint8. They are scaled to [-1, 1].
          deterministic: True for the posterior means of the weights and no dropout, False for a sample.
          train: True for batch norms with the statistics of the batch, which update the moving averages ("batch_stats"); False for
            batch norms with the moving averages.

        Returns:
          The class scores, [examples, 10] of float32.
        """
        hidden = layers.scaled(images)
        for widths, clip_var in itertools.zip_longest(self.widths, self.clip_vars[: len(self.widths)]):
            family = layers.clipped(self.family, clip_var)
            for width in widths:
                hidden = layers.convolution(width, (3, 3), family, deterministic, "SAME", self.dtype)(hidden)
                hidden = layers.normalized_relu(hidden, train, self.dtype) if self.batch_norm else nn.relu(hidden)
            hidden = layers.pool(hidden, deterministic)
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = nn.relu(layers.dense(self.hidden, self.family, deterministic, self.dtype)(hidden))
        hidden = layers.dropped(hidden, 0 if self.family else self.dropout, deterministic)
        return layers.dense(10, self.family, deterministic, self.dtype)(hidden).astype(jnp.float32)


def vgg(family: bcdl_jax.Family | None, width: float) -> VGG:
    """The VGG of the experiment, without batch norms. Its layers are ``width`` times as wide as in [L17]."""
    return VGG(family, **vgg_widths(width), batch_norm=False)


def vgg_widths(factor: float) -> dict[str, Any]:
    """The arguments of a ``VGG`` whose layers are ``factor`` times as wide as in [L17], with at least one channel each."""
    widths = tuple(tuple(max(1, round(factor * width)) for width in part) for part in VGG_WIDTHS)
    return {"widths": widths, "hidden": max(1, round(factor * VGG_HIDDEN))}
