"""Plans the small program: for each value of a program, the indices that are kept along each axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import Analysis, Fact, along, in_full
from bcdl_jax.graph.known_values import values_of
from bcdl_jax.graph.moving import Moving
from bcdl_jax.graph.primitives import MOVES
from bcdl_jax.graph.program import Program, Step
from bcdl_jax.graph.reshapes import AxisGroups, reshape_groups
from bcdl_jax.graph.rules import MIXING, REDUCTIONS, WINDOWS, unindexed_axes
from bcdl_jax.shrinking.layouts import Axis, Layout, indices

# Primitives that compute their outputs at some indices without the others, like elementwise primitives.
_ANY_INDICES = (MOVES - {"reshape"}) | {"concatenate", "dot_general", "iota", "slice", "split", *REDUCTIONS}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The arrays of the small program.

    Attributes:
      layouts: The layout of each value; None for a value that is not needed.
      contracted: The indices to sum over along each contracted axis of a product, by the index of its step.
      reshapes: The runs of axes of a reshape, by the index of its step, see ``reshape_groups``.
      constants: The constant to add to the output of a product with folded elements, by the index of its step. An axis along which
        the constant does not change has size 1.
      facts: The facts about each value.
      moving_axes: The axes of each value whose size depends on the batch size.
      bodies: The plans of the programs within a loop or branch, by the index of its step.
    """

    layouts: tuple[Layout | None, ...]
    contracted: dict[int, Layout]
    reshapes: dict[int, AxisGroups]
    constants: dict[int, np.ndarray]
    facts: tuple[Fact, ...]
    moving_axes: Sequence[frozenset[int]]
    bodies: dict[int, tuple[Plan, ...]]


def make_plan(program: Program, analysis: Analysis, moving: Moving, multiple_of: int) -> Plan:
    """Plans to keep the live indices of each value.

    Args:
      program: The program of the whole network.
      analysis: The analysis of the program.
      moving: The parts of the program that depend on the batch size. Axes whose size depends on it stay whole.
      multiple_of: The divisor of kept widths. Each width is rounded up to a multiple of it.
    """
    layouts: list[Layout | None] = []
    for fact, shape, axes in zip(analysis.facts, program.shapes, moving.axes, strict=True):
        layouts.append(_layout(fact.live, shape.shape, axes, multiple_of) if fact.live.any() else None)
    for index, step in enumerate(program.steps):
        whole = set() if index in analysis.bodies else _whole_axes(step, program, moving.axes)
        for number in step.outputs:
            layout = layouts[number]
            if layout is not None:
                layouts[number] = tuple(None if axis in whole else kept for axis, kept in enumerate(layout))
    reshapes = {
        index: reshape_groups(program.shapes[step.inputs[0]].shape, program.shapes[step.outputs[0]].shape)
        for index, step in enumerate(program.steps)
        if step.name == "reshape"
    }
    contracted, constants = {}, {}
    for index, product in analysis.products.items():
        contracted[index] = tuple(_rounded(needed, multiple_of) for needed in product.needed)
        if product.folded is not None and product.folded_side is not None:
            constant = _folded_constant(index, program, analysis, contracted[index])
            if constant is not None:
                constants[index] = constant
    bodies = {
        index: tuple(
            make_plan(*each, multiple_of)
            for each in zip(program.steps[index].bodies, analyses, moving.bodies[index], strict=True)
        )
        for index, analyses in analysis.bodies.items()
    }
    facts = tuple(map(_light, analysis.facts, layouts))
    return Plan(tuple(layouts), contracted, reshapes, constants, facts, moving.axes, bodies)


def _light(fact: Fact, layout: Layout | None) -> Fact:
    """The fact without the arrays that the small function does not read. The small function holds its facts for its whole lifetime.

    The small function computes a fixed value. It reads the fact only for indices that the layout leaves out.
    """
    ones = (1,) * fact.unknown.ndim
    is_whole = layout is not None and all(axis is None for axis in layout)
    value = np.ones(ones, fact.value.dtype) if fact.fixed and is_whole else fact.value
    return dataclasses.replace(fact, value=value, live=np.zeros(ones, bool))


def _layout(live: np.ndarray, shape: Sequence[int], moving: frozenset[int], multiple_of: int) -> Layout:
    return tuple(
        None if axis in moving else _rounded(along(live, axis, size), multiple_of) for axis, size in enumerate(shape)
    )


def _rounded(needed: np.ndarray, multiple_of: int) -> Axis:
    """The needed indices, with enough other indices to round their number up to a multiple."""
    count = min(-(-int(needed.sum()) // multiple_of) * multiple_of, needed.size)
    if count == needed.size:
        return None
    spare = np.flatnonzero(~needed)[: count - int(needed.sum())]
    return np.sort(np.concatenate([np.flatnonzero(needed), spare]))


def _whole_axes(step: Step, program: Program, moving_axes: Sequence[frozenset[int]]) -> set[int]:
    """The axes along which the outputs of a step must be computed whole."""
    rank = len(program.shapes[step.outputs[0]].shape)
    params = step.params
    if step.elementwise or step.name in _ANY_INDICES:
        return set()
    if step.name in WINDOWS:
        return {axis for axis in range(rank) if not _window_is_trivial(params, axis)}
    if step.name == "conv_general_dilated" and params["batch_group_count"] == 1:
        return set(params["dimension_numbers"].out_spec) - {params["dimension_numbers"].out_spec[1]}
    if step.name == "reshape":
        groups = reshape_groups(program.shapes[step.inputs[0]].shape, program.shapes[step.outputs[0]].shape)
        moving = moving_axes[step.inputs[0]], moving_axes[step.outputs[0]]
        return {axis for ins, outs in groups if moving[0] & set(ins) or moving[1] & set(outs) for axis in outs}
    if step.name == "tile":
        return {axis for axis, count in enumerate(params["reps"]) if count != 1}
    if step.name == "pad":
        return {axis for axis, config in enumerate(params["padding_config"]) if any(config)}
    if step.name in MIXING:
        return {params[MIXING[step.name]] % rank}
    if step.name in ("gather", "dynamic_slice"):
        return set(range(rank)) - set(unindexed_axes(step, program).values())
    return set(range(rank))


def _window_is_trivial(params: Mapping[str, Any], axis: int) -> bool:
    """Whether pooling leaves an axis unchanged."""
    names = ("window_dimensions", "window_strides", "base_dilation")
    return all(params[name][axis] == 1 for name in names) and tuple(params["padding"][axis]) == (0, 0)


def _folded_constant(index: int, program: Program, analysis: Analysis, contracted: Layout) -> np.ndarray | None:
    """The constant that the folded elements of a product add to its output; None if the product keeps all of them.

    Args:
      index: The index of the product's step.
      program: The program of the whole network.
      analysis: The analysis of the program.
      contracted: The indices that the small product sums over.
    """
    step, product = program.steps[index], analysis.products[index]
    side = product.folded_side
    assert product.folded is not None
    assert side is not None
    left_out = product.folded.copy()
    grid = np.ix_(*(indices(axis, size) for axis, size in zip(contracted, left_out.shape, strict=True)))
    left_out[grid] = False
    if not left_out.any():
        return None
    contracted_axes, free, free_outputs = product_axes(step, program, side)
    facts = [analysis.facts[number] for number in step.inputs]
    shapes = [program.shapes[number] for number in step.inputs]
    value = facts[side].value
    for axis in free:
        value = np.take(value, [0], axis)
    flags = np.expand_dims(np.transpose(left_out, np.argsort(contracted_axes)), tuple(sorted(free)))
    values = [facts[0].value, facts[1].value]
    values[side] = np.where(flags, value, 0)
    # A convolution needs all positions, and any product needs all indices that it sums over.
    needed = (*contracted_axes, *free[1:]) if step.name == "conv_general_dilated" else contracted_axes
    values[side] = in_full(values[side], shapes[side].shape, needed)
    values[1 - side] = in_full(values[1 - side], shapes[1 - side].shape)
    constant = values_of(step, [value.astype(each.dtype) for value, each in zip(values, shapes, strict=True)])[0]
    for axis in free_outputs:
        constant = np.take(constant, [0], axis)
    return constant


def product_axes(step: Step, program: Program, side: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """The contracted axes of one operand of a product, its other axes, and the output's axes that correspond to the latter."""
    rank = len(program.shapes[step.inputs[side]].shape)
    if step.name == "conv_general_dilated":
        numbers = step.params["dimension_numbers"]
        free = [numbers.lhs_spec[0], *numbers.lhs_spec[2:]]
        return (numbers.lhs_spec[1],), free, [numbers.out_spec[0], *numbers.out_spec[2:]]
    contracted = step.params["dimension_numbers"][0][side]
    free = [axis for axis in range(rank) if axis not in contracted]
    out_rank = len(program.shapes[step.outputs[0]].shape)
    outputs = range(len(free)) if side == 0 else range(out_rank - len(free), out_rank)
    return contracted, free, list(outputs)
