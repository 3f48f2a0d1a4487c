"""Emitters: each runs one step of the small program.

An emitter requests its operands from the machine, in the layouts that its primitive needs, and stores its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bcdl_jax.graph.facts import along
from bcdl_jax.graph.primitives import CUSTOM, evaluate_elementwise, is_elementwise
from bcdl_jax.graph.program import Atom, Step
from bcdl_jax.graph.reshapes import AxisGroups
from bcdl_jax.graph.rules import MIXING, REDUCTIONS, WINDOWS, unindexed_axes
from bcdl_jax.shrinking.layouts import Axis, Layout, as_axis, flattened, indices, small_sizes
from bcdl_jax.shrinking.machine import Machine, take_axis
from bcdl_jax.shrinking.product_emitters import emit_convolution, emit_dot


def emit_whole(machine: Machine, _: int, step: Step) -> None:
    """Emits any primitive at full size."""
    operands = [machine.get(number, machine.whole(number)) for number in step.inputs]
    for number, value in zip(step.outputs, step.bind_at_any_size(*operands), strict=True):
        machine.put(number, value, machine.whole(number))


def emit_same_layout(machine: Machine, _: int, step: Step) -> None:
    """Emits a primitive whose operands and outputs have the same shape, or differ only along axes that are computed whole."""
    layout = machine.shared_layout(step.outputs)
    values = step.bind(*(machine.get(number, layout) for number in step.inputs))
    for number, value in zip(step.outputs, values, strict=True):
        machine.put(number, value, layout)


# Elementwise functions.


def emit_elementwise(machine: Machine, index: int, step: Step) -> None:
    layout, shape = machine.shared_layout(step.outputs), machine.shape(step.outputs[0])
    custom = step.name in CUSTOM
    function = _small_custom_function(step, small_sizes(layout, shape)) if custom else step.bind
    if function is None:
        emit_whole(machine, index, step)
        return
    operands = []
    for number in step.inputs:
        own = machine.shape(number)
        wanted = (None if mine != full else kept for mine, full, kept in zip(own, shape, layout, strict=False))
        operands.append(machine.get(number, tuple(wanted) if own else ()))
    for number, value in zip(step.outputs, function(*operands), strict=True):
        machine.put(number, value, layout)


def _small_custom_function(step: Step, sizes: tuple[int, ...]) -> Callable[..., list[Any]] | None:
    """An elementwise function with a custom forward derivative, for arrays of other sizes. None if the derivative cannot be resized."""
    if step.name != "custom_jvp_call":
        return None
    inside = step.params["call_jaxpr"]
    # The sizes at which the inner function was traced. In a program for any batch size, the values have other sizes.
    whole = [jax.ShapeDtypeStruct(each.aval.shape, each.aval.dtype) for each in step.equation.invars]
    shape = step.equation.outvars[0].aval.shape
    if any(not jnp.issubdtype(value.dtype, jnp.floating) for value in whole):
        return None
    derivative = jax.make_jaxpr(lambda primals, tangents: jax.jvp(lambda *xs: step.bind(*xs), primals, tangents))(
        tuple(whole), tuple(whole)
    )
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


# Primitives that move elements.


def emit_reshape(machine: Machine, index: int, step: Step) -> None:
    (number,), (output,) = step.inputs, step.outputs
    before, after = machine.shape(number), machine.shape(output)
    layout, groups = machine.layout(output), machine.plan.reshapes[index]
    wanted = _layout_before_reshape(machine, number, output, groups)
    value = machine.get(number, wanted)
    # The operand is reshaped to one axis for each group, then reduced to the needed elements, then reshaped to the axes of the output.
    small = small_sizes(wanted, before)
    # The operand may be a Python scalar, which has no method reshape.
    value = jnp.reshape(value, [math.prod(small[axis] for axis in ins) for ins, _ in groups])
    found: list[np.ndarray | None] = []
    for place, (ins, outs) in enumerate(groups):
        have = flattened([wanted[axis] for axis in ins], [before[axis] for axis in ins])
        want = flattened([layout[axis] for axis in outs], [after[axis] for axis in outs])
        value, present = take_axis(value, place, have, want, math.prod(before[axis] for axis in ins))
        found.append(present)
    sizes = small_sizes(layout, after)
    value = value.reshape(sizes)
    if any(present is not None for present in found):
        flags = np.ones((1,) * len(after), bool)
        for group, present in zip(groups, found, strict=True):
            if present is not None:
                flags = flags & present.reshape([sizes[axis] if axis in group[1] else 1 for axis in range(len(after))])
        value = jnp.where(flags, value, machine.fill(output, layout))
    machine.put(output, value, layout)


def _layout_before_reshape(machine: Machine, number: Atom, output: Atom, groups: AxisGroups) -> Layout:
    """The layout in which a reshape needs its operand. Runs of several axes keep their current layout."""
    layout, moving = machine.layout(output), (machine.plan.moving_axes[number], machine.plan.moving_axes[output])
    wanted = list(machine.current_layout(number))
    for ins, outs in groups:
        if moving[0] & set(ins) or moving[1] & set(outs) or not ins or not outs:
            for axis in ins:
                wanted[axis] = None
        elif len(ins) == len(outs) == 1:
            wanted[ins[0]] = layout[outs[0]]
    return tuple(wanted)


def emit_transpose(machine: Machine, _: int, step: Step) -> None:
    layout, order = machine.layout(step.outputs[0]), step.params["permutation"]
    wanted: list[Axis] = [None] * len(order)
    for place, axis in enumerate(order):
        wanted[axis] = layout[place]
    machine.put(step.outputs[0], lax.transpose(machine.get(step.inputs[0], tuple(wanted)), order), layout)


def emit_squeeze(machine: Machine, _: int, step: Step) -> None:
    layout = iter(machine.layout(step.outputs[0]))
    removed, rank = step.params["dimensions"], len(machine.shape(step.inputs[0]))
    wanted = tuple(None if axis in removed else next(layout) for axis in range(rank))
    machine.put(
        step.outputs[0], lax.squeeze(machine.get(step.inputs[0], wanted), removed), machine.layout(step.outputs[0])
    )


def emit_expand_dims(machine: Machine, _: int, step: Step) -> None:
    layout, new = machine.layout(step.outputs[0]), step.params["dimensions"]
    wanted = tuple(kept for axis, kept in enumerate(layout) if axis not in new)
    value = lax.expand_dims(machine.get(step.inputs[0], wanted), new)
    machine.put(step.outputs[0], value, tuple(None if axis in new else kept for axis, kept in enumerate(layout)))


def emit_broadcast(machine: Machine, _: int, step: Step) -> None:
    layout, shape = machine.layout(step.outputs[0]), machine.shape(step.outputs[0])
    axes, own = step.params["broadcast_dimensions"], machine.shape(step.inputs[0])
    wanted = tuple(layout[axis] if size == shape[axis] else None for axis, size in zip(axes, own, strict=True))
    value = lax.broadcast_in_dim(machine.get(step.inputs[0], wanted), small_sizes(layout, shape), axes)
    machine.put(step.outputs[0], value, layout)


def emit_slice(machine: Machine, _: int, step: Step) -> None:
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


def emit_reverse(machine: Machine, _: int, step: Step) -> None:
    layout, shape = machine.layout(step.outputs[0]), machine.shape(step.outputs[0])
    reversed_axes = step.params["dimensions"]
    wanted = tuple(
        np.sort(shape[axis] - 1 - kept) if kept is not None and axis in reversed_axes else kept
        for axis, kept in enumerate(layout)
    )
    machine.put(step.outputs[0], lax.rev(machine.get(step.inputs[0], wanted), reversed_axes), layout)


def emit_concatenate(machine: Machine, _: int, step: Step) -> None:
    layout, along = machine.layout(step.outputs[0]), step.params["dimension"]
    parts, start = [], 0
    for number in step.inputs:
        size, kept = machine.shape(number)[along], layout[along]
        inside = None if kept is None else kept[(kept >= start) & (kept < start + size)] - start
        start += size
        if inside is None or len(inside):
            wanted = list(layout)
            wanted[along] = None if inside is None else as_axis(inside, size)
            parts.append(machine.get(number, tuple(wanted)))
    machine.put(step.outputs[0], lax.concatenate(parts, along), layout)


def emit_split(machine: Machine, _: int, step: Step) -> None:
    along, start = step.params["axis"], 0
    for number, size in zip(step.outputs, step.params["sizes"], strict=True):
        layout = machine.layout(number)
        wanted = list(layout)
        wanted[along] = start + indices(layout[along], size)
        start += size
        if machine.is_needed(number):
            machine.put(number, machine.get(step.inputs[0], tuple(wanted)), layout)


def emit_pad(machine: Machine, _: int, step: Step) -> None:
    layout = machine.layout(step.outputs[0])
    value, padding = machine.get(step.inputs[0], layout), machine.get(step.inputs[1], ())
    machine.put(step.outputs[0], lax.pad(value, padding, step.params["padding_config"]), layout)


def emit_tile(machine: Machine, _: int, step: Step) -> None:
    # The layout is whole along each axis that is repeated.
    layout = machine.layout(step.outputs[0])
    machine.put(step.outputs[0], step.bind(machine.get(step.inputs[0], layout))[0], layout)


# Reductions, indices and indexing.


def emit_reduction(machine: Machine, _: int, step: Step) -> None:
    axes = step.params["axes"]
    number, layout = step.inputs[0], iter(machine.layout(step.outputs[0]))
    wanted: list[Axis] = []
    for axis in range(len(machine.shape(number))):
        if axis not in axes:
            wanted.append(next(layout))
        elif step.name == "reduce_sum" and axis not in machine.plan.moving_axes[number]:
            # A sum needs no zeros.
            nonzero = along(machine.plan.facts[number].nonzero, axis, machine.shape(number)[axis])
            wanted.append(as_axis(np.flatnonzero(nonzero), nonzero.size))
        else:
            wanted.append(None)
    machine.put(step.outputs[0], step.bind(machine.get(number, tuple(wanted)))[0], machine.layout(step.outputs[0]))


def emit_iota(machine: Machine, _: int, step: Step) -> None:
    (output,) = step.outputs
    layout, along = machine.layout(output), step.params["dimension"]
    kept, dtype = layout[along], step.params["dtype"]
    sizes = small_sizes(layout, machine.shape(output))
    if kept is None:
        value = lax.broadcasted_iota(dtype, sizes, along)
    else:
        column = jnp.asarray(kept, dtype).reshape([-1 if axis == along else 1 for axis in range(len(sizes))])
        value = jnp.broadcast_to(column, sizes)
    machine.put(output, value, layout)


def emit_gather(machine: Machine, _: int, step: Step) -> None:
    unindexed = unindexed_axes(step, machine.program)
    (output,), shape = step.outputs, machine.shape(step.inputs[0])
    full = machine.layout(output)
    layout = tuple(kept if axis in unindexed.values() else None for axis, kept in enumerate(full))
    wanted = tuple(layout[unindexed[axis]] if axis in unindexed else None for axis in range(len(shape)))
    operand = machine.get(step.inputs[0], wanted)
    others = [machine.get(number, machine.whole(number)) for number in step.inputs[1:]]
    sizes = tuple(
        operand.shape[axis] if axis in unindexed else size for axis, size in enumerate(step.params["slice_sizes"])
    )
    primitive = lax.gather_p if step.name == "gather" else lax.dynamic_slice_p
    value = primitive.bind(operand, *others, **(step.params | {"slice_sizes": sizes}))
    machine.put(output, value, layout)


EMITTERS: dict[str, Callable[[Machine, int, Step], None]] = {
    "dot_general": emit_dot,
    "conv_general_dilated": emit_convolution,
    "reshape": emit_reshape,
    "transpose": emit_transpose,
    "squeeze": emit_squeeze,
    "expand_dims": emit_expand_dims,
    "broadcast_in_dim": emit_broadcast,
    "slice": emit_slice,
    "rev": emit_reverse,
    "concatenate": emit_concatenate,
    "split": emit_split,
    "pad": emit_pad,
    "tile": emit_tile,
    "iota": emit_iota,
    "gather": emit_gather,
    "dynamic_slice": emit_gather,
    **dict.fromkeys(REDUCTIONS, emit_reduction),
    **dict.fromkeys((*WINDOWS, *MIXING), emit_same_layout),
}
