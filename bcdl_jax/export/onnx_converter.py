"""Converts the steps of a program to the nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bcdl_jax.export import onnx_elementwise, onnx_indexing, onnx_products, onnx_structure
from bcdl_jax.export.onnx_graph import Graph, Tensor, UnsupportedError
from bcdl_jax.export.onnx_loops import LOOPS
from bcdl_jax.graph.primitives import CUSTOM, MOVES, evaluate_elementwise, is_plain
from bcdl_jax.graph.program import Atom, Program, Step, is_expression, program_of, trace_fixed_sizes

_RULES = {**onnx_structure.RULES, **onnx_products.RULES, **onnx_indexing.RULES}
# Results of more elements than this are computed by the graph, not stored in the file, if they are larger than their operands.
_MOST_STORED = 2**20
# Operations whose results may leave the range of a small integer type.
_WRAPPING = frozenset(["add", "sub", "mul", "neg", "not", "convert_element_type", "integer_pow", "square"])

# Steps that the graph computes although their operands are known, so that the file holds the params as they are. Runtimes compute such
# steps once, when they load the file. Copies and reversed arrays are stored as such.
_KEEPING = (MOVES - {"copy", "rev"}) | {"convert_element_type"}

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
        for index, step in enumerate(self._program.steps):
            if index not in self._program.live_steps:
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
        if name in LOOPS:
            return LOOPS[name](graph, step, [self.whole(number) for number in step.inputs], shapes, convert_jaxpr)
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


def convert_jaxpr(graph: Graph, closed: Any, operands: Sequence[Value]) -> list[Value]:
    """Adds the nodes of a jaxpr to a graph. Returns its outputs: tensors, or known arrays."""
    program = program_of(closed)
    return Converter(program, graph, dict(zip(program.inputs, operands, strict=True))).run()
