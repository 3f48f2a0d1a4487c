"""A layer of integer weights: the node that replaces a posterior in the params tree after precision reduction."""

from __future__ import annotations

import math
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from bcdl_jax.priors.posterior import kernel_mask


class QuantizedLayer(flax.struct.PyTreeNode):
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
        """Mask of this layer's groups, [groups]."""
        return self.input_mask if self.group_axis == "input" else self.output_mask

    @property
    def kernel_mask(self) -> jax.Array:
        """Entries of the kernel between kept inputs and kept outputs, an array of bool that broadcasts against it."""
        return kernel_mask(self.kernel_shape, self.input_mask, self.output_mask)

    def kept_weights(self) -> jax.Array:
        """The number of kept entries of the kernel, a scalar of float32."""
        if self.prunes_weights:
            return jnp.sum(self.kernel != 0, dtype=jnp.float32)
        return jnp.sum(self.kernel_mask, dtype=jnp.float32) * math.prod(self.kernel_shape[:-2])

    def mean_weights(self) -> tuple[jax.Array, jax.Array | None]:
        """The kernel and the bias as floating-point numbers. The bias is None for a layer without one."""
        bias = None if self.bias is None or self.bias_step is None else self.bias * self.bias_step
        if self.kernel_levels is None:
            return self.kernel * self.kernel_step, bias
        # The appended zero gives the places a valid target in an empty layer, which has no levels.
        levels = jnp.append(jnp.asarray(self.kernel_levels), 0.0)
        place = self.kernel + jnp.sum(levels < 0) - (self.kernel > 0)
        return jnp.where(self.kernel == 0, 0, levels[place]), bias
