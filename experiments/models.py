"""The networks of the experiments."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

import bcdl_jax

# Largest posterior variance of the first layer's weights: a standard deviation of 0.2 [Louizos et al. 2017, appendix].
FIRST_LAYER_CLIP_VAR = 0.04


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10, 266,610 weights and biases."""

    clip_var: float | None = FIRST_LAYER_CLIP_VAR

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Class scores [examples, 10] of images [examples, 28, 28, 1] of uint8, which are scaled to [-1, 1]."""
        hidden = images.reshape(images.shape[0], -1).astype(jnp.float32) / 127.5 - 1
        hidden = nn.relu(
            bcdl_jax.Dense(300, family=bcdl_jax.GroupNormalJeffreys(clip_var=self.clip_var))(
                hidden, deterministic=deterministic
            )
        )
        hidden = nn.relu(bcdl_jax.Dense(100)(hidden, deterministic=deterministic))
        return bcdl_jax.Dense(10)(hidden, deterministic=deterministic)
