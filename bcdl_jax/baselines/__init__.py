"""Baselines from the literature, which prune and quantise plain networks weight by weight."""

from bcdl_jax.baselines.levels import kernels_from_levels, reduce_to_levels
from bcdl_jax.baselines.magnitude import (
    apply_masks,
    expand_masks,
    kernels_by_layer,
    magnitude_masks,
    prune_and_splice,
    surgery_thresholds,
)
from bcdl_jax.baselines.soft_weight_sharing import Mixture, collapse, create_mixture, mixture_nll
from bcdl_jax.baselines.weight_sharing import cluster_values, share_weights

__all__ = [
    "Mixture",
    "apply_masks",
    "cluster_values",
    "collapse",
    "create_mixture",
    "expand_masks",
    "kernels_by_layer",
    "kernels_from_levels",
    "magnitude_masks",
    "mixture_nll",
    "prune_and_splice",
    "reduce_to_levels",
    "share_weights",
    "surgery_thresholds",
]
