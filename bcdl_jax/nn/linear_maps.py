"""The products of inputs and kernel that layers are made of, and the pair of them that a sampled layer needs.

A sampled layer multiplies its inputs with the means of the kernel, and the squared inputs with the variances. A convolution shares what can be
shared between the two: on a CPU both become matrix products with the same patches, of which the second squares the entries. In
training that is several times as fast there as XLA's own convolutions, whose gradients are slow and which use one core inside of a loop.
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

from bcdl_jax._backend import on_cpu


class LinearMap(Protocol):
    """A matrix product or a convolution: inputs [n, ..., in] and kernel [*window, in, out] give [n, ..., out]."""

    def __call__(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array: ...

    def moments(self, inputs: jax.Array, mean: jax.Array, variance: jax.Array) -> Moments:
        """Mean and variance of the outputs when the kernel has these means and variances, independent of each other."""
        ...


class Moments(NamedTuple):
    """Means and variances of outputs [n, ..., out], with the axes in the order in which they were computed.

    Attributes:
      mean: the outputs, transposed by ``order``.
      variance: likewise.
      order: of the axes, as for ``jax.numpy.transpose``.
    """

    mean: jax.Array
    variance: jax.Array
    order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DenseMap:
    """The product of a dense layer: [..., in] and [in, out] give [..., out].

    Attributes:
      precision: of the matrix product, see ``jax.lax.Precision``.
    """

    precision: Any = None

    def __call__(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(inputs, kernel, precision=self.precision)

    def moments(self, inputs: jax.Array, mean: jax.Array, variance: jax.Array) -> Moments:
        return _two_products(self, inputs, mean, variance)


@dataclasses.dataclass(frozen=True)
class ConvolutionMap:
    """The product of a convolution with channels last: [n, ..., *spatial, in] and [*window, in / feature groups, out].

    Attributes:
      strides: one per spatial axis, which says how many of them there are.
      padding: "SAME", or a (low, high) pair per spatial axis.
      input_dilation: one per spatial axis.
      kernel_dilation: one per spatial axis.
      feature_group_count: number of groups of a grouped convolution.
      precision: see ``jax.lax.Precision``.
      pad_mode: how ``padding`` fills the border, see ``jax.numpy.pad``; None for zeros.
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
        if self._suits_convolution(mean):
            return _two_products(self, inputs, mean, variance)
        matrix, product, order = self._product(inputs, mean.shape)
        return Moments(product(mean, matrix), product(variance, matrix * matrix), order)

    def in_training(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        """The same outputs as a call gives, in the form whose gradients are fast on a CPU."""
        if self._suits_convolution(kernel):
            return self(inputs, kernel)
        matrix, product, order = self._product(inputs, kernel.shape)
        return product(kernel, matrix).transpose(np.argsort(order))

    def _suits_convolution(self, kernel: jax.Array) -> bool:
        return not on_cpu() or self.feature_group_count > 1 or math.prod(kernel.shape) == 0

    def _product(
        self, inputs: jax.Array, kernel_shape: tuple[int, ...]
    ) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array], tuple[int, ...]]:
        """The matrix of patches, the product of a kernel and such a matrix, and the order of the axes of its result."""
        images, leading, padding = self._images(inputs)
        patches = self._patches(images, kernel_shape[:-2], padding)

        def product(kernel: jax.Array, matrix: jax.Array) -> jax.Array:
            rows = kernel.reshape(-1, kernel.shape[-1]).T
            return jnp.matmul(rows, matrix, precision=self.precision).reshape(-1, *patches.shape[2:-1], *leading)

        rank, front = len(self.strides), len(leading)
        order = (front + rank, *range(front, front + rank), *range(front))
        return patches.reshape(math.prod(kernel_shape[:-1]), -1), product, order

    def _images(self, inputs: jax.Array) -> tuple[jax.Array, tuple[int, ...], str | Sequence[tuple[int, int]]]:
        """The inputs with all leading axes as one, the shape of these, and the padding that remains to be done."""
        rank = len(self.strides)
        leading, rest = inputs.shape[: -rank - 1], inputs.shape[-rank - 1 :]
        images = inputs.reshape(-1, *rest)
        if self.pad_mode is None:
            return images, leading, self.padding
        images = jnp.pad(images, [(0, 0), *self.padding, (0, 0)], mode=self.pad_mode)  # type: ignore[list-item]
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
        """[positions of the window, in, *spatial out, n].

        The examples come last, so that what is moved, forwards and backwards, are long rows of neighbouring numbers.
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
    outputs = linear_map(inputs, mean)
    return Moments(outputs, linear_map(inputs * inputs, variance), tuple(range(outputs.ndim)))
