"""Converts the steps of a program to the nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bcdl_jax.export import onnx_elementwise, onnx_indexing, onnx_products, onnx_structure
from bcdl_jax.export.onnx_graph import Graph, Tensor, UnsupportedError, onnx_type
from bcdl_jax.graph.primitives import CUSTOM, evaluate_elementwise, is_plain
from bcdl_jax.graph.program import Atom, Program, Step, is_expression, program_of, trace_fixed_sizes

_RULES = {**onnx_structure.RULES, **onnx_products.RULES, **onnx_indexing.RULES}
# Results of more elements than this are computed by the graph, not stored in the file, if they are larger than their operands.
_MOST_STORED = 2**20
# Operations whose results may leave the range of a small integer type.
_WRAPPING = frozenset(["add", "sub", "mul", "neg", "not", "convert_element_type", "integer_pow", "square"])

# Steps that the graph computes although their operands are known, so that the file holds the params as they are. Runtimes compute such
# steps once, when they load the file.
_KEEPING = frozenset(["broadcast_in_dim", "convert_element_type", "expand_dims", "reshape", "squeeze", "transpose"])

Value = Any  # A Tensor, or an array that is known at the time of the export.


class Converter:
    """Converts one program into one graph.

    Args:
      program: The program.
      graph: The graph.
      values: The inputs of the program, by number.
      names: The names of the known inputs, for the constants of the graph.
    """

    def __init__(
        self, program: Program, graph: Graph, values: Mapping[Atom, Value], names: Mapping[Atom, str] | None = None
    ) -> None:
        self._program, self._graph = program, graph
        self._values: dict[Atom, Value] = {**values, **program.constants}
        self._names = dict(names or {})
        for number, value in program.constants.items():
            if is_expression(value):
                self._values[number] = self._size(value, program.shapes[number].dtype)

    def _size(self, size: Any, dtype: Any) -> Tensor:
        """An expression of the batch size as a scalar tensor."""
        return self._graph.cast(self._graph.reshape(self._graph.size_vector([size]), []), self._graph.carrier(dtype))

    def run(self) -> list[Value]:
        """Converts all steps that the outputs depend on, and returns the outputs."""
        needed = _needed_steps(self._program)
        for index, step in enumerate(self._program.steps):
            if index not in needed:
                continue
            try:
                results = self._fold(step) if self._can_be_folded(step) else self._convert(step)
            except NestedError:
                raise
            except Exception as error:
                where = f" in {step.scope}" if step.scope else ""
                raise NestedError(
                    f"Step {index + 1} of {len(self._program.steps)}, the primitive {step.name}{where}, cannot be converted: {error}."
                ) from error
            self._values |= dict(zip(step.outputs, results, strict=True))
        return [self._values[number] for number in self._program.outputs]

    def tensor(self, number: Atom) -> Tensor:
        """The tensor of a value, which may be yet to be expanded."""
        value = self._values[number]
        if not isinstance(value, Tensor):
            if not is_plain(self._program.shapes[number].dtype):
                raise UnsupportedError("PRNG keys have no counterpart in ONNX")
            value = self._graph.constant(np.asarray(value, self._program.shapes[number].dtype), self._names.get(number))
            self._values[number] = value
        return value

    def whole(self, number: Atom) -> Tensor:
        """The tensor of a value in its full shape."""
        tensor = self._graph.whole(self.tensor(number), self._program.shapes[number].shape)
        self._values[number] = tensor
        return tensor

    # Steps whose results are known.

    def _can_be_folded(self, step: Step) -> bool:
        known = step.name != "dim_as_value" and not any(
            isinstance(self._values[number], Tensor) for number in step.inputs
        )
        shapes = [self._program.shapes[number].shape for number in step.outputs]
        if not known or any(not isinstance(size, int) for shape in shapes for size in shape):
            return False
        if step.name in _KEEPING and any(number in self._names for number in step.inputs):
            return False
        largest = max((int(np.prod(shape)) for shape in shapes), default=0)
        return largest <= max(_MOST_STORED, sum(int(np.size(self._values[number])) for number in step.inputs))

    def _fold(self, step: Step) -> list[Value]:
        results = step.bind_at_any_size(*(jnp.asarray(self._values[number]) for number in step.inputs))
        return [result if not is_plain(result.dtype) else np.asarray(result) for result in results]

    # Other steps.

    def _convert(self, step: Step) -> list[Value]:
        graph, name = self._graph, step.name
        shapes = [self._program.shapes[number].shape for number in step.outputs]
        if name in CUSTOM:
            return self._convert_custom(step)
        if name in ("scan", "while", "cond"):
            operands = [self.whole(number) for number in step.inputs]
            return {"scan": convert_scan, "while": convert_while, "cond": convert_cond}[name](
                graph, step, operands, shapes
            )
        if name == "dim_as_value":  # JAX reads a symbolic size as a number.
            return [self._size(step.params["dim"], self._program.shapes[step.outputs[0]].dtype)]
        if name == "broadcast_in_dim":
            return [onnx_structure.broadcast_in_dim(graph, step.params, self.tensor(step.inputs[0]), len(shapes[0]))]
        if name == "convert_element_type":
            return [self._convert_type(self.tensor(step.inputs[0]), step.params["new_dtype"])]
        if name in onnx_elementwise.RULES:
            result = onnx_elementwise.RULES[name](graph, step.params, [self.tensor(number) for number in step.inputs])
            dtype = self._program.shapes[step.outputs[0]].dtype
            result = self._wrapped(result, dtype) if name in _WRAPPING else result
            rank = len(shapes[0])
            return [
                result
                if len(result.sizes) == rank
                else graph.reshape(result, [1] * (rank - len(result.sizes)) + [*result.sizes])
            ]
        if name in _RULES:
            return list(_RULES[name](graph, step.params, [self.whole(number) for number in step.inputs], shapes))
        raise UnsupportedError("it has no counterpart in ONNX")

    def _convert_type(self, tensor: Tensor, dtype: Any) -> Tensor:
        carrier = self._graph.carrier(dtype)
        if np.dtype(dtype).name in ("bfloat16", "float16") and carrier != np.dtype(dtype):  # Rounded as in the network.
            tensor = self._graph.cast(tensor, dtype)
        if tensor.dtype.kind == "f" and carrier.kind == "i" and carrier != np.dtype(dtype):  # XLA clips.
            info = np.iinfo(dtype)
            low, high = (self._graph.scalar(bound, tensor.dtype) for bound in (info.min, info.max))
            tensor = self._graph.binary("Max", self._graph.binary("Min", tensor, high), low)
        return self._wrapped(self._graph.cast(tensor, carrier), dtype)

    def _wrapped(self, tensor: Tensor, dtype: Any) -> Tensor:
        """The tensor of a small integer type in the range of the type."""
        if np.dtype(dtype).kind not in "iu" or tensor.dtype == dtype:
            return tensor
        if np.dtype(dtype).name == "uint32":
            return self._graph.binary("BitwiseAnd", tensor, self._graph.scalar(2**32 - 1, np.int64))
        return self._graph.cast(self._graph.cast(tensor, dtype), tensor.dtype)

    def _convert_custom(self, step: Step) -> list[Value]:
        """A function with a custom derivative as its own steps."""
        inside = step.params["call_jaxpr"]
        operands = [self._values[number] for number in step.inputs]
        if not step.elementwise:
            return convert_jaxpr(self._graph, inside, operands)
        shape = self._program.shapes[step.outputs[0]].shape
        structs = [self._program.shapes[number] for number in step.inputs]
        program = trace_fixed_sizes(
            lambda *values: evaluate_elementwise(inside.jaxpr, inside.consts, values, shape), *structs
        )
        return Converter(program, self._graph, dict(zip(program.inputs, operands, strict=True))).run()


class NestedError(NotImplementedError):
    """An error that names its step."""


def _needed_steps(program: Program) -> set[int]:
    """The steps that the outputs depend on."""
    live, needed = set(program.outputs), set()
    for index, step in reversed(list(enumerate(program.steps))):
        if live.intersection(step.outputs):
            needed.add(index)
            live.update(step.inputs)
    return needed


def convert_jaxpr(graph: Graph, closed: Any, operands: Sequence[Value]) -> list[Value]:
    """Adds the nodes of a jaxpr to a graph. Returns its outputs: tensors, or known arrays."""
    program = program_of(closed)
    return Converter(program, graph, dict(zip(program.inputs, operands, strict=True))).run()


def _whole_outputs(graph: Graph, closed: Any, operands: Sequence[Value]) -> list[Tensor]:
    """Like ``convert_jaxpr``, with tensors of their full shapes that nodes of this graph compute."""
    outputs = []
    for value, aval in zip(convert_jaxpr(graph, closed, operands), closed.out_avals, strict=True):
        tensor = value if isinstance(value, Tensor) else graph.constant(np.asarray(value, aval.dtype))
        whole = graph.whole(tensor, aval.shape)
        outputs.append(graph.add("Identity", [whole], aval.shape, whole.dtype))
    return outputs


# Loops and branches. Their bodies read constants and the tensors around them by name.


def convert_scan(graph: Graph, step: Step, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    """A ``lax.scan`` as a Scan node."""
    params, closed = step.params, step.params["jaxpr"]
    consts, carry = params["num_consts"], params["num_carry"]
    scanned = list(operands[consts + carry :])
    if not scanned:  # A Scan node needs an array to run along.
        scanned = [graph.constant(np.zeros(params["length"], np.int32))]
    body = Graph(graph.floats_in_float32, outer=graph)
    states = [_body_input(body, operand.sizes, operand.dtype) for operand in operands[consts : consts + carry]]
    parts = [_body_input(body, operand.sizes[1:], operand.dtype) for operand in scanned]
    taken = parts if len(operands) > consts + carry else []
    outputs = _whole_outputs(body, closed, [*operands[:consts], *states, *taken])
    direction = int(params["reverse"])
    inputs = [*operands[consts : consts + carry], *scanned]
    results = [(shape, output.dtype) for shape, output in zip(shapes, outputs, strict=True)]
    if not results:
        return []
    return graph.add_many(
        "Scan",
        inputs,
        results,
        body=_body_graph(body, [*states, *parts], outputs),
        num_scan_inputs=len(scanned),
        scan_input_directions=[direction] * len(scanned),
        **({"scan_output_directions": [direction] * (len(outputs) - carry)} if len(outputs) > carry else {}),
    )


def convert_while(
    graph: Graph, step: Step, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]
) -> list[Tensor]:
    """A ``lax.while_loop`` as a Loop node."""
    params = step.params
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    first = cond_consts + body_consts
    start = list(operands[first:])
    (go_on,) = _whole_outputs(graph, params["cond_jaxpr"], [*operands[:cond_consts], *start])
    body = Graph(graph.floats_in_float32, outer=graph)
    count, flag = _body_input(body, (), np.int64), _body_input(body, (), bool)
    states = [_body_input(body, operand.sizes, operand.dtype) for operand in start]
    outputs = _whole_outputs(body, params["body_jaxpr"], [*operands[cond_consts:first], *states])
    (next_flag,) = _whole_outputs(body, params["cond_jaxpr"], [*operands[:cond_consts], *outputs])
    results = [(shape, output.dtype) for shape, output in zip(shapes, outputs, strict=True)]
    return graph.add_many(
        "Loop", [None, go_on, *start], results, body=_body_graph(body, [count, flag, *states], [next_flag, *outputs])
    )


def convert_cond(graph: Graph, step: Step, operands: Sequence[Tensor], shapes: Sequence[Sequence[Any]]) -> list[Tensor]:
    """A ``lax.cond`` or ``lax.switch`` as nested If nodes."""
    which, *arguments = operands
    return _branch(graph, which, step.params["branches"], arguments, shapes)


def _branch(
    graph: Graph, which: Tensor, branches: Sequence[Any], arguments: Sequence[Tensor], shapes: Sequence[Sequence[Any]]
) -> list[Tensor]:
    if len(branches) == 1:
        return _whole_outputs(graph, branches[0], arguments)
    numbers = graph.cast(which, np.int32)
    is_last = graph.binary("GreaterOrEqual", numbers, graph.scalar(len(branches) - 1, np.int32), bool)
    bodies, outputs = [], []
    for taken in (branches[-1:], branches[:-1]):
        body = Graph(graph.floats_in_float32, outer=graph)
        outputs = _branch(body, numbers, taken, arguments, shapes)
        bodies.append(_body_graph(body, [], outputs))
    results = [(shape, output.dtype) for shape, output in zip(shapes, outputs, strict=True)]
    return graph.add_many("If", [is_last], results, then_branch=bodies[0], else_branch=bodies[1])


def _body_input(body: Graph, sizes: Sequence[Any], dtype: Any) -> Tensor:
    return Tensor(body.new_name("value"), tuple(sizes), np.dtype(dtype))


def _body_graph(body: Graph, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
    from onnx import helper

    entries = [[describe(each) for each in part] for part in (inputs, outputs)]
    return helper.make_graph(body.nodes, body.new_name("body"), entries[0], entries[1])


def describe(tensor: Tensor) -> Any:
    """The entry of an input or output of a graph: name, type and shape."""
    from onnx import helper

    shape = [size if isinstance(size, int) else str(size).replace(" ", "") for size in tensor.sizes]
    return helper.make_tensor_value_info(tensor.name, onnx_type(tensor.dtype), shape)
