"""A common threshold for all layers: a search with a few measurements, for large networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import ConvertedNetwork, prune
from bcdl_jax.compression.scores import pruning_scores
from bcdl_jax.priors.posterior import variational_layers

# The bisection ends within this share of the units.
_PRECISION = 1 / 512


def choose_common_threshold(
    params: PyTree,
    error: Callable[[PyTree], float | jax.Array],
    *,
    max_increase: float,
    network: ConvertedNetwork | None = None,
) -> dict[str, float]:
    """Finds the lowest common threshold whose network has an error of at most ``max_increase`` above the error of the given network.

    A log dropout rate predicts the damage of pruning: a scale with mean m and variance v, which training has fitted, costs about
    m^2 / (2 v) nats when it becomes 0. So one threshold for all layers prunes the units that cost least. ``choose_thresholds`` finds a network
    that is some percent smaller, but measures some hundred networks instead of about ten.

    Args:
      params: A tree with trained variational layers.
      error: A function from params to the validation error.
      max_increase: The largest allowed increase of the error.
      network: The converted network, see ``prune``.

    Returns:
      A threshold by layer name, for ``prune``: the common one, or a higher one for a layer that would lose its last unit.
    """
    scores = kept_scores(params)
    candidates = np.unique(np.concatenate(list(scores.values())))[::-1]
    limit = float(error(params)) + max_increase
    allowed, refused = -1, len(candidates)
    while refused - allowed > max(1, int(len(candidates) * _PRECISION)):
        middle = (allowed + refused) // 2
        pruned = prune(params, common_thresholds(scores, float(candidates[middle])), network=network)
        allowed, refused = (middle, refused) if float(error(pruned)) <= limit else (allowed, middle)
    return common_thresholds(scores, float(candidates[allowed]) if allowed >= 0 else math.inf)


def kept_scores(params: PyTree) -> dict[str, np.ndarray]:
    """The scores of the kept units of each layer, in the order of ``unit_mask``, see ``pruning_scores``."""
    layers, scores = variational_layers(params), jax.device_get(pruning_scores(params))
    return {name: each[np.asarray(layers[name].unit_mask) > 0] for name, each in scores.items()}


def common_thresholds(scores: Mapping[str, np.ndarray], common: float) -> dict[str, float]:
    """The common threshold for each layer, or a higher one for a layer that would lose its last unit.

    Args:
      scores: The scores of the kept units by layer name.
      common: The common threshold.
    """
    least = {name: each.min(initial=np.float32(math.inf)) for name, each in scores.items()}
    # The scores are in float32, so the next number of that type keeps the best unit.
    return {
        name: common if each < common else float(np.nextafter(each, np.float32(math.inf)))
        for name, each in least.items()
    }
