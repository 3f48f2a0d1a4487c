"""Runs a program on smaller arrays: of each value only the indices that are needed, axis by axis.

A *layout* says for each axis of a value which indices its small array holds: an array of ascending indices, or None for all. Any
layout that holds all that is needed is right, since a value can be brought from one layout to another: indices are left out, and
where one is missing its known constant is filled in. So every primitive is free to ask for the layouts that suit it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bcdl_jax.graph.data_flow import MIXING, REDUCTIONS, WINDOWS, Analysis, Fact, passing_axes
from bcdl_jax.graph.program import Atom, Program, Step, evaluate_elementwise, is_elementwise

Axis = np.ndarray | None
Layout = tuple[Axis, ...]
AxisGroups = list[tuple[tuple[int, ...], tuple[int, ...]]]  # [(input axes, output axes), ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the small program computes.

    Attributes:
      layouts: per value, the indices that are needed; None for a value that is not needed at all.
      contracted: by step number, of products: the indices to sum over, per contracted axis.
      reshapes: by step number, the runs of axes that a reshape turns into one another, see ``reshape_groups``.
      constants: by step number, of products: what the folded channels add to the output; of full rank, with size 1 where it is the same.
    """

    layouts: tuple[Layout | None, ...]
    contracted: dict[int, Layout]
    reshapes: dict[int, AxisGroups]
    constants: dict[int, np.ndarray]


def make_plan(program: Program, analysis: Analysis, moving_axes: Sequence[frozenset[int]], multiple_of: int) -> Plan:
    """Chooses the layouts: what is live, with widths rounded up."""
    layouts: list[Layout | None] = []
    for fact, moving in zip(analysis.facts, moving_axes, strict=True):
        layouts.append(_layout(fact.live, moving, multiple_of) if fact.live.any() else None)
    for step in program.steps:
        for number in step.outputs:
            layout = layouts[number]
            if layout is not None:
                whole = _whole_axes(step, program, moving_axes)
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
            constant = _folded_share(program.steps[index], program, analysis, index, contracted[index])
            if constant is not None:
                constants[index] = constant
    return Plan(tuple(layouts), contracted, reshapes, constants)


def _layout(live: np.ndarray, moving: frozenset[int], multiple_of: int) -> Layout:
    axes = range(live.ndim)
    return tuple(
        None
        if axis in moving
        else _rounded(np.asarray(live.any(tuple(other for other in axes if other != axis))), multiple_of)
        for axis in axes
    )


def _rounded(needed: np.ndarray, multiple_of: int) -> Axis:
    """The needed indices, and of the others as many as bring the number up to a multiple."""
    count = min(-(-int(needed.sum()) // multiple_of) * multiple_of, needed.size)
    if count == needed.size:
        return None
    spare = np.flatnonzero(~needed)[: count - int(needed.sum())]
    return np.sort(np.concatenate([np.flatnonzero(needed), spare]))


def _whole_axes(step: Step, program: Program, moving_axes: Sequence[frozenset[int]]) -> set[int]:
    """Axes along which the outputs of a step must be computed whole."""
    rank = len(program.shapes[step.outputs[0]].shape)
    params = step.params
    if step.elementwise or step.name in (
        "squeeze",
        "expand_dims",
        "transpose",
        "broadcast_in_dim",
        "slice",
        "rev",
        "split",
    ):
        return set()
    if step.name in ("concatenate", "iota", "dot_general", *REDUCTIONS):
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
        return set(range(rank)) - set(passing_axes(step, program).values())
    return set(range(rank))


def _window_is_trivial(params: Mapping[str, Any], axis: int) -> bool:
    names = ("window_dimensions", "window_strides", "base_dilation")
    return all(params[name][axis] == 1 for name in names) and tuple(params["padding"][axis]) == (0, 0)


def _folded_share(step: Step, program: Program, analysis: Analysis, index: int, kept: Layout) -> np.ndarray | None:
    """What the known channels that are left out add to the outputs of a product."""
    product = analysis.products[index]
    side = product.folded_side
    assert product.folded is not None
    assert side is not None
    left_out = product.folded.copy()
    grid = np.ix_(*(np.arange(size) if axis is None else axis for axis, size in zip(kept, left_out.shape, strict=True)))
    left_out[grid] = False
    if not left_out.any():
        return None
    contracted, free, free_outputs = product_axes(step, program, side)
    facts = [analysis.facts[number] for number in step.inputs]
    value = facts[side].value
    for axis in free:
        value = np.take(value, [0], axis)
    flags = np.transpose(left_out, np.argsort(contracted))
    values = [facts[0].value, facts[1].value]
    values[side] = np.broadcast_to(np.where(np.expand_dims(flags, tuple(free)), value, 0), facts[side].value.shape)
    arrays = [
        jnp.asarray(array, program.shapes[number].dtype) for array, number in zip(values, step.inputs, strict=True)
    ]
    share = np.asarray(step.bind(*arrays)[0])
    for axis in free_outputs:
        share = np.take(share, [0], axis)
    return share


def product_axes(step: Step, program: Program, side: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Of one operand of a product: its contracted axes, its other axes, and the output's axes that stand for the latter."""
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


def reshape_groups(before: Sequence[int], after: Sequence[int]) -> AxisGroups:
    """Splits a reshape into the smallest runs of axes with equal numbers of elements."""
    if 0 in before or 0 in after:
        return [(tuple(range(len(before))), tuple(range(len(after))))]
    groups, i, o = [], 0, 0
    while i < len(before) or o < len(after):
        ins, outs = [], []
        left, right = 1, 1
        while True:
            if i < len(before) and (left <= right or o >= len(after)):
                ins.append(i)
                left *= before[i]
                i += 1
            elif o < len(after):
                outs.append(o)
                right *= after[o]
                o += 1
            if left == right and ((ins and outs) or (i >= len(before) and o >= len(after)) or left == 1):
                break
        groups.append((tuple(ins), tuple(outs)))
    return groups


class Machine:
    """Runs the small program, traced for some batch size, on small params and whole inputs."""

    def __init__(self, program: Program, plan: Plan, facts: Sequence[Fact], moving_axes: Sequence[frozenset[int]]):
        self._program = program
        self._plan = plan
        self._facts = facts
        self._moving = moving_axes
        self._values: dict[Atom, tuple[Any, Layout]] = {}

    def run(self, small_params: Mapping[Atom, Any], inputs: Mapping[Atom, Any]) -> list[Any]:
        """Args: small params in the layouts of the plan, and inputs, by number. Returns the results, whole."""
        whole = {**inputs, **self._program.constants}
        self._values = {number: (value, self._all(number)) for number, value in whole.items()}
        for number, value in small_params.items():
            self._values[number] = (value, self._plan.layouts[number] or self._all(number))
        for index, step in enumerate(self._program.steps):
            if any(self._plan.layouts[number] is not None for number in step.outputs):
                emit = _EMITTERS.get("elementwise" if step.elementwise else step.name, _emit_whole)
                emit(self, index, step)
        return [self.get(number, self._all(number)) for number in self._program.outputs]

    # For the emitters.

    def shape(self, number: Atom) -> tuple[int, ...]:
        return self._program.shapes[number].shape

    def layout(self, number: Atom) -> Layout:
        """What is needed of a value; everything of one that nobody reads but that comes along with others."""
        return self._plan.layouts[number] or self._all(number)

    def shared_layout(self, numbers: Sequence[Atom]) -> Layout:
        """One layout for several values of a shape: whatever one of them needs."""
        needed = [layout for number in numbers if (layout := self._plan.layouts[number]) is not None]
        return tuple(
            None if any(kept is None for kept in axis) else np.unique(np.concatenate(axis))  # type: ignore[arg-type]
            for axis in zip(*needed, strict=True)
        )

    def held(self, number: Atom) -> Layout:
        """The layout in which a value stands at the moment."""
        return self._values[number][1] if number in self._values else self.layout(number)

    def is_needed(self, number: Atom) -> bool:
        return self._plan.layouts[number] is not None

    def reshape_groups(self, index: int) -> AxisGroups:
        return self._plan.reshapes[index]

    def contracted(self, index: int) -> Layout:
        return self._plan.contracted[index]

    def constant(self, index: int) -> np.ndarray | None:
        return self._plan.constants.get(index)

    def fact(self, number: Atom) -> Fact:
        return self._facts[number]

    @property
    def program(self) -> Program:
        return self._program

    @property
    def moving_axes(self) -> Sequence[frozenset[int]]:
        return self._moving

    def put(self, number: Atom, value: Any, layout: Layout) -> None:
        self._values[number] = (value, layout)

    def get(self, number: Atom, want: Layout) -> Any:
        """A value in the wanted layout."""
        if number not in self._values:  # all of it is known, or nobody needs it
            return self.fill(number, want)
        value, have = self._values[number]
        found: list[np.ndarray | None] = []
        for axis, (old, new) in enumerate(zip(have, want, strict=True)):
            value, there = self.take_axis(value, axis, old, new, self.shape(number)[axis])
            found.append(there)
        return value if all(there is None for there in found) else self._fill_in(number, value, want, found)

    def fill(self, number: Atom, layout: Layout) -> Any:
        """The known constants of a value in a layout, 1 where nothing is known; 1 rather than 0, whose logarithm is not finite."""
        fact, shape = self._facts[number], self.shape(number)
        sizes = tuple(size if axis is None else len(axis) for axis, size in zip(layout, shape, strict=True))
        dtype = self._program.shapes[number].dtype
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return jnp.zeros(sizes, dtype)
        value = np.where(fact.unknown, np.ones((), fact.value.dtype), fact.value)
        for axis, kept in enumerate(layout):
            if axis in self._moving[number]:
                value = np.take(value, [0], axis)
            elif kept is not None:
                value = np.take(value, kept, axis)
        for axis in range(value.ndim):  # what is the same everywhere takes no memory
            if value.shape[axis] > 1 and (value == np.take(value, [0], axis)).all():
                value = np.take(value, [0], axis)
        return jnp.broadcast_to(jnp.asarray(value, dtype), sizes)

    def _all(self, number: Atom) -> Layout:
        return (None,) * len(self.shape(number))

    def take_axis(self, value: Any, axis: int, old: Axis, new: Axis, size: int) -> tuple[Any, np.ndarray | None]:
        """Brings one axis to a layout. Returns also which of the wanted indices were there, None if all."""
        if same_axis(old, new):
            return value, None
        old = np.arange(size) if old is None else old
        new = np.arange(size) if new is None else new
        if not len(old):
            sizes = [*value.shape]
            sizes[axis] = len(new)
            return jnp.zeros(sizes, value.dtype), np.zeros(len(new), bool)
        places = np.minimum(np.searchsorted(old, new), len(old) - 1)
        there = old[places] == new
        return take(value, places, axis), None if there.all() else there

    def _fill_in(self, number: Atom, value: Any, layout: Layout, found: Sequence[np.ndarray | None]) -> Any:
        flags = np.ones((1,) * len(layout), bool)
        for axis, there in enumerate(found):
            if there is not None:
                flags = flags & there.reshape([-1 if other == axis else 1 for other in range(len(layout))])
        return jnp.where(flags, value, self.fill(number, layout))


def same_axis(first: Axis, second: Axis) -> bool:
    """Whether two layouts agree along an axis."""
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)


def take(value: Any, places: np.ndarray, axis: int) -> Any:
    """Indices along one axis; a run of them is a slice."""
    if len(places) and np.array_equal(places, np.arange(places[0], places[0] + len(places))):
        return lax.slice_in_dim(value, int(places[0]), int(places[0]) + len(places), axis=axis)
    unique = bool((np.diff(places) > 0).all())
    return jnp.take(value, places, axis=axis, mode="clip", unique_indices=unique, indices_are_sorted=unique)


def _sizes(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size if axis is None else len(axis) for axis, size in zip(layout, shape, strict=True))


def _expand(axis: Axis, size: int) -> np.ndarray:
    return np.arange(size) if axis is None else axis


# One emitter per primitive: asks the machine for its operands in the layouts that suit it, and puts its outputs.


def _emit_whole(machine: Machine, _: int, step: Step) -> None:
    operands = [machine.get(number, (None,) * len(machine.shape(number))) for number in step.inputs]
    for number, value in zip(step.outputs, step.bind_at_any_size(*operands), strict=True):
        machine.put(number, value, (None,) * len(machine.shape(number)))


def _emit_elementwise(machine: Machine, index: int, step: Step) -> None:
    layout, shape = machine.shared_layout(step.outputs), machine.shape(step.outputs[0])
    custom = step.name.startswith("custom_")
    rule = _small_custom_rule(machine, step, _sizes(layout, shape)) if custom else None
    if custom and rule is None:
        _emit_whole(machine, index, step)
        return
    operands = []
    for number in step.inputs:
        own = machine.shape(number)
        wanted = (None if mine != full else kept for mine, full, kept in zip(own, shape, layout, strict=False))
        operands.append(machine.get(number, tuple(wanted) if own else ()))
    values = rule(*operands) if rule is not None else step.bind(*operands)
    for number, value in zip(step.outputs, values, strict=True):
        machine.put(number, value, layout)


def _small_custom_rule(machine: Machine, step: Step, sizes: tuple[int, ...]) -> Callable[..., list[Any]] | None:
    """An elementwise function with a custom forward derivative, for arrays of other sizes; None if it can't be had."""
    if step.name != "custom_jvp_call":
        return None
    inside = step.params["call_jaxpr"]
    # At the size for which the inner function was traced, which a program for any batch size does not tell.
    whole = [jax.ShapeDtypeStruct(each.aval.shape, each.aval.dtype) for each in step.equation.invars]
    shape = step.equation.outvars[0].aval.shape
    if any(not jnp.issubdtype(value.dtype, jnp.floating) for value in whole):
        return None
    derivative = jax.make_jaxpr(lambda primals, tangents: jax.jvp(lambda *xs: step.bind(*xs), primals, tangents))(
        tuple(whole), tuple(whole)
    )
    # The values come out of the call itself, whose derivative is what is asked for; the tangents must be elementwise too.
    if not is_elementwise(derivative.jaxpr, shape):
        return None

    @jax.custom_jvp
    def call(*xs: Any) -> list[Any]:
        return evaluate_elementwise(inside.jaxpr, inside.consts, xs, sizes)

    @call.defjvp
    def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        results = evaluate_elementwise(derivative.jaxpr, derivative.consts, [*primals, *tangents], sizes)
        return results[: len(step.outputs)], results[len(step.outputs) :]

    return call


def _emit_product(machine: Machine, index: int, step: Step) -> None:
    if step.name == "dot_general":
        value, layout = _dot(machine, index, step)
    elif step.params["batch_group_count"] != 1:
        _emit_whole(machine, index, step)
        return
    else:
        value, layout = _convolution(machine, index, step)
    constant = machine.constant(index)
    if constant is not None:
        for axis, kept in enumerate(layout):
            if kept is not None and constant.shape[axis] > 1:
                constant = np.take(constant, kept, axis)
        value = value + jnp.asarray(constant, value.dtype)
    machine.put(step.outputs[0], value, layout)


def _dot(machine: Machine, index: int, step: Step) -> tuple[Any, Layout]:
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
        for axis, kept in zip(contracted[side], machine.contracted(index), strict=True):
            wanted[axis] = kept
        operands.append(machine.get(number, tuple(wanted)))
    return step.bind(*operands)[0], layout


def _convolution(machine: Machine, index: int, step: Step) -> tuple[Any, Layout]:
    params = step.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (x_number, w_number), layout = step.inputs, machine.layout(step.outputs[0])
    x_shape, w_shape = machine.shape(x_number), machine.shape(w_number)
    x_axis, (w_out_axis, w_in_axis), out_axis = numbers.lhs_spec[1], numbers.rhs_spec[:2], numbers.out_spec[1]
    x_kept = _expand(machine.contracted(index)[0], x_shape[x_axis])
    out_kept = _expand(layout[out_axis], w_shape[w_out_axis])
    positions: np.ndarray | None = None
    if groups > 1:
        # XLA wants groups of one size: those with outputs are filled up to the largest, with channels of their own.
        ins, outs = w_shape[w_in_axis], w_shape[w_out_axis] // groups
        members = [
            (x_kept[x_kept // ins == group], out_kept[out_kept // outs == group], group) for group in range(groups)
        ]
        members = [member for member in members if len(member[1])]
        wide_in = max([1, *(len(kept) for kept, _, _ in members)])
        wide_out = max([1, *(len(kept) for _, kept, _ in members)])
        x_sets = [_fill_up(member[0], member[2] * ins, ins, wide_in) for member in members]
        out_sets = [_fill_up(member[1], member[2] * outs, outs, wide_out) for member in members]
        x_kept, out_kept = np.concatenate(x_sets), np.concatenate(out_sets)
        positions = np.stack([kept % ins for kept in x_sets])
        params = params | {"feature_group_count": len(members)}
    x_layout: list[Axis] = [None] * len(x_shape)
    x_layout[x_axis] = _whole_or(x_kept, x_shape[x_axis])
    w_layout: list[Axis] = [None] * len(w_shape)
    w_layout[w_out_axis] = _whole_or(out_kept, w_shape[w_out_axis])
    w_layout[w_in_axis] = (
        machine.contracted(index)[0] if positions is None else _whole_or(np.unique(positions), w_shape[w_in_axis])
    )
    x, w = machine.get(x_number, tuple(x_layout)), machine.get(w_number, tuple(w_layout))
    if positions is not None and w.shape[w_in_axis] > positions.shape[1]:
        # Groups that keep different channels: each output channel takes its own group's rows of the kernel.
        places = np.searchsorted(np.unique(positions), positions)  # [groups, kept]
        by_output = np.repeat(places, len(out_kept) // len(places), axis=0)  # [out, kept]
        ones = [1] * w.ndim
        ones[w_in_axis], ones[w_out_axis] = by_output.shape[1], by_output.shape[0]
        by_output = by_output.T if w_in_axis < w_out_axis else by_output
        w = jnp.take_along_axis(w, jnp.asarray(by_output.reshape(ones)), axis=w_in_axis)
    value = lax.conv_general_dilated_p.bind(x, w, **params)
    out_layout = list(layout)
    out_layout[out_axis] = _whole_or(out_kept, machine.shape(step.outputs[0])[out_axis])
    return value, tuple(out_layout)


def _fill_up(kept: np.ndarray, start: int, size: int, count: int) -> np.ndarray:
    spare = np.setdiff1d(np.arange(start, start + size), kept)
    return np.sort(np.concatenate([kept, spare[: count - len(kept)]])).astype(int)


def _whole_or(kept: np.ndarray, size: int) -> Axis:
    return None if len(kept) == size else kept


def _emit_reshape(machine: Machine, index: int, step: Step) -> None:
    (number,), (output,) = step.inputs, step.outputs
    before, after = machine.shape(number), machine.shape(output)
    layout = machine.layout(output)
    groups = machine.reshape_groups(index)
    moving = machine.moving_axes[number], machine.moving_axes[output]
    wanted = list(machine.held(number))
    for ins, outs in groups:
        if moving[0] & set(ins) or moving[1] & set(outs) or not ins or not outs:
            for axis in ins:
                wanted[axis] = None
        elif len(ins) == len(outs) == 1:
            wanted[ins[0]] = layout[outs[0]]
    value = machine.get(number, tuple(wanted))
    # First one axis per group, then the elements that are needed of it, then the axes of the output.
    small = _sizes(tuple(wanted), before)
    # Not value.reshape: it may be a literal.
    value = jnp.reshape(value, [math.prod(small[axis] for axis in ins) for ins, _ in groups])
    found: list[np.ndarray | None] = []
    for place, (ins, outs) in enumerate(groups):
        have = _flat_indices([wanted[axis] for axis in ins], [before[axis] for axis in ins])
        want = _flat_indices([layout[axis] for axis in outs], [after[axis] for axis in outs])
        total = math.prod(before[axis] for axis in ins)
        value, there = machine.take_axis(value, place, have, want, total)
        found.append(there)
    sizes = _sizes(layout, after)
    value = value.reshape(sizes)
    if any(there is not None for there in found):
        flags = np.ones((1,) * len(after), bool)
        for group, there in zip(groups, found, strict=True):
            if there is not None:
                flags = flags & there.reshape([sizes[axis] if axis in group[1] else 1 for axis in range(len(after))])
        value = jnp.where(flags, value, machine.fill(output, layout))
    machine.put(output, value, layout)


def _flat_indices(axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """The layout of several axes run together; None for all."""
    if all(axis is None for axis in axes):
        return None
    flat = np.zeros(1, int)
    for axis, size in zip(axes, sizes, strict=True):
        flat = (flat[:, None] * size + _expand(axis, size)[None, :]).ravel()
    return flat


def _emit_transpose(machine: Machine, _: int, step: Step) -> None:
    layout, order = machine.layout(step.outputs[0]), step.params["permutation"]
    wanted: list[Axis] = [None] * len(order)
    for place, axis in enumerate(order):
        wanted[axis] = layout[place]
    machine.put(step.outputs[0], lax.transpose(machine.get(step.inputs[0], tuple(wanted)), order), layout)


def _emit_squeeze(machine: Machine, _: int, step: Step) -> None:
    layout = iter(machine.layout(step.outputs[0]))
    gone, rank = step.params["dimensions"], len(machine.shape(step.inputs[0]))
    wanted = tuple(None if axis in gone else next(layout) for axis in range(rank))
    machine.put(
        step.outputs[0], lax.squeeze(machine.get(step.inputs[0], wanted), gone), machine.layout(step.outputs[0])
    )


def _emit_expand_dims(machine: Machine, _: int, step: Step) -> None:
    layout, new = machine.layout(step.outputs[0]), step.params["dimensions"]
    wanted = tuple(kept for axis, kept in enumerate(layout) if axis not in new)
    value = lax.expand_dims(machine.get(step.inputs[0], wanted), new)
    machine.put(step.outputs[0], value, tuple(None if axis in new else kept for axis, kept in enumerate(layout)))


def _emit_broadcast(machine: Machine, _: int, step: Step) -> None:
    layout, shape = machine.layout(step.outputs[0]), machine.shape(step.outputs[0])
    axes, own = step.params["broadcast_dimensions"], machine.shape(step.inputs[0])
    wanted = tuple(layout[axis] if size == shape[axis] else None for axis, size in zip(axes, own, strict=True))
    value = lax.broadcast_in_dim(machine.get(step.inputs[0], wanted), _sizes(layout, shape), axes)
    machine.put(step.outputs[0], value, layout)


def _emit_slice(machine: Machine, _: int, step: Step) -> None:
    layout, own = machine.layout(step.outputs[0]), machine.shape(step.inputs[0])
    starts, limits = step.params["start_indices"], step.params["limit_indices"]
    strides = step.params["strides"] or (1,) * len(own)
    wanted = tuple(
        None if kept is None else start + stride * kept
        for kept, start, stride in zip(layout, starts, strides, strict=True)
    )
    value = machine.get(step.inputs[0], wanted)
    cut = [axis for axis, kept in enumerate(layout) if kept is None]
    value = lax.slice(
        value,
        [starts[axis] if axis in cut else 0 for axis in range(len(own))],
        [limits[axis] if axis in cut else value.shape[axis] for axis in range(len(own))],
        [strides[axis] if axis in cut else 1 for axis in range(len(own))],
    )
    machine.put(step.outputs[0], value, layout)


def _emit_reverse(machine: Machine, _: int, step: Step) -> None:
    layout, shape = machine.layout(step.outputs[0]), machine.shape(step.outputs[0])
    turned = step.params["dimensions"]
    wanted = tuple(
        np.sort(shape[axis] - 1 - kept) if kept is not None and axis in turned else kept
        for axis, kept in enumerate(layout)
    )
    machine.put(step.outputs[0], lax.rev(machine.get(step.inputs[0], wanted), turned), layout)


def _emit_concatenate(machine: Machine, _: int, step: Step) -> None:
    layout, along = machine.layout(step.outputs[0]), step.params["dimension"]
    parts, start = [], 0
    for number in step.inputs:
        size, kept = machine.shape(number)[along], layout[along]
        inside = None if kept is None else kept[(kept >= start) & (kept < start + size)] - start
        start += size
        if inside is None or len(inside):
            wanted = list(layout)
            wanted[along] = None if inside is None else _whole_or(inside, size)
            parts.append(machine.get(number, tuple(wanted)))
    machine.put(step.outputs[0], lax.concatenate(parts, along), layout)


def _emit_split(machine: Machine, _: int, step: Step) -> None:
    along, start = step.params["axis"], 0
    for number, size in zip(step.outputs, step.params["sizes"], strict=True):
        layout = machine.layout(number)
        wanted = list(layout)
        wanted[along] = start + _expand(layout[along], size)
        start += size
        if machine.is_needed(number):
            machine.put(number, machine.get(step.inputs[0], tuple(wanted)), layout)


def _emit_pad(machine: Machine, _: int, step: Step) -> None:
    layout = machine.layout(step.outputs[0])
    value, padding = machine.get(step.inputs[0], layout), machine.get(step.inputs[1], ())
    machine.put(step.outputs[0], lax.pad(value, padding, step.params["padding_config"]), layout)


def _emit_tile(machine: Machine, _: int, step: Step) -> None:
    layout = machine.layout(step.outputs[0])  # whole where there is more than one repetition
    machine.put(step.outputs[0], step.bind(machine.get(step.inputs[0], layout))[0], layout)


def _emit_reduction(machine: Machine, _: int, step: Step) -> None:
    axes = step.params["axes"]
    number, layout = step.inputs[0], iter(machine.layout(step.outputs[0]))
    wanted: list[Axis] = []
    for axis in range(len(machine.shape(number))):
        if axis not in axes:
            wanted.append(next(layout))
        elif step.name == "reduce_sum" and axis not in machine.moving_axes[number]:
            fact = machine.fact(number)
            counts = fact.nonzero.any(tuple(other for other in range(fact.live.ndim) if other != axis))
            wanted.append(_whole_or(np.flatnonzero(counts), counts.size))
        else:
            wanted.append(None)
    machine.put(step.outputs[0], step.bind(machine.get(number, tuple(wanted)))[0], machine.layout(step.outputs[0]))


def _emit_same_layout(machine: Machine, _: int, step: Step) -> None:
    """Primitives whose operands and outputs have one shape, or differ only along axes that are computed whole."""
    layout = machine.shared_layout(step.outputs)
    values = step.bind(*(machine.get(number, layout) for number in step.inputs))
    for number, value in zip(step.outputs, values, strict=True):
        machine.put(number, value, layout)


def _emit_iota(machine: Machine, _: int, step: Step) -> None:
    (output,) = step.outputs
    layout, along = machine.layout(output), step.params["dimension"]
    kept, dtype = layout[along], step.params["dtype"]
    sizes = _sizes(layout, machine.shape(output))
    if kept is None:
        value = lax.broadcasted_iota(dtype, sizes, along)
    else:
        column = jnp.asarray(kept, dtype).reshape([-1 if axis == along else 1 for axis in range(len(sizes))])
        value = jnp.broadcast_to(column, sizes)
    machine.put(output, value, layout)


def _emit_gather(machine: Machine, index: int, step: Step) -> None:
    passing = passing_axes(step, machine.program)
    (output,), shape = step.outputs, machine.shape(step.inputs[0])
    full = machine.layout(output)
    layout = tuple(kept if axis in passing.values() else None for axis, kept in enumerate(full))
    wanted = tuple(layout[passing[axis]] if axis in passing else None for axis in range(len(shape)))
    operand = machine.get(step.inputs[0], wanted)
    others = [machine.get(number, (None,) * len(machine.shape(number))) for number in step.inputs[1:]]
    sizes = tuple(
        operand.shape[axis] if axis in passing else size for axis, size in enumerate(step.params["slice_sizes"])
    )
    primitive = lax.gather_p if step.name == "gather" else lax.dynamic_slice_p
    value = primitive.bind(operand, *others, **(step.params | {"slice_sizes": sizes}))
    machine.put(output, value, layout)


_EMITTERS: dict[str, Callable[[Machine, int, Step], None]] = {
    "elementwise": _emit_elementwise,
    "dot_general": _emit_product,
    "conv_general_dilated": _emit_product,
    "reshape": _emit_reshape,
    "transpose": _emit_transpose,
    "squeeze": _emit_squeeze,
    "expand_dims": _emit_expand_dims,
    "broadcast_in_dim": _emit_broadcast,
    "slice": _emit_slice,
    "rev": _emit_reverse,
    "concatenate": _emit_concatenate,
    "split": _emit_split,
    "pad": _emit_pad,
    "tile": _emit_tile,
    "iota": _emit_iota,
    "gather": _emit_gather,
    "dynamic_slice": _emit_gather,
    **dict.fromkeys(REDUCTIONS, _emit_reduction),
    **dict.fromkeys((*WINDOWS, *MIXING), _emit_same_layout),
}
