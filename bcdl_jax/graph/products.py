"""The flow of elements through matrix products and convolutions.

The rules compute with counts: the product of two arrays of 0 and 1 gives the number of terms in each sum. Where a sum has no term, the
result is 0.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import Fact, Flags, Product
from bcdl_jax.graph.program import Program, Step

PRODUCTS = ("dot_general", "conv_general_dilated")

Axes = Sequence[int]


@dataclasses.dataclass(frozen=True)
class ProductRule(abc.ABC):
    """A product of two arrays, on arrays of counts.

    Attributes:
      contracted: The axes of each operand that the product sums over.
      foldable_sides: The operands whose known elements can become a constant that is added to the result.
    """

    contracted: tuple[Axes, Axes]
    foldable_sides: tuple[int, ...]

    @abc.abstractmethod
    def forward(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The product."""

    @abc.abstractmethod
    def to_first(self, out: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The transpose with respect to the first operand."""

    @abc.abstractmethod
    def to_second(self, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The transpose with respect to the second operand."""


def product_rule(step: Step, program: Program) -> ProductRule | None:
    """The rule of a product; None for other steps, and for convolutions with groups along the batch."""
    if step.name not in PRODUCTS:
        return None
    shapes = [program.shapes[number].shape for number in step.inputs]
    if step.name == "dot_general":
        return _dot(step.params["dimension_numbers"], shapes)
    return _convolution(step.params, shapes) if step.params["batch_group_count"] == 1 else None


def unknown_results(rule: ProductRule, x: Fact, w: Fact) -> Flags:
    """Flags of the unknown elements of a product."""
    return (rule.forward(x.unknown, w.nonzero) + rule.forward(x.nonzero, w.unknown)) > 0


def product_needs(rule: ProductRule, inputs: Sequence[Fact], output: Fact) -> tuple[list[Flags], Product]:
    """The backward pass through a product.

    Returns:
      Flags of the elements that are read from each operand, and the facts about the product.
    """
    counts = [inputs[0].nonzero, inputs[1].nonzero]
    folded, folded_side = None, None
    if not output.fixed:
        for side in rule.foldable_sides:
            if not inputs[side].fixed and inputs[1 - side].fixed:
                folded, folded_side = _constant_slices(inputs[side], rule.contracted[side]), side
                others = tuple(axis for axis in range(counts[side].ndim) if axis not in rule.contracted[side])
                order = np.argsort(rule.contracted[side])
                counts[side] = counts[side] & ~np.expand_dims(np.transpose(folded, order), others)
                if not folded.any():
                    folded, folded_side = None, None
                break
    needs = [
        (rule.to_first(output.live, counts[1]) > 0) & counts[0],
        (rule.to_second(counts[0], output.live) > 0) & counts[1],
    ]
    needed = []
    for axis in rule.contracted[0]:
        needed.append(needs[0].any(tuple(other for other in range(needs[0].ndim) if other != axis)))
    return needs, Product(tuple(needed), folded, folded_side)


def _constant_slices(fact: Fact, contracted: Axes) -> Flags:
    """Flags over the contracted axes, in their order: known, not 0, and equal along all other axes."""
    others = tuple(axis for axis in range(fact.unknown.ndim) if axis not in contracted)
    first = fact.value
    for axis in others:
        first = np.take(first, [0], axis)
    flags = ~(fact.unknown | (fact.value != first)).any(others) & (first != 0).any(others)
    return np.transpose(flags, np.argsort(np.argsort(contracted)))


# Matrix products.


@dataclasses.dataclass(frozen=True)
class _Dot(ProductRule):
    """``dot_general`` as an einsum. Each list numbers the axes of one array; equal numbers are the same axis."""

    x_axes: list[int]
    w_axes: list[int]
    out_axes: list[int]

    def forward(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return _einsum(x, self.x_axes, w, self.w_axes, self.out_axes)

    def to_first(self, out: np.ndarray, w: np.ndarray) -> np.ndarray:
        return _einsum(out, self.out_axes, w, self.w_axes, self.x_axes)

    def to_second(self, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        return _einsum(x, self.x_axes, out, self.out_axes, self.w_axes)


def _einsum(
    first: np.ndarray, first_axes: list[int], second: np.ndarray, second_axes: list[int], result_axes: list[int]
) -> np.ndarray:
    operands: list[Any] = [first.astype(np.float32), first_axes, second.astype(np.float32), second_axes]
    return np.einsum(*operands, result_axes, optimize=True)


def _dot(numbers: Any, shapes: Sequence[tuple[int, ...]]) -> _Dot:
    (contract_x, contract_w), (batch_x, batch_w) = numbers
    free_numbers = iter(range(len(shapes[0]) + len(shapes[1])))
    x_axes = [next(free_numbers) for _ in shapes[0]]
    w_axes = [-1] * len(shapes[1])
    for x_axis, w_axis in [*zip(contract_x, contract_w, strict=True), *zip(batch_x, batch_w, strict=True)]:
        w_axes[w_axis] = x_axes[x_axis]
    w_axes = [next(free_numbers) if axis < 0 else axis for axis in w_axes]
    out_axes = [x_axes[axis] for axis in batch_x]
    out_axes += [axis for place, axis in enumerate(x_axes) if place not in (*contract_x, *batch_x)]
    out_axes += [axis for place, axis in enumerate(w_axes) if place not in (*contract_w, *batch_w)]
    return _Dot(
        contracted=(contract_x, contract_w),
        foldable_sides=() if batch_x else (0, 1),
        x_axes=x_axes,
        w_axes=w_axes,
        out_axes=out_axes,
    )


# Convolutions.


@dataclasses.dataclass(frozen=True)
class _Convolution(ProductRule):
    """A convolution as a matrix product of patches and kernel, group by group.

    Attributes:
      x_order: The permutation of the input's axes to [batch, *positions, channels].
      w_order: The permutation of the kernel's axes to [*window, in, out].
      out_order: The permutation of the output's axes to [batch, *positions, channels].
      x_shape: The shape of the input in that order.
      w_shape: The shape of the kernel in that order.
      out_positions: The sizes of the output's position axes.
      groups: The number of feature groups.
      reads: The input position that each output position reads at each window position, [output positions, window positions]. Positions
        are flattened. One position beyond the last is the padding.
    """

    x_order: tuple[int, ...]
    w_order: tuple[int, ...]
    out_order: tuple[int, ...]
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    out_positions: tuple[int, ...]
    groups: int
    reads: np.ndarray

    @property
    def _taps(self) -> int:
        return self.reads.shape[1]

    def forward(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        out = np.moveaxis(self._patches(x) @ self._kernels(w), 0, 1)
        out = out.reshape(self.x_shape[0], *self.out_positions, self.w_shape[-1])
        return np.transpose(out, np.argsort(self.out_order))

    def to_first(self, out: np.ndarray, w: np.ndarray) -> np.ndarray:
        batch, features_in, padding = self.x_shape[0], self.w_shape[-2], math.prod(self.x_shape[1:-1])
        flat = self._results(out) @ np.swapaxes(self._kernels(w), 1, 2)
        flat = np.moveaxis(flat.reshape(self.groups, batch, len(self.reads), self._taps, features_in), 0, 3)
        x = np.zeros((batch, padding + 1, self.groups, features_in), np.float32)
        # At one window position, no input position but the padding is read twice. So the sum below drops no term.
        for tap in range(self._taps):
            x[:, self.reads[:, tap]] += flat[:, :, tap]
        return np.transpose(x[:, :-1].reshape(self.x_shape), np.argsort(self.x_order))

    def to_second(self, x: np.ndarray, out: np.ndarray) -> np.ndarray:
        flat = np.swapaxes(self._patches(x), 1, 2) @ self._results(out)
        return np.transpose(np.moveaxis(flat, 0, 1).reshape(self.w_shape), np.argsort(self.w_order))

    def _patches(self, x: np.ndarray) -> np.ndarray:
        """[groups, batch * output positions, window positions * in]."""
        batch, features_in = self.x_shape[0], self.w_shape[-2]
        flat = np.transpose(x, self.x_order).astype(np.float32)
        flat = flat.reshape(batch, math.prod(self.x_shape[1:-1]), self.groups * features_in)
        flat = np.concatenate([flat, np.zeros((batch, 1, flat.shape[-1]), np.float32)], 1)[:, self.reads]
        flat = flat.reshape(batch, len(self.reads), self._taps, self.groups, features_in)
        return np.moveaxis(flat, 3, 0).reshape(self.groups, -1, self._taps * features_in)

    def _kernels(self, w: np.ndarray) -> np.ndarray:
        """[groups, window positions * in, out / groups]."""
        flat = np.transpose(w, self.w_order).astype(np.float32)
        flat = flat.reshape(self._taps * self.w_shape[-2], self.groups, self.w_shape[-1] // self.groups)
        return np.moveaxis(flat, 1, 0)

    def _results(self, out: np.ndarray) -> np.ndarray:
        """[groups, batch * output positions, out / groups]."""
        flat = np.transpose(out, self.out_order).astype(np.float32)
        return np.moveaxis(flat.reshape(-1, self.groups, self.w_shape[-1] // self.groups), 1, 0)


def _convolution(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> _Convolution:
    numbers = params["dimension_numbers"]
    x_order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    w_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    x_shape, w_shape = (
        tuple(shape[axis] for axis in order) for shape, order in zip(shapes, (x_order, w_order), strict=True)
    )
    reads, out_positions = _positions_read(params, x_shape[1:-1], w_shape[:-2])
    padded = any(low or high for low, high in params["padding"]) or any(spread > 1 for spread in params["lhs_dilation"])
    return _Convolution(
        contracted=((numbers.lhs_spec[1],), (numbers.rhs_spec[1],)),
        # A constant channel is not constant at the border if the padding adds zeros to it.
        foldable_sides=() if padded else (0,),
        x_order=x_order,
        w_order=w_order,
        out_order=(numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]),
        x_shape=x_shape,
        w_shape=w_shape,
        out_positions=out_positions,
        groups=params["feature_group_count"],
        reads=reads,
    )


def _positions_read(
    params: Mapping[str, Any], positions: tuple[int, ...], window: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
    """``reads`` and ``out_positions`` of ``_Convolution``."""
    reads, out_positions = np.zeros((1, 1), int), []
    for size, taps, stride, (low, high), spread, dilation in zip(
        positions,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    ):
        length = low + high + ((size - 1) * spread + 1 if size else 0)
        count = max(0, (length - ((taps - 1) * dilation + 1)) // stride + 1)
        place = np.arange(count)[:, None] * stride + np.arange(taps) * dilation - low
        valid = (place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)
        place = np.where(valid, place // spread, -1)
        mixed = reads[:, None, :, None] * size + place[None, :, None, :]
        mixed = np.where((reads[:, None, :, None] < 0) | (place[None, :, None, :] < 0), -1, mixed)
        reads = mixed.reshape(reads.shape[0] * count, reads.shape[1] * taps)
        out_positions.append(count)
    return np.where(reads < 0, math.prod(positions), reads), tuple(out_positions)
