"""Pruning, reduced precision and compression rates of a trained params tree."""

from bcdl_jax.compression.layers import is_layer
from bcdl_jax.compression.plain_arrays import round_plain_arrays
from bcdl_jax.compression.plain_twin import from_trained, mean_weights, weight_variances
from bcdl_jax.compression.pruning import kept_groups, prune, prune_units
from bcdl_jax.compression.quantization import choose_relative_step, reduce_precision, reduce_precision_by_round_off
from bcdl_jax.compression.quantized_layer import QuantizedLayer
from bcdl_jax.compression.rates import layer_bits, rate, rate_paper, rate_paper_maximum
from bcdl_jax.compression.scores import Score, log_dropout_rate, log_noise_to_signal, pruning_scores
from bcdl_jax.compression.threshold_search import choose_thresholds

__all__ = [
    "QuantizedLayer",
    "Score",
    "choose_relative_step",
    "choose_thresholds",
    "from_trained",
    "is_layer",
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
    "round_plain_arrays",
    "weight_variances",
]
