"""A forecast of blood glucose by convolutions over time."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LENGTH, HORIZONS = 36, 3
# A typical value and a typical deviation from it, in mg/dl.
CENTRE, SPREAD = 140.0, 50.0


class Forecast(nn.Module):
    """Convolutions over time, and dense layers whose outputs are changes since the last value.

    Attributes:
      horizons: The number of forecasts.
      widths: The number of channels of each convolution.
    """

    horizons: int = HORIZONS
    widths: tuple[int, ...] = (32, 32, 64)

    @nn.compact
    def __call__(self, values: jax.Array) -> jax.Array:
        """The forecasts [examples, horizons] for values [examples, length, 1], both in mg/dl."""
        x = (values - CENTRE) / SPREAD
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (5,), strides=(2,))(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return values[:, -1] + SPREAD * nn.Dense(self.horizons)(x)


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(variables, values)``, and new variables."""
    net = Forecast()
    return net.apply, net.init(key, jnp.zeros((1, LENGTH, 1)))
