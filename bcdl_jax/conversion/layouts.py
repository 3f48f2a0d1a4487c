"""The layouts of kernels and products: from any axes to those of a variational layer, and back.

A variational layer has a kernel [*window, in / feature groups, out], inputs [examples, ..., in] and outputs [examples, ..., out].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax.graph.program import Step
from bcdl_jax.nn.linear_maps import ConvolutionMap, DenseMap, LinearMap
from bcdl_jax.nn.sampling import sample_outputs, sample_rows
from bcdl_jax.priors.layer_node import GroupAxis
from bcdl_jax.priors.posterior import Posterior

Axes = tuple[int, ...]
ArrayType = TypeVar("ArrayType", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Canonical:
    """The operand of a product as the kernel of a variational layer.

    Attributes:
      order: The permutation of the operand's axes that puts the inputs before the outputs, as for ``jax.numpy.transpose``.
      shape: The shape of the kernel, [*window, in / feature groups, out].
      group_axis: The side of the groups, "input" for a matrix product and "output" for a convolution.
      feature_groups: The number of feature groups of a grouped convolution.
    """

    order: Axes
    shape: tuple[int, ...]
    group_axis: GroupAxis
    feature_groups: int = 1


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """The relation between an array of the params and the kernel of its posterior.

    Attributes:
      shape: The shape of the array.
      chain: The steps that move the array to its product.
      canonical: The operand of the product as a kernel.
    """

    shape: tuple[int, ...]
    chain: tuple[Step, ...]
    canonical: Canonical

    def to_kernel(self, array: ArrayType) -> ArrayType:
        """The kernel that holds the elements of the array."""
        return moved(array, self.chain).transpose(self.canonical.order).reshape(self.canonical.shape)

    def to_array(self, kernel: jax.Array) -> jax.Array:
        """The array that holds the elements of a kernel, the inverse of ``to_kernel``."""
        value = _untransposed(kernel, self._operand_shape, self.canonical.order)
        for step in reversed(self.chain):
            shape = step.equation.invars[0].aval.shape
            if step.name == "rev":
                value = jax.lax.rev(value, step.params["dimensions"])
            elif step.name == "transpose":
                value = jnp.transpose(value, _inverse(step.params["permutation"]))
            else:
                value = value.reshape(shape)
        return value.reshape(self.shape)

    def is_equal(self, other: KernelLayout) -> bool:
        """Whether both layouts put each element at the same place of the same kernel."""
        first, second = self.canonical, other.canonical
        same = (first.shape, first.group_axis, first.feature_groups) == (
            second.shape,
            second.group_axis,
            second.feature_groups,
        )
        return same and bool(np.array_equal(self.places, other.places))

    @property
    def _operand_shape(self) -> tuple[int, ...]:
        return self.chain[-1].equation.outvars[0].aval.shape if self.chain else self.shape

    @functools.cached_property
    def places(self) -> np.ndarray:
        """The place in the flattened array of each element of the kernel, of the kernel's shape."""
        return self.to_kernel(np.arange(math.prod(self.shape), dtype=np.int32).reshape(self.shape))


@dataclasses.dataclass(frozen=True)
class ProductLayout:
    """The relation between a product of the network and the linear map of a variational layer.

    Attributes:
      canonical: The operand of the product as a kernel.
      linear_map: The linear map.
      data_side: The operand that holds the data, 0 or 1.
      data_order: The permutation of the data's axes to [examples, ..., *spatial, in].
      num_inputs: The number of the last axes of the permuted data that become one axis of inputs.
      out_shape: The shape of the outputs behind the axes of the data: the axes that are outputs of the layer.
      out_order: The permutation of [examples, ..., *out_shape] to the axes of the product.
    """

    canonical: Canonical
    linear_map: LinearMap
    data_side: int
    data_order: Axes
    num_inputs: int
    out_shape: tuple[int, ...]
    out_order: Axes

    @property
    def example_axis(self) -> int:
        """The axis of the data that runs over the examples."""
        return self.data_order[0]

    def sampled(self, posterior: Posterior, data: jax.Array, scale: jax.Array, noise_key: jax.Array) -> jax.Array:
        """The result of the product with sampled weights.

        Args:
          posterior: The posterior of the kernel.
          data: The other operand.
          scale: The sampled scales of the kernel, [examples, groups].
          noise_key: The key of the other noise.
        """
        return self.to_result(sample_outputs(posterior, self.to_inputs(data), scale, noise_key, self.linear_map))

    def to_inputs(self, data: jax.Array) -> jax.Array:
        """The inputs of the layer, [examples, ..., in]."""
        data = jnp.transpose(data, self.data_order)
        front = data.ndim - self.num_inputs
        return data.reshape(*data.shape[:front], math.prod(data.shape[front:]))

    def to_result(self, outputs: ArrayType) -> ArrayType:
        """The result of the product."""
        return outputs.reshape(*outputs.shape[:-1], *self.out_shape).transpose(self.out_order)

    def output_numbers(self, result: tuple[int, ...]) -> np.ndarray:
        """The number of the output to which each element of the result of the product belongs.

        Args:
          result: The shape of the result.
        """
        count = self.canonical.shape[-1]
        leading = [result[axis] for axis in _inverse(self.out_order)][: len(result) - len(self.out_shape)]
        return self.to_result(np.broadcast_to(np.arange(count, dtype=np.int32), (*leading, count)))


@dataclasses.dataclass(frozen=True)
class LookupLayout:
    """The relation between a ``gather`` of rows of a table, such as an embedding, and the kernel of its posterior.

    The kernel is [columns, rows], with the columns as groups of inputs. So a table that the network also multiplies, transposed, with data has
    one posterior for both.

    Attributes:
      canonical: The table as a kernel.
      step: The ``gather``.
      shape: The shape of the table.
      example_axis: The axis of the indices that runs over the examples.
      order: The permutation of the result's axes to [examples, ..., *columns].
      num_columns: The number of the last axes of the permuted result that are columns.
    """

    canonical: Canonical
    step: Step
    shape: tuple[int, ...]
    example_axis: int
    order: Axes
    num_columns: int
    data_side: int = 1

    def sampled(self, posterior: Posterior, data: jax.Array, scale: jax.Array, noise_key: jax.Array) -> jax.Array:
        """The rows at the indices ``data``, with sampled weights. The arguments are those of ``ProductLayout.sampled``."""
        posterior = posterior.in_float32()
        moments = (jnp.where(posterior.kernel_mask, each, 0) for each in posterior.sampled_moments())
        mean, variance = (self._rows(each, data) for each in moments)
        shape = mean.shape
        columns = (*shape[: len(shape) - self.num_columns], -1)
        rows = sample_rows(mean.reshape(columns), variance.reshape(columns), scale, noise_key)
        return jnp.transpose(rows.reshape(shape), _inverse(self.order))

    def _rows(self, kernel: jax.Array, indices: jax.Array) -> jax.Array:
        """The rows at the indices, [examples, ..., *columns]."""
        (rows,) = self.step.bind(_untransposed(kernel, self.shape, self.canonical.order), indices)
        return jnp.transpose(rows, self.order)


def moved(array: ArrayType, chain: Sequence[Step]) -> ArrayType:
    """The array after steps that move its elements, in its own type."""
    for step in chain:
        if step.name != "convert_element_type":
            array = _moved_by_numpy(array, step) if isinstance(array, np.ndarray) else step.bind(array)[0]
    return array


def _moved_by_numpy(array: np.ndarray, step: Step) -> np.ndarray:
    """The array after a step of ``MOVES``. XLA would compile a program for each shape."""
    if step.name == "transpose":
        return array.transpose(step.params["permutation"])
    if step.name == "rev":
        return np.flip(array, step.params["dimensions"])
    shape = step.equation.outvars[0].aval.shape
    if step.name == "broadcast_in_dim":
        axes = [1] * len(shape)
        for axis, size in zip(step.params["broadcast_dimensions"], array.shape, strict=True):
            axes[axis] = size
        return np.broadcast_to(array.reshape(axes), shape)
    return array.reshape(shape)


def dot_layout(
    params: Mapping[str, Any], side: int, shapes: Sequence[tuple[int, ...]], moving: frozenset[int]
) -> ProductLayout | str:
    """The layout of a ``dot_general``, or the reason why it has none.

    Args:
      params: The parameters of the primitive.
      side: The operand that is the kernel, 0 or 1.
      shapes: The shapes of both operands.
      moving: The axes of the data that run over the examples.
    """
    contracted, batch = params["dimension_numbers"]
    if batch[side]:
        return "its product has batch axes"
    inner, data_inner = tuple(contracted[side]), tuple(contracted[1 - side])
    outer = tuple(axis for axis in range(len(shapes[side])) if axis not in inner)
    data_outer = tuple(axis for axis in range(len(shapes[1 - side])) if axis not in data_inner)
    examples = [axis for axis in data_outer if axis in moving]
    if not examples:
        return "its product sums over the examples" if moving else "its product reads no axis of examples"
    front = (examples[0], *(axis for axis in data_outer if axis != examples[0]))
    kernel = shapes[side]
    shape = tuple(math.prod(kernel[axis] for axis in axes) for axes in (inner, outer))
    # The product has the free axes of its first operand before those of the second. The layer has the axes of the data first.
    data_places = [front.index(axis) for axis in data_outer]
    kernel_places = [len(front) + place for place in range(len(outer))]
    return ProductLayout(
        canonical=Canonical((*inner, *outer), shape, "input"),
        linear_map=DenseMap(params["precision"]),
        data_side=1 - side,
        data_order=(*front, *data_inner),
        num_inputs=len(data_inner),
        out_shape=tuple(kernel[axis] for axis in outer),
        out_order=tuple(data_places + kernel_places if side == 1 else kernel_places + data_places),
    )


def convolution_layout(
    params: Mapping[str, Any], side: int, shapes: Sequence[tuple[int, ...]], moving: frozenset[int]
) -> ProductLayout | str:
    """The layout of a ``conv_general_dilated``, or the reason why it has none. The arguments are those of ``dot_layout``."""
    if side == 0:
        return "it is the image of its convolution"
    if params["batch_group_count"] != 1:
        return "its convolution has groups along the examples"
    numbers = params["dimension_numbers"]
    (examples, channels, *spatial), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    if examples not in moving:
        return "its convolution reads no axis of examples"
    kernel, groups = shapes[1], params["feature_group_count"]
    order = (*window, into, out)
    out_examples, out_channels, *out_spatial = numbers.out_spec
    return ProductLayout(
        canonical=Canonical(order, tuple(kernel[axis] for axis in order), "output", groups),
        linear_map=ConvolutionMap(
            tuple(params["window_strides"]),
            tuple(params["padding"]),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            groups,
            params["precision"],
        ),
        data_side=0,
        data_order=(examples, *spatial, channels),
        num_inputs=1,
        out_shape=(kernel[out],),
        out_order=_inverse((out_examples, *out_spatial, out_channels)),
    )


def lookup_layout(
    step: Step, table: tuple[int, ...], indices: tuple[int, ...], moving: frozenset[int]
) -> LookupLayout | str:
    """The layout of a ``gather`` from a table, or the reason why it has none.

    Args:
      step: The ``gather``.
      table: The shape of the table.
      indices: The shape of the indices. Their last axis holds one index for each axis of rows.
      moving: The axes of the indices that run over the examples.
    """
    numbers, rows = step.params["dimension_numbers"], step.params["dimension_numbers"].start_index_map
    columns = tuple(axis for axis in range(len(table)) if axis not in rows)
    sizes = step.params["slice_sizes"]
    whole = all(sizes[axis] == table[axis] for axis in columns) and all(sizes[axis] == 1 for axis in rows)
    if numbers.operand_batching_dims or {*numbers.collapsed_slice_dims} != {*rows} or not whole:
        return "its gather reads other parts than rows"
    examples = [axis for axis in range(len(indices) - 1) if axis in moving]
    if not examples:
        return "its gather reads no axis of examples"
    rank = len(indices) - 1 + len(columns)
    places = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    others = [place for axis, place in enumerate(places) if axis != examples[0]]
    shape = tuple(math.prod(table[axis] for axis in axes) for axes in (columns, rows))
    return LookupLayout(
        canonical=Canonical((*columns, *rows), shape, "input"),
        step=step,
        shape=table,
        example_axis=examples[0],
        order=(places[examples[0]], *others, *numbers.offset_dims),
        num_columns=len(columns),
    )


def _untransposed(kernel: jax.Array, shape: tuple[int, ...], order: Axes) -> jax.Array:
    """The operand of this shape whose axes in ``order``, merged, are the kernel."""
    return jnp.transpose(kernel.reshape([shape[axis] for axis in order]), _inverse(order))


def _inverse(order: Sequence[int]) -> Axes:
    """The permutation that undoes another one."""
    return tuple(int(place) for place in np.argsort(order))
