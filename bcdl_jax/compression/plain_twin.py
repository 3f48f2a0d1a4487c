"""Conversions between a variational network and its plain twin, a deterministic network with the same layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import (
    PyTree,
    check_arrays,
    check_not_stacked,
    layer_name,
    named_arrays,
    path_name,
    plain_layers,
    takes_arrays,
)
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
        array, has an extra array, or has an array of another shape or with values that are not finite; the error names its path.
    """
    variational_layers(params)
    check_arrays(trained, "trained")
    if any(isinstance(node, Posterior) for node in jax.tree.leaves(trained, is_leaf=is_layer)):
        raise ValueError("trained holds variational layers; it must be the params of a plain network, and come second.")
    given = dict(named_arrays(trained))
    used: set[str] = set()

    def take(path: str, like: jax.Array) -> jax.Array:
        if f"params/{path}" in given:
            raise ValueError(f'trained holds params/{path}, where {path} is needed; pass its entry "params".')
        if path not in given:
            raise ValueError(
                f"trained lacks {path}, which must have shape {jnp.shape(like)}; it holds {', '.join(given) or 'nothing'}."
            )
        if jnp.shape(given[path]) != jnp.shape(like):
            raise ValueError(f"{path} of trained has shape {jnp.shape(given[path])}; it must have {jnp.shape(like)}.")
        used.add(path)
        check_finite(path, given[path], jnp.result_type(like), "trained")
        return jnp.asarray(given[path], jnp.result_type(like))

    def fill(path: Any, node: Any) -> Any:
        if not isinstance(node, Posterior):
            return take(path_name(path), node)
        check_not_stacked(layer_name(path), node)
        prefix = path_name(path[:-1]) + "/" if len(path) > 1 else ""
        kernel = take(prefix + "kernel", node.kernel_mean)
        bias = None if node.bias_mean is None else take(prefix + "bias", node.bias_mean)
        return with_mean_weights(node, kernel, bias)

    filled = jax.tree_util.tree_map_with_path(fill, params, is_leaf=lambda node: isinstance(node, Posterior))
    if extra := sorted(set(given) - used):
        raise ValueError(f"trained holds {', '.join(extra)}, which params does not have.")
    return filled


def check_finite(path: str, array: Any, dtype: Any, argument: str) -> None:
    """Raises ValueError if a known array at a path of an argument holds a value that is not finite in this dtype."""
    if isinstance(array, jax.core.Tracer) or not jnp.issubdtype(dtype, jnp.inexact):
        return
    with np.errstate(over="ignore"):
        bad = int(np.sum(~np.isfinite(np.asarray(array).astype(dtype))))
    if bad:
        raise ValueError(
            f"{path} of {argument} holds {bad:,} values that are not finite in {dtype}; a network starts from finite weights."
        )


def with_mean_weights(posterior: Posterior, kernel: jax.Array, bias: jax.Array | None) -> Posterior:
    """The posterior whose mean weights are these, where it keeps them. They are divided by the means of their scales."""
    scale = posterior.scale_moments()[0]
    if bias is not None and posterior.group_axis == "output":
        bias = bias / scale
    return posterior.replace(kernel_mean=kernel / posterior.spread_over_kernel(scale), bias_mean=bias)


def mean_weights(params: PyTree) -> PyTree:
    """The params of the plain twin, a network of layers such as ``flax.linen.Dense`` and ``Conv``.

    For the params of ``bcdl_jax.variational``, use ``VariationalModel.mean_params``.

    Args:
      params: A tree with variational layers, pruned or not, or with quantised layers. Other parameters stay as they are.

    Returns:
      The tree with ``{"kernel": ..., "bias": ...}`` in place of each such layer: the posterior means or the rounded weights, exactly zero
      where pruned, so that ``shrink`` can cut the twin.

    Raises:
      ValueError: A node holds several stacked layers, or a leaf of the tree is not an array.
    """
    check_arrays(params)

    def weights(layer: Any) -> dict[str, jax.Array]:
        kernel, bias = layer.mean_weights()
        return {"kernel": kernel} | ({} if bias is None else {"bias": bias})

    return plain_layers(weights, params, LAYER_TYPES)


@takes_arrays
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
        wide = posterior.in_float32()
        bias = wide.bias_moments()
        return {"kernel": wide.kernel_moments()[1]} | ({} if bias is None else {"bias": bias[1]})

    return plain_layers(variances, params, Posterior, jnp.zeros_like)
