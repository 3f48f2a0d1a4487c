"""Primitives that move or combine elements along axes, as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.export.onnx_graph import Graph, Tensor, UnsupportedError

# From the graph, the parameters of the primitive, its whole operands, and the shapes of its results, to its results.
Rule = Callable[[Graph, Mapping[str, Any], Sequence[Tensor], Sequence[Sequence[Any]]], list[Tensor]]
Params = Mapping[str, Any]


def _reshape(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    return [graph.reshape(operands[0], shapes[0])]


def _transpose(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    return [graph.transpose(operands[0], params["permutation"])]


def broadcast_in_dim(graph: Graph, params: Params, operand: Tensor, rank: int) -> Tensor:
    """The operand with its axes at their places among ``rank`` axes. The other axes have size 1, and are expanded when needed."""
    sizes: list[Any] = [1] * rank
    for axis, size in zip(params["broadcast_dimensions"], operand.sizes, strict=True):
        sizes[axis] = size
    return graph.reshape(operand, sizes)


def _slice(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    (value,) = operands
    strides = params["strides"] or (1,) * len(value.sizes)
    for axis, (start, limit, stride) in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        value = graph.slice(value, axis, start, limit, stride)
    return [value]


def _reverse(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    (value,), axes = operands, params["dimensions"]
    if not axes:
        return [value]
    count = len(axes)
    bounds = [[-1] * count, [np.iinfo(np.int64).min] * count, axes, [-1] * count]
    return [graph.add("Slice", [value, *map(graph.integers, bounds)], value.sizes, value.dtype)]


def _concatenate(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    return [graph.concatenate(operands, params["dimension"])]


def _split(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    outputs = [(shape, operands[0].dtype) for shape in shapes]
    sizes = graph.size_vector(params["sizes"])
    return graph.add_many("Split", [operands[0], sizes], outputs, axis=params["axis"])


def _tile(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    return [graph.add("Tile", [operands[0], graph.size_vector(params["reps"])], shapes[0], operands[0].dtype)]


def pad_with_interior(graph: Graph, value: Tensor, padding: Tensor, config: Sequence[tuple[int, int, int]]) -> Tensor:
    """The value with padding: (low, high, interior) for each axis, where low and high may be negative."""
    for axis, (_, _, interior) in enumerate(config):
        if interior and value.sizes[axis] != 0:
            size, rest = value.sizes[axis], value.sizes[axis + 1 :]
            columns = graph.reshape(value, [*value.sizes[:axis], size, 1, *rest])
            after = [interior if place == axis + 1 else 0 for place in range(len(columns.sizes))]
            columns = graph.pad(columns, [0] * len(after), after, padding)
            spread = graph.reshape(columns, [*value.sizes[:axis], size * (interior + 1), *rest])
            value = graph.slice(spread, axis, 0, size * (interior + 1) - interior)
    for axis, (low, high, _) in enumerate(config):
        if low < 0 or high < 0:
            value = graph.slice(value, axis, max(0, -low), value.sizes[axis] - max(0, -high))
    low_margins, high_margins = ([max(0, each[side]) for each in config] for side in (0, 1))
    return graph.pad(value, low_margins, high_margins, padding)


def _pad(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    value, padding = operands
    if value.dtype == np.float16:  # onnxruntime pads no float16.
        wide, padding = graph.cast(value, np.float32), graph.cast(padding, np.float32)
        return [graph.cast(pad_with_interior(graph, wide, padding, params["padding_config"]), value.dtype)]
    return [pad_with_interior(graph, value, padding, params["padding_config"])]


def _iota(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Positions along an axis whose size depends on the batch size."""
    along, shape = params["dimension"], shapes[0]
    size = graph.add("Squeeze", [graph.size_vector([shape[along]]), graph.integers([0])], (), np.int64)
    count = graph.add("Range", [graph.scalar(0, np.int64), size, graph.scalar(1, np.int64)], (shape[along],), np.int64)
    column = graph.reshape(count, [size if axis == along else 1 for axis, size in enumerate(shape)])
    return [graph.cast(column, graph.carrier(params["dtype"]))]


# Reductions.


def reduce(graph: Graph, op: str, value: Tensor, axes: Sequence[int], keep: bool = False) -> Tensor:
    """A reduction over axes by an operation such as "ReduceSum"."""
    if not axes:
        return value
    kept = [1 if axis in axes else size for axis, size in enumerate(value.sizes) if keep or axis not in axes]
    return graph.add(op, [value, graph.integers(axes)], kept, value.dtype, keepdims=int(keep))


def _reduction(op: str) -> Rule:
    def rule(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
        (value,) = operands
        if value.dtype == bool:
            numbers = graph.cast(value, np.int32)
            return [graph.cast(reduce(graph, op, numbers, params["axes"]), bool)]
        return [reduce(graph, op, value, params["axes"])]

    return rule


def _arg_reduction(op: str) -> Rule:
    def rule(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
        (value,), (axis,) = operands, params["axes"]
        value = graph.cast(value, np.int32) if value.dtype == bool else value
        place = graph.add(op, [value], shapes[0], np.int64, axis=axis, keepdims=0)
        return [graph.cast(place, graph.carrier(params["index_dtype"]))]

    return rule


def _cumulative(op: str, start: float | None) -> Rule:
    """Cumulative reductions by doubling: after step k, an element is the reduction of the last 2^k elements.

    Args:
      op: The operation.
      start: The neutral element, or None for the lowest number (Max) or the largest number (Min).
    """

    def rule(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
        (value,), axis, backwards = operands, params["axis"] % len(operands[0].sizes), params["reverse"]
        size = value.sizes[axis]
        if not isinstance(size, int):
            raise UnsupportedError("a cumulative operation along the batch has no counterpart in ONNX")
        info = np.finfo if value.dtype.kind == "f" else np.iinfo
        neutral = start if start is not None else (info(value.dtype).min if op == "Max" else info(value.dtype).max)
        padding, shift = graph.scalar(neutral, value.dtype), 1
        while shift < size:
            margin = [shift if place == axis else 0 for place in range(len(value.sizes))]
            none = [0] * len(margin)
            kept = graph.slice(value, axis, shift, size) if backwards else graph.slice(value, axis, 0, size - shift)
            moved = graph.pad(kept, none if backwards else margin, margin if backwards else none, padding)
            value = graph.binary(op, value, moved)
            shift *= 2
        return [value]

    return rule


def _cumsum(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    (value,) = operands
    axis = graph.scalar(params["axis"] % len(value.sizes), np.int64)
    return [graph.add("CumSum", [value, axis], value.sizes, value.dtype, reverse=int(params["reverse"]))]


# Sorting.


def _sort(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    keys, *others = operands
    axis = params["dimension"]
    if params["num_keys"] != 1:
        raise UnsupportedError("a sort by several keys has no counterpart in ONNX")
    values, places = top_k(graph, keys, keys.sizes[axis], axis, largest=False)
    return [
        values,
        *(graph.add("GatherElements", [each, places], each.sizes, each.dtype, axis=axis) for each in others),
    ]


def _top_k(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    (value,) = operands
    values, places = top_k(graph, value, params["k"], params.get("axis", -1) % len(value.sizes), largest=True)
    return [values, graph.cast(places, np.int32)]


def top_k(graph: Graph, value: Tensor, count: Any, axis: int, largest: bool) -> list[Tensor]:
    """The first elements along an axis in sorted order, and their places. Among equal elements, the order stays."""
    numbers = graph.cast(value, np.int32) if value.dtype == bool else value
    sizes = [*value.sizes[:axis], count, *value.sizes[axis + 1 :]]
    outputs = [(sizes, numbers.dtype), (sizes, np.int64)]
    values, places = graph.add_many(
        "TopK", [numbers, graph.size_vector([count])], outputs, axis=axis, largest=int(largest), sorted=1
    )
    return [graph.cast(values, value.dtype), places]


RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "rev": _reverse,
    "concatenate": _concatenate,
    "split": _split,
    "tile": _tile,
    "pad": _pad,
    "iota": _iota,
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_prod": _reduction("ReduceProd"),
    "reduce_and": _reduction("ReduceMin"),
    "reduce_or": _reduction("ReduceMax"),
    "argmax": _arg_reduction("ArgMax"),
    "argmin": _arg_reduction("ArgMin"),
    "cumsum": _cumsum,
    "cumprod": _cumulative("Mul", 1),
    "cummax": _cumulative("Max", None),
    "cummin": _cumulative("Min", None),
    "sort": _sort,
    "top_k": _top_k,
    "optimization_barrier": lambda graph, params, operands, _: list(operands),
}
