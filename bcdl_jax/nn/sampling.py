"""The forward pass of a variational layer, as pure functions of (posterior, inputs, key).

Sampling uses the local reparametrisation trick [K15 section 2.2]: the noise is drawn for the outputs, not for the weights. An *example* is an
entry of the leading axis of the inputs. Further leading axes (time, positions) share the example's group scales.

The noise of example i depends on the key and on i alone, see ``priors.noise``. It depends neither on the batch size nor on the way in which the
batch is divided among devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax._arrays import in_float32, is_kept, of_rank
from bcdl_jax.nn.linear_maps import LinearMap
from bcdl_jax.priors.noise import example_normal
from bcdl_jax.priors.posterior import Posterior, WeightsNode

# Keeps the derivative of sqrt finite where the variance vanishes.
_VARIANCE_FLOOR = 1e-8


def apply_mean(node: WeightsNode, inputs: jax.Array, linear_map: LinearMap) -> jax.Array:
    """Applies the layer with its mean weights.

    Args:
      node: The posterior of a layer, or a quantised layer.
      inputs: The inputs, [examples, ..., in].
      linear_map: The layer's product of inputs and kernel.

    Returns:
      The outputs, [examples, ..., out], exactly zero for pruned ones.
    """
    kernel, bias = node.mean_weights()
    outputs = linear_map(_masked(inputs, node.input_mask), kernel.astype(inputs.dtype))
    return outputs if bias is None else outputs + of_rank(bias.astype(inputs.dtype), outputs.ndim)


def apply_sampled(posterior: Posterior, inputs: jax.Array, key: jax.Array, linear_map: LinearMap) -> jax.Array:
    """Applies the layer with sampled weights and scales.

    x are the inputs, W and S the means and variances of the kernel, b and s the means and variances of the bias. There is one z per example
    and group, and one standard normal e per output:

      input groups (dense):          h = (xz) W + b + e sqrt((xz)^2 S + s)            [L17 eq. 9]
      output groups (convolution):   h = z (conv(x, W) + b + e sqrt(conv(x^2, S) + s))

    The noise e of a convolution is independent at each position. So the outputs have the exact distribution at each position, but not the exact
    covariance between positions.

    Args:
      posterior: The posterior of the layer.
      inputs: The inputs, [examples, ..., in].
      key: A PRNG key.
      linear_map: The layer's product of inputs and kernel.

    Returns:
      The outputs, [examples, ..., out], exactly zero for pruned ones.
    """
    scale_key, noise_key = jax.random.split(key)
    scale = posterior.in_float32().sample_scale(scale_key, inputs.shape[0])
    return sample_outputs(posterior, inputs, scale, noise_key, linear_map)


def sample_outputs(
    posterior: Posterior, inputs: jax.Array, scale: jax.Array, noise_key: jax.Array, linear_map: LinearMap
) -> jax.Array:
    """``apply_sampled`` with sampled scales [examples, groups] and the key for the noise of the outputs. Products can so share their scales."""
    dtype = inputs.dtype
    posterior = posterior.in_float32()
    scale = scale.astype(dtype).reshape(inputs.shape[0], *(1,) * (inputs.ndim - 2), scale.shape[-1])
    if posterior.group_axis == "input":
        inputs = inputs * scale
    inputs = _masked(inputs, posterior.input_mask)
    kernel_mean, kernel_variance = posterior.sampled_moments()
    moments = linear_map.moments(inputs, kernel_mean.astype(dtype), kernel_variance.astype(dtype))
    mean, variance, order = moments
    if posterior.bias_mean is not None and posterior.bias_log_variance is not None:
        mean += moments.in_order(posterior.bias_mean.astype(dtype))
        variance += moments.in_order(jnp.exp(posterior.bias_log_variance).astype(dtype))
    outputs = mean + _deviation(variance) * example_normal(noise_key, mean.shape, dtype, order)
    if posterior.group_axis == "output":
        outputs = outputs * moments.in_order(scale)
    return moments.restored(_masked(outputs, moments.in_order(posterior.output_mask)))


def sample_rows(mean: jax.Array, variance: jax.Array, scale: jax.Array, noise_key: jax.Array) -> jax.Array:
    """Samples rows of a table whose columns are groups.

    M and S are means and variances of the rows that each example reads. There is one z per example and column, and one standard normal e per
    element: h = z (M + e sqrt(S)). A row that an example reads twice has the exact distribution at each place, with independent e.

    Args:
      mean: The means of the rows, [examples, ..., columns].
      variance: Their variances, of the same shape.
      scale: The sampled scales, [examples, columns].
      noise_key: A PRNG key.

    Returns:
      The rows, of the shape of ``mean``.
    """
    scale = scale.astype(mean.dtype).reshape(mean.shape[0], *(1,) * (mean.ndim - 2), mean.shape[-1])
    return scale * (mean + _deviation(variance) * example_normal(noise_key, mean.shape, mean.dtype))


def _deviation(variance: jax.Array) -> jax.Array:
    """The standard deviation, with finite derivatives. It is exactly zero where the variance is zero."""
    wide = in_float32(variance)
    return jnp.where(wide > 0, jnp.sqrt(jnp.maximum(wide, 0) + _VARIANCE_FLOOR), 0).astype(variance.dtype)


def _masked(array: jax.Array, mask: jax.Array) -> jax.Array:
    """The array with exact zeros where the mask is not positive, even if the array is not finite there."""
    return jnp.where(of_rank(is_kept(mask), array.ndim), array, 0)
