"""From a trained deterministic network to a variational one, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, check_not_stacked, layer_name, path_name, plain_layers
from bcdl_jax.compression.quantization import QuantizedLayer
from bcdl_jax.priors.posterior import Posterior, variational_layers


def from_trained(params: PyTree, trained: PyTree) -> PyTree:
    """Variational params whose means are a trained net's weights.

    The posterior means are set such that the mean network computes what the trained one does: the kernel (and the bias of a convolution) is
    divided by the mean of its group scale. Everything else, such as variances, stays as in ``params``.

    Args:
      params: fresh params of the variational network, from ``model.init``.
      trained: params of its deterministic twin: the same tree with ``{"kernel": ..., "bias": ...}`` in place of each variational layer.
        ``{"Dense_0/kernel": ...}``, with paths as keys, works too.

    Returns:
      A tree like ``params``. Parameters that have no posterior are copied from ``trained``.

    Raises:
      ValueError: ``trained`` lacks an array, has one too many, or one of another shape; the path is named. Or a layer of ``params`` is
        several, stacked.
    """
    given = _flatten(trained)
    used: set[str] = set()

    def take(path: str, like: jax.Array) -> jax.Array:
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
    """The weights of the deterministic twin, built of plain layers such as ``flax.linen.Dense`` and ``Conv``.

    Args:
      params: a tree with variational layers, pruned or not, or with layers of reduced precision. Other parameters stay as they are.

    Returns:
      The tree with ``{"kernel": ..., "bias": ...}`` in place of each such layer: posterior means, or the rounded weights; zero where
      pruned, so that ``shrink`` can cut the twin.

    Raises:
      ValueError: a variational layer was shrunk, and so has lost what its moments need.
    """

    def weights(layer: Any) -> dict[str, jax.Array]:
        if (
            isinstance(layer, Posterior)
            and 0 in [leaf.size for leaf in jax.tree.leaves(layer)]
            and layer.kernel_mean.size
        ):
            raise ValueError(
                "params hold a variational layer that was shrunk; take mean_weights first, and shrink the twin."
            )
        kernel, bias = layer.mean_weights()
        return {"kernel": kernel} | ({} if bias is None else {"bias": bias})

    return plain_layers(weights, params, (Posterior, QuantizedLayer))


@jax.jit
def weight_variances(params: PyTree) -> PyTree:
    """Posterior variances of the weights of the plain twin, a tree like that of ``mean_weights``.

    Args:
      params: A tree with variational layers, pruned or not. Other parameters have variance 0.

    Returns:
      The tree with ``{"kernel": ..., "bias": ...}`` in place of each variational layer: variances of kernel * scale, zero where pruned.

    Raises:
      ValueError: The tree holds no variational layer.
    """
    variational_layers(params)

    def variances(posterior: Posterior) -> dict[str, jax.Array]:
        bias = posterior.bias_moments()
        return {"kernel": posterior.kernel_moments()[1]} | ({} if bias is None else {"bias": bias[1]})

    return plain_layers(variances, params, Posterior, jnp.zeros_like)


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Arrays by path, joined by "/"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, Mapping | list | tuple):
            flat |= {f"{key}/{path}": array for path, array in _flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat
