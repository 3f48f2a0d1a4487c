"""Linear maps of layers: the product of inputs and kernel, and the pair of products that a sampled layer needs.

A sampled layer applies the means of the kernel to its inputs, and the variances of the kernel to its squared inputs. On a CPU, both products of
a convolution become matrix products with the same patches; the second one squares their entries. Training is several times as fast in this form
as with XLA's convolutions, whose gradients are slow on a CPU and which use only one core within a loop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bcdl_jax._arrays import of_rank
from bcdl_jax._backend import on_cpu


class LinearMap(Protocol):
    """A matrix product or a convolution of inputs [n, ..., in] and a kernel [*window, in, out], with outputs [n, ..., out]."""

    def __call__(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array: ...

    def moments(self, inputs: jax.Array, mean: jax.Array, variance: jax.Array) -> Moments:
        """Means and variances of the outputs, for a kernel of independent entries with these means and variances."""
        ...


class Moments(NamedTuple):
    """Means and variances of outputs [n, ..., out], with their axes in the order in which they were computed.

    Attributes:
      mean: The means of the outputs, transposed by ``order``.
      variance: The variances of the outputs, transposed by ``order``.
      order: The permutation of the axes, as for ``jax.numpy.transpose``.
    """

    mean: jax.Array
    variance: jax.Array
    order: tuple[int, ...]

    def in_order(self, values: jax.Array) -> jax.Array:
        """Transposes values that broadcast against the outputs, such that they broadcast against the moments."""
        return of_rank(values, len(self.order)).transpose(self.order)

    def restored(self, values: jax.Array) -> jax.Array:
        """Transposes values of the shape of the moments to the outputs, [n, ..., out]."""
        return restored(values, self.order)


def examples_last(num_spatial: int, num_leading: int = 1) -> tuple[int, ...]:
    """The order [out, *spatial, n, ...] of the axes of outputs [n, ..., *spatial, out], as for ``jax.numpy.transpose``.

    Args:
      num_spatial: The number of spatial axes.
      num_leading: The number of axes in front of them.
    """
    last = num_leading + num_spatial
    return last, *range(num_leading, last), *range(num_leading)


def restored(values: jax.Array, order: Sequence[int]) -> jax.Array:
    """The array whose axes in this order are those of the values."""
    return values.transpose(np.argsort(order))


@dataclasses.dataclass(frozen=True)
class DenseMap:
    """The matrix product of a dense layer: inputs [..., in], a kernel [in, out] and outputs [..., out].

    Attributes:
      precision: The precision of the matrix product, see ``jax.lax.Precision``.
    """

    precision: Any = None

    def __call__(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(inputs, kernel, precision=self.precision)

    def moments(self, inputs: jax.Array, mean: jax.Array, variance: jax.Array) -> Moments:
        return _two_products(self, inputs, mean, variance)


@dataclasses.dataclass(frozen=True)
class ConvolutionMap:
    """A convolution with channels last: inputs [n, ..., *spatial, in] and a kernel [*window, in / feature groups, out].

    Attributes:
      strides: The strides, one per spatial axis. Their number is the number of spatial axes.
      padding: The padding, "SAME" or a (low, high) pair per spatial axis.
      input_dilation: The dilations of the inputs, one per spatial axis.
      kernel_dilation: The dilations of the kernel, one per spatial axis.
      feature_group_count: The number of feature groups of a grouped convolution.
      precision: The precision of the products, see ``jax.lax.Precision``.
      pad_mode: The mode of ``jax.numpy.pad`` that fills the border, or None for zeros.
    """

    strides: Sequence[int]
    padding: str | Sequence[tuple[int, int]]
    input_dilation: Sequence[int]
    kernel_dilation: Sequence[int]
    feature_group_count: int = 1
    precision: Any = None
    pad_mode: Literal["wrap", "reflect"] | None = None

    def __call__(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        images, leading, padding = self._images(inputs)
        outputs = self._convolve(images, kernel, padding)
        return outputs.reshape(*leading, *outputs.shape[1:])

    def moments(self, inputs: jax.Array, mean: jax.Array, variance: jax.Array) -> Moments:
        if self._uses_xla_convolution(mean):
            return _two_products(self, inputs, mean, variance)
        matrix, product, order = self._product(inputs, mean.shape)
        return Moments(product(mean, matrix), product(variance, matrix * matrix), order)

    def in_training(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        """Computes the same outputs as a call, in the form whose gradients are fast on a CPU."""
        if self._uses_xla_convolution(kernel):
            return self(inputs, kernel)
        matrix, product, order = self._product(inputs, kernel.shape)
        return restored(product(kernel, matrix), order)

    def _uses_xla_convolution(self, kernel: jax.Array) -> bool:
        return not on_cpu() or self.feature_group_count > 1 or math.prod(kernel.shape) == 0

    def _product(
        self, inputs: jax.Array, kernel_shape: tuple[int, ...]
    ) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array], tuple[int, ...]]:
        """The matrix of patches, a function that multiplies a kernel with such a matrix, and the order of the axes of its result."""
        images, leading, padding = self._images(inputs)
        patches = self._patches(images, kernel_shape[:-2], padding)

        def product(kernel: jax.Array, matrix: jax.Array) -> jax.Array:
            rows = kernel.reshape(-1, kernel.shape[-1]).T
            return jnp.matmul(rows, matrix, precision=self.precision).reshape(-1, *patches.shape[2:-1], *leading)

        order = examples_last(len(self.strides), len(leading))
        return patches.reshape(math.prod(kernel_shape[:-1]), -1), product, order

    def _images(self, inputs: jax.Array) -> tuple[jax.Array, tuple[int, ...], str | Sequence[tuple[int, int]]]:
        """The inputs with all leading axes merged into one, the shape of these axes, and the padding that is still to be applied."""
        rank = len(self.strides)
        leading, rest = inputs.shape[: -rank - 1], inputs.shape[-rank - 1 :]
        images = inputs.reshape(-1, *rest)
        if self.pad_mode is None:
            return images, leading, self.padding
        images = jnp.pad(images, [(0, 0), *self.padding, (0, 0)], mode=self.pad_mode)
        return images, leading, [(0, 0)] * rank

    def _convolve(self, images: jax.Array, kernel: jax.Array, padding: str | Sequence[tuple[int, int]]) -> jax.Array:
        axes = tuple(range(1, images.ndim - 1))
        channels_last = (0, images.ndim - 1, *axes)
        numbers = lax.ConvDimensionNumbers(
            channels_last, (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2)), channels_last
        )
        return lax.conv_general_dilated(
            images,
            kernel,
            window_strides=self.strides,
            padding=padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=numbers,
            feature_group_count=self.feature_group_count,
            precision=self.precision,
        )

    def _patches(self, images: jax.Array, window: Sequence[int], padding: str | Sequence[tuple[int, int]]) -> jax.Array:
        """The patches, [positions of the window, in, *spatial out, n].

        The examples come last, so that the forward and the backward pass copy long contiguous rows.
        """
        reach = [(size - 1) * dilation + 1 for size, dilation in zip(window, self.kernel_dilation, strict=True)]
        pads = (
            lax.padtype_to_pads(images.shape[1:-1], reach, self.strides, padding)
            if isinstance(padding, str)
            else padding
        )
        rows = jnp.moveaxis(images, (0, -1), (-1, 0))
        config = [(low, high, dilation - 1) for (low, high), dilation in zip(pads, self.input_dilation, strict=True)]
        rows = lax.pad(rows, jnp.zeros((), rows.dtype), [(0, 0, 0), *config, (0, 0, 0)])
        counts = [(size - length) // stride + 1 for size, length, stride in zip(rows.shape[1:-1], reach, self.strides)]
        slices = []
        for place in itertools.product(*map(range, window)):
            starts = [index * dilation for index, dilation in zip(place, self.kernel_dilation, strict=True)]
            ends = [
                start + (count - 1) * stride + 1
                for start, count, stride in zip(starts, counts, self.strides, strict=True)
            ]
            slices.append(
                lax.slice(
                    rows,
                    (0, *starts, 0),
                    (rows.shape[0], *ends, rows.shape[-1]),
                    (1, *self.strides, 1),
                )
            )
        return jnp.concatenate([piece[None] for piece in slices])


def _two_products(linear_map: LinearMap, inputs: jax.Array, mean: jax.Array, variance: jax.Array) -> Moments:
    """The moments from two calls of the linear map, with the axes in their usual order."""
    outputs = linear_map(inputs, mean)
    return Moments(outputs, linear_map(inputs * inputs, variance), tuple(range(outputs.ndim)))
