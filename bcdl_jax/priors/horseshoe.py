"""Group horseshoe: half-Cauchy scales of groups, times a half-Cauchy scale of the whole layer [L17 section 3.2].

A weight of group g is w = w~ z_g with w~ ~ N(0, 1) and z_g = s z~_g. Each of the half-Cauchy variables s and z~_g is the square root of the
product of a gamma and an inverse gamma variable:

    s    = sqrt(s_a s_b),      s_a  ~ Gamma(1/2, scale tau0^2),   s_b  ~ InverseGamma(1/2, 1)
    z~_g = sqrt(a_g b_g),      a_g  ~ Gamma(1/2, scale 1),        b_g  ~ InverseGamma(1/2, 1)

The approximate posterior of each of the four factors is log-normal, LN(m, v): m and v are the mean and the variance of the factor's
logarithm. So the posterior of z is log-normal too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax._arrays import in_float32
from bcdl_jax.priors.family import Family
from bcdl_jax.priors.formulas import START_LOG_VARIANCE, near
from bcdl_jax.priors.noise import example_normal
from bcdl_jax.priors.posterior import Posterior


class GroupHorseshoePosterior(Posterior):
    """q(w~) = N(mean, variance), and a log-normal q for each factor of the scales. ``Posterior`` documents the shared fields.

    ``*_log_mean`` is the mean m of a factor's logarithm, and ``*_log_variance`` the natural logarithm of its variance v.

    Attributes:
      layer_gamma_log_mean, layer_gamma_log_variance: Parameters of s_a, scalars.
      layer_inverse_log_mean, layer_inverse_log_variance: Parameters of s_b, scalars.
      group_gamma_log_mean, group_gamma_log_variance: Parameters of a_g, [groups].
      group_inverse_log_mean, group_inverse_log_variance: Parameters of b_g, [groups].
      tau0: The scale of the half-Cauchy prior of s.
    """

    layer_gamma_log_mean: jax.Array = flax.struct.field(metadata={"kind": "scale", "axis": None})
    layer_gamma_log_variance: jax.Array = flax.struct.field(metadata={"kind": "log_variance", "axis": None})
    layer_inverse_log_mean: jax.Array = flax.struct.field(metadata={"kind": "scale", "axis": None})
    layer_inverse_log_variance: jax.Array = flax.struct.field(metadata={"kind": "log_variance", "axis": None})
    group_gamma_log_mean: jax.Array = flax.struct.field(metadata={"kind": "scale", "axis": "group"})
    group_gamma_log_variance: jax.Array = flax.struct.field(metadata={"kind": "log_variance", "axis": "group"})
    group_inverse_log_mean: jax.Array = flax.struct.field(metadata={"kind": "scale", "axis": "group"})
    group_inverse_log_variance: jax.Array = flax.struct.field(metadata={"kind": "log_variance", "axis": "group"})
    tau0: float = flax.struct.field(pytree_node=False)

    @property
    def default_threshold(self) -> float:
        # Thresholds that were chosen on validation data for LeNet-5 lay between 0.9 and 2.1.
        return 2.0

    def kl_divergence(self) -> jax.Array:
        """The sum of three KLs: of the kept groups' scales, of the layer's scale if any group is kept, and of weights and biases.

        [L17 section 3.2]
        """
        groups = log_normal_kl_from_gamma(
            self.group_gamma_log_mean, self.group_gamma_log_variance, 1.0
        ) + log_normal_kl_from_inverse_gamma(self.group_inverse_log_mean, self.group_inverse_log_variance)
        layer = log_normal_kl_from_gamma(
            self.layer_gamma_log_mean, self.layer_gamma_log_variance, self.tau0**2
        ) + log_normal_kl_from_inverse_gamma(self.layer_inverse_log_mean, self.layer_inverse_log_variance)
        kept = self.group_mask > 0
        return jnp.sum(jnp.where(kept, groups, 0)) + jnp.where(jnp.any(kept), layer, 0) + self.gaussian_kl()

    def log_dropout_rate(self) -> jax.Array:
        """The variance minus the mean of log z, [groups]. It is minus the logarithm of the mode of z [L17 section 3.2]."""
        mean, layer_variance, group_variance = self.in_float32()._log_scale()
        return layer_variance + group_variance - mean

    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        mean, layer_variance, group_variance = self._log_scale()
        variance = layer_variance + group_variance
        return jnp.exp(mean + variance / 2), jnp.expm1(variance) * jnp.exp(2 * mean + variance)

    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        mean, layer_variance, group_variance = self._log_scale()
        layer_key, group_key = jax.random.split(key)
        # One s per example: all groups of the layer share it.
        layer_noise = example_normal(layer_key, (num_examples, 1), mean.dtype)
        group_noise = example_normal(group_key, (num_examples, *mean.shape), mean.dtype)
        return jnp.exp(
            mean[None] + jnp.sqrt(layer_variance) * layer_noise + jnp.sqrt(group_variance)[None] * group_noise
        )

    def with_scales_times(self, factor: jax.Array) -> Self:
        # The prior of the layer's scale is almost flat, so the geometric mean of the factors goes there.
        kept = self.group_mask > 0
        log_factor = jnp.log(factor)
        shared = jnp.sum(jnp.where(kept, log_factor, 0)) / jnp.maximum(jnp.sum(kept), 1).astype(log_factor.dtype)
        own = log_factor - shared
        return self.with_weights_divided_by(factor).replace(
            layer_inverse_log_mean=self.layer_inverse_log_mean + 2 * shared,
            group_gamma_log_mean=self.group_gamma_log_mean + own,
            group_inverse_log_mean=self.group_inverse_log_mean + own,
        )

    def _log_scale(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The mean of log z, [groups], and the parts of its variance that s (a scalar) and z~ ([groups]) contribute."""
        mean = (
            self.layer_gamma_log_mean
            + self.layer_inverse_log_mean
            + self.group_gamma_log_mean
            + self.group_inverse_log_mean
        ) / 2
        layer = (jnp.exp(self.layer_gamma_log_variance) + jnp.exp(self.layer_inverse_log_variance)) / 4
        group = (jnp.exp(self.group_gamma_log_variance) + jnp.exp(self.group_inverse_log_variance)) / 4
        return mean, layer, group


@dataclasses.dataclass(frozen=True)
class GroupHorseshoe(Family):
    """The group horseshoe family: half-Cauchy scales of groups, times a half-Cauchy scale of the layer [L17 section 3.2].

    All scales z start near 1: log s_a starts near its mode under the prior, log s_b near minus that value, and the logarithms of the groups'
    factors near 0. All log-variances start near -9.

    Attributes:
      tau0: The scale of the half-Cauchy prior of a layer's scale. A smaller value draws all groups of the layer towards zero more strongly.
      clip_var: The largest posterior variance of the layer's weights and biases, see ``Family``.

    Raises:
      ValueError: ``tau0`` or ``clip_var`` is not a positive finite number.
    """

    posterior_type = GroupHorseshoePosterior
    start_keys = 8

    tau0: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau0 < math.inf:
            raise ValueError(f"tau0 is {self.tau0}; it must be a positive finite number.")

    def start_fields(self, keys: Sequence[jax.Array], kernel: jax.Array, groups: int) -> dict[str, jax.Array | float]:
        prior_mode = math.log(self.tau0**2 / 2)
        layer: tuple[int, ...] = ()
        factors = {
            "layer_gamma": (prior_mode, layer),
            "layer_inverse": (-prior_mode, layer),
            "group_gamma": (0.0, (groups,)),
            "group_inverse": (0.0, (groups,)),
        }
        fields: dict[str, jax.Array | float] = {"tau0": self.tau0}
        pairs = zip(keys[::2], keys[1::2], strict=True)
        for (factor, (mean, shape)), (mean_key, variance_key) in zip(factors.items(), pairs, strict=True):
            fields[f"{factor}_log_mean"] = near(mean, mean_key, shape, kernel.dtype)
            fields[f"{factor}_log_variance"] = near(START_LOG_VARIANCE, variance_key, shape, kernel.dtype)
        return fields


def log_normal_kl_from_gamma(log_mean: jax.Array, log_variance: jax.Array, scale: float) -> jax.Array:
    """KL(LN(m, v) || Gamma(1/2, scale)) in nats, elementwise: log(scale)/2 + e^(m + v/2)/scale - (m + log v + 1 + log 2)/2.

    Args:
      log_mean: The mean m of the logarithm.
      log_variance: The natural logarithm of the variance v of that logarithm.
      scale: The scale of the gamma distribution.
    """
    log_mean, log_variance = in_float32(log_mean), in_float32(log_variance)
    log_scale = math.log(scale)
    ratio = jnp.exp(log_mean + jnp.exp(log_variance) / 2 - log_scale)
    return log_scale / 2 + ratio - (log_mean + log_variance + 1 + math.log(2)) / 2


def log_normal_kl_from_inverse_gamma(log_mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(LN(m, v) || InverseGamma(1/2, 1)) in nats, elementwise: e^(v/2 - m) - (-m + log v + 1 + log 2)/2.

    The inverse of the variable has the distribution LN(-m, v), and Gamma(1/2, 1) under the prior.
    """
    return log_normal_kl_from_gamma(-log_mean, log_variance, 1.0)
