"""Bayesian compression for JAX/Flax: train a network with group sparsity priors, prune it, reduce its precision."""

from bcdl_jax.averaging import AverageParamsState, average_params, averaged_params
from bcdl_jax.balancing import balance_scales
from bcdl_jax.compressed_file import CompressedFileError, RecordSummary, decode, encode, load, save, summarize
from bcdl_jax.cpu import for_cpu
from bcdl_jax.ensemble import EnsembleReport, EpochReport, compile_ensemble, each_seed, train_ensemble
from bcdl_jax.export import export_stablehlo, load_stablehlo
from bcdl_jax.export_onnx import export_onnx
from bcdl_jax.export_safetensors import export_safetensors, torch_state_dict
from bcdl_jax.horseshoe import GroupHorseshoe, GroupHorseshoePosterior
from bcdl_jax.kl import clip_variances, kl_divergence, kl_divergence_per_layer, log_dropout_rates, posterior_moments
from bcdl_jax.layers import Conv, Dense
from bcdl_jax.magnitude_pruning import (
    apply_masks,
    kernels,
    magnitude_masks,
    mask_tree,
    surgery_thresholds,
    update_masks,
)
from bcdl_jax.mesh import fetch, jit_step, make_mesh, place_data, place_state, process_rows, replicated
from bcdl_jax.normal_jeffreys import GroupNormalJeffreys, GroupNormalJeffreysPosterior
from bcdl_jax.objective import kl_warmup, negative_elbo
from bcdl_jax.pmap import make_pmap_train_step
from bcdl_jax.pooling import max_pool
from bcdl_jax.posterior import Posterior, posteriors
from bcdl_jax.precision import QuantizedLayer, choose_relative_step, reduce_precision, reduce_precision_by_round_off
from bcdl_jax.pruning import (
    Score,
    choose_thresholds,
    kept_groups,
    log_dropout_rate,
    log_noise_to_signal,
    prune,
    set_unit_masks,
)
from bcdl_jax.rates import layer_bits, rate, rate_paper, rate_paper_maximum
from bcdl_jax.settings import make_step_by_setting, with_setting
from bcdl_jax.shrinking import LeafReport, ShrinkReport, cut, expand, shrink
from bcdl_jax.shrinking_training import Shrinking, SmallTraining, prune_state, shrink_further, shrink_training
from bcdl_jax.soft_weight_sharing import Mixture, collapse, create_mixture, mixture_nll
from bcdl_jax.sparse_variational_dropout import SparseVariationalDropout, SparseVariationalDropoutPosterior
from bcdl_jax.trained import from_trained, mean_weights
from bcdl_jax.training import (
    TrainState,
    create_train_state,
    keep_masks,
    make_train_epoch,
    make_train_step,
    make_train_steps,
    parameter_kinds,
    scale_by_kind,
    stack,
    unstack,
)
from bcdl_jax.weight_sharing import cluster_values, reduce_to_levels, share_weights, shared_kernels

__all__ = [
    "AverageParamsState",
    "CompressedFileError",
    "Conv",
    "Dense",
    "EnsembleReport",
    "EpochReport",
    "GroupHorseshoe",
    "GroupHorseshoePosterior",
    "GroupNormalJeffreys",
    "GroupNormalJeffreysPosterior",
    "LeafReport",
    "Mixture",
    "Posterior",
    "QuantizedLayer",
    "RecordSummary",
    "Score",
    "ShrinkReport",
    "Shrinking",
    "SmallTraining",
    "SparseVariationalDropout",
    "SparseVariationalDropoutPosterior",
    "TrainState",
    "apply_masks",
    "average_params",
    "averaged_params",
    "balance_scales",
    "choose_relative_step",
    "choose_thresholds",
    "clip_variances",
    "cluster_values",
    "collapse",
    "compile_ensemble",
    "create_mixture",
    "create_train_state",
    "cut",
    "decode",
    "each_seed",
    "encode",
    "expand",
    "export_onnx",
    "export_safetensors",
    "export_stablehlo",
    "fetch",
    "for_cpu",
    "from_trained",
    "jit_step",
    "keep_masks",
    "kept_groups",
    "kernels",
    "kl_divergence",
    "kl_divergence_per_layer",
    "kl_warmup",
    "layer_bits",
    "load",
    "load_stablehlo",
    "log_dropout_rate",
    "log_dropout_rates",
    "log_noise_to_signal",
    "magnitude_masks",
    "make_mesh",
    "make_pmap_train_step",
    "make_step_by_setting",
    "make_train_epoch",
    "make_train_step",
    "make_train_steps",
    "mask_tree",
    "max_pool",
    "mean_weights",
    "mixture_nll",
    "negative_elbo",
    "parameter_kinds",
    "place_data",
    "place_state",
    "posterior_moments",
    "posteriors",
    "process_rows",
    "prune",
    "prune_state",
    "rate",
    "rate_paper",
    "rate_paper_maximum",
    "reduce_precision",
    "reduce_precision_by_round_off",
    "reduce_to_levels",
    "replicated",
    "save",
    "scale_by_kind",
    "set_unit_masks",
    "share_weights",
    "shared_kernels",
    "shrink",
    "shrink_further",
    "shrink_training",
    "stack",
    "summarize",
    "surgery_thresholds",
    "torch_state_dict",
    "train_ensemble",
    "unstack",
    "update_masks",
    "with_setting",
]
