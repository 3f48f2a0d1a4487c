"""A regression of prices on a table."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

COLUMNS = 26
# A typical price and a typical deviation from it, in dollars.
CENTRE, SPREAD = 4000.0, 4000.0


class PriceModel(nn.Module):
    """Three hidden layers.

    Attributes:
      widths: The widths of the hidden layers.
    """

    widths: tuple[int, ...] = (128, 128, 64)

    @nn.compact
    def __call__(self, rows: jax.Array) -> jax.Array:
        """The prices [examples, 1] in dollars, for standardised rows [examples, columns]."""
        x = rows
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return CENTRE + SPREAD * nn.Dense(1)(x)


def make(key: jax.Array) -> tuple[Any, Any]:
    """The function ``apply(variables, rows)``, and new variables."""
    net = PriceModel()
    return net.apply, net.init(key, jnp.zeros((1, COLUMNS)))
