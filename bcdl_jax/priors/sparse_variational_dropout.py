"""Sparse variational dropout: a log-uniform prior on every single weight, and pruning of single weights [M17]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax._arrays import of_rank
from bcdl_jax.priors.family import Family
from bcdl_jax.priors.formulas import log_alpha, log_uniform_kl
from bcdl_jax.priors.posterior import Posterior


class SparseVariationalDropoutPosterior(Posterior):
    """q(w) = N(mean, variance) for each weight, without group scales. ``Posterior`` documents the shared fields.

    The variance is a parameter of its own, the additive form of [M17 section 4.2]: alpha = variance / mean^2. Biases are Gaussian with
    the prior N(0, 1), as in the other families. Pruning removes single weights. An input that loses all of its weights is masked too.

    Attributes:
      weight_mask: Mask of the weights, of the kernel's shape. A weight whose entry is not positive is pruned.
    """

    prunes_weights: ClassVar[bool] = True

    weight_mask: jax.Array = flax.struct.field(metadata={"kind": "mask", "axis": "kernel"})

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
        """The KL of the kept weights from the log-uniform prior [M17 eq. 14], plus the KL of the biases from N(0, 1)."""
        weights_kl = jnp.where(self.kernel_mask, log_uniform_kl(self.log_dropout_rate()), 0)
        return jnp.sum(weights_kl) + self.gaussian_bias_kl()

    def log_dropout_rate(self) -> jax.Array:
        """log alpha = log(Var[w] / E[w]^2) of every weight, of the kernel's shape."""
        return log_alpha(self.kernel_mean, self.kernel_log_variance)

    def log_noise_to_signal(self) -> jax.Array:
        return self.log_dropout_rate()

    def group_scores(self) -> jax.Array:
        """The lowest log dropout rate within each group, [groups]."""
        rates = jnp.min(self.log_dropout_rate(), axis=tuple(range(self.kernel_mean.ndim - 2)))
        if self.group_axis == "output":
            return jnp.min(rates, axis=0, initial=jnp.inf)
        return jnp.min(self._by_feature_group(rates), axis=-1, initial=jnp.inf).T.ravel()

    def sampled_moments(self) -> tuple[jax.Array, jax.Array]:
        kept = self.weight_mask > 0
        return jnp.where(kept, self.kernel_mean, 0), jnp.where(kept, jnp.exp(self.kernel_log_variance), 0)

    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        """Means of 1 and variances of 0, since the family has no scales."""
        groups = self.group_mask.shape
        return jnp.ones(groups, self.dtype), jnp.zeros(groups, self.dtype)

    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        return jnp.ones((num_examples, *self.group_mask.shape), self.dtype)

    def prune_units(self, keep: jax.Array) -> Self:
        kept = self.weight_mask * keep.astype(self.weight_mask.dtype)
        pruned = self.replace(weight_mask=kept)
        return pruned.with_masks(self.input_mask > 0, self.output_mask > 0)

    def inputs_read_by(self, outputs: jax.Array) -> jax.Array:
        read = jnp.any(
            (self.weight_mask > 0) & of_rank(outputs, self.weight_mask.ndim),
            axis=tuple(range(self.kernel_mean.ndim - 2)),
        )
        return jnp.any(self._by_feature_group(read), axis=-1).T.ravel()

    def with_masks(self, inputs: jax.Array, outputs: jax.Array) -> Self:
        masked = super().with_masks(inputs & self.inputs_read_by(outputs), outputs)
        return masked.replace(weight_mask=masked.kernel_mask.astype(self.weight_mask.dtype))

    def _by_feature_group(self, connections: jax.Array) -> jax.Array:
        """Reshapes [in / feature groups, out] to [in / feature groups, feature groups, out / feature groups]."""
        inputs, features = self.kernel_shape[-2:]
        return connections.reshape(inputs, self.feature_groups, features // self.feature_groups)


@dataclasses.dataclass(frozen=True)
class SparseVariationalDropout(Family):
    """The family of sparse variational dropout: a log-uniform prior on every single weight [M17].

    A network that is trained from scratch needs a warm-up of the KL. Without it, all weights lose their signal before they are trained
    [M17 section 5].

    Attributes:
      clip_var: The largest posterior variance of the layer's weights and biases, see ``Family``. The paper has no limit.

    Raises:
      ValueError: ``clip_var`` is not a positive finite number.
    """

    posterior_type = SparseVariationalDropoutPosterior
    start_keys = 0

    def start_fields(self, keys: Sequence[jax.Array], kernel: jax.Array, groups: int) -> dict[str, jax.Array | float]:
        return {"weight_mask": jnp.ones_like(kernel)}
