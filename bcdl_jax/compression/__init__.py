"""Pruning, reduced precision and compression rates of a trained params tree."""

from bcdl_jax.compression.plain_twin import from_trained, mean_weights, weight_variances
from bcdl_jax.compression.pruning import (
    Score,
    choose_thresholds,
    kept_groups,
    log_dropout_rate,
    log_noise_to_signal,
    prune,
    prune_units,
    pruning_scores,
)
from bcdl_jax.compression.quantization import (
    QuantizedLayer,
    choose_relative_step,
    reduce_precision,
    reduce_precision_by_round_off,
)
from bcdl_jax.compression.rates import layer_bits, rate, rate_paper, rate_paper_maximum

__all__ = [
    "QuantizedLayer",
    "Score",
    "choose_relative_step",
    "choose_thresholds",
    "from_trained",
    "kept_groups",
    "layer_bits",
    "log_dropout_rate",
    "log_noise_to_signal",
    "mean_weights",
    "prune",
    "prune_units",
    "pruning_scores",
    "rate",
    "rate_paper",
    "rate_paper_maximum",
    "reduce_precision",
    "reduce_precision_by_round_off",
    "weight_variances",
]
