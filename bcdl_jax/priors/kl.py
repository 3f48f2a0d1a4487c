"""The KL divergence of a whole network from its priors. It needs only the params tree, and no forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, find_layers, map_layers, takes_arrays
from bcdl_jax.priors.posterior import Posterior, variational_layers


@takes_arrays
@jax.jit
def kl_divergence_per_layer(params: PyTree) -> dict[str, jax.Array]:
    """KL(q || prior) of each variational layer in nats, over the kept weights and groups.

    Args:
      params: A tree with variational layers.

    Returns:
      A scalar for each layer, by layer name, of float32 at least.

    Raises:
      ValueError: The tree holds no variational layer, or a posterior returns a KL divergence that is no scalar.
    """
    per_layer = {name: posterior.in_float32().kl_divergence() for name, posterior in variational_layers(params).items()}
    for name, value in per_layer.items():
        if jnp.shape(value):
            raise ValueError(
                f"The KL divergence of layer {name} has shape {jnp.shape(value)}; the posterior must return a scalar."
            )
    return per_layer


@takes_arrays
@jax.jit
def kl_divergence(params: PyTree) -> jax.Array:
    """KL(q || prior) in nats, summed over all variational layers of the tree.

    Args:
      params: A tree with variational layers.

    Returns:
      A scalar of float32 at least.

    Raises:
      ValueError: The tree holds no variational layer.
    """
    return sum(kl_divergence_per_layer(params).values(), start=jnp.zeros(()))


@takes_arrays
@jax.jit
def clip_variances(params: PyTree) -> PyTree:
    """Reduces the variances of every layer to at most its family's ``clip_var``. Call it after each optimiser step.

    Args:
      params: A tree with variational layers, stacked or not.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: The tree holds no variational layer.
    """
    find_layers(params, Posterior)
    return map_layers(lambda posterior: posterior.clip_variances(), params, Posterior)
