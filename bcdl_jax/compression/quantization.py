"""Reducing the precision of the weights after training, as far as the posterior says it does not matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree, map_named_layers, values_by_layer
from bcdl_jax.priors.posterior import Posterior, kernel_mask, variational_layers

# Integers are held in 16 bits; a step is never finer than the largest weight needs to fit.
_INTEGER_DTYPE = jnp.int16
_LARGEST = 2**15 - 1


class QuantizedLayer(flax.struct.PyTreeNode):
    """A layer of integer weights: weight = integer * step, or one of a few levels. Takes the place of the posterior in the params tree.

    Attributes:
      kernel: [*window, in / feature groups, out], int16; zero where pruned.
      kernel_step: scalar, float32; not used where there are levels.
      kernel_bits: scalar, int32: the bits that one kept integer of the kernel takes.
      bias: [out], int16, or None.
      bias_step: scalar or None.
      bias_bits: scalar or None.
      input_mask: [in] of bool, kept inputs.
      output_mask: [out] of bool, kept outputs.
      group_axis: "input" or "output", see ``Posterior``.
      prunes_weights: whether weights were pruned one by one, see ``Posterior``; then the zeros of the kernel are the pruned ones.
      kernel_levels: [levels], float32, ascending and without 0, or None. The integers number them: 1 is the least positive level, 2 the
        next, -1 the negative level nearest to 0, and 0 is 0.
    """

    kernel: jax.Array
    kernel_step: jax.Array
    kernel_bits: jax.Array
    bias: jax.Array | None
    bias_step: jax.Array | None
    bias_bits: jax.Array | None
    input_mask: jax.Array
    output_mask: jax.Array
    group_axis: str = flax.struct.field(pytree_node=False)
    prunes_weights: bool = flax.struct.field(pytree_node=False, default=False)
    kernel_levels: jax.Array | None = None

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel_step.dtype

    @property
    def group_mask(self) -> jax.Array:
        return self.input_mask if self.group_axis == "input" else self.output_mask

    @property
    def kernel_mask(self) -> jax.Array:
        return kernel_mask(self.kernel_shape, self.input_mask, self.output_mask)

    def kept_weights(self) -> jax.Array:
        """How many entries of the kernel are not pruned: a scalar, float32."""
        if self.prunes_weights:
            return jnp.sum(self.kernel != 0, dtype=jnp.float32)
        return jnp.sum(self.kernel_mask, dtype=jnp.float32) * math.prod(self.kernel_shape[:-2])

    def mean_weights(self) -> tuple[jax.Array, jax.Array | None]:
        """Kernel and bias as floating-point numbers."""
        bias = None if self.bias is None or self.bias_step is None else self.bias * self.bias_step
        if self.kernel_levels is None:
            return self.kernel * self.kernel_step, bias
        # A zero more, since a layer of which nothing is left has no level that the places could point to.
        levels = jnp.append(jnp.asarray(self.kernel_levels), 0.0)
        place = self.kernel + jnp.sum(levels < 0) - (self.kernel > 0)
        return jnp.where(self.kernel == 0, 0, levels[place]), bias


def integer_bits(integers: jax.Array) -> jax.Array:
    """Bits of the shortest two's complement that holds every one of these integers, int32; 0 if all are zero."""
    integers = integers.astype(jnp.int32)
    magnitudes = jnp.where(integers < 0, -integers - 1, integers)
    length = 32 - jax.lax.clz(jnp.max(magnitudes, initial=0))
    return jnp.where(jnp.any(integers != 0), length + 1, 0).astype(jnp.int32)


def reduce_precision(params: PyTree, relative_step: float | Mapping[str, float]) -> PyTree:
    """Rounds every layer's weights to multiples of one step, taken from the posterior uncertainty of its kept weights.

    step = relative_step * geometric mean of the posterior standard deviations of the kept weights (kernel * scale, see
    ``Posterior.kernel_moments``); biases likewise with a step of their own.

    Args:
      params: tree with variational layers, pruned or not.
      relative_step: for all layers, or by layer name. About 0.25 costs nothing, about 1 costs a few tenths of a percent for MNIST nets; see
        ``choose_relative_step``.

    Returns:
      The tree with a ``QuantizedLayer`` in place of each posterior, on which the model runs deterministically as before.

    Raises:
      ValueError: a relative step that is not positive, or a layer without one.
    """
    relative = values_by_layer(relative_step, variational_layers(params), "relative_step")
    for name, value in relative.items():
        if not isinstance(value, jax.core.Tracer) and not 0 < value < math.inf:
            raise ValueError(f"relative_step of layer {name} is {value}; it must be a positive number.")

    return _reduce_precision(params, {name: jnp.asarray(relative[name], jnp.float32) for name in relative})


@jax.jit
def _reduce_precision(params: PyTree, relative: dict[str, jax.Array]) -> PyTree:
    def quantize(name: str, posterior: Posterior) -> QuantizedLayer:
        def rounded(moments: tuple[jax.Array, jax.Array], mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            mean, variance = moments
            log_deviation = jnp.where(mask, 0.5 * jnp.log(jnp.where(mask, variance, 1)), 0)
            count = jnp.sum(jnp.broadcast_to(mask, mean.shape))
            step = relative[name] * jnp.exp(jnp.sum(log_deviation) / jnp.maximum(count, 1))
            integers, step = _round_to_step(mean, step)
            return integers, step, integer_bits(integers)

        return _quantized(posterior, rounded)

    return map_named_layers(quantize, params, Posterior)


@jax.jit
def reduce_precision_by_round_off(params: PyTree) -> PyTree:
    """The rule of the paper's public code, for comparison: as many significand bits as the mean posterior variance allows.

    With the unit round-off u_t = 2^-t, a weight of variance v gets as many bits as there are t in 1..23 with 2 v < u_t; a layer gets the mean
    over its kept weights, rounded up, t; weights are rounded to multiples of 2^-t (of a coarser step
    where 16-bit integers would overflow). Each is charged t bits, one for the sign, and
    ceil(log2(log2(max |w|) + 1) + 1) for the exponent, where max |w| counts as at least 1 (the formula has no value below 1/2).

    Returns:
      As ``reduce_precision``.
    """
    round_offs = 2.0 ** -jnp.arange(1, 24)

    def quantize(_: str, posterior: Posterior) -> QuantizedLayer:
        def rounded(moments: tuple[jax.Array, jax.Array], mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            mean, variance = moments
            per_weight = jnp.sum(2 * variance[..., None] < round_offs, axis=-1)
            count = jnp.sum(jnp.broadcast_to(mask, mean.shape))
            bits = jnp.ceil(jnp.sum(jnp.where(mask, per_weight, 0)) / jnp.maximum(count, 1))
            largest = jnp.maximum(jnp.max(jnp.abs(mean), initial=0), 1)
            exponent_bits = jnp.ceil(jnp.log2(jnp.log2(largest) + 1) + 1)
            integers, step = _round_to_step(mean, 2.0**-bits)
            return integers, step, jnp.where(count > 0, bits + exponent_bits + 1, 0).astype(jnp.int32)

        return _quantized(posterior, rounded)

    return map_named_layers(quantize, params, Posterior)


def choose_relative_step(
    params: PyTree,
    error: Callable[[PyTree], float | jax.Array],
    *,
    max_increase: float,
    candidates: Sequence[float] = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.06),
) -> float:
    """The largest candidate up to which the error stays within ``max_increase`` of the error before rounding.

    Candidates are tried from the finest; a coarse one that is good by luck, beyond one that is not, is not taken.

    Args:
      params: tree with variational layers, pruned or not.
      error: params -> validation error; called with variational_layers once and with quantised trees.
      max_increase: in the units of ``error``, at least 0.
      candidates: relative steps to try.

    Returns:
      The relative step for ``reduce_precision``; the smallest candidate if none is good enough.

    Raises:
      ValueError: ``max_increase`` is negative or not a number, or there are no candidates.
    """
    if not max_increase >= 0:
        raise ValueError(f"max_increase is {max_increase}; it must be 0 or more.")
    if not candidates:
        raise ValueError("candidates is empty; it must name at least one relative step.")
    limit = float(error(params)) + max_increase
    ordered = sorted(candidates)
    good = itertools.takewhile(lambda step: float(error(reduce_precision(params, step))) <= limit, ordered)
    return max(good, default=ordered[0])


def _round_to_step(mean: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    step = jnp.maximum(step, jnp.max(jnp.abs(mean), initial=0) / _LARGEST).astype(mean.dtype)
    return jnp.round(mean / step).astype(_INTEGER_DTYPE), step


def _quantized(posterior: Posterior, rounded: Callable[..., Any]) -> QuantizedLayer:
    kernel, kernel_step, kernel_bits = rounded(posterior.kernel_moments(), posterior.kernel_mask)
    bias_moments = posterior.bias_moments()
    bias, bias_step, bias_bits = (
        (None, None, None) if bias_moments is None else rounded(bias_moments, posterior.output_mask > 0)
    )
    return QuantizedLayer(
        kernel=kernel,
        kernel_step=kernel_step,
        kernel_bits=kernel_bits,
        bias=bias,
        bias_step=bias_step,
        bias_bits=bias_bits,
        input_mask=posterior.input_mask > 0,
        output_mask=posterior.output_mask > 0,
        group_axis=posterior.group_axis,
        prunes_weights=posterior.prunes_weights,
    )
