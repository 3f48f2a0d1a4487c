"""How much smaller: compression rates of a pruned or quantised params tree against the float32 network."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, find_single_layers
from bcdl_jax.compression.quantization import QuantizedLayer
from bcdl_jax.priors.posterior import Posterior

_FLOAT_BITS = 32


@jax.jit
def rate_paper(params: PyTree) -> jax.Array:
    """The paper's rate: bits of all weights in float32 / bits of the kept weights [L17 section 4.2].

    Counts kernels only. A kept weight takes 32 bits after pruning and its layer's bits after precision reduction; where weights were pruned
    one by one, as many bits more for its index. So the paper charges methods without groups, as far as its table tells: twice the bits after
    pruning, and a quarter of that after precision reduction, which indices of 32 bits would not allow. Infinite if nothing is kept, never NaN.

    Args:
      params: tree with variational_layers or quantised layers.

    Raises:
      ValueError: there are neither.
    """
    layers = _layers(params).values()
    # A Python float: the bits of a large network exceed 32-bit integers.
    before = float(sum(math.prod(layer.kernel_shape) for layer in layers)) * _FLOAT_BITS
    after = jnp.stack([_kernel_bits(layer) + _index_bits(layer) for layer in layers]).sum()
    return before / after


@jax.jit
def rate_paper_maximum(params: PyTree) -> jax.Array:
    """The paper's maximum rate: bits of all weights in float32 / those of the kept weights under an ideal entropy code [L17 section 4.2].

    The steps, or levels, of a layer are its clusters. A kept weight takes the entropy of its layer's clusters, in bits; where weights were
    pruned one by one, the positions take the entropy of kept or not for every weight. As in the paper's estimate, kernels alone are counted, and
    neither code tables nor steps; the real size is that of the file. Infinite if nothing is kept.

    Args:
      params: tree with quantised layers.

    Raises:
      ValueError: there are none.
    """
    layers = find_single_layers(params, QuantizedLayer).values()
    before = float(sum(math.prod(layer.kernel_shape) for layer in layers)) * _FLOAT_BITS
    return before / jnp.stack([_entropy_bits(layer) for layer in layers]).sum()


def _entropy_bits(layer: QuantizedLayer) -> jax.Array:
    integers = layer.kernel.astype(jnp.int32)
    kept = jnp.broadcast_to(layer.kernel_mask, integers.shape)
    if layer.prunes_weights:
        kept = kept & (integers != 0)
    counts = jnp.bincount((integers + 2**15).ravel(), weights=kept.ravel().astype(jnp.float32), length=2**16)
    bits = _entropy(counts)
    if layer.prunes_weights:
        number = jnp.sum(counts)
        bits += _entropy(jnp.stack([number, integers.size - number]))
    return bits


def _entropy(counts: jax.Array) -> jax.Array:
    """Of as many symbols, together, in bits."""
    total = jnp.sum(counts)
    shares = jnp.where(counts > 0, counts, 1) / jnp.maximum(total, 1)
    return jnp.sum(jnp.where(counts > 0, -counts * jnp.log2(shares), 0))


@jax.jit
def rate(params: PyTree) -> jax.Array:
    """The rate with everything counted: bits of all parameters in float32 / bits of all that must be stored.

    Stored are the kept weights and biases at their layer's bits (32 after pruning alone), one 32-bit step, or the levels, for each quantised array, one bit
    per group for the set of kept groups of every layer that lost any, and parameters outside the variational layers at 32 bits. Where
    weights were pruned one by one, their set takes one bit per weight, or 32 bits per kept weight if that is less.

    Args:
      params: tree with variational_layers or quantised layers.

    Raises:
      ValueError: there are neither.
    """
    layers = _layers(params).values()
    outside = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_layer) if not _is_layer(leaf)]
    others = float(sum(jnp.size(leaf) for leaf in outside)) * _FLOAT_BITS
    before = others + float(sum(math.prod(layer.kernel_shape) + _bias_size(layer) for layer in layers)) * _FLOAT_BITS
    after = (
        others + jnp.stack([_kernel_bits(layer) + _bias_bits(layer) + _overhead_bits(layer) for layer in layers]).sum()
    )
    return before / after


@jax.jit
def layer_bits(params: PyTree) -> dict[str, jax.Array]:
    """Bits per kept weight of each layer, int32 by layer name."""
    return {name: jnp.asarray(_bits(layer), jnp.int32) for name, layer in _layers(params).items()}


Layer = Posterior | QuantizedLayer


def _is_layer(node: Any) -> bool:
    return isinstance(node, Posterior | QuantizedLayer)


def _layers(params: PyTree) -> dict[str, Layer]:
    return find_single_layers(params, (Posterior, QuantizedLayer))


def _bits(layer: Layer) -> jax.Array | int:
    return layer.kernel_bits if isinstance(layer, QuantizedLayer) else _FLOAT_BITS


def _kernel_bits(layer: Layer) -> jax.Array:
    return layer.kept_weights() * _bits(layer)


def _index_bits(layer: Layer) -> jax.Array | int:
    if not layer.prunes_weights:
        return 0
    kept = layer.kept_weights()
    return jnp.where(kept < math.prod(layer.kernel_shape), kept * _bits(layer), 0)


def _bias_size(layer: Layer) -> int:
    bias = layer.bias if isinstance(layer, QuantizedLayer) else layer.bias_mean
    return 0 if bias is None else bias.size


def _bias_bits(layer: Layer) -> jax.Array | int:
    if not _bias_size(layer):
        return 0
    bits: Any = layer.bias_bits if isinstance(layer, QuantizedLayer) else _FLOAT_BITS
    return jnp.sum(layer.output_mask > 0, dtype=jnp.float32) * bits


def _overhead_bits(layer: Layer) -> jax.Array | int:
    steps = 0
    if isinstance(layer, QuantizedLayer):
        steps = (_bias_size(layer) > 0) + (1 if layer.kernel_levels is None else layer.kernel_levels.size)
        steps *= _FLOAT_BITS
    if layer.prunes_weights:
        return jnp.minimum(_FLOAT_BITS * layer.kept_weights(), float(math.prod(layer.kernel_shape))) + steps
    group_mask = layer.group_mask > 0
    return jnp.where(jnp.all(group_mask), 0, group_mask.size) + steps
