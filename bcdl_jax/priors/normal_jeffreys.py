"""Group normal-Jeffreys: the scale-mixture prior p(z) proportional to 1/|z|, w | z ~ N(0, z^2) [L17 section 3.1]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax.priors.family import Family
from bcdl_jax.priors.formulas import START_LOG_VARIANCE, log_alpha, log_uniform_kl, near
from bcdl_jax.priors.noise import example_normal
from bcdl_jax.priors.posterior import Posterior


class GroupNormalJeffreysPosterior(Posterior):
    """q(w~) = N(mean, variance), q(z_g) = N(scale_mean_g, scale_variance_g). ``Posterior`` documents the shared fields.

    Attributes:
      scale_mean: Means of the scales z, [groups].
      scale_log_variance: Natural logarithms of the variances of the scales, [groups].
    """

    scale_mean: jax.Array = flax.struct.field(metadata={"kind": "scale", "axis": "group"})
    scale_log_variance: jax.Array = flax.struct.field(metadata={"kind": "log_variance", "axis": "group"})

    @property
    def default_threshold(self) -> float:
        return -1.0

    def kl_divergence(self) -> jax.Array:
        """The KL of z, summed over the kept groups, plus the KL of weights and biases given z [L17 eq. 8, with M17 eq. 14]."""
        scale_kl = log_uniform_kl(self.log_dropout_rate())
        return jnp.sum(jnp.where(self.group_mask > 0, scale_kl, 0)) + self.gaussian_kl()

    def log_dropout_rate(self) -> jax.Array:
        """log alpha = log(Var[z] / E[z]^2), [groups]: large if the noise of the scale exceeds its mean [L17 section 3.1]."""
        return log_alpha(self.scale_mean, self.scale_log_variance)

    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        return self.scale_mean, jnp.exp(self.scale_log_variance)

    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        noise = example_normal(key, (num_examples, *self.scale_mean.shape), self.scale_mean.dtype)
        return self.scale_mean[None] + jnp.exp(0.5 * self.scale_log_variance)[None] * noise

    def with_scales_times(self, factor: jax.Array) -> Self:
        return self.with_weights_divided_by(factor).replace(
            scale_mean=self.scale_mean * factor,
            scale_log_variance=self.scale_log_variance + 2 * jnp.log(factor),
        )


@dataclasses.dataclass(frozen=True)
class GroupNormalJeffreys(Family):
    """The group normal-Jeffreys family: p(z) proportional to 1/|z|, w | z ~ N(0, z^2) [L17 section 3.1].

    The means of the scales start near 1, and their log-variances near -9, each with a standard deviation of 0.01.

    Attributes:
      clip_var: The largest posterior variance of the layer's weights and biases, see ``Family``.

    Raises:
      ValueError: ``clip_var`` is not a positive finite number.
    """

    posterior_type = GroupNormalJeffreysPosterior
    start_keys = 2

    def start_fields(self, keys: Sequence[jax.Array], kernel: jax.Array, groups: int) -> dict[str, jax.Array | float]:
        return {
            "scale_mean": near(1.0, keys[0], (groups,), kernel.dtype),
            "scale_log_variance": near(START_LOG_VARIANCE, keys[1], (groups,), kernel.dtype),
        }
