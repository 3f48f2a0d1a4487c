"""Pruning scores: one number for each unit of a layer, high for a unit without signal."""

from __future__ import annotations

import functools
from typing import Protocol

import jax

from bcdl_jax._tree import PyTree, takes_arrays
from bcdl_jax.priors.posterior import Posterior, variational_layers


class Score(Protocol):
    """A function from a layer to the scores of its units, of the shape of the layer's ``unit_mask``.

    Compiled functions are cached by their score, so define a score once, at the top level of a module.
    """

    def __call__(self, layer: Posterior, /) -> jax.Array: ...


def log_dropout_rate(layer: Posterior) -> jax.Array:
    """The score of the paper, which each family defines, see ``Posterior.log_dropout_rate``.

    For families with scales it depends on the scales alone.
    """
    return layer.in_float32().log_dropout_rate()


def log_noise_to_signal(layer: Posterior) -> jax.Array:
    """log(sum of Var[w] / sum of E[w]^2) over the weights of each unit, without the biases. See ``Posterior.log_noise_to_signal``.

    For a family that prunes single weights it is the log dropout rate. It is the better score for a layer whose scales stay alike while its
    weights are noisy, such as a wide layer that starts from trained weights with balanced scales.

    The score of a unit depends on the masks of the layer. So a second pruning with the same thresholds may remove more units.
    """
    return layer.log_noise_to_signal()


@takes_arrays
@functools.partial(jax.jit, static_argnames="score")
def pruning_scores(params: PyTree, score: Score = log_dropout_rate) -> dict[str, jax.Array]:
    """Computes the score of every group, or of every weight if the family prunes single weights.

    Args:
      params: A tree with variational layers.
      score: The score to compute, ``log_dropout_rate`` or ``log_noise_to_signal``.

    Returns:
      The scores by layer name, of the shape of the layer's ``unit_mask``. Groups with low scores carry the signal. A layer of which
      ``shrink`` left nothing has no scores and is left out.

    Raises:
      ValueError: The tree holds no variational layer.
    """
    return {
        name: score(posterior) for name, posterior in variational_layers(params).items() if posterior.unit_mask.size
    }
