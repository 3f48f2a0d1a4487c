"""Matrix products, convolutions and pooling as ONNX nodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.export.onnx_graph import Graph, Tensor, UnsupportedError
from bcdl_jax.export.onnx_structure import Rule, pad_with_interior

Params = Mapping[str, Any]


def _dot(graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    (contracted, batch), preferred = params["dimension_numbers"], params["preferred_element_type"]
    dtype = operands[0].dtype if preferred is None else graph.carrier(preferred)
    sides = [graph.cast(operand, dtype) for operand in operands]
    if dtype.kind == "b":
        raise UnsupportedError("a product of bools has no counterpart in ONNX")
    free = [
        [axis for axis in range(len(side.sizes)) if axis not in (*contracted[place], *batch[place])]
        for place, side in enumerate(sides)
    ]
    batch_sizes = [sides[0].sizes[axis] for axis in batch[0]]
    free_sizes = [[side.sizes[axis] for axis in axes] for side, axes in zip(sides, free, strict=True)]
    first = graph.transpose(sides[0], [*batch[0], *free[0], *contracted[0]])
    second = graph.transpose(sides[1], [*batch[1], *contracted[1], *free[1]])
    inner = math.prod(sides[0].sizes[axis] for axis in contracted[0])
    # Without batch axes, the first operand may keep its free axes: MatMul takes any number of them.
    left = free_sizes[0] if (not batch[0] and free[0]) else [math.prod(free_sizes[0])]
    first = graph.reshape(first, [*batch_sizes, *left, inner])
    second = graph.reshape(second, [*batch_sizes, inner, math.prod(free_sizes[1])])
    product = graph.add("MatMul", [first, second], [*batch_sizes, *left, math.prod(free_sizes[1])], dtype)
    return [graph.reshape(product, shapes[0])]


def _convolution(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    numbers, preferred = params["dimension_numbers"], params["preferred_element_type"]
    dtype = operands[0].dtype if preferred is None else graph.carrier(preferred)
    if params["batch_group_count"] != 1 or dtype.kind != "f":
        raise UnsupportedError(
            "convolutions of integers, and those with groups along the batch, have no counterpart in ONNX"
        )
    computed = np.dtype(np.float32) if dtype == np.float64 else dtype  # onnxruntime has no convolution of float64.
    values, kernel = (graph.cast(operand, computed) for operand in operands)
    values, kernel = graph.transpose(values, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)
    rank = len(values.sizes) - 2
    if max(params["lhs_dilation"]) > 1 or min(min(pair) for pair in params["padding"]) < 0:
        config = [(0, 0, 0), (0, 0, 0)]
        config += [(*pair, spread - 1) for pair, spread in zip(params["padding"], params["lhs_dilation"], strict=True)]
        values, padding = pad_with_interior(graph, values, graph.scalar(0, computed), config), [(0, 0)] * rank
    else:
        padding = list(params["padding"])
    positions = [
        (values.sizes[2 + axis] + sum(padding[axis]) - (kernel.sizes[2 + axis] - 1) * dilation - 1) // stride + 1
        for axis, (stride, dilation) in enumerate(zip(params["window_strides"], params["rhs_dilation"], strict=True))
    ]
    result = graph.add(
        "Conv",
        [values, kernel],
        [values.sizes[0], kernel.sizes[0], *positions],
        computed,
        strides=list(params["window_strides"]),
        dilations=list(params["rhs_dilation"]),
        pads=[pair[0] for pair in padding] + [pair[1] for pair in padding],
        group=params["feature_group_count"],
    )
    order = np.argsort(numbers.out_spec).tolist()
    return [graph.cast(graph.transpose(result, order), dtype)]


# Pooling.


def _window_max(
    graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]
) -> list[Tensor]:
    (value,) = operands
    pooled = _pooling(graph, "MaxPool", value, params, shapes[0])
    low = -np.inf if value.dtype.kind == "f" else np.iinfo(np.int32).min
    return [_by_slices(graph, "Max", low, value, params) if pooled is None else pooled]


def _window_sum(
    graph: Graph, params: Params, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]
) -> list[Tensor]:
    (value,) = operands
    pooled = _pooling(graph, "AveragePool", value, params, shapes[0], count_include_pad=1)
    if pooled is None:
        return [_by_slices(graph, "Add", 0, value, params)]
    return [graph.binary("Mul", pooled, graph.scalar(math.prod(params["window_dimensions"]), value.dtype))]


def _window_min(graph: Graph, params: Params, operands: Sequence[Tensor], _: Any) -> list[Tensor]:
    high = np.inf if operands[0].dtype.kind == "f" else np.iinfo(np.int32).max
    return [_by_slices(graph, "Min", high, operands[0], params)]


def _pooling(
    graph: Graph, op: str, value: Tensor, params: Params, shape: Sequence[Any], **attributes: Any
) -> Tensor | None:
    """A window reduction as a pooling node, or None if such a node cannot compute it."""
    window, strides, padding = (params[name] for name in ("window_dimensions", "window_strides", "padding"))
    dilations = {*params["base_dilation"], *params["window_dilation"]}
    margins_fit = all(0 <= low < size and 0 <= high < size for (low, high), size in zip(padding, window, strict=True))
    others = [axis for axis in range(len(window)) if (window[axis], strides[axis], *padding[axis]) == (1, 1, 0, 0)]
    if dilations != {1} or not margins_fit or value.dtype != np.float32 or not 2 <= len(others) < len(window):
        return None
    inner = [axis for axis in range(len(window)) if axis not in (others[0], others[-1])]
    order = [others[0], others[-1], *inner]
    pooled = graph.add(
        op,
        [graph.transpose(value, order)],
        [shape[axis] for axis in order],
        value.dtype,
        kernel_shape=[window[axis] for axis in inner],
        strides=[strides[axis] for axis in inner],
        pads=[padding[axis][side] for side in (0, 1) for axis in inner],
        **attributes,
    )
    return graph.transpose(pooled, np.argsort(order).tolist())


def _by_slices(graph: Graph, op: str, neutral: float, value: Tensor, params: Params) -> Tensor:
    """A window reduction as a reduction of strided slices, one for each place in the window."""
    config = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(params["padding"], params["base_dilation"], strict=True)
    ]
    value = pad_with_interior(graph, value, graph.scalar(neutral, value.dtype), config)
    axes = [
        (axis, size, stride, dilation)
        for axis, (size, stride, dilation) in enumerate(
            zip(params["window_dimensions"], params["window_strides"], params["window_dilation"], strict=True)
        )
        if size > 1 or stride > 1
    ]
    result = None
    for places in itertools.product(*(range(size) for _, size, _, _ in axes)):
        part = value
        for place, (axis, size, stride, dilation) in zip(places, axes, strict=True):
            span = value.sizes[axis] - (size - 1) * dilation
            count = (span - 1) // stride + 1
            first = place * dilation
            part = graph.slice(part, axis, first, first + (count - 1) * stride + 1, stride)
        result = part if result is None else graph.binary(op, result, part)
    return value if result is None else result


RULES: dict[str, Rule] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _window_max,
    "reduce_window_sum": _window_sum,
    "reduce_window_min": _window_min,
}
