"""Soft weight-sharing: retraining under a mixture-of-Gaussians prior that draws the weights to a few values [Ullrich et al. 2017].

    mixture = bcdl_jax.baselines.create_mixture(params, components=16)
    loss = lambda params, mixture, batch: plain_loss(params, batch) + tau * bcdl_jax.baselines.mixture_nll(params, mixture) / num_examples
    places, levels = bcdl_jax.baselines.collapse(params, mixture)

From there to a file as at the top of ``weight_sharing``, with masks ``{name: place >= 0 for name, place in places.items()}``.

To prune more, go on in rounds. Set the weights whose place is -1 to zero and keep them there,

    masks = bcdl_jax.baselines.mask_tree(params, {name: place >= 0 for name, place in places.items()})
    params = bcdl_jax.baselines.apply_masks(params, masks)

apply the same masks inside the loss, train on under a new mixture that starts with a greater ``deviation``, and collapse again. In a last round
a small deviation and a lighter prior let the weights that are left make up for the others.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special, stats

from bcdl_jax._tree import PyTree
from bcdl_jax.baselines.magnitude import kernels_by_layer


class Mixture(flax.struct.PyTreeNode):
    """A mixture of Gaussians over the weights of a network, one component of which is fixed at zero [U17 section 3].

    Attributes:
      means: [components], of all but the component at zero.
      log_precisions: [components + 1], that of the component at zero first: log of 1 / variance.
      logits: [components], of the proportions of all but the component at zero, among themselves.
      zero_proportion: of the component at zero; fixed, since the data hardly resist a proportion of 1.
    """

    means: jax.Array
    log_precisions: jax.Array
    logits: jax.Array
    zero_proportion: float = flax.struct.field(pytree_node=False)

    def all_means(self) -> jax.Array:
        """[components + 1], with the zero first."""
        return jnp.concatenate([jnp.zeros(1, self.means.dtype), self.means])

    def log_proportions(self) -> jax.Array:
        """[components + 1]."""
        rest = jax.nn.log_softmax(self.logits) + jnp.log1p(-self.zero_proportion)
        return jnp.concatenate([jnp.log(self.zero_proportion)[None], rest])

    def log_joint(self, weights: jax.Array) -> jax.Array:
        """log of proportion times density, [components + 1, ...]: sums over a first axis are the fast ones."""

        def joint(log_proportion: jax.Array, mean: jax.Array, log_precision: jax.Array) -> jax.Array:
            return log_proportion + stats.norm.logpdf(weights, mean, jnp.exp(-0.5 * log_precision))

        return jax.vmap(joint)(self.log_proportions(), self.all_means(), self.log_precisions)


def create_mixture(
    params: PyTree, components: int = 16, zero_proportion: float = 0.99, deviation: float | None = None
) -> Mixture:
    """The mixture that retraining starts from, with means at equal distances over the range of the weights [U17 section 4.1].

    Args:
      params: of a plain network, trained.
      components: beside the one at zero.
      zero_proportion: of the component at zero, above 0 and below 1.
      deviation: standard deviation of every component, above 0 and finite; where it is not given, the range of the weights by four times the
        number of components. The greater it is, the more weights belong to a component at zero of a large proportion.

    Raises:
      ValueError: fewer than two components, or a proportion or deviation out of range.
    """
    if components < 2:
        raise ValueError(f"components is {components}; it must be at least 2.")
    if not 0 < np.float32(zero_proportion) < 1:
        raise ValueError(f"zero_proportion is {zero_proportion}; it must be above 0 and below 1, in float32.")
    if deviation is not None and not 0 < deviation < np.inf:
        raise ValueError(f"deviation is {deviation}; it must be above 0 and finite.")
    weights = _all_weights(params)
    low, high = jnp.min(weights), jnp.max(weights)
    spread = (high - low) / (4 * components) if deviation is None else jnp.asarray(deviation, weights.dtype)
    return Mixture(
        means=jnp.linspace(low, high, components),
        log_precisions=jnp.full((components + 1,), -2 * jnp.log(spread)),
        logits=jnp.zeros((components,)),
        zero_proportion=zero_proportion,
    )


# Of the gamma hyper-priors over the precisions [U17 section 4.2]: shape and rate, for the component at zero and for the others.
_ZERO_GAMMA, _OTHER_GAMMA = (5e3, 20e-1), (2.5e2, 1e-1)


def mixture_nll(params: PyTree, mixture: Mixture) -> jax.Array:
    """-log p(weights, precisions) of all kernels, in nats, up to a constant: a scalar [U17 eq. 2].

    The gamma hyper-priors keep the components from growing infinitely narrow. Biases have no prior.

    Args:
      params: of a plain network.
      mixture: of its weights.
    """
    weights = _all_weights(params)
    rows = -(-weights.size // _AT_A_TIME)
    padded = jnp.zeros(rows * _AT_A_TIME, weights.dtype).at[: weights.size].set(weights).reshape(rows, -1)
    real = (jnp.arange(rows * _AT_A_TIME) < weights.size).reshape(rows, -1)

    # In pieces that fit the cache, computed again for the gradient: all joint densities at once would be many times as much memory.
    @jax.checkpoint
    def add(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        some, there = piece
        return total - jnp.sum(jnp.where(there, special.logsumexp(mixture.log_joint(some), axis=0), 0)), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), (padded, real))
    for (shape, rate), log_precisions in (
        (_ZERO_GAMMA, mixture.log_precisions[:1]),
        (_OTHER_GAMMA, mixture.log_precisions[1:]),
    ):
        total -= jnp.sum((shape - 1) * log_precisions - rate * jnp.exp(log_precisions))
    return total


def collapse(
    params: PyTree, mixture: Mixture, *, closest: float = 1e-10
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sets every weight to the mean of the component that is most responsible for it, and prunes those of the component at zero.

    First components that have become alike are merged: as long as any two have a symmetric KL divergence below ``closest``, the pair with the
    smallest one becomes one, with the mean and variance of both [U17 section 4.3].

    Args:
      params: of a plain network, retrained.
      mixture: retrained with it.
      closest: in nats.

    Returns:
      By layer name, the place of each weight's level (-1 where pruned), and the levels, as for ``reduce_to_levels``.
    """
    means = np.asarray(mixture.all_means(), np.float64)
    variances = np.exp(-np.asarray(mixture.log_precisions, np.float64))
    proportions = np.exp(np.asarray(mixture.log_proportions(), np.float64))
    while len(means) > 2:
        squared = (means[:, None] - means) ** 2
        divergence = (variances[:, None] + squared) / variances + (variances + squared.T) / variances[:, None]
        divergence = divergence / 2 - 1
        divergence[np.diag_indices(len(means))] = np.inf
        first, second = np.unravel_index(np.argmin(divergence), divergence.shape)
        if divergence[first, second] >= closest:
            break
        first, second = sorted((first, second))
        weight = proportions[[first, second]] / proportions[[first, second]].sum()
        mean = 0.0 if first == 0 else weight @ means[[first, second]]  # the one at zero stays there
        variances[first] = weight @ (variances[[first, second]] + (means[[first, second]] - mean) ** 2)
        means[first], proportions[first] = mean, proportions[[first, second]].sum()
        means, variances, proportions = (np.delete(array, second) for array in (means, variances, proportions))

    def responsible(kernel: jax.Array) -> np.ndarray:
        best, place = np.full(kernel.shape, -np.inf), np.zeros(kernel.shape, np.int32)
        weights = np.asarray(kernel, np.float64)
        for number, (mean, variance, proportion) in enumerate(zip(means, variances, proportions, strict=True)):
            joint = np.log(proportion) - 0.5 * np.log(variance) - 0.5 * (weights - mean) ** 2 / variance
            place, best = np.where(joint > best, number, place), np.maximum(joint, best)
        return place - 1

    assignments = {name: responsible(kernel) for name, kernel in kernels_by_layer(params).items()}
    return assignments, dict.fromkeys(assignments, means[1:].astype(np.float32))


_AT_A_TIME = 2048


def _all_weights(params: PyTree) -> jax.Array:
    return jnp.concatenate([kernel.ravel() for kernel in kernels_by_layer(params).values()])
