"""The candidates of ``compress``: networks that are pruned to a share of their weights, and rounded by a relative step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.common_threshold import common_thresholds, kept_scores
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.compression.pruning import ConvertedNetwork, prune
from bcdl_jax.compression.quantized_layer import QuantizedLayer
from bcdl_jax.priors.posterior import Posterior, variational_layers

# The relative steps to try, see ``reduce_precision``: neighbours differ by the square root of 2, which is half a bit.
RELATIVE_STEPS = tuple(0.125 * 2 ** (number / 2) for number in range(13))
# The shares of the kept weights to try first.
SHARES = (1.0, 0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.22, 0.16, 0.12, 0.09, 0.06, 0.04)
# The bytes of a file, of a layer and of an array beside their coded numbers.
_FILE, _LAYER, _ARRAY = 12, 14, 6


@dataclasses.dataclass(frozen=True)
class Pruner:
    """Prunes a network to a share of its kept weights, along the order of its pruning scores.

    Attributes:
      params: The params with posteriors.
      network: The network that finds useless units, or None.
      scores: The scores of the kept units by layer.
      ordered: All scores, the highest first.
      shares: The share of the weights that is left after the units up to each of these scores are pruned.
    """

    params: PyTree
    network: ConvertedNetwork | None
    scores: dict[str, np.ndarray]
    ordered: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, params: PyTree, network: ConvertedNetwork | None) -> Pruner:
        """The pruner of these params."""
        scores, layers = kept_scores(params), variational_layers(params)
        weights = {name: _weights_per_unit(layers[name]) for name in scores}
        ordered = np.concatenate(list(scores.values()))
        counts = np.concatenate([np.full(each.size, weights[name]) for name, each in scores.items()])
        order = np.argsort(-ordered, kind="stable")
        shares = 1 - np.cumsum(counts[order]) / max(1.0, counts.sum())
        return cls(params, network, scores, ordered[order], shares)

    def pruned(self, share: float) -> PyTree:
        """The params with about this share of the weights. Useless units go, too, so that fewer weights may be left."""
        number = int(np.searchsorted(-self.shares, -share, side="right"))
        if share >= 1 or not number:
            return self.params
        return prune(self.params, common_thresholds(self.scores, float(self.ordered[number - 1])), network=self.network)


def _weights_per_unit(layer: Posterior) -> float:
    units = layer.unit_mask.size if layer.prunes_weights else float(np.sum(np.asarray(layer.unit_mask) > 0))
    return 1.0 if layer.prunes_weights else float(layer.kept_weights()) / max(1.0, units)


def count_weights(params: PyTree) -> tuple[int, int]:
    """The number of kept weights of the layers, and the number of all."""
    layers = [node for node in jax.tree.leaves(params, is_leaf=is_layer) if is_layer(node)]
    return round(sum(float(layer.kept_weights()) for layer in layers)), sum(
        math.prod(layer.kernel_shape) for layer in layers
    )


def estimated_bytes(params: PyTree) -> float:
    """An estimate of the size of the file of a tree of quantised layers and arrays, from the entropy of their integers."""
    return _FILE + sum(_node_bytes(node) for node in jax.tree.leaves(params, is_leaf=is_layer))


def _node_bytes(node: Any) -> float:
    if not isinstance(node, QuantizedLayer):
        array = np.asarray(node)
        # The entropy of floats that are multiples of a step is that of their integers. Others are copied.
        return _ARRAY + min(array.nbytes, _entropy_bytes(array) + 4 * np.unique(array).size / 8)
    inputs, outputs = np.asarray(node.input_mask), np.asarray(node.output_mask)
    kernel = np.asarray(node.kernel)[..., outputs]
    kernel = kernel if node.feature_groups != 1 else kernel[..., inputs, :]
    biases = 0.0 if node.bias is None else _entropy_bytes(np.asarray(node.bias)[outputs])
    return _LAYER + _entropy_bytes(kernel) + biases + _entropy_bytes(inputs) + _entropy_bytes(outputs)


def _entropy_bytes(values: np.ndarray) -> float:
    """The bytes of these values under an ideal code for their own frequencies."""
    _, counts = np.unique(values, return_counts=True)
    return float(np.sum(counts * np.log2(max(1, values.size) / counts))) / 8
