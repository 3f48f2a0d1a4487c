"""Formulas that several families share: start values, the dropout rate, and the KL divergence from a log-uniform prior."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax._arrays import in_float32

# The logarithm of the variances that training starts from.
START_LOG_VARIANCE = -9.0
_START_SPREAD = 0.01

# Constants of the fit to KL(N(1, alpha) || log-uniform) [M17 eq. 14], whose error is at most 0.009 nats.
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def near(center: float, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Start values around ``center``, with a standard deviation of 0.01."""
    return center + _START_SPREAD * jax.random.normal(key, shape, dtype)


def log_alpha(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """log alpha = log(variance / mean^2), elementwise, in float32 at least. A mean of 0 gives a large finite number."""
    # 1e-8 is zero in float16.
    return in_float32(log_variance) - jnp.log(in_float32(mean) ** 2 + 1e-8)


def log_uniform_kl(log_dropout_rate: jax.Array) -> jax.Array:
    """KL(N(m, alpha m^2) || p(z) prop. to 1/|z|) in nats, elementwise, from the fit of [M17 eq. 14].

    The KL has no finite constant, since the prior is improper. The fit chooses the constant such that the value tends to 0 for large alpha.

    Args:
      log_dropout_rate: The logarithm of alpha, see ``log_alpha``.
    """
    return _K1 - _K1 * jax.nn.sigmoid(_K2 + _K3 * log_dropout_rate) + 0.5 * jax.nn.softplus(-log_dropout_rate)
