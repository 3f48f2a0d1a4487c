"""Where the magnitude of the weights lies: in the scales of the groups, or in the weights before scaling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, map_layers
from bcdl_jax.priors.posterior import Posterior, variational_layers


@jax.jit
def balance_scales(params: PyTree) -> PyTree:
    """Moves the magnitude of each group's weights into the group's scale, which leaves the weights in use as they are distributed.

    A weight is w = w~ z with the prior w~ ~ N(0, 1), see ``Posterior``. In a trained net, or a fresh one with many inputs, w is far smaller
    than 1, which costs several nats for every weight as long as z is near 1. Here z becomes as large as the weights of its group, and those
    get a mean square of 1: of all ways to share the magnitude between the two the one of lowest KL under the normal-Jeffreys prior, to
    which the magnitude of z makes no difference. Training gets there too, but slowly in networks of wide layers.

    A horseshoe's log dropout rates grow by minus the logarithm of what its scales grow by: thresholds for scales that start at 1, as the
    family's own one is, do not fit then.

    The optimiser then moves weights near 1, and scales far below it: the former want steps several times larger, the latter smaller
    (``scale_by_kind({"scale_mean": 0.02})``), unless they are learned as logarithms, as those of the horseshoe are. A limit of variances,
    ``clip_var``, is one of weights near 1 then.

    Args:
      params: with variational layers. Those whose family has no scales stay as they are, as does what is pruned.

    Returns:
      params of the same structure.

    Raises:
      ValueError: the tree holds no variational layer.
    """
    variational_layers(params)
    return map_layers(_balanced, params, Posterior)


def _balanced(layer: Posterior) -> Posterior:
    window = tuple(range(layer.kernel_mean.ndim - 2))
    others = (*window, -1 if layer.group_axis == "input" else -2)
    mask = jnp.broadcast_to(layer.kernel_mask, layer.kernel_shape)
    total = jnp.sum(jnp.where(mask, _mean_square(layer.kernel_mean, layer.kernel_log_variance), 0), others)
    count = jnp.sum(mask, others)
    if layer.group_axis == "output" and layer.bias_mean is not None and layer.bias_log_variance is not None:
        total += _mean_square(layer.bias_mean, layer.bias_log_variance)
        count += 1
    in_use = (layer.group_mask > 0) & (count > 0)
    return layer.with_scales_times(jnp.where(in_use, jnp.sqrt(total / jnp.maximum(count, 1)), 1))


def _mean_square(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    return mean**2 + jnp.exp(log_variance)
