"""Pruning single weights of plain networks by their magnitude: once, as in Deep Compression, or again and again, with splicing.

    masks = bcdl_jax.baselines.magnitude_masks(params, 0.08)  # [Han et al. 2016], then train on with
    loss = lambda params, batch: plain_loss(bcdl_jax.baselines.apply_masks(params, masks), batch)

    thresholds = bcdl_jax.baselines.surgery_thresholds(params, 2.0)  # [Guo et al. 2016]: at each step
    masks = bcdl_jax.baselines.prune_and_splice(params, masks, thresholds)
    loss = lambda params, batch: plain_loss(bcdl_jax.baselines.apply_masks(params, masks, splicing=True), batch)

From there to a file as at the top of ``weight_sharing``.
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
    """Which weights are the largest of their layer [H16 section 2].

    Args:
      params: of a plain network: a tree with ``{"kernel": ..., "bias": ...}`` for each layer, of Linen or NNX.
      kept: share of the weights of each kernel to keep, above 0 and at most 1, for all layers or by layer name.

    Returns:
      A tree like ``params`` of bools; all that is not a kernel is kept.

    Raises:
      ValueError: a share that is out of range, or a layer without one, or one for a layer that is not there; or there is no kernel.
    """

    def mask(kernel: jax.Array, share: float) -> jax.Array:
        if not 0 < share <= 1:
            raise ValueError(f"kept holds {share}; it must be above 0 and at most 1.")
        count = max(1, round(share * kernel.size))
        magnitudes = jnp.abs(kernel)
        return magnitudes >= jnp.sort(magnitudes, axis=None)[kernel.size - count]

    return _map_kernels(mask, params, kept, "kept")


def mask_tree(params: PyTree, masks: Mapping[str, jax.Array | np.ndarray]) -> PyTree:
    """Masks of kernels as a tree like the params, in which all that is not a kernel is kept.

    Args:
      params: of a plain network.
      masks: by layer name, bools of the shape of the layer's kernel.

    Raises:
      ValueError: a mask of another shape or type, a layer without one, or one for a layer that is not there; or there is no kernel.
    """
    for name, kernel in kernels_by_layer(params).items():
        if name in masks and (jnp.shape(masks[name]) != kernel.shape or jnp.result_type(masks[name]) != np.dtype(bool)):
            raise ValueError(
                f"masks holds {jnp.result_type(masks[name])}{list(jnp.shape(masks[name]))} for layer {name}; "
                f"it must be bool{list(kernel.shape)}, as its kernel."
            )
    return _map_kernels(lambda _, mask: jnp.asarray(mask), params, masks, "masks")


def apply_masks(params: PyTree, masks: PyTree, *, splicing: bool = False) -> PyTree:
    """The params, zero where their mask is False.

    Args:
      params: of a plain network.
      masks: of the same structure, see ``mask_tree``.
      splicing: whether the gradient goes to the pruned weights too, as if they were in use, so that they can grow back [G16 eq. 3].

    Raises:
      ValueError: ``masks`` has another structure.
    """
    _check_masks(params, masks)

    def apply(weights: jax.Array, mask: jax.Array) -> jax.Array:
        kept = jnp.where(mask, weights, 0)
        return weights + jax.lax.stop_gradient(kept - weights) if splicing else kept

    return jax.tree.map(apply, params, masks)


def surgery_thresholds(params: PyTree, spread: ByLayer) -> PyTree:
    """Per kernel the threshold about which weights are pruned and spliced: mean + spread * standard deviation of the magnitudes, as in the
    code that [G16] published; 0 for all that is not a kernel.

    Args:
      params: of a plain network, trained.
      spread: for all layers or by layer name.

    Raises:
      ValueError: a layer without a spread, or one for a layer that is not there; or there is no kernel.
    """

    def threshold(kernel: jax.Array, factor: float) -> jax.Array:
        magnitudes = jnp.abs(kernel)
        return jnp.mean(magnitudes) + factor * jnp.std(magnitudes)

    return _map_kernels(threshold, params, spread, "spread", other=lambda leaf: jnp.zeros((), leaf.dtype))


def prune_and_splice(params: PyTree, masks: PyTree, thresholds: PyTree, margin: float = 0.1) -> PyTree:
    """Prunes what is small by now, and takes back what has grown [G16 eq. 3]; what lies between stays as it is.

    Args:
      params: of a plain network, those of pruned weights included.
      masks: a tree like it of bools.
      thresholds: from ``surgery_thresholds``.
      margin: a weight is pruned below (1 - margin) times its threshold, and comes back from (1 + margin) times it.

    Raises:
      ValueError: ``masks`` has another structure.
    """
    _check_masks(params, masks)

    def update(weights: jax.Array, mask: jax.Array, threshold: jax.Array) -> jax.Array:
        magnitudes = jnp.abs(weights)
        return jnp.where(
            magnitudes < (1 - margin) * threshold, False, jnp.where(magnitudes >= (1 + margin) * threshold, True, mask)
        )

    return jax.tree.map(update, params, masks, thresholds)


def kernels_by_layer(params: PyTree) -> dict[str, jax.Array]:
    """The kernels of a plain network by layer name: the arrays called "kernel" that have two axes or more.

    Raises:
      ValueError: there is none.
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
            f"masks must be a tree like params, with bools for every array; it is {given}. mask_tree(params, masks) makes one of masks by layer name."
        )


def _map_kernels(
    function: Callable[[jax.Array, Any], jax.Array],
    params: PyTree,
    values: float | Mapping[str, Any],
    what: str,
    other: Callable[[jax.Array], jax.Array] = lambda leaf: jnp.ones(leaf.shape, bool),
) -> PyTree:
    """``function(kernel, its layer's value)`` for kernels, ``other(leaf)`` elsewhere."""
    layers = list(kernels_by_layer(params))
    by_layer = values_by_layer(values, layers, what)

    def map_leaf(name: str, leaf: jax.Array) -> jax.Array:
        layer = _layer_of(name, leaf)
        return other(leaf) if layer is None else function(leaf, by_layer[layer])

    return jax.tree.unflatten(jax.tree.structure(params), map(map_leaf, *_named(params)))


def _named(params: PyTree) -> tuple[list[str], list[jax.Array]]:
    named = named_arrays(params)
    return [name for name, _ in named], [leaf for _, leaf in named]


def _layer_of(name: str, leaf: jax.Array) -> str | None:
    """The layer whose kernel this is, or None."""
    *parents, last = name.split("/")
    return "/".join(parents) if last == "kernel" and jnp.ndim(leaf) >= 2 else None
