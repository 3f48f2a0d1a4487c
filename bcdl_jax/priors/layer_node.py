"""The masks and sizes that all nodes of layers share. A node is a posterior, or a layer of integers."""

from __future__ import annotations

import abc
import math
from typing import Literal

import jax
import jax.numpy as jnp

from bcdl_jax._arrays import is_kept, of_rank

GroupAxis = Literal["input", "output"]
# The entries that an array of a layer has: those of the kernel, one for each group, input or output, or others (None).
ARRAY_AXES = ("kernel", "group", "input", "output")

# The bits of a number that is not quantised.
FLOAT_BITS = 32


class LayerNode(abc.ABC):
    """The masks of a layer, and the bits that its arrays take.

    Each array field of a node declares its axes, ``metadata={"axis": axis}``: "kernel" for the shape of the kernel; "group", "input" or
    "output" for one entry for each group, input or output; None for other axes.

    Attributes:
      input_mask: Mask of the inputs, [in]. An input whose entry is not positive is pruned.
      output_mask: Mask of the outputs, [out], in the same form.
      group_axis: The side of the groups, "input" or "output".
    """

    input_mask: jax.Array
    output_mask: jax.Array
    group_axis: GroupAxis

    @property
    @abc.abstractmethod
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel, [*window, in / feature groups, out]."""

    @property
    @abc.abstractmethod
    def bias_size(self) -> int:
        """The number of biases, kept or not. It is 0 for a layer without bias."""

    @property
    @abc.abstractmethod
    def bits_per_weight(self) -> jax.Array | int:
        """The number of bits that each kept weight of the kernel takes."""

    @property
    @abc.abstractmethod
    def bits_per_bias(self) -> jax.Array | int:
        """The number of bits that each kept bias takes. It is 0 for a layer without bias."""

    @property
    @abc.abstractmethod
    def step_bits(self) -> int:
        """The number of bits of the steps or levels. It is 0 before precision reduction."""

    @property
    def feature_groups(self) -> int:
        """The number of feature groups of a grouped convolution, else 1. A layer without inputs counts as one group."""
        return _feature_groups(self.kernel_shape, self.input_mask)

    @property
    def group_mask(self) -> jax.Array:
        """Mask of this layer's groups, [groups]."""
        return self.input_mask if self.group_axis == "input" else self.output_mask

    @property
    def kernel_mask(self) -> jax.Array:
        """Kept entries of the kernel, an array of bool that broadcasts against it."""
        return kernel_mask(self.kernel_shape, self.input_mask, self.output_mask)

    def kept_weights(self) -> jax.Array:
        """The number of kept entries of the kernel: a scalar of float32, since an int32 may be too small."""
        mask = self.kernel_mask
        return jnp.sum(mask, dtype=jnp.float32) * (math.prod(self.kernel_shape) // mask.size if mask.size else 0)


def kernel_mask(kernel_shape: tuple[int, ...], input_mask: jax.Array, output_mask: jax.Array) -> jax.Array:
    """The entries of a kernel [*window, in / feature groups, out] that connect kept inputs [in] with kept outputs [out].

    Returns:
      An array of bool that broadcasts against the kernel: [1, ..., in / feature groups, out], the same for all positions of the window.
    """
    inputs, features = kernel_shape[-2:]
    groups = _feature_groups(kernel_shape, input_mask)
    kept_inputs = is_kept(input_mask).reshape(groups, inputs)
    mask = jnp.repeat(kept_inputs.T, features // groups, axis=1) & of_rank(is_kept(output_mask), 2)
    return of_rank(mask, len(kernel_shape))


def _feature_groups(kernel_shape: tuple[int, ...], input_mask: jax.Array) -> int:
    inputs = kernel_shape[-2]
    return input_mask.shape[-1] // inputs if inputs else 1  # A shrunk layer may have no inputs.
