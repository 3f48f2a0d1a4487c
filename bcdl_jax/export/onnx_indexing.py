"""Indexing with computed indices as ONNX nodes.

A gather of whole slices along one axis is a Gather node. Every other gather and every scatter works on the flattened operand: the place of
each element is the sum, over the axes, of its index times the stride of the axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax

from bcdl_jax.export.onnx_elementwise import select
from bcdl_jax.export.onnx_graph import Graph, Tensor, UnsupportedError
from bcdl_jax.export.onnx_structure import Rule, reduce

Params = Mapping[str, Any]
_CLIP, _IN_BOUNDS = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS


def _gather(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    operand, indices = operands
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    starts = graph.cast(indices, np.int64)
    limits = [_less(operand.sizes[axis], sizes[axis]) for axis in numbers.start_index_map]
    bounded, valid = _bounded(graph, starts, limits, params["mode"])
    whole = [axis for axis in range(len(sizes)) if axis not in numbers.start_index_map]
    simple = (
        not batching and len(numbers.start_index_map) == 1 and numbers.collapsed_slice_dims == numbers.start_index_map
    )
    if simple and all(sizes[axis] == operand.sizes[axis] for axis in whole):
        result = _gather_slices(graph, operand, bounded, numbers, len(shapes[0]))
    else:
        result = _gather_elements(graph, operand, bounded, numbers, sizes, shapes[0])
    if valid is None:
        return [result]
    fill = params["fill_value"]
    if fill is None:
        fill = np.nan if result.dtype.kind == "f" else np.iinfo(np.int32).min
    mask = _at_axes(
        graph, valid, [axis for axis in range(len(shapes[0])) if axis not in numbers.offset_dims], len(shapes[0])
    )
    return [graph.whole(select(graph, mask, result, graph.scalar(fill, result.dtype)), shapes[0])]


def _less(size: Any, taken: Any) -> Any:
    return 0 if size == taken else size - taken


def _bounded(graph: Graph, starts: Tensor, limits: Sequence[Any], mode: Any) -> tuple[Tensor, Tensor | None]:
    """Indices within their bounds, and flags of the index vectors that were within them; None if all are or the bounds apply silently."""
    mode = lax.GatherScatterMode.from_any(mode) if not isinstance(mode, lax.GatherScatterMode) else mode
    if mode == _IN_BOUNDS:
        return starts, None
    upper, zero = graph.size_vector(limits), graph.scalar(0, np.int64)
    bounded = graph.binary("Max", graph.binary("Min", starts, upper), zero)
    if mode == _CLIP:
        return bounded, None
    same = graph.cast(graph.binary("Equal", starts, bounded, bool), np.int32)
    return bounded, graph.cast(reduce(graph, "ReduceMin", same, [len(starts.sizes) - 1]), bool)


def _gather_slices(graph: Graph, operand: Tensor, indices: Tensor, numbers: Any, rank: int) -> Tensor:
    """Whole slices along one axis."""
    (axis,) = numbers.start_index_map
    indices = graph.reshape(indices, indices.sizes[:-1])
    sizes = [*operand.sizes[:axis], *indices.sizes, *operand.sizes[axis + 1 :]]
    gathered = graph.add("Gather", [operand, indices], sizes, operand.dtype, axis=axis)
    # The axes of the slices are at ``offset_dims`` of the result, the axes of the indices at the others.
    order: list[int] = [0] * rank
    index_axes = iter(range(axis, axis + len(indices.sizes)))
    slice_axes = iter([*range(axis), *range(axis + len(indices.sizes), rank)])
    for place in range(rank):
        order[place] = next(slice_axes) if place in numbers.offset_dims else next(index_axes)
    return graph.transpose(gathered, order)


def _gather_elements(
    graph: Graph, operand: Tensor, starts: Tensor, numbers: Any, sizes: Sequence[Any], shape: Sequence[Any]
) -> Tensor:
    places = flat_places(
        graph,
        operand.sizes,
        starts,
        rank=len(shape),
        window_axes=numbers.offset_dims,
        window_sizes=sizes,
        removed=numbers.collapsed_slice_dims,
        index_map=numbers.start_index_map,
        batching=getattr(numbers, "operand_batching_dims", ()),
        index_batching=getattr(numbers, "start_indices_batching_dims", ()),
    )
    flat = graph.reshape(operand, [math.prod(operand.sizes)])
    return graph.add("Gather", [flat, graph.whole(places, shape)], shape, operand.dtype, axis=0)


def flat_places(
    graph: Graph,
    operand_sizes: Sequence[Any],
    starts: Tensor,
    *,
    rank: int,
    window_axes: Sequence[int],
    window_sizes: Sequence[Any],
    removed: Sequence[int],
    index_map: Sequence[int],
    batching: Sequence[int],
    index_batching: Sequence[int],
) -> Tensor:
    """The place in the flattened operand of each element of a gather's result or of a scatter's updates.

    Args:
      graph: The graph.
      operand_sizes: The shape of the operand.
      starts: The indices, [..., indexed axes].
      rank: The number of axes of the result or the updates.
      window_axes: The axes of the result that run along the operand; the other ones run along the indices.
      window_sizes: The size of the slice along each axis of the operand.
      removed: The axes of the operand that the result lacks.
      index_map: The axis of the operand for each entry of an index vector.
      batching: The axes of the operand that run along axes of the indices, without entries of their own.
      index_batching: The axes of the indices that correspond to ``batching``, in the same order.
    """
    index_axes = [axis for axis in range(rank) if axis not in window_axes]
    kept = [axis for axis in range(len(operand_sizes)) if axis not in (*removed, *batching)]
    window_of = dict(zip(kept, window_axes, strict=True))
    total = graph.scalar(0, np.int64)
    total = graph.reshape(total, [1] * rank)
    for axis in range(len(operand_sizes)):
        stride = math.prod(operand_sizes[axis + 1 :])
        terms = []
        if axis in index_map:
            entry = graph.slice(starts, len(starts.sizes) - 1, index_map.index(axis), index_map.index(axis) + 1)
            terms.append(_at_axes(graph, graph.reshape(entry, starts.sizes[:-1]), index_axes, rank))
        if axis in batching:
            along = index_axes[index_batching[list(batching).index(axis)]]
            terms.append(_positions(graph, operand_sizes[axis], along, rank))
        if axis in window_of and not (isinstance(window_sizes[axis], int) and window_sizes[axis] == 1):
            terms.append(_positions(graph, window_sizes[axis], window_of[axis], rank))
        for term in terms:
            scaled = graph.binary("Mul", term, graph.size_vector([stride]))
            total = graph.binary("Add", total, scaled)
    return total


def _at_axes(graph: Graph, tensor: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """The tensor with its axes at the given places among ``rank`` axes."""
    sizes: list[Any] = [1] * rank
    for axis, size in zip(axes, tensor.sizes, strict=True):
        sizes[axis] = size
    return graph.reshape(tensor, sizes)


def _positions(graph: Graph, size: Any, axis: int, rank: int) -> Tensor:
    """0, 1, 2, ... along one of ``rank`` axes."""
    if isinstance(size, int):
        column = graph.constant(np.arange(size, dtype=np.int64))
    else:
        stop = graph.add("Squeeze", [graph.size_vector([size]), graph.integers([0])], (), np.int64)
        column = graph.add("Range", [graph.scalar(0, np.int64), stop, graph.scalar(1, np.int64)], (size,), np.int64)
    return _at_axes(graph, column, [axis], rank)


def _scatter(reduction: str) -> Rule:
    def rule(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
        operand, indices, updates = operands
        numbers = params["dimension_numbers"]
        removed, batching = numbers.inserted_window_dims, getattr(numbers, "operand_batching_dims", ())
        kept = iter(numbers.update_window_dims)
        sizes = [
            1 if axis in (*removed, *batching) else updates.sizes[next(kept)] for axis in range(len(operand.sizes))
        ]
        starts = graph.cast(indices, np.int64)
        limits = [_less(operand.sizes[axis], sizes[axis]) for axis in numbers.scatter_dims_to_operand_dims]
        bounded, valid = _bounded(graph, starts, limits, params["mode"])
        rank = len(updates.sizes)
        places = flat_places(
            graph,
            operand.sizes,
            bounded,
            rank=rank,
            window_axes=numbers.update_window_dims,
            window_sizes=sizes,
            removed=removed,
            index_map=numbers.scatter_dims_to_operand_dims,
            batching=batching,
            index_batching=getattr(numbers, "scatter_indices_batching_dims", ()),
        )
        total = math.prod(operand.sizes)
        if valid is not None:  # Updates out of bounds go to a place of their own, which is cut off again.
            index_axes = [axis for axis in range(rank) if axis not in numbers.update_window_dims]
            places = select(graph, _at_axes(graph, valid, index_axes, rank), places, graph.size_vector([total]))
        flat = graph.pad(graph.reshape(operand, [total]), [0], [int(valid is not None)])
        count = math.prod(updates.sizes)
        inputs = [
            flat,
            graph.reshape(graph.whole(places, updates.sizes), [count, 1]),
            graph.reshape(graph.cast(updates, operand.dtype), [count]),
        ]
        result = graph.add("ScatterND", inputs, flat.sizes, operand.dtype, reduction=reduction)
        return [graph.reshape(graph.slice(result, 0, 0, total), shapes[0])]

    return rule


# Slices at computed places.


def _starts(graph: Graph, indices: Sequence[Tensor], limits: Sequence[Any]) -> Tensor:
    parts = [graph.reshape(graph.cast(each, np.int64), [1]) for each in indices]
    starts = graph.concatenate(parts, 0)
    return graph.binary("Max", graph.binary("Min", starts, graph.size_vector(limits)), graph.scalar(0, np.int64))


def _dynamic_slice(
    graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]
) -> list[Tensor]:
    operand, *indices = operands
    starts = _starts(graph, indices, [_less(*pair) for pair in zip(operand.sizes, params["slice_sizes"], strict=True)])
    ends = graph.binary("Add", starts, graph.size_vector(params["slice_sizes"]))
    axes = graph.integers(range(len(operand.sizes)))
    return [graph.add("Slice", [operand, starts, ends, axes], shapes[0], operand.dtype)]


def _dynamic_update_slice(
    graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]
) -> list[Tensor]:
    operand, update, *indices = operands
    axes = [axis for axis, pair in enumerate(zip(operand.sizes, update.sizes, strict=True)) if pair[0] != pair[1]]
    if not axes:
        return [update]
    if len(axes) > 1:
        raise UnsupportedError("an update of a slice along several axes has no counterpart in ONNX")
    (axis,) = axes
    start = _starts(graph, [indices[axis]], [operand.sizes[axis] - update.sizes[axis]])
    end = graph.binary("Add", start, graph.size_vector([update.sizes[axis]]))
    along, zero, last = graph.integers([axis]), graph.integers([0]), graph.size_vector([operand.sizes[axis]])
    # The sizes of the outer parts are not known before the graph runs.
    before, after = (
        graph.add("Slice", [operand, *bounds, along], operand.sizes, operand.dtype)
        for bounds in ((zero, start), (end, last))
    )
    return [graph.add("Concat", [before, update, after], shapes[0], operand.dtype, axis=axis)]


RULES: dict[str, Rule] = {
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter("none"),
    "scatter-add": _scatter("add"),
    "scatter-mul": _scatter("mul"),
    "scatter-max": _scatter("max"),
    "scatter-min": _scatter("min"),
}
