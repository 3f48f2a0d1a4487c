"""Bayesian compression for JAX and Flax: train a network with group sparsity priors, prune it, reduce its precision, ship a small file.

The names below are the most used ones, in the order of use. The subpackages hold the rest.
"""

from bcdl_jax import (
    baselines,
    budget,
    codec,
    command,
    compression,
    conversion,
    export,
    graph,
    nn,
    priors,
    shrinking,
    train,
)
from bcdl_jax.budget import compress, squared_error, wrong_class
from bcdl_jax.codec import load, save
from bcdl_jax.compression import (
    choose_relative_step,
    choose_thresholds,
    from_trained,
    mean_weights,
    prune,
    rate,
    reduce_precision,
)
from bcdl_jax.conversion import variational
from bcdl_jax.export import export_onnx, export_safetensors, export_stablehlo, load_network, load_stablehlo
from bcdl_jax.nn import Conv, Dense, max_pool
from bcdl_jax.priors import (
    Family,
    GroupHorseshoe,
    GroupNormalJeffreys,
    Posterior,
    SparseVariationalDropout,
    balance_scales,
    clip_variances,
    kl_divergence,
    variational_layers,
)
from bcdl_jax.shrinking import cut, expand, for_cpu, shrink
from bcdl_jax.train import keep_masks, kl_warmup, negative_elbo

# In the order of use, not of the alphabet.
__all__ = [  # noqa: RUF022
    # Layers and their priors.
    "Dense",
    "Conv",
    "max_pool",
    "Family",
    "GroupNormalJeffreys",
    "GroupHorseshoe",
    "SparseVariationalDropout",
    "Posterior",
    "variational_layers",
    # The start of training, from a trained network.
    "variational",
    "from_trained",
    "balance_scales",
    # The objective, and the functions to call after each step.
    "kl_divergence",
    "negative_elbo",
    "kl_warmup",
    "clip_variances",
    "keep_masks",
    # Compression of the trained network: within a budget, or step by step.
    "compress",
    "wrong_class",
    "squared_error",
    "choose_thresholds",
    "prune",
    "choose_relative_step",
    "reduce_precision",
    "rate",
    "mean_weights",
    # Deployment.
    "shrink",
    "cut",
    "expand",
    "for_cpu",
    "save",
    "load",
    "load_network",
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "load_stablehlo",
    # The rest, by subpackage.
    "nn",
    "priors",
    "train",
    "compression",
    "shrinking",
    "conversion",
    "budget",
    "command",
    "codec",
    "export",
    "baselines",
    "graph",
]
