"""Compression rates: the size of the whole network in float32, divided by the size of a pruned or quantised params tree."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from bcdl_jax._arrays import is_kept
from bcdl_jax._tree import PyTree, find_single_layers, takes_arrays
from bcdl_jax.compression.layers import LAYER_TYPES, is_layer
from bcdl_jax.compression.quantized_layer import QuantizedLayer
from bcdl_jax.priors.layer_node import FLOAT_BITS
from bcdl_jax.priors.posterior import Posterior

_Layer = Posterior | QuantizedLayer


@takes_arrays
@jax.jit
def rate_paper(params: PyTree) -> jax.Array:
    """The rate of the paper's table: bits of all weights in float32 / bits of the kept weights [L17 section 4.2].

    It counts kernels alone. A kept weight takes 32 bits after pruning, and its layer's bits after precision reduction. In a layer with pruned
    single weights, each kept weight takes the same number of bits again for its index. The paper does not state the size of an index. Its table
    suggests this rule: methods that prune single weights pay twice the bits after pruning, and a quarter of that after precision reduction,
    which is less than an index of 32 bits would take.

    Args:
      params: A tree with variational or quantised layers.

    Returns:
      The rate, a scalar. It is infinite if nothing is kept, and never NaN.

    Raises:
      ValueError: The tree holds no such layer.
    """
    layers = _layers(params).values()
    # A Python float: the bits of a large network exceed 32-bit integers.
    before = float(sum(math.prod(layer.kernel_shape) for layer in layers)) * FLOAT_BITS
    after = jnp.stack([_kernel_bits(layer) + _index_bits(layer) for layer in layers]).sum()
    return _ratio(before, after)


@takes_arrays
@jax.jit
def rate_paper_maximum(params: PyTree) -> jax.Array:
    """The paper's maximum rate: bits of all weights in float32 / bits of the kept weights under an ideal entropy code [L17 section 4.2].

    A kept weight takes the entropy of its layer's integers in bits. If single weights were pruned, every weight also takes the entropy of being
    kept or pruned. As in the paper's estimate, this counts kernels alone, without code tables and steps. ``codec.save`` writes a real file.

    Args:
      params: A tree with quantised layers.

    Returns:
      The rate, a scalar. It is infinite if nothing is kept.

    Raises:
      ValueError: The tree holds no quantised layer.
    """
    layers = find_single_layers(params, QuantizedLayer).values()
    before = float(sum(math.prod(layer.kernel_shape) for layer in layers)) * FLOAT_BITS
    return _ratio(before, jnp.stack([_entropy_bits(layer) for layer in layers]).sum())


def _entropy_bits(layer: QuantizedLayer) -> jax.Array:
    integers = layer.kernel.astype(jnp.int32)
    kept = jnp.broadcast_to(layer.kernel_mask, integers.shape)
    counts = jnp.bincount((integers + 2**15).ravel(), weights=kept.ravel().astype(jnp.float32), length=2**16)
    bits = _entropy(counts)
    if layer.prunes_weights:
        number = jnp.sum(counts)
        bits += _entropy(jnp.stack([number, integers.size - number]))
    return bits


def _entropy(counts: jax.Array) -> jax.Array:
    """The entropy of a sequence in bits, from the number of times that each symbol occurs."""
    total = jnp.sum(counts)
    shares = jnp.where(counts > 0, counts, 1) / jnp.maximum(total, 1)
    return jnp.sum(jnp.where(counts > 0, -counts * jnp.log2(shares), 0))


@takes_arrays
@jax.jit
def rate(params: PyTree) -> jax.Array:
    """The rate that counts everything: bits of all parameters in float32 / bits that must be stored.

    The stored bits are the sum of:

    * kept weights and biases: their layer's bits each, or 32 before precision reduction;
    * steps: 32 bits for each quantised array, or 32 bits for each of its levels;
    * the set of kept groups: one bit per group, in each layer that lost a group;
    * the set of kept weights, in a layer that prunes single weights: one bit per weight, or 32 bits per kept weight if that is less;
    * parameters outside the variational layers: 32 bits each.

    The rate of a shrunk network is relative to the shrunk network in float32. A layer of which ``shrink`` left nothing does not count.

    Args:
      params: A tree with variational or quantised layers.

    Returns:
      The rate, a scalar. It is infinite if nothing is kept.

    Raises:
      ValueError: The tree holds no such layer.
    """
    layers = _layers(params).values()
    outside = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_layer) if not is_layer(leaf)]
    others = float(sum(jnp.size(leaf) for leaf in outside)) * FLOAT_BITS
    before = others + float(sum(math.prod(layer.kernel_shape) + layer.bias_size for layer in layers)) * FLOAT_BITS
    after = (
        others + jnp.stack([_kernel_bits(layer) + _bias_bits(layer) + _overhead_bits(layer) for layer in layers]).sum()
    )
    return _ratio(before, after)


def _ratio(before: float, after: jax.Array) -> jax.Array:
    """The bits before compression divided by the bits after it. It is infinite if nothing is kept, even if there was nothing before."""
    return jnp.where(after > 0, before / after, jnp.inf)


@takes_arrays
@jax.jit
def layer_bits(params: PyTree) -> dict[str, jax.Array]:
    """The number of bits per kept weight of each layer.

    Args:
      params: A tree with variational or quantised layers.

    Returns:
      The bits by layer name, int32: 32 for a variational layer.

    Raises:
      ValueError: The tree holds no such layer.
    """
    return {name: jnp.asarray(layer.bits_per_weight, jnp.int32) for name, layer in _layers(params).items()}


def _layers(params: PyTree) -> dict[str, _Layer]:
    return find_single_layers(params, LAYER_TYPES)


def _kernel_bits(layer: _Layer) -> jax.Array:
    return layer.kept_weights() * jnp.asarray(layer.bits_per_weight, jnp.float32)


def _index_bits(layer: _Layer) -> jax.Array | int:
    """The bits of all indices in the paper's count: none as long as no weight is pruned."""
    if not layer.prunes_weights:
        return 0
    kept = layer.kept_weights()
    return jnp.where(kept < math.prod(layer.kernel_shape), kept * jnp.asarray(layer.bits_per_weight, jnp.float32), 0)


def _bias_bits(layer: _Layer) -> jax.Array | int:
    if not layer.bias_size:
        return 0
    return jnp.sum(is_kept(layer.output_mask), dtype=jnp.float32) * jnp.asarray(layer.bits_per_bias, jnp.float32)


def _overhead_bits(layer: _Layer) -> jax.Array | int:
    """The bits of steps or levels, and of the set of kept groups or weights."""
    if layer.prunes_weights:
        weights = float(math.prod(layer.kernel_shape))
        return jnp.minimum(FLOAT_BITS * layer.kept_weights(), weights) + layer.step_bits
    group_mask = is_kept(layer.group_mask)
    return jnp.where(jnp.all(group_mask), 0, group_mask.size) + layer.step_bits
