"""Emitters of matrix products and convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from bcdl_jax.graph.program import Step
from bcdl_jax.shrinking.layouts import Axis, Layout, as_axis, indices
from bcdl_jax.shrinking.machine import Machine


def emit_dot(machine: Machine, index: int, step: Step) -> None:
    """Emits a matrix product."""
    (contracted, batch) = step.params["dimension_numbers"]
    layout = machine.layout(step.outputs[0])
    ranks = [len(machine.shape(number)) for number in step.inputs]
    free = [[axis for axis in range(ranks[side]) if axis not in (*contracted[side], *batch[side])] for side in (0, 1)]
    starts = (len(batch[0]), len(batch[0]) + len(free[0]))
    operands = []
    for side, number in enumerate(step.inputs):
        wanted: list[Axis] = [None] * ranks[side]
        for place, axis in enumerate(batch[side]):
            wanted[axis] = layout[place]
        for place, axis in enumerate(free[side]):
            wanted[axis] = layout[starts[side] + place]
        for axis, kept in zip(contracted[side], machine.plan.contracted[index], strict=True):
            wanted[axis] = kept
        operands.append(machine.get(number, tuple(wanted)))
    _put_with_constant(machine, index, step, step.bind(*operands)[0], layout)


def _put_with_constant(machine: Machine, index: int, step: Step, value: Any, layout: Layout) -> None:
    """Stores the output of a product, after adding the constant of its folded elements."""
    constant = machine.plan.constants.get(index)
    if constant is not None:
        for axis, kept in enumerate(layout):
            if kept is not None and constant.shape[axis] > 1:
                constant = np.take(constant, kept, axis)
        value = value + jnp.asarray(constant, value.dtype)
    machine.put(step.outputs[0], value, layout)


def emit_convolution(machine: Machine, index: int, step: Step) -> None:
    """Emits a convolution without groups along the batch."""
    params = step.params
    numbers, num_groups = params["dimension_numbers"], params["feature_group_count"]
    (x_number, w_number), layout = step.inputs, machine.layout(step.outputs[0])
    x_shape, w_shape = machine.shape(x_number), machine.shape(w_number)
    x_axis, (w_out_axis, w_in_axis), out_axis = numbers.lhs_spec[1], numbers.rhs_spec[:2], numbers.out_spec[1]
    contracted = machine.plan.contracted[index][0]
    x_kept, out_kept = indices(contracted, x_shape[x_axis]), indices(layout[out_axis], w_shape[w_out_axis])
    w_in_kept, groups = contracted, None
    if num_groups > 1:
        groups = _equal_groups(x_kept, out_kept, w_shape[w_in_axis], w_shape[w_out_axis] // num_groups, num_groups)
        x_kept, out_kept = groups.inputs, groups.outputs
        w_in_kept = as_axis(np.unique(groups.positions), w_shape[w_in_axis])
        params = params | {"feature_group_count": len(groups.positions)}
    x_layout: list[Axis] = [None] * len(x_shape)
    x_layout[x_axis] = as_axis(x_kept, x_shape[x_axis])
    w_layout: list[Axis] = [None] * len(w_shape)
    w_layout[w_out_axis] = as_axis(out_kept, w_shape[w_out_axis])
    w_layout[w_in_axis] = w_in_kept
    x, w = machine.get(x_number, tuple(x_layout)), machine.get(w_number, tuple(w_layout))
    if groups is not None and w.shape[w_in_axis] > groups.positions.shape[1]:
        w = _kernel_rows_of_groups(w, groups, w_in_axis, w_out_axis)
    value = lax.conv_general_dilated_p.bind(x, w, **params)
    out_layout = list(layout)
    out_layout[out_axis] = as_axis(out_kept, machine.shape(step.outputs[0])[out_axis])
    _put_with_constant(machine, index, step, value, tuple(out_layout))


@dataclasses.dataclass(frozen=True)
class _Groups:
    """The channels that a small grouped convolution keeps, group by group.

    Attributes:
      inputs: Kept input channels.
      outputs: Kept output channels.
      positions: Kept input channels, counted from the first channel of their group, [groups, channels].
    """

    inputs: np.ndarray
    outputs: np.ndarray
    positions: np.ndarray


def _equal_groups(x_kept: np.ndarray, out_kept: np.ndarray, ins: int, outs: int, num_groups: int) -> _Groups:
    """Fills the groups that have outputs up to the size of the largest, since XLA requires groups of equal size.

    Args:
      x_kept: Input channels that the product needs.
      out_kept: Output channels that are needed.
      ins: Input channels of a group.
      outs: Output channels of a group.
      num_groups: The number of groups.
    """
    members = [
        (x_kept[x_kept // ins == group], out_kept[out_kept // outs == group], group) for group in range(num_groups)
    ]
    members = [member for member in members if len(member[1])]
    wide_in = max([1, *(len(kept) for kept, _, _ in members)])
    wide_out = max([1, *(len(kept) for _, kept, _ in members)])
    x_sets = [_fill_up(member[0], member[2] * ins, ins, wide_in) for member in members]
    out_sets = [_fill_up(member[1], member[2] * outs, outs, wide_out) for member in members]
    return _Groups(np.concatenate(x_sets), np.concatenate(out_sets), np.stack([kept % ins for kept in x_sets]))


def _fill_up(kept: np.ndarray, start: int, size: int, count: int) -> np.ndarray:
    """The kept channels of a group, with enough other channels of the group to have ``count`` in all."""
    spare = np.setdiff1d(np.arange(start, start + size), kept)
    return np.sort(np.concatenate([kept, spare[: count - len(kept)]])).astype(int)


def _kernel_rows_of_groups(w: Any, groups: _Groups, in_axis: int, out_axis: int) -> Any:
    """The kernel in which each output channel has the rows that its own group keeps."""
    places = np.searchsorted(np.unique(groups.positions), groups.positions)
    by_output = np.repeat(places, len(groups.outputs) // len(places), axis=0)  # [out, kept rows]
    sizes = [1] * w.ndim
    sizes[in_axis], sizes[out_axis] = by_output.shape[1], by_output.shape[0]
    by_output = by_output.T if in_axis < out_axis else by_output
    return jnp.take_along_axis(w, jnp.asarray(by_output.reshape(sizes)), axis=in_axis)
