"""Loops and branches as ONNX nodes. Their bodies read constants and the tensors around them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bcdl_jax.export.onnx_graph import Graph, Tensor, describe
from bcdl_jax.graph.loops import split_operands
from bcdl_jax.graph.program import Step

# ``convert_jaxpr``, which adds the nodes of a jaxpr to a graph and returns its outputs: tensors, or known arrays.
Convert = Callable[[Graph, Any, Sequence[Tensor]], list[Any]]
Shapes = Sequence[Sequence[Any]]


def _scan(graph: Graph, step: Step, operands: Sequence[Tensor], shapes: Shapes, convert: Convert) -> list[Tensor]:
    """A ``lax.scan`` as a Scan node."""
    constants, carried, stacks = (operands[part] for part in split_operands(step))
    # A Scan node needs an array to run along.
    scanned = stacks or [graph.constant(np.zeros(step.params["length"], np.int32))]
    body = Graph(graph.floats_in_float32, outer=graph)
    states = [_body_input(body, operand.sizes, operand.dtype) for operand in carried]
    slices = [_body_input(body, operand.sizes[1:], operand.dtype) for operand in scanned]
    read = slices if stacks else []
    outputs = _whole_outputs(body, step.params["jaxpr"], [*constants, *states, *read], convert)
    direction = int(step.params["reverse"])
    results = [(shape, output.dtype) for shape, output in zip(shapes, outputs, strict=True)]
    if not results:
        return []
    stacked = len(outputs) - len(carried)
    return graph.add_many(
        "Scan",
        [*carried, *scanned],
        results,
        body=_body_graph(body, [*states, *slices], outputs),
        num_scan_inputs=len(scanned),
        scan_input_directions=[direction] * len(scanned),
        **({"scan_output_directions": [direction] * stacked} if stacked else {}),
    )


def _while(graph: Graph, step: Step, operands: Sequence[Tensor], shapes: Shapes, convert: Convert) -> list[Tensor]:
    """A ``lax.while_loop`` as a Loop node."""
    constants, carried, _ = split_operands(step)
    for_condition, for_body, start = operands[: constants.start], operands[constants], operands[carried]
    condition = step.params["cond_jaxpr"]
    (go_on,) = _whole_outputs(graph, condition, [*for_condition, *start], convert)
    body = Graph(graph.floats_in_float32, outer=graph)
    count, flag = _body_input(body, (), np.int64), _body_input(body, (), bool)
    states = [_body_input(body, operand.sizes, operand.dtype) for operand in start]
    outputs = _whole_outputs(body, step.params["body_jaxpr"], [*for_body, *states], convert)
    (next_flag,) = _whole_outputs(body, condition, [*for_condition, *outputs], convert)
    results = [(shape, output.dtype) for shape, output in zip(shapes, outputs, strict=True)]
    return graph.add_many(
        "Loop", [None, go_on, *start], results, body=_body_graph(body, [count, flag, *states], [next_flag, *outputs])
    )


def _cond(graph: Graph, step: Step, operands: Sequence[Tensor], shapes: Shapes, convert: Convert) -> list[Tensor]:
    """A ``lax.cond`` or ``lax.switch`` as nested If nodes."""
    which, *arguments = operands
    return _branch(graph, which, step.params["branches"], arguments, shapes, convert)


LOOPS: dict[str, Callable[[Graph, Step, Sequence[Tensor], Shapes, Convert], list[Tensor]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _branch(
    graph: Graph, which: Tensor, branches: Sequence[Any], arguments: Sequence[Tensor], shapes: Shapes, convert: Convert
) -> list[Tensor]:
    if len(branches) == 1:
        return _whole_outputs(graph, branches[0], arguments, convert)
    numbers = graph.cast(which, np.int32)
    is_last = graph.binary("GreaterOrEqual", numbers, graph.scalar(len(branches) - 1, np.int32), bool)
    bodies, outputs = [], []
    for taken in (branches[-1:], branches[:-1]):
        body = Graph(graph.floats_in_float32, outer=graph)
        outputs = _branch(body, numbers, taken, arguments, shapes, convert)
        bodies.append(_body_graph(body, [], outputs))
    results = [(shape, output.dtype) for shape, output in zip(shapes, outputs, strict=True)]
    return graph.add_many("If", [is_last], results, then_branch=bodies[0], else_branch=bodies[1])


def _whole_outputs(graph: Graph, closed: Any, operands: Sequence[Tensor], convert: Convert) -> list[Tensor]:
    """The outputs of a jaxpr as tensors of their full shapes that nodes of this graph compute."""
    outputs = []
    for value, aval in zip(convert(graph, closed, operands), closed.out_avals, strict=True):
        tensor = value if isinstance(value, Tensor) else graph.constant(np.asarray(value, aval.dtype))
        whole = graph.whole(tensor, aval.shape)
        outputs.append(graph.add("Identity", [whole], aval.shape, whole.dtype))
    return outputs


def _body_input(body: Graph, sizes: Sequence[Any], dtype: Any) -> Tensor:
    return Tensor(body.new_name("value"), tuple(sizes), np.dtype(dtype))


def _body_graph(body: Graph, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
    from onnx import helper

    entries = [[describe(each) for each in part] for part in (inputs, outputs)]
    return helper.make_graph(body.nodes, body.new_name("body"), entries[0], entries[1])
