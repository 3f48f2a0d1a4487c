"""The flow of elements through matrix products and convolutions.

The rules compute with counts: the product of two arrays of 0 and 1 gives the number of terms in each sum. Where a sum has no term, the
result is 0. All arrays are compact, see ``facts``. Counts are exact up to a positive factor: only their signs matter.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import Fact, Flags, Product, Shape, along, any_along, compact, in_full
from bcdl_jax.graph.known_values import values_of
from bcdl_jax.graph.program import Program, Step
from bcdl_jax.graph.windows import positions_read

PRODUCTS = ("dot_general", "conv_general_dilated")

Axes = Sequence[int]


@dataclasses.dataclass(frozen=True)
class ProductRule(abc.ABC):
    """A product of two arrays, on compact arrays of counts.

    Attributes:
      shapes: The shapes of the operands.
      contracted: The axes of each operand that the product sums over.
      foldable_sides: The operands whose known elements can become a constant that is added to the result.
    """

    shapes: tuple[Shape, Shape]
    contracted: tuple[Axes, Axes]
    foldable_sides: tuple[int, ...]

    @abc.abstractmethod
    def forward(self, x: Flags, w: Flags) -> Flags:
        """Flags of the results that have a term."""

    @abc.abstractmethod
    def to_first(self, out: Flags, w: Flags) -> Flags:
        """Flags of the elements of the first operand that meet flagged elements of the second in a flagged result."""

    @abc.abstractmethod
    def to_second(self, x: Flags, out: Flags) -> Flags:
        """Flags of the elements of the second operand that meet flagged elements of the first in a flagged result."""

    @abc.abstractmethod
    def operands(self, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values of both operands, extended so that the primitive takes them."""


def product_rule(step: Step, program: Program) -> ProductRule | None:
    """The rule of a product; None for other steps, and for convolutions with groups along the batch."""
    if step.name not in PRODUCTS:
        return None
    x, w = (program.shapes[number].shape for number in step.inputs)
    if step.name == "dot_general":
        return _dot(step.params["dimension_numbers"], (x, w))
    return _convolution(step.params, (x, w)) if step.params["batch_group_count"] == 1 else None


def known_results(rule: ProductRule, step: Step, x: Fact, w: Fact) -> tuple[Flags, np.ndarray]:
    """Flags of the unknown elements of a product, and its values at all other elements."""
    if x.nonzero is x.unknown and w.nonzero is w.unknown:  # Only zeros are known.
        unknown = rule.forward(x.unknown, w.unknown)
        return compact(unknown), np.zeros((1,) * unknown.ndim, np.float32)
    unknown = rule.forward(x.unknown, w.nonzero)
    if w.unknown.any():
        unknown = unknown | rule.forward(x.nonzero, w.unknown)
    zeros = np.zeros((1,) * unknown.ndim, np.float32)
    if unknown.all() or x.unknown.all() or not (rule.forward(x.nonzero, w.nonzero) & ~unknown).any():
        return compact(unknown), zeros
    # Terms with unknown elements are 0 in all known results, so that the 0 in place of these elements is right.
    return compact(unknown), compact(values_of(step, rule.operands(x.value, w.value))[0])


def product_needs(rule: ProductRule, inputs: Sequence[Fact], output: Fact) -> tuple[list[Flags], Product]:
    """The backward pass through a product.

    Returns:
      Flags of the elements that are read from each operand, and the facts about the product.
    """
    counts = [inputs[0].nonzero, inputs[1].nonzero]
    folded, folded_side = None, None
    if not output.fixed:
        for side in rule.foldable_sides:
            other = inputs[1 - side]
            if not inputs[side].fixed and other.fixed and not other.unknown.any():
                flags = _constant_slices(inputs[side], rule.contracted[side])
                if flags.any():
                    folded, folded_side = _in_full_order(flags, rule, side), side
                    counts[side] = counts[side] & ~flags
                break
    needs = [
        rule.to_first(output.live, counts[1]) & counts[0],
        rule.to_second(counts[0], output.live) & counts[1],
    ]
    needed = [along(needs[0], axis, rule.shapes[0][axis]) for axis in rule.contracted[0]]
    return needs, Product(tuple(needed), folded, folded_side)


def _constant_slices(fact: Fact, contracted: Axes) -> Flags:
    """Flags of the known elements that are not 0, and equal along all axes but the contracted ones. The latter have size 1."""
    others = [axis for axis in range(fact.unknown.ndim) if axis not in contracted]
    first = fact.value
    for axis in others:
        first = np.take(first, [0], axis)
    flags = ~any_along(fact.unknown, others) & (first != 0)
    return flags if first.shape == fact.value.shape else flags & ~any_along(fact.value != first, others)


def _in_full_order(flags: Flags, rule: ProductRule, side: int) -> Flags:
    """Flags over the contracted axes of one operand, in their order and in full size."""
    axes = rule.contracted[side]
    whole = in_full(flags, rule.shapes[side], axes)
    rest = tuple(axis for axis in range(flags.ndim) if axis not in axes)
    return np.transpose(np.squeeze(whole, rest), np.argsort(np.argsort(axes)))


# Matrix products.


@dataclasses.dataclass(frozen=True)
class _Dot(ProductRule):
    """``dot_general`` as an einsum. Each list numbers the axes of one array; equal numbers are the same axis."""

    x_axes: list[int]
    w_axes: list[int]
    out_axes: list[int]

    def forward(self, x: Flags, w: Flags) -> Flags:
        return _einsum(x, self.x_axes, w, self.w_axes, self.out_axes)

    def to_first(self, out: Flags, w: Flags) -> Flags:
        return _einsum(out, self.out_axes, w, self.w_axes, self.x_axes)

    def to_second(self, x: Flags, out: Flags) -> Flags:
        return _einsum(x, self.x_axes, out, self.out_axes, self.w_axes)

    def operands(self, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, w = (
            in_full(array, shape, axes) for array, shape, axes in zip((x, w), self.shapes, self.contracted, strict=True)
        )
        shared = [
            (x_axis, self.w_axes.index(number)) for x_axis, number in enumerate(self.x_axes) if number in self.w_axes
        ]
        differ = [(one, two) for one, two in shared if x.shape[one] != w.shape[two]]
        return (
            in_full(x, self.shapes[0], [one for one, _ in differ]),
            in_full(w, self.shapes[1], [two for _, two in differ]),
        )


def _einsum(
    first: Flags, first_axes: list[int], second: Flags, second_axes: list[int], result_axes: list[int]
) -> Flags:
    """Flags of the results that have a term. An axis of size 1 does not appear in the sum."""
    present = [
        {axis for axis, size in zip(axes, flags.shape, strict=True) if size != 1}
        for axes, flags in ((first_axes, first), (second_axes, second))
    ]
    shared, result = present[0] & present[1], [axis for axis in result_axes if axis in present[0] | present[1]]
    both = [axis for axis in result if axis in shared]
    summed = [axis for axis in first_axes if axis in shared and axis not in result]
    own = [[axis for axis in result if axis in each and axis not in shared] for each in present]
    one = _matrices(first, first_axes, both, own[0], summed)
    other = _matrices(second, second_axes, both, own[1], summed)
    sizes = [*one.shape[: len(both)], *(first.shape[first_axes.index(axis)] for axis in own[0])]
    sizes += [second.shape[second_axes.index(axis)] for axis in own[1]]
    product = (one @ np.swapaxes(other, -1, -2) > 0).reshape(sizes)
    order = [*both, *own[0], *own[1]]
    product = np.transpose(product, [order.index(axis) for axis in result])
    sizes_left = iter(product.shape)
    return product.reshape([next(sizes_left) if axis in result else 1 for axis in result_axes])


def _matrices(flags: Flags, axes: list[int], both: list[int], own: list[int], summed: list[int]) -> np.ndarray:
    """Flags as matrices of 0 and 1, [*both, own, summed]: whether any is set along all other axes."""
    kept = [*both, *own, *summed]
    places = [axes.index(axis) for axis in kept]
    others = [place for place in range(flags.ndim) if place not in places]
    moved = np.transpose(any_along(flags, others), [*places, *others])
    sizes = moved.shape[: len(both)], moved.shape[len(both) : len(both) + len(own)], moved.shape[len(both) + len(own) :]
    return moved.reshape(*sizes[0], math.prod(sizes[1]), math.prod(sizes[2])).astype(np.float32)


@functools.cache
def _dot(numbers: Any, shapes: tuple[Shape, Shape]) -> _Dot:
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
        shapes=shapes,
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
      positions_read: The input position that each output position reads at each window position, along each position axis, [output positions,
        window positions]. -1 is the padding.
      groups: The number of feature groups.
    """

    x_order: tuple[int, ...]
    w_order: tuple[int, ...]
    out_order: tuple[int, ...]
    positions_read: tuple[np.ndarray, ...]
    groups: int

    def forward(self, x: Flags, w: Flags) -> Flags:
        x, w = np.transpose(x, self.x_order), np.transpose(w, self.w_order)
        if math.prod(x.shape[1:-1]) == 1 and self._every_result_reads():
            # All positions are alike.
            out = self._per_position(x, self._kernels_of_any_tap(w))
        else:
            x = np.broadcast_to(x, (x.shape[0], *self._positions, x.shape[-1]))
            out = np.moveaxis(self._patches(x) @ self._kernels(w, self._taps), 0, 1)
            out = out.reshape(x.shape[0], *self._out_positions, self.groups * self._features_out) > 0
        return np.transpose(out, np.argsort(self.out_order))

    def to_first(self, out: Flags, w: Flags) -> Flags:
        out, w = np.transpose(out, self.out_order), np.transpose(w, self.w_order)
        if math.prod(out.shape[1:-1]) == 1:
            x = self._per_position(out, np.swapaxes(self._kernels_of_any_tap(w), 1, 2))
            for axis, read in enumerate(self.positions_read):
                x = _restricted(x, axis + 1, np.isin(np.arange(self._positions[axis]), read))
        else:
            x = self._to_each_position(out, w)
        return np.transpose(x, np.argsort(self.x_order))

    def to_second(self, x: Flags, out: Flags) -> Flags:
        x, out = np.transpose(x, self.x_order), np.transpose(out, self.out_order)
        if math.prod((*x.shape[1:-1], *out.shape[1:-1])) == 1:
            ins, outs = (np.asarray(flags.any(tuple(range(flags.ndim - 1)))) for flags in (x, out))
            pairs = self._split(ins, self._features_in)[:, :, None] * self._split(outs, self._features_out)[:, None]
            shape = (*(1 for _ in self._window), self._features_in, self.groups * self._features_out)
            w = np.moveaxis(pairs, 0, 1).reshape(shape) > 0
            for axis, read in enumerate(self.positions_read):
                w = _restricted(w, axis, np.asarray((read >= 0).any(0)))
        else:
            batch = max(x.shape[0], out.shape[0])
            x = np.broadcast_to(x, (batch, *self._positions, x.shape[-1]))
            flat = np.swapaxes(self._patches(x), 1, 2) @ self._results(out, batch)
            w = np.moveaxis(flat, 0, 1).reshape(*self._taps, self._features_in, self.groups * self._features_out) > 0
        return np.transpose(w, np.argsort(self.w_order))

    def operands(self, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return in_full(x, self.shapes[0], [axis for axis in self.x_order if axis != self.x_order[0]]), in_full(
            w, self.shapes[1]
        )

    @property
    def _window(self) -> tuple[int, ...]:
        """The window axes of a kernel [*window, in, out]."""
        return tuple(range(len(self.positions_read)))

    @property
    def _positions(self) -> Shape:
        return tuple(self.shapes[0][axis] for axis in self.x_order[1:-1])

    @property
    def _out_positions(self) -> Shape:
        return tuple(len(read) for read in self.positions_read)

    @property
    def _taps(self) -> Shape:
        return tuple(read.shape[1] for read in self.positions_read)

    @property
    def _features_in(self) -> int:
        return self.shapes[1][self.w_order[-2]]

    @property
    def _features_out(self) -> int:
        return self.shapes[1][self.w_order[-1]] // self.groups

    def _every_result_reads(self) -> bool:
        """Whether each output position reads some input position."""
        return all((read >= 0).any(1).all() for read in self.positions_read)

    @functools.cached_property
    def _reads(self) -> np.ndarray:
        """``positions_read`` for flattened positions. One position beyond the last is the padding."""
        reads = np.zeros((1, 1), int)
        for size, place in zip(self._positions, self.positions_read, strict=True):
            mixed = reads[:, None, :, None] * size + place[None, :, None, :]
            mixed = np.where((reads[:, None, :, None] < 0) | (place[None, :, None, :] < 0), -1, mixed)
            reads = mixed.reshape(reads.shape[0] * place.shape[0], reads.shape[1] * place.shape[1])
        return np.where(reads < 0, math.prod(self._positions), reads)

    def _split(self, flags: Flags, features: int) -> np.ndarray:
        """Counts of the channels by group, [groups, ..., channels], from [..., all channels]."""
        flags = np.broadcast_to(flags, (*flags.shape[:-1], self.groups * features))
        return np.moveaxis(flags.reshape(*flags.shape[:-1], self.groups, features), -2, 0).astype(np.float32)

    def _per_position(self, flags: Flags, kernels: np.ndarray) -> Flags:
        """The product of the channels of one position, [batch, 1, ..., channels], and kernels without a window, [groups, channels, other channels]."""
        batch = flags.shape[0]
        product = self._split(flags, kernels.shape[1]).reshape(self.groups, batch, -1) @ kernels
        shape = (batch, *(1 for _ in self._window), self.groups * kernels.shape[2])
        return np.moveaxis(product, 0, 1).reshape(shape) > 0

    def _to_each_position(self, out: Flags, w: Flags) -> Flags:
        """``to_first`` where positions differ, [batch, *positions, channels]."""
        batch, num_taps = out.shape[0], math.prod(self._taps)
        flat = self._results(out, batch) @ np.swapaxes(self._kernels(w, self._taps), 1, 2)
        flat = np.moveaxis(flat.reshape(self.groups, batch, len(self._reads), num_taps, self._features_in), 0, 3)
        x = np.zeros((batch, math.prod(self._positions) + 1, self.groups, self._features_in), np.float32)
        # At one window position, no input position but the padding is read twice. So the sum below drops no term.
        for tap in range(num_taps):
            x[:, self._reads[:, tap]] += flat[:, :, tap]
        return x[:, :-1].reshape(batch, *self._positions, self.groups * self._features_in) > 0

    def _patches(self, x: Flags) -> np.ndarray:
        """[groups, batch * output positions, window positions * in]."""
        batch, features_in = x.shape[0], self._features_in
        flat = np.broadcast_to(x, (*x.shape[:-1], self.groups * features_in)).astype(np.float32)
        flat = flat.reshape(batch, math.prod(self._positions), self.groups * features_in)
        flat = np.concatenate([flat, np.zeros((batch, 1, flat.shape[-1]), np.float32)], 1)[:, self._reads]
        flat = flat.reshape(batch, *self._reads.shape, self.groups, features_in)
        return np.moveaxis(flat, 3, 0).reshape(self.groups, -1, math.prod(self._taps) * features_in)

    def _kernels(self, w: Flags, taps: Shape) -> np.ndarray:
        """[groups, window positions * in, out / groups], for a window of the given size."""
        flat = np.broadcast_to(w, (*taps, self._features_in, self._features_out * self.groups)).astype(np.float32)
        size = math.prod(taps) * self._features_in
        return np.moveaxis(flat.reshape(size, self.groups, self._features_out), 1, 0)

    def _kernels_of_any_tap(self, w: Flags) -> np.ndarray:
        """[groups, in, out / groups]: whether any window position is flagged."""
        return self._kernels(np.asarray(w.any(self._window, keepdims=True)), (1,) * len(self._window))

    def _results(self, out: Flags, batch: int) -> np.ndarray:
        """[groups, batch * output positions, out / groups]."""
        out = np.broadcast_to(out, (batch, *self._out_positions, out.shape[-1]))
        return self._split(out, self._features_out).reshape(self.groups, -1, self._features_out)


def _restricted(flags: Flags, axis: int, allowed: Flags) -> Flags:
    """Flags at the allowed indices of one axis alone."""
    if allowed.all():
        return flags
    return flags & allowed.reshape([-1 if place == axis else 1 for place in range(flags.ndim)])


def _convolution(params: Mapping[str, Any], shapes: tuple[Shape, Shape]) -> _Convolution:
    numbers = params["dimension_numbers"]
    x_order = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    w_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    positions, window = [shapes[0][axis] for axis in x_order[1:-1]], [shapes[1][axis] for axis in w_order[:-2]]
    others = (params[name] for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"))
    padded = any(low or high for low, high in params["padding"]) or any(spread > 1 for spread in params["lhs_dilation"])
    return _Convolution(
        shapes=shapes,
        contracted=((numbers.lhs_spec[1],), (numbers.rhs_spec[1],)),
        # A constant channel is not constant at the border if the padding adds zeros to it.
        foldable_sides=() if padded else (0,),
        x_order=x_order,
        w_order=w_order,
        out_order=(numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]),
        positions_read=tuple(positions_read(*each) for each in zip(positions, window, *others, strict=True)),
        groups=params["feature_group_count"],
    )
