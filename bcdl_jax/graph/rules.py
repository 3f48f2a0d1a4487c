"""How the elements of a primitive's outputs depend on the elements of its inputs. Products have rules of their own, see ``products``.

All arrays are compact, see ``facts``. The rules keep them compact: they extend an array along an axis only if elements differ along it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import Fact, Flags, Shape, any_along, compact, in_full
from bcdl_jax.graph.known_values import elementwise_values, values_of
from bcdl_jax.graph.program import Program, Step
from bcdl_jax.graph.structural import STRUCTURAL, move_backward, move_forward
from bcdl_jax.graph.windows import positions_read

REDUCTIONS = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "reduce_xor",
    "argmax",
    "argmin",
)
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
# Primitives whose outputs depend on all inputs along one axis, with the name of the parameter that holds the axis.
MIXING = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
    "top_k": "axis",
}

Known = tuple[Flags, np.ndarray]  # Flags of the unknown elements of an output, and its values at all other elements.


@dataclasses.dataclass(frozen=True)
class FlowRule:
    """The rule of one step.

    Attributes:
      forward: A function of the inputs' facts. It returns the known elements of each output.
      backward: A function of the inputs' facts and of each output's live flags. It returns flags of the elements that are read from each
        input.
    """

    forward: Callable[[Sequence[Fact]], list[Known]]
    backward: Callable[[Sequence[Fact], Sequence[Flags]], list[Flags]]


def flow_rule(step: Step, program: Program) -> FlowRule | None:
    """The rule of a step; None if its primitive has no rule here."""
    in_shapes = [program.shapes[number].shape for number in step.inputs]
    outputs = [program.shapes[number] for number in step.outputs]
    if step.elementwise:
        return _elementwise(step, in_shapes, outputs)
    if step.name in STRUCTURAL:
        return _structural(step, in_shapes, [output.shape for output in outputs])
    if step.name == "iota":
        return _iota(step.params)
    if step.name in REDUCTIONS:
        return _reduction(step, in_shapes[0])
    if step.name in WINDOWS:
        return _window(step, in_shapes[0])
    if step.name in MIXING:
        axis = step.params[MIXING[step.name]]
        return _mixing(step, axis % len(in_shapes[0]), in_shapes, len(outputs))
    if step.name in ("gather", "dynamic_slice"):
        axes = unindexed_axes(step, program)
        return _indexing(axes, in_shapes, outputs[0].shape, step.params.get("fill_value")) if axes else None
    return None


@functools.cache
def no_elements_known(rank: int) -> Known:
    """The known elements of an output that is unknown as a whole."""
    ones = (1,) * rank
    return np.ones(ones, bool), np.zeros(ones, np.float32)


def _known(unknown: Flags, value: Callable[[], np.ndarray]) -> Known:
    """The known elements of an output. The value is not computed if there are none."""
    if unknown.all():
        return no_elements_known(unknown.ndim)
    return unknown, value()


# Elementwise primitives.


def _elementwise(step: Step, in_shapes: Sequence[Shape], outputs: Sequence[Any]) -> FlowRule:
    shape, dtypes = outputs[0].shape, [output.dtype for output in outputs]

    def forward(inputs: Sequence[Fact]) -> list[Known]:
        unknown = compact(np.asarray(_elementwise_unknown(step.name, inputs)))
        if unknown.ndim < len(shape):
            unknown = unknown.reshape((1,) * len(shape))
        if unknown.all():
            return [no_elements_known(len(shape)) for _ in outputs]
        values = elementwise_values(step, [fact.filled for fact in inputs], dtypes)
        return [(unknown, value.reshape((1,) * (len(shape) - value.ndim) + value.shape)) for value in values]

    def backward(inputs: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        live = lives[0]
        for other in lives[1:]:
            live = live | other
        needs = _elementwise_needs(step.name, inputs, live)
        return [_shrink_to(np.asarray(need), size, shape) for need, size in zip(needs, in_shapes, strict=True)]

    return FlowRule(forward, backward)


def _elementwise_unknown(name: str, inputs: Sequence[Fact]) -> Flags:
    if name == "mul":
        (first, second) = inputs
        return (first.unknown & second.nonzero) | (second.unknown & first.nonzero)
    if name == "div":
        return (inputs[0].unknown | inputs[1].unknown) & inputs[0].nonzero
    if name == "select_n":
        which, *cases = inputs
        flags = which.unknown & ~_are_equal(cases)
        for number, case in enumerate(cases):
            flags = flags | (case.unknown & (which.unknown | (which.value.astype(int) == number)))
        return flags
    flags = inputs[0].unknown
    for fact in inputs[1:]:
        flags = flags | fact.unknown
    return flags


def _are_equal(cases: Sequence[Fact]) -> Flags:
    """Flags of the elements that are known and the same in all cases."""
    flags = ~cases[0].unknown
    for case in cases[1:]:
        flags = flags & ~case.unknown & (case.value == cases[0].value)
    return flags


def _elementwise_needs(name: str, inputs: Sequence[Fact], live: Flags) -> list[Flags]:
    if name == "mul":
        return [live & inputs[1].nonzero, live & inputs[0].nonzero]
    if name == "div":
        return [live, live & inputs[0].nonzero]
    if name == "select_n":
        which = inputs[0]
        return [
            live,
            *(live & (which.unknown | (which.value.astype(int) == case)) for case in range(len(inputs) - 1)),
        ]
    return [live] * len(inputs)


def _shrink_to(flags: Flags, shape: Shape, full: Shape) -> Flags:
    """The reverse of broadcasting from ``shape`` to ``full``: any flag along an axis of size 1."""
    if not shape:
        return np.asarray(flags.any())
    return any_along(flags, [axis for axis, size in enumerate(shape) if size == 1 != full[axis]])


# Primitives that only move elements.


def _structural(step: Step, in_shapes: Sequence[Shape], out_shapes: Sequence[Shape]) -> FlowRule:
    def forward(inputs: Sequence[Fact]) -> list[Known]:
        flags = move_forward(step, in_shapes, out_shapes, [fact.unknown for fact in inputs])
        if all(each.all() for each in flags):
            return [no_elements_known(each.ndim) for each in flags]
        values = move_forward(step, in_shapes, out_shapes, [fact.value for fact in inputs])
        return [(compact(unknown), value) for unknown, value in zip(flags, values, strict=True)]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        return move_backward(step, in_shapes, out_shapes, lives)

    return FlowRule(forward, backward)


def _iota(params: Mapping[str, Any]) -> FlowRule:
    def forward(_: Sequence[Fact]) -> list[Known]:
        shape, dimension = params["shape"], params["dimension"]
        sizes = [size if axis == dimension else 1 for axis, size in enumerate(shape)]
        return [(np.zeros((1,) * len(shape), bool), np.arange(shape[dimension], dtype=params["dtype"]).reshape(sizes))]

    return FlowRule(forward, lambda *_: [])


# Primitives that combine elements along axes.


def _reduction(step: Step, shape: Shape) -> FlowRule:
    axes = tuple(step.params["axes"])

    def forward(inputs: Sequence[Fact]) -> list[Known]:
        unknown = np.asarray(any_along(inputs[0].unknown, axes).any(axes))
        return [_known(unknown, lambda: values_of(step, [in_full(inputs[0].filled, shape, axes)])[0])]

    return FlowRule(forward, lambda _, lives: [np.expand_dims(lives[0], axes)])


def _mixing(step: Step, axis: int, in_shapes: Sequence[Shape], num_outputs: int) -> FlowRule:
    def mixed(all_flags: Sequence[Flags]) -> Flags:
        result = any_along(all_flags[0], [axis])
        for flags in all_flags[1:]:
            result = result | any_along(flags, [axis])
        return result

    def forward(inputs: Sequence[Fact]) -> list[Known]:
        unknown = mixed([fact.unknown for fact in inputs])
        if unknown.all():
            return [no_elements_known(unknown.ndim)] * num_outputs
        sizes = np.broadcast_shapes(*(fact.value.shape for fact in inputs), unknown.shape)
        sizes = tuple(in_shapes[0][axis] if place == axis else size for place, size in enumerate(sizes))
        values = values_of(step, [np.broadcast_to(fact.filled, sizes) for fact in inputs])
        return [(unknown, value) for value in values]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        return [mixed(lives)] * len(in_shapes)

    return FlowRule(forward, backward)


def _window(step: Step, shape: Shape) -> FlowRule:
    """The rule of pooling. In the code, ``cover[axis][o, i]`` marks that the window of output o covers input i."""
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    cover = [
        (positions_read(size, *numbers)[..., None] == np.arange(size)).any(1)
        for size, *numbers in zip(shape, *(step.params[name] for name in names), strict=True)
    ]
    pooled = [axis for axis, matrix in enumerate(cover) if not _is_identity(matrix)]

    def forward(inputs: Sequence[Fact]) -> list[Known]:
        unknown = _spread_over(inputs[0].unknown, shape, pooled, cover)
        return [_known(unknown, lambda: compact(values_of(step, [in_full(inputs[0].filled, shape, pooled)])[0]))]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        transposed = [matrix.T for matrix in cover]
        return [_spread_over(lives[0], [len(matrix) for matrix in cover], pooled, transposed)]

    return FlowRule(forward, backward)


def _is_identity(matrix: Flags) -> bool:
    return matrix.shape[0] == matrix.shape[1] and bool((matrix == np.eye(len(matrix), dtype=bool)).all())


def _spread_over(flags: Flags, shape: Shape | list[int], axes: Sequence[int], matrices: Sequence[Flags]) -> Flags:
    """Flags of the elements that, along each of the given axes, a matrix connects to a flagged element."""
    for axis in axes:
        if flags.shape[axis] == 1 and matrices[axis].any(1).all():
            continue
        moved = np.tensordot(
            matrices[axis].astype(np.float32), in_full(flags, shape, [axis]).astype(np.float32), (1, axis)
        )
        flags = np.moveaxis(moved, 0, axis) > 0
    return flags


# Indexing with computed indices.


def unindexed_axes(step: Step, program: Program) -> dict[int, int]:
    """The axes along which a gather or dynamic slice takes every element in its place: output axis by operand axis."""
    operand, output = program.shapes[step.inputs[0]].shape, program.shapes[step.outputs[0]].shape
    sizes = step.params["slice_sizes"]
    if step.name == "dynamic_slice":
        return {axis: axis for axis in range(len(operand)) if sizes[axis] == operand[axis]}
    numbers = step.params["dimension_numbers"]
    removed = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
    kept = [axis for axis in range(len(operand)) if axis not in removed]
    by_axis = dict(zip(kept, numbers.offset_dims, strict=True))
    return {
        axis: out
        for axis, out in by_axis.items()
        if axis not in numbers.start_index_map and sizes[axis] == operand[axis] == output[out]
    }


def _indexing(
    unindexed: dict[int, int], in_shapes: Sequence[Shape], out_shape: Shape, fill_value: Any = None
) -> FlowRule:
    """The rule of a gather or dynamic slice. Along its indexed axes, the output may come from any place of the operand.

    Args:
      unindexed: The axes of ``unindexed_axes``.
      in_shapes: The shapes of the operands.
      out_shape: The shape of the output.
      fill_value: The elements for indices out of range, if the network gives a number. The default of JAX, NaN, marks wrong inputs.
    """
    indexed = tuple(axis for axis in range(len(in_shapes[0])) if axis not in unindexed)
    out_indexed = tuple(axis for axis in range(len(out_shape)) if axis not in unindexed.values())
    by_operand = sorted(unindexed)
    by_output = sorted(unindexed, key=lambda axis: unindexed[axis])

    def to_output(array: np.ndarray) -> np.ndarray:
        """The array with the indexed axes, of size 1, in place of those of the output."""
        array = np.squeeze(array, indexed)
        return np.expand_dims(np.transpose(array, [by_operand.index(axis) for axis in by_output]), out_indexed)

    def forward(inputs: Sequence[Fact]) -> list[Known]:
        first, unknown = inputs[0].value, any_along(inputs[0].unknown, indexed)
        for axis in indexed:
            first = np.take(first, [0], axis)
        if inputs[0].value.shape != first.shape:
            unknown = unknown | any_along(inputs[0].value != first, indexed)
        if fill_value is not None and fill_value == fill_value:
            unknown = unknown | (first != fill_value)
        return [(compact(to_output(unknown)), to_output(first))]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        read = np.squeeze(any_along(lives[0], out_indexed), out_indexed)
        read = np.transpose(read, [by_output.index(axis) for axis in by_operand])
        indices = [np.full((1,) * len(shape), bool(lives[0].any())) for shape in in_shapes[1:]]
        return [np.expand_dims(read, indexed), *indices]

    return FlowRule(forward, backward)
