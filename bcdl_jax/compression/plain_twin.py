"""Conversions between a variational network and its plain twin, a deterministic network with the same layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, check_not_stacked, layer_name, path_name, plain_layers
from bcdl_jax.compression.layers import LAYER_TYPES, is_layer
from bcdl_jax.priors.posterior import Posterior, variational_layers


def from_trained(params: PyTree, trained: PyTree) -> PyTree:
    """Sets the posterior means of a variational network to the weights of a trained plain network.

    The network with mean weights then computes the same outputs as the trained one. For this, the kernel (and the bias of a convolution) is
    divided by the mean of its group scale. Variances and scales stay as in ``params``.

    Args:
      params: The params of the variational network, from ``model.init``.
      trained: The params of the plain twin: the same tree with ``{"kernel": ..., "bias": ...}`` in place of each variational layer, or a flat
        mapping whose keys are paths, ``{"Dense_0/kernel": ...}``.

    Returns:
      A tree like ``params``. Parameters without a posterior are copied from ``trained``.

    Raises:
      ValueError: ``params`` holds no variational layer, or a node of several stacked layers. ``trained`` holds a variational layer, lacks an
        array, has an extra array, or has an array of another shape; the error names its path.
    """
    variational_layers(params)
    if any(isinstance(node, Posterior) for node in jax.tree.leaves(trained, is_leaf=is_layer)):
        raise ValueError("trained holds variational layers; it must be the params of a plain network, and come second.")
    given = _flatten(trained)
    used: set[str] = set()

    def take(path: str, like: jax.Array) -> jax.Array:
        if f"params/{path}" in given:
            raise ValueError(f'trained holds params/{path}, where {path} is needed; pass its entry "params".')
        if path not in given:
            raise ValueError(
                f"The trained net lacks {path}, which must have shape {jnp.shape(like)}; it holds {', '.join(given) or 'nothing'}."
            )
        if jnp.shape(given[path]) != jnp.shape(like):
            raise ValueError(
                f"{path} of the trained net has shape {jnp.shape(given[path])}; it must have {jnp.shape(like)}."
            )
        used.add(path)
        return jnp.asarray(given[path], jnp.result_type(like))

    def fill(path: Any, node: Any) -> Any:
        if not isinstance(node, Posterior):
            return take(path_name(path), node)
        check_not_stacked(layer_name(path), node)
        prefix = path_name(path[:-1]) + "/" if len(path) > 1 else ""
        scale = node.scale_moments()[0]
        kernel = take(prefix + "kernel", node.kernel_mean) / node.spread_over_kernel(scale)
        bias = None if node.bias_mean is None else take(prefix + "bias", node.bias_mean)
        if bias is not None and node.group_axis == "output":
            bias = bias / scale
        return node.replace(kernel_mean=kernel, bias_mean=bias)

    filled = jax.tree_util.tree_map_with_path(fill, params, is_leaf=lambda node: isinstance(node, Posterior))
    if extra := sorted(set(given) - used):
        raise ValueError(f"The trained net holds {', '.join(extra)}, which this network does not have.")
    return filled


def mean_weights(params: PyTree) -> PyTree:
    """The params of the plain twin, a network of layers such as ``flax.linen.Dense`` and ``Conv``.

    Args:
      params: A tree with variational layers, pruned or not, or with quantised layers. Other parameters stay as they are.

    Returns:
      The tree with ``{"kernel": ..., "bias": ...}`` in place of each such layer: the posterior means or the rounded weights, exactly zero
      where pruned, so that ``shrink`` can cut the twin.

    Raises:
      ValueError: A variational layer was shrunk, which removes arrays that its moments need.
    """

    def weights(layer: Any) -> dict[str, jax.Array]:
        if (
            isinstance(layer, Posterior)
            and 0 in [leaf.size for leaf in jax.tree.leaves(layer)]
            and layer.kernel_mean.size
        ):
            raise ValueError(
                "params holds a variational layer that was shrunk; take mean_weights first, then shrink the plain twin."
            )
        kernel, bias = layer.mean_weights()
        return {"kernel": kernel} | ({} if bias is None else {"bias": bias})

    return plain_layers(weights, params, LAYER_TYPES)


@jax.jit
def weight_variances(params: PyTree) -> PyTree:
    """The posterior variances of the params of the plain twin, in a tree with the structure of ``mean_weights(params)``.

    Args:
      params: A tree with variational layers, pruned or not. Other parameters have variance 0.

    Returns:
      The tree with ``{"kernel": ..., "bias": ...}`` in place of each variational layer: the variances of the weights and biases in use,
      zero where pruned.

    Raises:
      ValueError: The tree holds no variational layer.
    """
    variational_layers(params)

    def variances(posterior: Posterior) -> dict[str, jax.Array]:
        bias = posterior.bias_moments()
        return {"kernel": posterior.kernel_moments()[1]} | ({} if bias is None else {"bias": bias[1]})

    return plain_layers(variances, params, Posterior, jnp.zeros_like)


def _flatten(tree: PyTree) -> dict[str, Any]:
    """The arrays of a nested tree by their paths, joined by "/"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, Mapping | list | tuple):
            flat |= {f"{key}/{path}": array for path, array in _flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat
