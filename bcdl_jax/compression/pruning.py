"""Pruning: pure transforms of the params tree that set the masks of its posteriors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree, check_layers_exist, map_named_layers, values_by_layer
from bcdl_jax.compression.scores import Score, log_dropout_rate
from bcdl_jax.priors.posterior import Posterior, variational_layers

Thresholds = float | Mapping[str, float]


class ConvertedNetwork(Protocol):
    """A network that finds the units that pruning makes useless, such as the ``VariationalModel`` of ``variational``."""

    def prune_useless(self, params: PyTree) -> PyTree: ...


def prune(
    params: PyTree,
    thresholds: Thresholds,
    chain: Sequence[str] | None = None,
    score: Score = log_dropout_rate,
    network: ConvertedNetwork | None = None,
) -> PyTree:
    """Masks every group whose score is not below the threshold of its layer, or every weight if the family prunes single weights.

    A masked group (a row of a dense kernel, or the kernels and the bias of an output channel) is exactly zero from then on, sampled or not,
    and no longer counts in the KL. Groups that were pruned before stay pruned.

    Args:
      params: A tree with variational layers.
      thresholds: One threshold for all layers, or a mapping from layer names to thresholds.
      chain: The names of layers that feed one another in this order. Only elementwise functions that map 0 to 0 (ReLU, tanh), pooling and a
        flatten (channels last) may lie between them. With a chain, outputs that the next layer does not read are pruned too, as are
        inputs that read only pruned outputs. None to prune each layer alone. A chain that contradicts the shapes raises an error. A wrong
        chain can still fit the shapes, so each layer must read only the layer before it. Prune with several chains one after the other.
      score: The score that is compared with the thresholds, ``log_dropout_rate`` or ``log_noise_to_signal``.
      network: The converted network whose params these are, or None. Its ``prune_useless`` then masks the inputs and outputs that become
        useless, along any data flow. So a converted network needs no chain.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: The tree holds no variational layer, a layer has no threshold, a threshold is not a number, ``thresholds`` or ``chain``
        names an unknown layer, the widths of a chain do not fit, or both ``chain`` and ``network`` are given.
    """
    layers = variational_layers(params)
    by_layer = _thresholds_by_layer(thresholds, layers)
    check_chain(chain or (), layers)
    check_chain_or_network(chain, network)
    pruned = _prune(params, by_layer, tuple(chain or ()), score)
    return pruned if network is None else network.prune_useless(pruned)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _prune(params: PyTree, thresholds: dict[str, jax.Array], chain: tuple[str, ...], score: Score) -> PyTree:
    masks = {name: score(posterior) < thresholds[name] for name, posterior in variational_layers(params).items()}
    return prune_units(params, masks, chain)


def prune_units(params: PyTree, masks: Mapping[str, jax.Array], chain: Sequence[str] | None = None) -> PyTree:
    """Prunes all units outside the masks, and the units that become useless along the chain.

    Args:
      params: A tree with variational layers.
      masks: The masks of the units to keep by layer name, arrays of bool of the shape of the layer's ``unit_mask``: one entry for each group,
        or for each weight if the family prunes single weights. A layer without a mask loses only units that are useless along the chain.
      chain: The names of layers that feed one another, see ``prune``.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: The tree holds no variational layer, a mask is for an unknown layer or has a wrong shape, or the chain does not fit.
    """
    layers = variational_layers(params)
    check_layers_exist(masks, layers, "masks")
    for name, mask in masks.items():
        if not isinstance(mask, jax.Array | np.ndarray):
            raise ValueError(f"The mask of layer {name} is a {type(mask).__name__}; it must be an array of bool.")
        if jnp.shape(mask) != layers[name].unit_mask.shape:
            raise ValueError(
                f"The mask of layer {name} has shape {jnp.shape(mask)}; it must have {layers[name].unit_mask.shape}."
            )
    layers = {name: layer.prune_units(masks[name]) if name in masks else layer for name, layer in layers.items()}
    inputs = {name: layer.input_mask > 0 for name, layer in layers.items()}
    outputs = {name: layer.output_mask > 0 for name, layer in layers.items()}

    check_chain(chain or (), layers)
    pairs = list(itertools.pairwise(chain or ()))

    def positions(first: str, second: str) -> int:
        """The number of positions of each output of the first layer that the second layer reads, such as after a flatten."""
        return inputs[second].size // max(1, outputs[first].size)

    # A layer without outputs makes everything before it useless. The backward pass finds this; the second forward pass uses it.
    for _ in range(2):
        for first, second in pairs:
            inputs[second] = inputs[second] & jnp.tile(outputs[first], positions(first, second))
        for first, second in reversed(pairs):
            read = inputs[second] & layers[second].inputs_read_by(outputs[second])
            by_position = read.reshape(positions(first, second), outputs[first].size)
            outputs[first] = outputs[first] & jnp.any(by_position, axis=0)

    def masked(name: str, _: Posterior) -> Posterior:
        return layers[name].with_masks(inputs[name], outputs[name])

    return map_named_layers(masked, params, Posterior)


def kept_groups(
    params: PyTree, thresholds: Thresholds | None = None, score: Score = log_dropout_rate
) -> dict[str, jax.Array]:
    """Counts the groups of each layer that pruning would keep, or the weights if the family prunes single weights.

    Args:
      params: A tree with variational layers.
      thresholds: One threshold for all layers, or a mapping from layer names to thresholds. None for the default thresholds of the families,
        which are log dropout rates.
      score: The score that is compared with the thresholds.

    Returns:
      The counts by layer name, int32. They do not include the effects of a chain.

    Raises:
      ValueError: The tree holds no variational layer, or the thresholds do not fit, see ``prune``.
    """
    layers = variational_layers(params)
    by_layer = (
        {name: posterior.default_threshold for name, posterior in layers.items()}
        if thresholds is None
        else _thresholds_by_layer(thresholds, layers)
    )
    return {
        name: jnp.sum((posterior.unit_mask > 0) & (score(posterior) < by_layer[name]))
        for name, posterior in layers.items()
    }


def _thresholds_by_layer(thresholds: Thresholds, layers: Mapping[str, Posterior]) -> dict[str, float]:
    """One threshold for each layer name. A layer of which ``shrink`` left nothing has no scores, so its threshold is ignored.

    Raises:
      ValueError: A threshold is not a number, or the names do not match.
    """
    if isinstance(thresholds, Mapping):
        thresholds = dict(thresholds) | {name: math.inf for name, layer in layers.items() if not layer.unit_mask.size}
    for value in thresholds.values() if isinstance(thresholds, Mapping) else [thresholds]:
        if not isinstance(value, jax.core.Tracer) and not _is_threshold(value):
            raise ValueError(
                f"thresholds holds {value!r}; it must be a number (a score or infinity), or a mapping from layer names to numbers."
            )
    return values_by_layer(thresholds, layers, "thresholds")


def _is_threshold(value: object) -> bool:
    return isinstance(value, SupportsFloat) and np.ndim(value) == 0 and not math.isnan(float(value))  # type: ignore[arg-type]


def check_chain_or_network(chain: Sequence[str] | None, network: ConvertedNetwork | None) -> None:
    """Raises ValueError if both a chain and a network are given."""
    if chain and network is not None:
        raise ValueError(
            "chain and network are both given; give network alone, which finds the layers that feed one another."
        )


def check_chain(chain: Sequence[str], layers: Mapping[str, Posterior]) -> None:
    """Raises ValueError if a chain is not a sequence of layer names, names a layer twice or an unknown one, or has widths that do not fit."""
    if isinstance(chain, str):
        raise ValueError(f"chain is {chain!r}; it must be a sequence of layer names.")
    for name in chain:
        if not isinstance(name, str):
            raise ValueError(
                f"chain holds {name!r}; it must be one sequence of layer names. Prune with several chains one after the other."
            )
        if list(chain).count(name) > 1:
            raise ValueError(f"chain names layer {name} twice; a layer can only feed layers after it.")
    check_layers_exist(chain, layers, "chain")
    for first, second in itertools.pairwise(chain):
        outputs, inputs = layers[first].output_mask.shape[-1], layers[second].input_mask.shape[-1]
        if inputs % outputs if outputs else inputs:  # A layer of which shrink left nothing has no outputs.
            raise ValueError(
                f"chain has {first} before {second}, but {second} has {inputs} inputs, not a multiple of {first}'s {outputs} outputs."
            )
        if inputs in (0, outputs):
            continue
        widths = (
            f"chain has {first} before {second}, but {second} has {inputs} inputs and {first} has {outputs} outputs"
        )
        if len(layers[second].kernel_shape) > 2:
            raise ValueError(f"{widths}; a convolution reads as many channels as the layer before it has outputs.")
        dense = len(layers[first].kernel_shape) == 2
        if dense and layers[second].output_mask.shape[-1] == layers[first].input_mask.shape[-1]:
            raise ValueError(f"{widths}; the widths are equal in the other order, {second} before {first}.")
