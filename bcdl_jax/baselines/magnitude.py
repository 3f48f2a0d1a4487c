"""Pruning of single weights of a plain network by magnitude: once, as in Deep Compression, or at each step, with splicing.

    masks = bcdl_jax.baselines.magnitude_masks(params, 0.08)  # [H15, H16]
    loss = lambda params, batch: plain_loss(bcdl_jax.baselines.apply_masks(params, masks), batch)

    thresholds = bcdl_jax.baselines.surgery_thresholds(params, 2.0)  # [G16]
    masks = bcdl_jax.baselines.prune_and_splice(params, masks, thresholds)  # at each step
    loss = lambda params, batch: plain_loss(bcdl_jax.baselines.apply_masks(params, masks, splicing=True), batch)

The module ``weight_sharing`` describes the way from the pruned network to a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree, named_arrays, values_by_layer

ByLayer = float | Mapping[str, float]


def magnitude_masks(params: PyTree, kept: ByLayer) -> PyTree:
    """Masks that keep the largest weights of each layer [H16 section 2].

    Args:
      params: The params of a plain network: a tree with ``{"kernel": ..., "bias": ...}`` for each layer, of Linen or NNX.
      kept: The share of the weights of each kernel to keep, above 0 and at most 1, for all layers or by layer name.

    Returns:
      A tree like ``params`` with arrays of bool. All arrays that are not kernels are kept.

    Raises:
      ValueError: A share is out of range, a layer lacks a share, a share names an unknown layer, or there is no kernel.
    """

    def mask(kernel: jax.Array, share: float) -> jax.Array:
        if not 0 < share <= 1:
            raise ValueError(f"kept holds {share}; it must be above 0 and at most 1.")
        if not kernel.size:  # Nothing is left of a layer that was shrunk.
            return jnp.ones(kernel.shape, bool)
        count = max(1, round(share * kernel.size))
        magnitudes = jnp.abs(kernel)
        return magnitudes >= jnp.sort(magnitudes, axis=None)[kernel.size - count]

    return _map_kernels(mask, params, kept, "kept")


def expand_masks(params: PyTree, masks: Mapping[str, jax.Array | np.ndarray]) -> PyTree:
    """Masks by layer name as a tree like the params.

    Args:
      params: The params of a plain network.
      masks: The mask of each kernel by layer name, an array of bool of the kernel's shape.

    Returns:
      A tree like ``params`` with arrays of bool. All arrays that are not kernels are kept.

    Raises:
      ValueError: A mask has another shape or type, a layer lacks a mask, a mask names an unknown layer, or there is no kernel.
    """
    for name, kernel in kernels_by_layer(params).items():
        if name in masks and (jnp.shape(masks[name]) != kernel.shape or jnp.result_type(masks[name]) != np.dtype(bool)):
            raise ValueError(
                f"masks holds {jnp.result_type(masks[name])}{list(jnp.shape(masks[name]))} for layer {name}; "
                f"it must be bool{list(kernel.shape)}, the shape of the kernel."
            )
    return _map_kernels(lambda _, mask: jnp.asarray(mask), params, masks, "masks")


def apply_masks(params: PyTree, masks: PyTree, *, splicing: bool = False) -> PyTree:
    """The params with zeros where the masks are False.

    Args:
      params: The params of a plain network.
      masks: A tree like ``params`` with arrays of bool, from ``magnitude_masks`` or ``expand_masks``.
      splicing: True to pass the gradient on to pruned weights as if they were in use, so that they can grow again [G16 eq. 3]. False for
        a gradient of zero there.

    Raises:
      ValueError: ``masks`` is not a tree like ``params``.
    """
    _check_masks(params, masks)

    def apply(weights: jax.Array, mask: jax.Array) -> jax.Array:
        kept = jnp.where(mask, weights, 0)
        return weights + jax.lax.stop_gradient(kept - weights) if splicing else kept

    return jax.tree.map(apply, params, masks)


def surgery_thresholds(params: PyTree, spread: ByLayer) -> PyTree:
    """The thresholds of ``prune_and_splice``: mean + spread * standard deviation of the magnitudes of each kernel.

    This is the rule of the code that was published with [G16].

    Args:
      params: The params of a plain network, trained.
      spread: The factor of the standard deviation, for all layers or by layer name.

    Returns:
      A tree like ``params`` of scalars, 0 for arrays that are not kernels.

    Raises:
      ValueError: A layer lacks a spread, a spread names an unknown layer, or there is no kernel.
    """

    def threshold(kernel: jax.Array, factor: float) -> jax.Array:
        magnitudes = jnp.abs(kernel)
        return jnp.mean(magnitudes) + factor * jnp.std(magnitudes) if kernel.size else jnp.zeros((), kernel.dtype)

    return _map_kernels(threshold, params, spread, "spread", other=lambda leaf: jnp.zeros((), leaf.dtype))


def prune_and_splice(params: PyTree, masks: PyTree, thresholds: PyTree, margin: float = 0.1) -> PyTree:
    """Prunes weights that have become small, and restores pruned weights that have grown [G16 eq. 3]. The others keep their masks.

    Args:
      params: The params of a plain network, including the values of pruned weights.
      masks: A tree like ``params`` with arrays of bool.
      thresholds: The thresholds from ``surgery_thresholds``.
      margin: The distance between the two limits. A weight is pruned below (1 - margin) times its threshold, and restored from
        (1 + margin) times it.

    Returns:
      The new masks.

    Raises:
      ValueError: ``masks`` is not a tree like ``params``.
    """
    _check_masks(params, masks)

    def update(weights: jax.Array, mask: jax.Array, threshold: jax.Array) -> jax.Array:
        magnitudes = jnp.abs(weights)
        return jnp.where(
            magnitudes < (1 - margin) * threshold, False, jnp.where(magnitudes >= (1 + margin) * threshold, True, mask)
        )

    return jax.tree.map(update, params, masks, thresholds)


def kernels_by_layer(params: PyTree) -> dict[str, jax.Array]:
    """The kernels of a plain network by layer name: the arrays called "kernel" with two axes or more.

    Raises:
      ValueError: There is no kernel.
    """
    names, leaves = _named(params)
    found = {
        layer: leaf for name, leaf in zip(names, leaves, strict=True) if (layer := _layer_of(name, leaf)) is not None
    }
    if not found:
        raise ValueError(
            "params holds no array called kernel with two axes or more, as Flax names its weights; it holds: "
            f"{', '.join(names) or 'nothing'}."
        )
    return found


def _check_masks(params: PyTree, masks: PyTree) -> None:
    expected: Any = jax.tree.structure(params)
    given = jax.tree.structure(masks)
    if expected != given:
        raise ValueError(
            f"masks must be a tree like params, with an array of bool for every array; it is {given}. "
            "expand_masks(params, masks) makes such a tree from masks by layer name."
        )


def _map_kernels(
    function: Callable[[jax.Array, Any], jax.Array],
    params: PyTree,
    values: float | Mapping[str, Any],
    argument: str,
    other: Callable[[jax.Array], jax.Array] = lambda leaf: jnp.ones(leaf.shape, bool),
) -> PyTree:
    """``function(kernel, value of its layer)`` for the kernels, and ``other(leaf)`` for the other arrays."""
    layers = list(kernels_by_layer(params))
    by_layer = values_by_layer(values, layers, argument)

    def map_leaf(name: str, leaf: jax.Array) -> jax.Array:
        layer = _layer_of(name, leaf)
        return other(leaf) if layer is None else function(leaf, by_layer[layer])

    return jax.tree.unflatten(jax.tree.structure(params), map(map_leaf, *_named(params)))


def _named(params: PyTree) -> tuple[list[str], list[jax.Array]]:
    """The names and the arrays of the params."""
    named = named_arrays(params)
    return [name for name, _ in named], [leaf for _, leaf in named]


def _layer_of(name: str, leaf: jax.Array) -> str | None:
    """The name of the layer that has this array as its kernel, or None for an array that is not a kernel."""
    *parents, last = name.split("/")
    return "/".join(parents) if last == "kernel" and jnp.ndim(leaf) >= 2 else None
