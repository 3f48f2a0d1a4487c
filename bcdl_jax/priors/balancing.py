"""Moving the magnitude of the weights from the weights before scaling to the scales of the groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, map_layers, takes_arrays
from bcdl_jax.priors.posterior import Posterior, variational_layers


@takes_arrays
@jax.jit
def balance_scales(params: PyTree) -> PyTree:
    """Moves the magnitude of each group's weights into the group's scale. The weights in use keep their distribution.

    A weight is w = w~ z with the prior w~ ~ N(0, 1), see ``Posterior``. In a trained network, and in a fresh one with many inputs, w is far
    smaller than 1. As long as z is near 1, this costs several nats for every weight. This function multiplies z by the root mean square of
    the weights w~ of its group, and divides w~ by it. Under the normal-Jeffreys prior the magnitude of z costs nothing, so that no other
    division of the magnitude has a lower KL. Training finds this division too, but slowly in networks with wide layers.

    The call changes the meaning of three settings:

    Thresholds: If the scales of a horseshoe grow by a factor, its log dropout rates fall by the logarithm of that factor. Thresholds for
      scales that start at 1, such as the default threshold, do not fit any more.
    Learning rates: The weights w~ are now near 1, and the scales far below 1. The weights need steps several times as large, and the scales
      smaller ones (``train.scale_by_kind({"scale": 0.02})``). The horseshoe learns the logarithms of its scales and needs no smaller steps.
    ``clip_var``: It limits the variance of w~, whose mean square is now 1.

    Args:
      params: A tree with variational layers. Layers without scales and pruned groups stay as they are.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: The tree holds no variational layer.
    """
    variational_layers(params)

    def balanced(layer: Posterior) -> Posterior:
        return jax.tree.map(lambda new, old: new.astype(old.dtype), _balanced(layer.in_float32()), layer)

    return map_layers(balanced, params, Posterior)


def _balanced(layer: Posterior) -> Posterior:
    window = tuple(range(layer.kernel_mean.ndim - 2))
    others = (*window, -1 if layer.group_axis == "input" else -2)
    mask = jnp.broadcast_to(layer.kernel_mask, layer.kernel_shape)
    total = jnp.sum(jnp.where(mask, _mean_square(layer.kernel_mean, layer.kernel_log_variance), 0), others)
    count = jnp.sum(mask, others).astype(total.dtype)
    if layer.group_axis == "output" and layer.bias_mean is not None and layer.bias_log_variance is not None:
        total += _mean_square(layer.bias_mean, layer.bias_log_variance)
        count += 1
    in_use = (layer.group_mask > 0) & (count > 0)
    return layer.with_scales_times(jnp.where(in_use, jnp.sqrt(total / jnp.maximum(count, 1)), 1))


def _mean_square(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    return mean**2 + jnp.exp(log_variance)
