"""ResNet-20 for CIFAR-10 (He et al. 2015, section 4.2), with projections at the shortcuts that change the width (option B)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# The mean and the standard deviation of the pixels of CIFAR-10, by channel, for pixels from 0 to 1.
PIXEL_MEAN = (0.4914, 0.4822, 0.4465)
PIXEL_STD = (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two convolutions of 3 x 3 and a shortcut around them.

    Attributes:
      width: The number of output channels.
      stride: The stride of the first convolution.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        strides = (self.stride, self.stride)
        hidden = nn.Conv(self.width, (3, 3), strides, padding=1, use_bias=False)(x)
        hidden = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(hidden))
        hidden = nn.Conv(self.width, (3, 3), padding=1, use_bias=False)(hidden)
        hidden = nn.BatchNorm(use_running_average=not train, momentum=0.9)(hidden)
        if x.shape != hidden.shape:
            x = nn.Conv(self.width, (1, 1), strides, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.relu(x + hidden)


class ResNet20(nn.Module):
    """A convolution, nine blocks at three resolutions, the mean over the image and a dense layer.

    Attributes:
      classes: The number of classes.
      widths: The number of channels at each resolution.
      blocks: The number of blocks at each resolution.
    """

    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The class scores of images [examples, 32, 32, 3] of uint8, with the statistics of the batch if ``train`` is True."""
        x = (images.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
        x = nn.Conv(self.widths[0], (3, 3), padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                x = Block(width, stride=2 if stage and not block else 1)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(variables, images)`` with running averages, and new variables: "params" and "batch_stats"."""
    net = ResNet20()
    return net.apply, net.init(key, jnp.zeros((1, 32, 32, 3), jnp.uint8))


def learn(variables: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    """The class scores in training, and the running averages after this batch."""
    return ResNet20().apply(variables, images, train=True, mutable=["batch_stats"])
