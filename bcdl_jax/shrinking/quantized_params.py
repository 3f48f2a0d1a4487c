"""Small functions of variational layers that also take quantised layers, so that a shrunk network can be rounded, saved and applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, layer_name, map_layers
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.compression.plain_twin import with_mean_weights
from bcdl_jax.compression.quantized_layer import QuantizedLayer
from bcdl_jax.priors.posterior import Posterior, array_kinds


def takes_quantized_layers(small_apply: Callable[..., PyTree], small_params: PyTree) -> Callable[..., PyTree]:
    """The small function for params in which a quantised layer may stand in place of each posterior.

    Args:
      small_apply: The small function ``small_apply(small_params, *inputs)``.
      small_params: The small params.
    """
    if not any(isinstance(node, Posterior) for node in jax.tree.leaves(small_params, is_leaf=is_layer)):
        return small_apply
    noiseless = map_layers(_without_noise, small_params, Posterior)

    def posterior(path: tuple[Any, ...], own: Any, given: Any) -> Any:
        if not isinstance(own, Posterior) or not isinstance(given, QuantizedLayer):
            return given
        if given.kernel_shape != own.kernel_shape:
            raise ValueError(
                f"small_params has layer {layer_name(path)} with kernel shape {given.kernel_shape}; it must be {own.kernel_shape}."
            )
        convert = _with_weights_of
        for _ in range(own.input_mask.ndim - 1):  # Several layers, stacked.
            convert = jax.vmap(convert)
        return convert(own, given)

    def apply(params: PyTree, *inputs: PyTree) -> PyTree:
        if any(isinstance(node, QuantizedLayer) for node in jax.tree.leaves(params, is_leaf=is_layer)):
            params = jax.tree_util.tree_map_with_path(posterior, noiseless, params, is_leaf=is_layer)
        return small_apply(params, *inputs)

    return apply


def _without_noise(layer: Posterior) -> Posterior:
    """The posterior with variances of 0, since a quantised layer has no noise."""
    fields = {name: getattr(layer, name) for name, kind in array_kinds(layer).items() if kind == "log_variance"}
    return layer.replace(
        **{name: jnp.full_like(array, -jnp.inf) for name, array in fields.items() if array is not None}
    )


def _with_weights_of(posterior: Posterior, layer: QuantizedLayer) -> Posterior:
    kernel, bias = layer.mean_weights()
    dtype = posterior.dtype
    result = with_mean_weights(posterior, kernel.astype(dtype), None if bias is None else bias.astype(dtype))
    # A scale of 0 has weights of 0.
    return result.replace(kernel_mean=jnp.where(kernel == 0, 0, result.kernel_mean))
