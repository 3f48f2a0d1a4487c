"""Soft weight-sharing: retraining under a mixture-of-Gaussians prior that draws the weights to a few values [U17].

    mixture = bcdl_jax.baselines.create_mixture(params, components=16)
    loss = lambda params, mixture, batch: plain_loss(params, batch) + tau * bcdl_jax.baselines.mixture_nll(params, mixture) / num_examples
    assignments, levels = bcdl_jax.baselines.collapse(params, mixture)

The module ``weight_sharing`` describes the way from the network to a file. The masks are
``{name: indices >= 0 for name, indices in assignments.items()}``.

More weights are pruned in several rounds. After each round, the weights with the index -1 are set to zero and stay zero:

    masks = bcdl_jax.baselines.expand_masks(params, {name: indices >= 0 for name, indices in assignments.items()})
    params = bcdl_jax.baselines.apply_masks(params, masks)

The next round applies the same masks inside the loss, trains under a new mixture with a larger ``deviation``, and collapses again. A last
round with a small deviation and a smaller ``tau`` lets the kept weights compensate for the pruned ones.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special, stats

from bcdl_jax._tree import PyTree
from bcdl_jax.baselines.magnitude import kernels_by_layer

# Shape and rate of the gamma hyper-priors of the precisions [U17 section 4.2].
_ZERO_GAMMA, _OTHER_GAMMA = (5e3, 20e-1), (2.5e2, 1e-1)

# The number of weights per chunk of ``mixture_nll``.
_CHUNK = 2048


class Mixture(flax.struct.PyTreeNode):
    """A mixture of Gaussians over the weights of a network. The mean of one component is fixed at zero [U17 section 3].

    Attributes:
      means: The means of all components but the one at zero, [components].
      log_precisions: The logarithms of the precisions 1 / variance, [components + 1]. The component at zero is the first.
      logits: The logits of the proportions of all components but the one at zero, among themselves, [components].
      zero_proportion: The proportion of the component at zero. It is fixed: training would move it to 1.
    """

    means: jax.Array
    log_precisions: jax.Array
    logits: jax.Array
    zero_proportion: float = flax.struct.field(pytree_node=False)

    def all_means(self) -> jax.Array:
        """The means of all components, [components + 1]. The component at zero is the first."""
        return jnp.concatenate([jnp.zeros(1, self.means.dtype), self.means])

    def log_proportions(self) -> jax.Array:
        """The logarithms of the proportions of all components, [components + 1]."""
        rest = jax.nn.log_softmax(self.logits) + jnp.log1p(-self.zero_proportion)
        return jnp.concatenate([jnp.log(self.zero_proportion)[None], rest])

    def log_joint(self, weights: jax.Array) -> jax.Array:
        """The logarithm of proportion times density for each component and each weight, [components + 1, ...]."""

        def joint(log_proportion: jax.Array, mean: jax.Array, log_precision: jax.Array) -> jax.Array:
            return log_proportion + stats.norm.logpdf(weights, mean, jnp.exp(-0.5 * log_precision))

        # The components form the first axis, since sums over a first axis are the fast ones.
        return jax.vmap(joint)(self.log_proportions(), self.all_means(), self.log_precisions)


def create_mixture(
    params: PyTree, components: int = 16, zero_proportion: float = 0.99, deviation: float | None = None
) -> Mixture:
    """The mixture that retraining starts from. Its means have equal distances over the range of the weights [U17 section 4.1].

    Args:
      params: The params of a plain network, trained.
      components: The number of components without the one at zero, at least 2.
      zero_proportion: The proportion of the component at zero, above 0 and below 1.
      deviation: The standard deviation of every component, above 0 and finite. If None, the range of the weights divided by
        4 * components. With a large ``zero_proportion``, a larger deviation assigns more weights to the component at zero.

    Raises:
      ValueError: ``components`` is below 2, ``zero_proportion`` or ``deviation`` is out of range, or ``params`` holds no weights.
    """
    if components < 2:
        raise ValueError(f"components is {components}; it must be at least 2.")
    if not 0 < np.float32(zero_proportion) < 1:
        raise ValueError(f"zero_proportion is {zero_proportion}; it must be above 0 and below 1, in float32.")
    if deviation is not None and not 0 < deviation < np.inf:
        raise ValueError(f"deviation is {deviation}; it must be above 0 and finite.")
    weights = _all_weights(params)
    if not weights.size:
        raise ValueError("params holds only kernels without elements; a mixture needs weights.")
    low, high = jnp.min(weights), jnp.max(weights)
    spread = (high - low) / (4 * components) if deviation is None else jnp.asarray(deviation, weights.dtype)
    return Mixture(
        means=jnp.linspace(low, high, components),
        log_precisions=jnp.full((components + 1,), -2 * jnp.log(spread)),
        logits=jnp.zeros((components,)),
        zero_proportion=zero_proportion,
    )


def mixture_nll(params: PyTree, mixture: Mixture) -> jax.Array:
    """-log p(weights, precisions) of all kernels in nats, up to a constant: a scalar [U17 eq. 2].

    Gamma hyper-priors keep the components from becoming infinitely narrow. Biases have no prior.

    Args:
      params: The params of a plain network.
      mixture: The prior of its weights.
    """
    weights = _all_weights(params)
    rows = -(-weights.size // _CHUNK)
    padded = jnp.zeros(rows * _CHUNK, weights.dtype).at[: weights.size].set(weights).reshape(rows, -1)
    is_weight = (jnp.arange(rows * _CHUNK) < weights.size).reshape(rows, -1)

    # All joint densities at once would take many times the memory of the weights. Each chunk fits the cache, and its densities are
    # computed again for the gradient.
    @jax.checkpoint
    def add_chunk(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        values, valid = chunk
        return total - jnp.sum(jnp.where(valid, special.logsumexp(mixture.log_joint(values), axis=0), 0)), None

    total, _ = jax.lax.scan(add_chunk, jnp.zeros(()), (padded, is_weight))
    for (shape, rate), log_precisions in (
        (_ZERO_GAMMA, mixture.log_precisions[:1]),
        (_OTHER_GAMMA, mixture.log_precisions[1:]),
    ):
        total -= jnp.sum((shape - 1) * log_precisions - rate * jnp.exp(log_precisions))
    return total


def collapse(
    params: PyTree, mixture: Mixture, *, closest: float = 1e-10
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Assigns every weight to the component that is most responsible for it. Weights of the component at zero are pruned.

    Equal components are merged first: while two components have a symmetric KL divergence below ``closest``, the closest pair becomes one
    component with the mean and the variance of both [U17 section 4.3].

    Args:
      params: The params of a plain network, retrained.
      mixture: The mixture that was retrained with it.
      closest: The smallest divergence between components that stay separate, in nats.

    Returns:
      Two dictionaries by layer name for ``reduce_to_levels``: the index of each weight's level, -1 where pruned, and the levels.
    """
    means, variances, proportions = _merge_components(
        np.array(mixture.all_means(), np.float64),
        np.exp(-np.asarray(mixture.log_precisions, np.float64)),
        np.exp(np.asarray(mixture.log_proportions(), np.float64)),
        closest,
    )

    def most_responsible(kernel: jax.Array) -> np.ndarray:
        best, component = np.full(kernel.shape, -np.inf), np.zeros(kernel.shape, np.int32)
        weights = np.asarray(kernel, np.float64)
        for number, (mean, variance, proportion) in enumerate(zip(means, variances, proportions, strict=True)):
            joint = np.log(proportion) - 0.5 * np.log(variance) - 0.5 * (weights - mean) ** 2 / variance
            component, best = np.where(joint > best, number, component), np.maximum(joint, best)
        return component

    # Component 0 lies at zero and has no level, so that level i is the mean of component i + 1.
    assignments = {name: most_responsible(kernel) - 1 for name, kernel in kernels_by_layer(params).items()}
    return assignments, dict.fromkeys(assignments, means[1:].astype(np.float32))


def _merge_components(
    means: np.ndarray, variances: np.ndarray, proportions: np.ndarray, closest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merges the closest pair of components until all pairs differ by ``closest``. Component 0 keeps the mean 0.

    The arrays are changed in place.
    """
    while len(means) > 2:
        squared = (means[:, None] - means) ** 2
        divergence = (variances[:, None] + squared) / variances + (variances + squared.T) / variances[:, None]
        divergence = divergence / 2 - 1
        divergence[np.diag_indices(len(means))] = np.inf
        first, second = np.unravel_index(np.argmin(divergence), divergence.shape)
        if divergence[first, second] >= closest:
            break
        first, second = sorted((first, second))
        pair = [first, second]
        weight = proportions[pair] / proportions[pair].sum()
        mean = 0.0 if first == 0 else weight @ means[pair]
        variances[first] = weight @ (variances[pair] + (means[pair] - mean) ** 2)
        means[first], proportions[first] = mean, proportions[pair].sum()
        means, variances, proportions = (np.delete(array, second) for array in (means, variances, proportions))
    return means, variances, proportions


def _all_weights(params: PyTree) -> jax.Array:
    return jnp.concatenate([kernel.ravel() for kernel in kernels_by_layer(params).values()])
