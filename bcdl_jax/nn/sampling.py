"""What a variational layer computes: pure functions of (posterior, inputs, key).

Sampling uses the local reparametrisation trick [Kingma et al. 2015, section 2.2]: the noise is drawn for the outputs, not for the weights.
An *example* is an entry of the leading axis of the inputs; further leading axes (time, positions) share the example's group scales.

The noise of example i depends on the key and on i alone, see ``noise``: not on the batch size, nor on how the batch is
spread over devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax.nn.linear_maps import LinearMap
from bcdl_jax.priors.noise import example_normal
from bcdl_jax.priors.posterior import Posterior, WeightsNode

# Keeps the derivative of sqrt finite where the variance vanishes.
_VARIANCE_FLOOR = 1e-8


def apply_mean(node: WeightsNode, inputs: jax.Array, linear_map: LinearMap) -> jax.Array:
    """The layer at its mean weights.

    Args:
      node: the posterior of a layer, or the quantised layer.
      inputs: [examples, ..., in].
      linear_map: the layer's product of inputs and kernel.

    Returns:
      [examples, ..., out]; exactly zero for pruned outputs.
    """
    kernel, bias = node.mean_weights()
    outputs = linear_map(_masked(inputs, node.input_mask), kernel.astype(inputs.dtype))
    return outputs if bias is None else outputs + bias.astype(inputs.dtype)


def apply_sampled(posterior: Posterior, inputs: jax.Array, key: jax.Array, linear_map: LinearMap) -> jax.Array:
    """The layer with sampled weights and scales.

    With x the inputs, W and S the means and variances of the kernel, b and s those of the bias, one z per example and group, and standard
    normal e per output:

      input groups (dense):          h = (xz) W + b + e sqrt((xz)^2 S + s)            [L17 eq. 9]
      output groups (convolution):   h = z (conv(x, W) + b + e sqrt(conv(x^2, S) + s))

    The noise of a convolution is independent per position, as usual, so that it has the right distribution at each position but not jointly.

    Args:
      posterior: of one layer.
      inputs: [examples, ..., in].
      key: a PRNG key.
      linear_map: the layer's product of inputs and kernel.

    Returns:
      [examples, ..., out]; exactly zero for pruned outputs.
    """
    dtype = inputs.dtype
    scale_key, noise_key = jax.random.split(key)
    scale = posterior.sample_scale(scale_key, inputs.shape[0]).astype(dtype)
    scale = scale.reshape(inputs.shape[0], *(1,) * (inputs.ndim - 2), scale.shape[-1])
    if posterior.group_axis == "input":
        inputs = inputs * scale
    inputs = _masked(inputs, posterior.input_mask)
    kernel_mean, kernel_variance = posterior.sampled_moments()
    mean, variance, order = linear_map.moments(inputs, kernel_mean.astype(dtype), kernel_variance.astype(dtype))

    def ordered(values: jax.Array) -> jax.Array:
        """What broadcasts against the outputs in the usual order of their axes, for the order of the moments."""
        return values.reshape((1,) * (len(order) - values.ndim) + values.shape).transpose(order)

    if posterior.bias_mean is not None and posterior.bias_log_variance is not None:
        mean += ordered(posterior.bias_mean.astype(dtype))
        variance += ordered(jnp.exp(posterior.bias_log_variance).astype(dtype))
    outputs = mean + _deviation(variance) * example_normal(noise_key, mean.shape, dtype, order)
    if posterior.group_axis == "output":
        outputs = outputs * ordered(scale)
    return _masked(outputs, ordered(posterior.output_mask)).transpose(np.argsort(order))


def _deviation(variance: jax.Array) -> jax.Array:
    """The square root, with finite derivatives; exactly zero where there is no variance at all."""
    wide = variance.astype(jnp.promote_types(variance.dtype, jnp.float32))
    return jnp.where(wide > 0, jnp.sqrt(jnp.maximum(wide, 0) + _VARIANCE_FLOOR), 0).astype(variance.dtype)


def _masked(array: jax.Array, mask: jax.Array) -> jax.Array:
    """Zero where the mask is not positive, also where the array is not finite."""
    return jnp.where(mask > 0, array, 0)
