"""A layer of integer weights: the node that replaces a posterior in the params tree after precision reduction."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax._arrays import in_float32
from bcdl_jax.priors.layer_node import FLOAT_BITS, GroupAxis, LayerNode
from bcdl_jax.priors.posterior import Posterior


class RoundedArray(NamedTuple):
    """A rounded kernel or bias.

    Attributes:
      integers: The integers, int16, zero where pruned.
      step: The step, a scalar.
      bits: The number of bits that each kept integer takes, an int32 scalar.
    """

    integers: jax.Array
    step: jax.Array
    bits: jax.Array


class QuantizedLayer(LayerNode, flax.struct.PyTreeNode):
    """A layer of integer weights: a weight is integer * step, or one of a few levels.

    Attributes:
      kernel: The integers of the kernel, int16 [*window, in / feature groups, out], zero where pruned.
      kernel_step: The step of the kernel, a scalar. It is not used if there are levels.
      kernel_bits: The number of bits that each kept integer of the kernel takes, an int32 scalar.
      bias: The integers of the bias, int16 [out], or None for a layer without bias.
      bias_step: The step of the bias, a scalar, or None.
      bias_bits: The number of bits that each kept integer of the bias takes, an int32 scalar, or None.
      input_mask: Mask of the inputs, [in] of bool.
      output_mask: Mask of the outputs, [out] of bool.
      group_axis: The side of the groups, "input" or "output", see ``Posterior``.
      prunes_weights: True if single weights were pruned, see ``Posterior``. The zeros of the kernel are then the pruned weights.
      kernel_levels: The values of the weights other than 0, float32 [levels], ascending, or None. The integers are their numbers: 1 is the
        smallest positive level, 2 the next one, -1 the negative level nearest to 0. The integer 0 is the value 0.
    """

    layer_kind: ClassVar[str] = "quantised layers"
    layer_source: ClassVar[str] = "bcdl_jax.reduce_precision makes quantised layers of variational layers."

    kernel: jax.Array = flax.struct.field(metadata={"axis": "kernel"})
    kernel_step: jax.Array = flax.struct.field(metadata={"axis": None})
    kernel_bits: jax.Array = flax.struct.field(metadata={"axis": None})
    bias: jax.Array | None = flax.struct.field(metadata={"axis": "output"})
    bias_step: jax.Array | None = flax.struct.field(metadata={"axis": None})
    bias_bits: jax.Array | None = flax.struct.field(metadata={"axis": None})
    input_mask: jax.Array = flax.struct.field(metadata={"axis": "input"})
    output_mask: jax.Array = flax.struct.field(metadata={"axis": "output"})
    group_axis: GroupAxis = flax.struct.field(pytree_node=False)
    prunes_weights: bool = flax.struct.field(pytree_node=False, default=False)
    kernel_levels: jax.Array | None = flax.struct.field(metadata={"axis": None}, default=None)

    @classmethod
    def of(
        cls, posterior: Posterior, *, kernel: RoundedArray, bias: RoundedArray | None, levels: jax.Array | None = None
    ) -> Self:
        """The layer that replaces a posterior.

        Args:
          posterior: The posterior. The layer takes over its masks and groups.
          kernel: The rounded kernel.
          bias: The rounded bias, or None for a layer without bias.
          levels: The levels of the kernel, see ``kernel_levels``, or None.
        """
        return cls(
            kernel=kernel.integers,
            kernel_step=kernel.step,
            kernel_bits=kernel.bits,
            bias=None if bias is None else bias.integers,
            bias_step=None if bias is None else bias.step,
            bias_bits=None if bias is None else bias.bits,
            input_mask=posterior.input_mask > 0,
            output_mask=posterior.output_mask > 0,
            group_axis=posterior.group_axis,
            prunes_weights=posterior.prunes_weights,
            kernel_levels=levels,
        )

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.kernel_step.dtype

    @property
    def kernel_mask(self) -> jax.Array:
        mask = super().kernel_mask
        return mask & (self.kernel != 0) if self.prunes_weights else mask

    @property
    def bias_size(self) -> int:
        return 0 if self.bias is None else self.bias.size

    @property
    def bits_per_weight(self) -> jax.Array:
        return self.kernel_bits

    @property
    def bits_per_bias(self) -> jax.Array | int:
        return 0 if self.bias_bits is None else self.bias_bits

    @property
    def step_bits(self) -> int:
        numbers = 1 if self.kernel_levels is None else self.kernel_levels.size
        has_weights = math.prod(self.kernel_shape) > 0  # A shrunk layer may have none.
        return FLOAT_BITS * (numbers * has_weights + (self.bias_size > 0))

    def mean_weights(self) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and the bias as floating-point numbers. The bias is None for a layer without one."""
        bias = None if self.bias is None or self.bias_step is None else _scaled(self.bias, self.bias_step)
        if self.kernel_levels is None:
            return _scaled(self.kernel, self.kernel_step), bias
        # The appended zero gives the places a valid target in an empty layer, which has no levels.
        levels = jnp.append(jnp.asarray(self.kernel_levels), 0.0)
        place = self.kernel + jnp.sum(levels < 0) - (self.kernel > 0)
        return jnp.where(self.kernel == 0, 0, levels[place]), bias


def _scaled(integers: jax.Array, step: jax.Array) -> jax.Array:
    """The integers times the step, in the dtype of the step. The product is computed in float32 at least: float16 rounds integers above 2048."""
    wide = in_float32(step)
    return (integers.astype(wide.dtype) * wide).astype(step.dtype)
