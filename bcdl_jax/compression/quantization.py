"""Precision reduction after training: rounding of the weights to steps that follow from the posterior uncertainty."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._arrays import of_rank
from bcdl_jax._tree import PyTree, check_arrays, map_layers, map_named_layers, takes_arrays, values_by_layer
from bcdl_jax.compression.quantized_layer import QuantizedLayer, RoundedArray
from bcdl_jax.priors.posterior import Posterior, variational_layers

_INTEGER_DTYPE = jnp.int16
_LARGEST = 2**15 - 1

# The mean and variance of each weight of an array, see ``Posterior.kernel_moments``.
_Moments = tuple[jax.Array, jax.Array]


def integer_bits(integers: jax.Array | np.ndarray) -> jax.Array:
    """The number of bits of the shortest two's complement that holds all of these integers, int32. It is 0 if all are zero.

    Args:
      integers: An array of a signed integer type.

    Returns:
      A scalar, of NumPy for an array of NumPy.
    """
    low, high = integers.min(initial=0), integers.max(initial=0)
    # The powers of two in the type of the integers. A magnitude has as many binary digits as there are powers up to it.
    powers = 1 << np.arange(8 * integers.dtype.itemsize - 1, dtype=integers.dtype)
    digits = ((high >= powers) | (-1 - low >= powers)).sum()
    return ((digits + 1) * ((high > 0) | (low < 0)).astype(digits.dtype)).astype(np.int32)


def reduce_precision(params: PyTree, relative_step: float | Mapping[str, float]) -> PyTree:
    """Rounds the weights of every layer to multiples of one step, which follows from the posterior uncertainty of the kept weights.

        step = relative_step * geometric mean of the posterior standard deviations of the kept weights

    The weights are those in use, see ``Posterior.kernel_moments``. The biases have a step of their own, by the same rule. A step is never so
    small that the largest weight needs more than 16 bits.

    Args:
      params: A tree with variational layers, pruned or not.
      relative_step: One relative step for all layers, or a mapping from layer names to relative steps. About 0.25 costs no accuracy, about 1
        costs some tenths of a percent on MNIST, see ``choose_relative_step``.

    Returns:
      The tree with a ``QuantizedLayer`` in place of each posterior. The model runs on it with ``deterministic=True``. All other arrays stay
      as they are, such as the float32 arrays of an embedding; ``python -m bcdl_jax inspect FILE`` lists their bytes.

    Raises:
      ValueError: The tree holds no variational layer, a relative step is not positive, or a layer has none.
    """
    relative = values_by_layer(relative_step, variational_layers(params), "relative_step")
    for name, value in relative.items():
        if not isinstance(value, jax.core.Tracer) and not 0 < value < math.inf:
            raise ValueError(f"relative_step of layer {name} is {value}; it must be a positive number.")

    return _reduce_precision(params, {name: jnp.asarray(relative[name], jnp.float32) for name in relative})


@jax.jit
def _reduce_precision(params: PyTree, relative: dict[str, jax.Array]) -> PyTree:
    def quantize(name: str, posterior: Posterior) -> QuantizedLayer:
        return _quantized(
            posterior, lambda moments, mask, dtype: _round_by_deviation(moments, mask, dtype, relative[name])
        )

    return map_named_layers(quantize, params, Posterior)


@takes_arrays
@jax.jit
def reduce_precision_by_round_off(params: PyTree) -> PyTree:
    """Rounds the weights by the rule of the paper's public code, for comparison.

    A weight of variance v gets as many significand bits as there are t in 1..23 with 2 v < 2^-t (the unit round-off of t bits). The t of
    a layer is the mean over its kept weights, rounded up. Its weights are rounded to multiples of 2^-t, or of a coarser step if 16-bit integers would
    overflow. The rule charges each kept weight t bits, one bit for the sign, and ceil(log2(log2(max |w|) + 1) + 1) bits for the exponent,
    where max |w| counts as at least 1 (the formula has no value below 1/2).

    Args:
      params: A tree with variational layers, pruned or not.

    Returns:
      The tree with a ``QuantizedLayer`` in place of each posterior.
    """
    return map_layers(lambda posterior: _quantized(posterior, _round_by_round_off), params, Posterior)


def choose_relative_step(
    params: PyTree,
    error: Callable[[PyTree], float | jax.Array],
    *,
    max_increase: float,
    candidates: Sequence[float] = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.06),
) -> float:
    """Finds the largest relative step whose error is at most ``max_increase`` above the error before rounding.

    The candidates are tried in ascending order, up to the first one whose error exceeds the limit. A larger candidate whose error is within the
    limit by chance is never returned.

    Args:
      params: A tree with variational layers, pruned or not.
      error: A function from params to the validation error. It is called once with ``params``, then with quantised trees.
      max_increase: The largest allowed increase of the error, at least 0.
      candidates: The relative steps to try.

    Returns:
      The relative step for ``reduce_precision``. It is the smallest candidate if the error of every candidate exceeds the limit.

    Raises:
      ValueError: ``max_increase`` is negative or not a number, or there are no candidates.
    """
    if not max_increase >= 0:
        raise ValueError(f"max_increase is {max_increase}; it must be 0 or more.")
    if not candidates:
        raise ValueError("candidates is empty; it must hold at least one relative step.")
    check_arrays(params)
    limit = float(error(params)) + max_increase
    ordered = sorted(candidates)
    good = itertools.takewhile(lambda step: float(error(reduce_precision(params, step))) <= limit, ordered)
    return max(good, default=ordered[0])


def _quantized(
    posterior: Posterior, round_weights: Callable[[_Moments, jax.Array, Any], RoundedArray]
) -> QuantizedLayer:
    """The layer whose kernel and bias are rounded by ``round_weights``, a function of moments, mask and the dtype of the step."""
    wide = posterior.in_float32()  # Variances and steps underflow in float16.
    bias_moments = wide.bias_moments()
    return QuantizedLayer.of(
        posterior,
        kernel=round_weights(wide.kernel_moments(), posterior.kernel_mask, posterior.dtype),
        bias=None if bias_moments is None else round_weights(bias_moments, posterior.output_mask > 0, posterior.dtype),
    )


def _round_by_deviation(moments: _Moments, mask: jax.Array, dtype: Any, relative_step: jax.Array) -> RoundedArray:
    """Rounds to multiples of the relative step times the geometric mean of the kept weights' standard deviations."""
    mean, variance = moments
    log_deviation = jnp.where(mask, 0.5 * jnp.log(jnp.where(mask, variance, 1)), 0)
    count = jnp.sum(jnp.broadcast_to(mask, mean.shape))
    step = relative_step * jnp.exp(jnp.sum(log_deviation) / jnp.maximum(count, 1).astype(mean.dtype))
    integers, step = _round_to_step(mean, step, dtype)
    return RoundedArray(integers, step, integer_bits(integers))


def _round_by_round_off(moments: _Moments, mask: jax.Array, dtype: Any) -> RoundedArray:
    """Rounds by the rule of ``reduce_precision_by_round_off``."""
    mean, variance = moments
    round_offs = 2.0 ** -jnp.arange(1.0, 24.0)
    per_weight = jnp.sum(2 * variance[..., None] < of_rank(round_offs, variance.ndim + 1), axis=-1)
    count = jnp.sum(jnp.broadcast_to(mask, mean.shape))
    bits = jnp.ceil(jnp.sum(jnp.where(mask, per_weight, 0)) / jnp.maximum(count, 1))
    largest = jnp.maximum(jnp.max(jnp.abs(mean), initial=0), 1)
    exponent_bits = jnp.ceil(jnp.log2(jnp.log2(largest) + 1) + 1)
    integers, step = _round_to_step(mean, 2.0**-bits, dtype)
    return RoundedArray(integers, step, jnp.where(count > 0, bits + exponent_bits + 1, 0).astype(jnp.int32))


def _round_to_step(mean: jax.Array, step: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The integers of the weights, and the step in the given dtype, which is enlarged if the largest weight would overflow."""
    step = jnp.maximum(step, jnp.max(jnp.abs(mean), initial=0) / _LARGEST).astype(dtype)
    if jnp.finfo(dtype).bits < 32:
        step = jnp.maximum(step, jnp.finfo(dtype).smallest_subnormal.astype(dtype))
    integers = jnp.round(mean / step.astype(mean.dtype))
    # The step may have been rounded down.
    return jnp.clip(integers, -_LARGEST, _LARGEST).astype(_INTEGER_DTYPE), step
