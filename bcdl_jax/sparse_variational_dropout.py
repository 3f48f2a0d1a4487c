"""Sparse variational dropout: a log-uniform prior on every single weight, which are pruned one by one [Molchanov et al. 2017]."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax.normal_jeffreys import log_uniform_kl
from bcdl_jax.posterior import GroupAxis, Posterior, check_clip_var, start_of_weights


@flax.struct.dataclass
class SparseVariationalDropoutPosterior(Posterior):
    """q(w) = N(mean, variance) for each weight, without group scales; see ``Posterior`` for the shared fields.

    The variance is a parameter of its own, the additive form of [M17 section 4.2]: alpha = variance / mean^2. Biases are Gaussian with
    the prior N(0, 1), as in the other families. What is pruned are single weights; an input none of whose weights is left is masked too.

    Attributes:
      weight_mask: of the kernel's shape; a weight whose entry is not positive is pruned.
      clip_var: largest variance of weights and biases, or None.
    """

    weight_mask: jax.Array
    clip_var: float | None = flax.struct.field(pytree_node=False)

    prunes_weights = True

    @property
    def default_threshold(self) -> float:
        return 3.0

    @property
    def unit_mask(self) -> jax.Array:
        return self.weight_mask

    @property
    def kernel_mask(self) -> jax.Array:
        return super().kernel_mask & (self.weight_mask > 0)

    def kl_divergence(self) -> jax.Array:
        """The KL of every kept weight from the log-uniform prior [M17 eq. 14], and that of the biases from N(0, 1)."""
        weights_kl = jnp.where(self.kernel_mask, log_uniform_kl(self.log_dropout_rate()), 0)
        return jnp.sum(weights_kl) + self.gaussian_bias_kl()

    def log_dropout_rate(self) -> jax.Array:
        """log alpha = log(Var[w] / E[w]^2) of every weight, of the kernel's shape."""
        # In float32 at least: 1e-8 is zero in float16.
        wide = jnp.promote_types(self.kernel_mean.dtype, jnp.float32)
        return self.kernel_log_variance.astype(wide) - jnp.log(self.kernel_mean.astype(wide) ** 2 + 1e-8)

    def log_noise_to_signal(self) -> jax.Array:
        return self.log_dropout_rate()

    def group_scores(self) -> jax.Array:
        """The lowest log dropout rate within each group, [groups]."""
        rates = jnp.min(self.log_dropout_rate(), axis=tuple(range(self.kernel_mean.ndim - 2)))
        if self.group_axis == "output":
            return jnp.min(rates, axis=0)
        return jnp.min(self._by_feature_group(rates), axis=-1).T.ravel()

    def sampled_moments(self) -> tuple[jax.Array, jax.Array]:
        kept = self.weight_mask > 0
        return jnp.where(kept, self.kernel_mean, 0), jnp.where(kept, jnp.exp(self.kernel_log_variance), 0)

    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        """1 and 0: there are no scales."""
        groups = self.group_mask.shape
        return jnp.ones(groups, self.dtype), jnp.zeros(groups, self.dtype)

    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        return jnp.ones((num_examples, *self.group_mask.shape), self.dtype)

    def clip_variances(self) -> Self:
        return self.with_weight_variances_up_to(self.clip_var)

    def prune_units(self, keep: jax.Array) -> Self:
        kept = self.weight_mask * keep.astype(self.weight_mask.dtype)
        pruned = self.replace(weight_mask=kept)  # type: ignore[attr-defined]
        return pruned.with_masks(self.input_mask > 0, self.output_mask > 0)

    def inputs_read_by(self, outputs: jax.Array) -> jax.Array:
        read = jnp.any((self.weight_mask > 0) & outputs, axis=tuple(range(self.kernel_mean.ndim - 2)))
        return jnp.any(self._by_feature_group(read), axis=-1).T.ravel()

    def with_masks(self, inputs: jax.Array, outputs: jax.Array) -> Self:
        masked = super().with_masks(inputs & self.inputs_read_by(outputs), outputs)
        return masked.replace(weight_mask=masked.kernel_mask.astype(self.weight_mask.dtype))  # type: ignore[attr-defined]

    def _by_feature_group(self, connections: jax.Array) -> jax.Array:
        """[in / feature groups, out] as [in / feature groups, feature groups, out / feature groups]."""
        inputs = self.kernel_shape[-2]
        return connections.reshape(inputs, self.input_mask.shape[-1] // inputs, -1)


@dataclasses.dataclass(frozen=True)
class SparseVariationalDropout:
    """The family of sparse variational dropout: pass it to ``bcdl_jax.Dense`` and ``bcdl_jax.Conv``.

    Trained from scratch it wants a warm-up of the KL, or all weights are pruned before they mean anything [M17 section 5].

    Attributes:
      clip_var: as for ``GroupNormalJeffreys``; the paper has no limit.

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
    ) -> SparseVariationalDropoutPosterior:
        """The posterior that training starts from, with the given arrays as means and log-variances near -9.

        Args:
          key, kernel, bias, group_axis, feature_group_count: as for ``GroupNormalJeffreys.create``.
        """
        weights: dict[str, Any] = start_of_weights(key, kernel, bias, group_axis, feature_group_count)
        return SparseVariationalDropoutPosterior(**weights, weight_mask=jnp.ones_like(kernel), clip_var=self.clip_var)
