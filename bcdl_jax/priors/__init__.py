"""Priors and approximate posteriors of layers, and the KL divergence between them."""

from bcdl_jax.priors.balancing import balance_scales
from bcdl_jax.priors.family import Family
from bcdl_jax.priors.formulas import START_LOG_VARIANCE, log_alpha, log_uniform_kl, near
from bcdl_jax.priors.horseshoe import GroupHorseshoe, GroupHorseshoePosterior
from bcdl_jax.priors.kl import clip_variances, kl_divergence, kl_divergence_per_layer
from bcdl_jax.priors.noise import example_normal
from bcdl_jax.priors.normal_jeffreys import GroupNormalJeffreys, GroupNormalJeffreysPosterior
from bcdl_jax.priors.posterior import Posterior, array_kinds, variational_layers
from bcdl_jax.priors.sparse_variational_dropout import SparseVariationalDropout, SparseVariationalDropoutPosterior

__all__ = [
    "START_LOG_VARIANCE",
    "Family",
    "GroupHorseshoe",
    "GroupHorseshoePosterior",
    "GroupNormalJeffreys",
    "GroupNormalJeffreysPosterior",
    "Posterior",
    "SparseVariationalDropout",
    "SparseVariationalDropoutPosterior",
    "array_kinds",
    "balance_scales",
    "clip_variances",
    "example_normal",
    "kl_divergence",
    "kl_divergence_per_layer",
    "log_alpha",
    "log_uniform_kl",
    "near",
    "variational_layers",
]
