"""The KL divergence of a whole network, and other quantities that need its params tree alone, no forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax.posterior import Posterior, PyTree, find_layers, map_layers, plain_layers, posteriors


@jax.jit
def kl_divergence_per_layer(params: PyTree) -> dict[str, jax.Array]:
    """KL(q || prior) in nats of each variational layer, over what is not pruned.

    Raises:
      ValueError: the tree holds no variational layer.
    """
    return {name: posterior.kl_divergence() for name, posterior in posteriors(params).items()}


@jax.jit
def kl_divergence(params: PyTree) -> jax.Array:
    """KL(q || prior) in nats, summed over all variational layers of the tree: a scalar.

    Raises:
      ValueError: the tree holds no variational layer.
    """
    return sum(kl_divergence_per_layer(params).values(), start=jnp.zeros(()))


@jax.jit
def log_dropout_rates(params: PyTree) -> dict[str, jax.Array]:
    """The pruning score of every group, [groups] by layer name; a group is worth keeping while its score is low."""
    return {name: posterior.log_dropout_rate() for name, posterior in posteriors(params).items()}


@jax.jit
def posterior_moments(params: PyTree) -> tuple[PyTree, PyTree]:
    """Means and variances of the weights in use (kernel * scale, zero where pruned).

    Returns:
      Two trees like that of the network's deterministic twin: each variational layer has become ``{"kernel": ..., "bias": ...}``. Parameters
      that have no posterior are their own mean, with variance 0. The first tree is what ``flax.linen.Dense`` and ``Conv`` run on.
    """
    posteriors(params)

    def moment(index: int) -> PyTree:
        def weights(posterior: Posterior) -> dict[str, jax.Array]:
            bias = posterior.bias_moments()
            return {"kernel": posterior.kernel_moments()[index]} | ({} if bias is None else {"bias": bias[index]})

        return plain_layers(weights, params, Posterior, (lambda leaf: leaf) if index == 0 else jnp.zeros_like)

    return moment(0), moment(1)


@jax.jit
def clip_variances(params: PyTree) -> PyTree:
    """Brings the variances of every layer, stacked or not, down to its family's limit; to be called after each optimiser step.

    Raises:
      ValueError: the tree holds no variational layer.
    """
    find_layers(params, Posterior)
    return map_layers(lambda posterior: posterior.clip_variances(), params, Posterior)  # type: ignore[type-abstract]
