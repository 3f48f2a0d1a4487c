"""Group normal-Jeffreys: the scale-mixture prior p(z) proportional to 1/|z|, w | z ~ N(0, z^2) [Louizos et al. 2017, section 3.1]."""

from __future__ import annotations

import dataclasses
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax.noise import example_normal
from bcdl_jax.posterior import START_LOG_VARIANCE, GroupAxis, Posterior, check_clip_var, near, start_of_weights

# Constants of the fit to KL(N(1, alpha) || log-uniform) [Molchanov et al. 2017, eq. 14]; off by at most 0.009 nats.
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


@flax.struct.dataclass
class GroupNormalJeffreysPosterior(Posterior):
    """q(w) = N(mean, variance), q(z_g) = N(scale_mean_g, scale_variance_g); see ``Posterior`` for the shared fields.

    Attributes:
      scale_mean: [groups].
      scale_log_variance: [groups].
      clip_var: largest variance of weights and biases, or None.
    """

    scale_mean: jax.Array
    scale_log_variance: jax.Array
    clip_var: float | None = flax.struct.field(pytree_node=False)

    @property
    def default_threshold(self) -> float:
        return -1.0

    def kl_divergence(self) -> jax.Array:
        """Sum over kept groups of the KL of z, plus the KL of weights and biases given z [L17 eq. 8, with M17 eq. 14]."""
        scale_kl = log_uniform_kl(self.log_dropout_rate())
        return jnp.sum(jnp.where(self.group_mask > 0, scale_kl, 0)) + self.gaussian_kl()

    def log_dropout_rate(self) -> jax.Array:
        """log alpha = log(Var[z] / E[z]^2), [groups]: large where the noise of the scale drowns its mean [L17 section 3.1]."""
        # In float32 at least: 1e-8 is zero in float16.
        wide = jnp.promote_types(self.scale_mean.dtype, jnp.float32)
        return self.scale_log_variance.astype(wide) - jnp.log(self.scale_mean.astype(wide) ** 2 + 1e-8)

    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        return self.scale_mean, jnp.exp(self.scale_log_variance)

    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        noise = example_normal(key, (num_examples, *self.scale_mean.shape), self.scale_mean.dtype)
        return self.scale_mean + jnp.exp(0.5 * self.scale_log_variance) * noise

    def with_scales_times(self, factor: jax.Array) -> Self:
        return self.with_weights_divided_by(factor).replace(  # type: ignore[attr-defined]
            scale_mean=self.scale_mean * factor,
            scale_log_variance=self.scale_log_variance + 2 * jnp.log(factor),
        )

    def clip_variances(self) -> Self:
        return self.with_weight_variances_up_to(self.clip_var)


@dataclasses.dataclass(frozen=True)
class GroupNormalJeffreys:
    """The group normal-Jeffreys family: pass it to ``bcdl_jax.Dense`` and ``bcdl_jax.Conv``.

    Attributes:
      clip_var: largest posterior variance of this layer's weights and biases, kept by ``clip_variances`` after each optimiser step;
        None for no limit. The first layer of a network trained from scratch wants one (0.04 for LeNet-300-100).

    Raises:
      ValueError: ``clip_var`` is not a positive finite number.
    """

    clip_var: float | None = None

    def __post_init__(self):
        check_clip_var(self.clip_var)

    def create(
        self,
        key: jax.Array,
        kernel: jax.Array,
        bias: jax.Array | None,
        group_axis: GroupAxis,
        feature_group_count: int = 1,
    ) -> GroupNormalJeffreysPosterior:
        """The posterior that training starts from, with the given arrays as means.

        Scale means start near 1 and all log-variances near -9, each with standard deviation 0.01.

        Args:
          key: a PRNG key for the start values.
          kernel: [*window, in / feature_group_count, out], the means of the weights: a usual initialiser's values, or a trained net's.
          bias: [out] or None.
          group_axis: "input" (dense layers) or "output" (convolutions).
          feature_group_count: number of groups of a grouped convolution.
        """
        weights_key, mean_key, variance_key = jax.random.split(key, 3)
        weights = start_of_weights(weights_key, kernel, bias, group_axis, feature_group_count)
        groups = weights["input_mask" if group_axis == "input" else "output_mask"].shape
        return GroupNormalJeffreysPosterior(
            **weights,
            scale_mean=near(1.0, mean_key, groups, kernel.dtype),
            scale_log_variance=near(START_LOG_VARIANCE, variance_key, groups, kernel.dtype),
            clip_var=self.clip_var,
        )


def log_uniform_kl(log_alpha: jax.Array) -> jax.Array:
    """KL(N(m, alpha m^2) || p(z) prop. to 1/|z|) in nats, elementwise, by the fit of [Molchanov et al. 2017, eq. 14].

    The constant is chosen such that the value goes to 0 for large alpha.
    """
    return _K1 - _K1 * jax.nn.sigmoid(_K2 + _K3 * log_alpha) + 0.5 * jax.nn.softplus(-log_alpha)
