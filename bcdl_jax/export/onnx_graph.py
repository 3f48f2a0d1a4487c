"""An ONNX graph under construction: tensors for the values of a program, and the nodes that compute them.

A value of a narrow type is computed in a wider one, since onnxruntime has few kernels for narrow types: bfloat16 in float32, small integers
in int32. The *carrier* of a type is the type of its tensors in the graph.

Broadcasting is lazy: a tensor may have size 1 along an axis where the value has more. Elementwise nodes broadcast their operands anyway;
``Graph.whole`` expands a tensor where another node needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bcdl_jax.export.symbolic_batch import size_at

_FLOAT32, _INT32, _INT64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
_CARRIERS: dict[str, np.dtype] = {
    "bfloat16": _FLOAT32,
    "float32": _FLOAT32,
    **dict.fromkeys(("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"), _INT32),
    **dict.fromkeys(("uint32", "int64"), _INT64),
    "bool": np.dtype(bool),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
# The names under which onnx.TensorProto knows types whose NumPy names differ.
_ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}
OPSET, IR_VERSION = 18, 9


class UnsupportedError(NotImplementedError):
    """A step that has no counterpart in ONNX."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the graph.

    Attributes:
      name: The name of the tensor.
      sizes: The size of each axis: that of the value, or 1 where the tensor is yet to be expanded.
      dtype: The type of the tensor.
    """

    name: str
    sizes: tuple[Any, ...]
    dtype: np.dtype


class Graph:
    """The nodes and the constants of a graph, or of the body of a loop.

    Args:
      floats_in_float32: True to compute float16 and float64 in float32, between casts.
      outer: The graph around the body of a loop.
    """

    def __init__(self, floats_in_float32: bool = False, outer: Graph | None = None) -> None:
        self.floats_in_float32 = floats_in_float32
        self.nodes: list[Any] = []
        self._outer = outer
        self._root: Graph = self if outer is None else outer._root
        if outer is None:
            self.initializers: dict[str, Any] = {}
            self._count = 0
            self.batch: Tensor | None = None  # The batch size, a vector of one int64.

    def carrier(self, dtype: Any) -> np.dtype:
        """The type of the tensors of a value. Raises UnsupportedError if there is none."""
        name = np.dtype(dtype).name if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else str(dtype)
        if self.floats_in_float32 and name in ("float16", "float64"):
            return _FLOAT32
        if name not in _CARRIERS:
            raise UnsupportedError(f"values of type {name} have no counterpart in ONNX")
        return _CARRIERS[name]

    # Nodes.

    def add(
        self, op: str, inputs: Sequence[Tensor | None], sizes: Sequence[Any], dtype: Any, **attributes: Any
    ) -> Tensor:
        """Adds a node of one output."""
        return self.add_many(op, inputs, [(sizes, dtype)], **attributes)[0]

    def add_many(
        self, op: str, inputs: Sequence[Tensor | None], outputs: Sequence[tuple[Sequence[Any], Any]], **attributes: Any
    ) -> list[Tensor]:
        """Adds a node. The outputs are pairs of sizes and types."""
        from onnx import helper

        results = [Tensor(self.new_name(op), tuple(sizes), np.dtype(dtype)) for sizes, dtype in outputs]
        names = ["" if tensor is None else tensor.name for tensor in inputs]
        self.nodes.append(helper.make_node(op, names, [each.name for each in results], results[0].name, **attributes))
        return results

    def new_name(self, kind: str) -> str:
        """A name that no other tensor of the graph has."""
        self._root._count += 1
        return f"{kind}_{self._root._count}"

    def constant(self, array: Any, name: str | None = None) -> Tensor:
        """A constant. An array of bfloat16 is stored as such and cast; every other array is stored in its carrier."""
        from onnx import numpy_helper

        array = np.asarray(array)
        wide = array if array.dtype.name == "bfloat16" else array.astype(self.carrier(array.dtype))
        label = name or self.new_name("constant")
        while label in self._root.initializers:
            label = self.new_name(label)
        self._root.initializers[label] = numpy_helper.from_array(np.ascontiguousarray(wide).reshape(wide.shape), label)
        return self.cast(Tensor(label, array.shape, wide.dtype), self.carrier(array.dtype))

    def integers(self, values: Sequence[int]) -> Tensor:
        """A constant vector of int64, such as axes or sizes."""
        return self.constant(np.array(values, np.int64).reshape(-1))

    def scalar(self, value: Any, dtype: Any) -> Tensor:
        """A constant scalar of a carrier type."""
        return self.constant(np.asarray(value, dtype))

    def cast(self, tensor: Tensor, dtype: Any) -> Tensor:
        """The tensor in another type."""
        dtype = np.dtype(dtype)
        return tensor if tensor.dtype == dtype else self.add("Cast", [tensor], tensor.sizes, dtype, to=onnx_type(dtype))

    # Sizes.

    def size_vector(self, sizes: Sequence[Any]) -> Tensor:
        """Sizes as a vector of int64, computed from the batch size where they depend on it."""
        if all(isinstance(size, int) for size in sizes):
            return self.integers(sizes)
        parts = [self.integers([size]) if isinstance(size, int) else self._size(size) for size in sizes]
        return parts[0] if len(parts) == 1 else self.add("Concat", parts, (len(parts),), _INT64, axis=0)

    def _size(self, size: Any) -> Tensor:
        """A size that is linear in the batch size, as a vector of one number."""
        if self._root.batch is None:
            raise UnsupportedError("the size of an array depends on the batch size, and no input has a batch axis")
        slope, start = linear_size(size)
        result = self._root.batch
        if slope != 1:
            result = self.add("Mul", [result, self.integers([slope])], (1,), _INT64)
        return result if not start else self.add("Add", [result, self.integers([start])], (1,), _INT64)

    def reshape(self, tensor: Tensor, sizes: Sequence[Any]) -> Tensor:
        """The tensor, which must be whole, in another shape."""
        if tuple(sizes) == tensor.sizes:
            return tensor
        symbolic = [axis for axis, size in enumerate(sizes) if not isinstance(size, int)]
        if len(symbolic) == 1 and 0 not in sizes:
            vector = self.integers([-1 if axis in symbolic else size for axis, size in enumerate(sizes)])
        else:
            vector = self.size_vector(sizes)
        return self.add("Reshape", [tensor, vector], sizes, tensor.dtype, allowzero=int(0 in sizes))

    def whole(self, tensor: Tensor, sizes: Sequence[Any]) -> Tensor:
        """The tensor with all axes expanded to the given sizes."""
        if tensor.sizes == tuple(sizes):
            return tensor
        # A size of 1 leaves an axis as it is.
        wanted = [1 if mine == full else full for mine, full in zip(tensor.sizes, sizes, strict=True)]
        return self.add("Expand", [tensor, self.size_vector(wanted)], sizes, tensor.dtype)

    def transpose(self, tensor: Tensor, order: Sequence[int]) -> Tensor:
        """The tensor with its axes in another order."""
        if list(order) == list(range(len(tensor.sizes))):
            return tensor
        sizes = [tensor.sizes[axis] for axis in order]
        return self.add("Transpose", [tensor], sizes, tensor.dtype, perm=list(order))

    def slice(self, tensor: Tensor, axis: int, start: Any, stop: Any, step: int = 1) -> Tensor:
        """A slice along one axis."""
        size = tensor.sizes[axis]
        if isinstance(start, int) and (start, step) == (0, 1) and stop == size:
            return tensor
        count = -(-(stop - start) // step) if step != 1 else stop - start
        sizes = [*tensor.sizes[:axis], count, *tensor.sizes[axis + 1 :]]
        bounds = [self.size_vector([start]), self.size_vector([stop]), self.integers([axis]), self.integers([step])]
        return self.add("Slice", [tensor, *bounds], sizes, tensor.dtype)

    def concatenate(self, tensors: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors one after the other along an axis."""
        tensors = [each for each in tensors if each.sizes[axis] != 0] or list(tensors[:1])
        if len(tensors) == 1:
            return tensors[0]
        total = sum((each.sizes[axis] for each in tensors[1:]), start=tensors[0].sizes[axis])
        sizes = [*tensors[0].sizes[:axis], total, *tensors[0].sizes[axis + 1 :]]
        return self.add("Concat", tensors, sizes, tensors[0].dtype, axis=axis)

    def pad(self, tensor: Tensor, low: Sequence[int], high: Sequence[int], value: Tensor | None = None) -> Tensor:
        """The tensor with margins, which must not be negative."""
        if not any(low) and not any(high):
            return tensor
        value = self.scalar(0, tensor.dtype) if value is None else value
        sizes = [size + before + after for size, before, after in zip(tensor.sizes, low, high, strict=True)]
        return self.add("Pad", [tensor, self.integers([*low, *high]), value], sizes, tensor.dtype)

    def binary(self, op: str, first: Tensor, second: Tensor, dtype: Any = None) -> Tensor:
        """An elementwise node of two operands, which are broadcast against each other."""
        return self.add(op, [first, second], broadcast(first.sizes, second.sizes), dtype or first.dtype)

    def unary(self, op: str, operand: Tensor, dtype: Any = None, **attributes: Any) -> Tensor:
        """An elementwise node of one operand."""
        return self.add(op, [operand], operand.sizes, dtype or operand.dtype, **attributes)


def onnx_type(dtype: Any) -> int:
    """The number of a type in ONNX."""
    from onnx import TensorProto

    name = np.dtype(dtype).name
    return int(getattr(TensorProto, _ONNX_NAMES.get(name, name.upper())))


def describe(tensor: Tensor) -> Any:
    """The entry of an input or output of a graph: name, type and shape."""
    from onnx import helper

    shape = [size if isinstance(size, int) else str(size).replace(" ", "") for size in tensor.sizes]
    return helper.make_tensor_value_info(tensor.name, onnx_type(tensor.dtype), shape)


def broadcast(*shapes: Sequence[Any]) -> tuple[Any, ...]:
    """The common shape of tensors that are broadcast against each other."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(
        next((size for size in sizes if not (isinstance(size, int) and size == 1)), 1) for sizes in zip(*padded)
    )


def linear_size(size: Any) -> tuple[int, int]:
    """The slope and the value at 0 of a size that is linear in the batch size. Raises UnsupportedError for another size."""
    slope = size_at(size, 3) - size_at(size, 2)
    start = size_at(size, 2) - 2 * slope
    if any(size_at(size, batch) != slope * batch + start for batch in (1, 7, 1000)):
        raise UnsupportedError(f"the size {size} of an array is not linear in the batch size")
    return slope, start
