"""How the elements of a primitive's outputs depend on the elements of its inputs. Products have rules of their own, see ``products``."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import Fact, Flags
from bcdl_jax.graph.program import Program, Step

Shape = tuple[int, ...]

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


@dataclasses.dataclass(frozen=True)
class FlowRule:
    """The rule of one step.

    Attributes:
      forward: A function of the inputs' facts. It returns flags of the unknown elements of each output.
      backward: A function of the inputs' facts and of each output's live flags. It returns flags of the elements that are read from each
        input.
    """

    forward: Callable[[Sequence[Fact]], list[Flags]]
    backward: Callable[[Sequence[Fact], Sequence[Flags]], list[Flags]]


def flow_rule(step: Step, program: Program) -> FlowRule | None:
    """The rule of a step; None if its primitive has no rule here."""
    in_shapes = [program.shapes[number].shape for number in step.inputs]
    out_shapes = [program.shapes[number].shape for number in step.outputs]
    if step.elementwise:
        return _elementwise(step.name, in_shapes, out_shapes)
    if step.name in STRUCTURAL:
        return _structural(STRUCTURAL[step.name](step.params, in_shapes), in_shapes)
    if step.name == "iota":
        return FlowRule(lambda _: [np.zeros(out_shapes[0], bool)], lambda *_: [])
    if step.name in REDUCTIONS:
        return _reduction(step.params["axes"], in_shapes[0])
    if step.name in WINDOWS:
        return _window(step.params, in_shapes[0])
    if step.name in MIXING:
        axis = step.params[MIXING[step.name]]
        return _mixing(len(in_shapes[0]) + axis if axis < 0 else axis, in_shapes, out_shapes)
    if step.name in ("gather", "dynamic_slice"):
        axes = unindexed_axes(step, program)
        return _indexing(axes, in_shapes, out_shapes[0]) if axes else None
    return None


# Elementwise primitives.


def _elementwise(name: str, in_shapes: Sequence[Shape], out_shapes: Sequence[Shape]) -> FlowRule:
    shape = out_shapes[0]

    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        flags = _elementwise_unknown(name, inputs, shape)
        return [np.array(np.broadcast_to(flags, out)) for out in out_shapes]

    def backward(inputs: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        needs = _elementwise_needs(name, inputs, np.logical_or.reduce(list(lives)))
        return [_shrink_to(np.broadcast_to(need, shape), size) for need, size in zip(needs, in_shapes, strict=True)]

    return FlowRule(forward, backward)


def _elementwise_unknown(name: str, inputs: Sequence[Fact], shape: Shape) -> Flags:
    unknown = [fact.unknown for fact in inputs]
    if name == "mul":
        (first, second) = inputs
        return (first.unknown & second.nonzero) | (second.unknown & first.nonzero)
    if name == "div":
        return (unknown[0] | unknown[1]) & inputs[0].nonzero
    if name == "select_n":
        which, *cases = inputs
        flags = np.zeros(shape, bool)
        for number, case in enumerate(cases):
            flags = flags | (case.unknown & (which.unknown | (which.value.astype(int) == number)))
        same = [~case.unknown & (case.value == cases[0].value) for case in cases]
        return flags | (which.unknown & ~np.logical_and.reduce(np.broadcast_arrays(*same)))
    return np.logical_or.reduce(np.broadcast_arrays(*unknown))


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


def _shrink_to(flags: Flags, shape: Shape) -> Flags:
    """The reverse of broadcasting: any flag along an axis of size 1."""
    if shape == flags.shape:
        return flags
    if not shape:
        return np.asarray(flags.any())
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 != flags.shape[axis])
    return np.asarray(flags.any(axes, keepdims=True))


# Structural primitives, which only move elements. The *sources* of an output give, for each of its elements, the place of the same element
# in the flattened and concatenated inputs.


def _structural(sources: list[np.ndarray], in_shapes: Sequence[Shape]) -> FlowRule:
    sizes = [math.prod(shape) for shape in in_shapes]
    ends = list(itertools.accumulate(sizes))

    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        flat = np.concatenate([fact.unknown.ravel() for fact in inputs])
        return [flat[source] for source in sources]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        flat = np.zeros(sum(sizes), bool)
        for source, live in zip(sources, lives, strict=True):
            flat[source[live]] = True
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), in_shapes, strict=True)]

    return FlowRule(forward, backward)


def _places(shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The place of each element of the inputs."""
    starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    return [start + np.arange(math.prod(shape)).reshape(shape) for start, shape in zip(starts, shapes, strict=False)]


def _broadcast_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    (places,) = _places(shapes[:1])
    sizes = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], shapes[0], strict=True):
        sizes[axis] = size
    return [np.broadcast_to(places.reshape(sizes), params["shape"])]


def _pad_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    places, padding = _places(shapes)
    for axis, (low, high, interior) in enumerate(params["padding_config"]):
        size = places.shape[axis]
        spread = np.arange(size) * (interior + 1) + low
        length = low + high + size + max(size - 1, 0) * interior
        inside = (spread >= 0) & (spread < length)
        out = np.full((*places.shape[:axis], length, *places.shape[axis + 1 :]), padding)
        np.moveaxis(out, axis, 0)[spread[inside]] = np.moveaxis(places, axis, 0)[inside]
        places = out
    return [places]


def _slice_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    strides = params["strides"] or (1,) * len(shapes[0])
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return [_places(shapes)[0][tuple(slice(*cut) for cut in cuts)]]


def _split_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    ends = list(itertools.accumulate(params["sizes"]))
    return np.split(_places(shapes)[0], ends[:-1], params["axis"])


STRUCTURAL: dict[str, Callable[[Mapping[str, Any], Sequence[Shape]], list[np.ndarray]]] = {
    "reshape": lambda params, shapes: [_places(shapes)[0].reshape(params["new_sizes"])],
    "squeeze": lambda params, shapes: [np.squeeze(_places(shapes)[0], params["dimensions"])],
    "expand_dims": lambda params, shapes: [np.expand_dims(_places(shapes)[0], params["dimensions"])],
    "transpose": lambda params, shapes: [np.transpose(_places(shapes)[0], params["permutation"])],
    "broadcast_in_dim": _broadcast_source,
    "slice": _slice_source,
    "rev": lambda params, shapes: [np.flip(_places(shapes)[0], params["dimensions"])],
    "concatenate": lambda params, shapes: [np.concatenate(_places(shapes), params["dimension"])],
    "pad": _pad_source,
    "tile": lambda params, shapes: [np.tile(_places(shapes)[0], params["reps"])],
    "split": _split_source,
}


# Primitives that combine elements along axes.


def _reduction(axes: Sequence[int], shape: Shape) -> FlowRule:
    return FlowRule(
        lambda inputs: [np.asarray(inputs[0].unknown.any(tuple(axes)))],
        lambda _, lives: [np.array(np.broadcast_to(np.expand_dims(lives[0], tuple(axes)), shape))],
    )


def _mixing(axis: int, in_shapes: Sequence[Shape], out_shapes: Sequence[Shape]) -> FlowRule:
    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        mixed = np.logical_or.reduce([fact.unknown.any(axis, keepdims=True) for fact in inputs])
        return [np.array(np.broadcast_to(mixed, shape)) for shape in out_shapes]

    def backward(_: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        mixed = np.logical_or.reduce([live.any(axis, keepdims=True) for live in lives])
        return [np.array(np.broadcast_to(mixed, shape)) for shape in in_shapes]

    return FlowRule(forward, backward)


def _window(params: Mapping[str, Any], shape: Shape) -> FlowRule:
    """The rule of pooling. In the code, ``cover[axis][o, i]`` marks that the window of output o covers input i."""
    cover = []
    for size, window, stride, (low, high), base, dilation in zip(
        shape,
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
        strict=True,
    ):
        spread = (size - 1) * base + 1 if size else 0
        count = max(0, (low + spread + high - ((window - 1) * dilation + 1)) // stride + 1)
        place = (np.arange(count)[:, None] * stride + np.arange(window) * dilation - low)[..., None]
        cover.append((place == np.arange(size) * base).any(1))
    return FlowRule(
        lambda inputs: [_spread_over(inputs[0].unknown, cover)],
        lambda _, lives: [_spread_over(lives[0], [matrix.T for matrix in cover])],
    )


def _spread_over(flags: Flags, matrices: Sequence[Flags]) -> Flags:
    """Flags of the elements that, along each axis, a matrix connects to a flagged element."""
    for axis, matrix in enumerate(matrices):
        if matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, np.eye(len(matrix), dtype=bool)):
            moved = np.tensordot(matrix.astype(np.float32), flags.astype(np.float32), (1, axis))
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


def _indexing(unindexed: dict[int, int], in_shapes: Sequence[Shape], out_shape: Shape) -> FlowRule:
    """The rule of a gather or dynamic slice. Along its indexed axes, the output may come from any place of the operand."""
    indexed = tuple(axis for axis in range(len(in_shapes[0])) if axis not in unindexed)
    out_indexed = tuple(axis for axis in range(len(out_shape)) if axis not in unindexed.values())
    order = sorted(unindexed, key=lambda axis: unindexed[axis])

    def to_output(flags: Flags) -> Flags:
        rest = [axis for axis in range(len(in_shapes[0])) if axis in unindexed]
        flags = np.transpose(flags, [rest.index(axis) for axis in order])
        return np.array(np.broadcast_to(np.expand_dims(flags, out_indexed), out_shape))

    def forward(inputs: Sequence[Fact]) -> list[Flags]:
        operand = inputs[0]
        first = operand.value
        for axis in indexed:
            first = np.take(first, [0], axis)
        return [to_output((operand.unknown | (operand.value != first)).any(indexed))]

    def backward(inputs: Sequence[Fact], lives: Sequence[Flags]) -> list[Flags]:
        read = lives[0].any(out_indexed)
        read = np.transpose(read, [order.index(axis) for axis in sorted(unindexed)])
        operand = np.broadcast_to(np.expand_dims(read, indexed), in_shapes[0])
        indices = [np.full(shape, bool(lives[0].any())) for shape in in_shapes[1:]]
        return [np.array(operand), *indices]

    return FlowRule(forward, backward)
