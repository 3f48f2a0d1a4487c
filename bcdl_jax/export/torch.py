"""Weights in the names and the layout of PyTorch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bcdl_jax._tree import PyTree, check_arrays, is_key
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.export.safetensors import numpy_arrays
from bcdl_jax.export.torch_order import MOVES_OF_FIRST, Flattening, OrderTracker
from bcdl_jax.graph.example_inputs import as_inputs
from bcdl_jax.graph.products import PRODUCTS
from bcdl_jax.graph.program import Atom, Program, Step, data_dependent
from bcdl_jax.graph.tracing import trace

# The collections of Flax's variables are no part of PyTorch's names.
_COLLECTIONS = ("params", "batch_stats")
_TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_state_dict(apply: Callable[..., PyTree], params: PyTree, example_inputs: Any) -> dict[str, np.ndarray]:
    """The params of a network of Flax layers, as the same layers of PyTorch hold them.

    A kernel becomes a ``weight`` [out, in] or [out, in, *window]. If a layer has several axes of inputs or outputs, such as attention heads,
    they become one. If the network transposes or masks a kernel, the weight is the result. The scale of a norm becomes a ``weight``, its
    averages become ``running_mean`` and ``running_var``. A transposed convolution with strides of 1 is an ordinary convolution. Arrays
    without elements are left out, such as those of a layer of which ``shrink`` left nothing.

    PyTorch has the channels of images first: if a dense layer reads a flattened image, the columns of its weight are put into PyTorch's order.
    Channels that the network rearranges in front of a convolution keep their order. If a layer reads only some of the flattened values, as in
    a shrunk network, the further array ``<layer>.input_indices`` lists them: ``linear(torch.flatten(x, 1)[:, input_indices])``.

    The groups of a grouped convolution have equal sizes. In a shrunk network, its weight may therefore have outputs that fill up a group, and
    that the bias does not have.

    The params alone become arrays, not the constants that ``shrink`` put in place of removed channels. Where these are not 0, the PyTorch
    network must add them.

    Args:
      apply: The network, ``apply(params, *inputs)``, such as the small function from ``shrink``. It is traced to find the use of each kernel.
      params: The params of the network, arrays only. ``mean_weights`` makes them from posteriors or quantised layers.
      example_inputs: A tuple of inputs, or a single array. Inputs of four or more axes are images and have the channels last.

    Returns:
      The arrays by name, for ``load_state_dict`` or ``export_safetensors``. A name is a path, joined by dots, without Flax's collection.

    Raises:
      ValueError: ``params`` holds a posterior or a quantised layer, a kernel is used neither by a dense layer nor by an ordinary convolution, the
        order of values between a flatten and a dense layer cannot be followed, or two arrays get the same name.

    Warns:
      UserWarning: A layer is left out.
    """
    check_arrays(params)
    for node in jax.tree.leaves(params, is_leaf=is_layer):
        if is_layer(node):
            raise ValueError(f"params holds a {type(node).__name__}; it must hold arrays only, see mean_weights.")
    inputs = as_inputs(example_inputs)
    program = trace(apply, params, *inputs)
    values = [
        np.asarray(value) if not is_key(value) else value
        for value in program.evaluate(*jax.tree.leaves((params, *inputs)))
    ]
    num_params = len(jax.tree.leaves(params))
    readers = _readers(program, values, num_params)
    order = OrderTracker(program, values, num_params)
    state: dict[str, np.ndarray] = {}
    arrays = numpy_arrays(params, "/")
    for number, (path, array) in zip(program.inputs, arrays.items(), strict=False):
        if not array.size:
            continue
        *parents, _ = path.split("/")
        if parents and parents[0] in _COLLECTIONS:
            del parents[0]
        for entry, value in _torch_entries(path, array, readers.get(number), order).items():
            name = ".".join([*parents, entry])
            if name in state:
                raise ValueError(f"{path} and another array would both be called {name}.")
            state[name] = np.array(value, order="C")
    if empty := _names_of_empty(arrays):
        warnings.warn(f"The state dict leaves out {', '.join(empty)}, of which no elements are left.", stacklevel=2)
    return state


def _names_of_empty(arrays: dict[str, np.ndarray]) -> list[str]:
    """The layers whose arrays have no elements, and such arrays of other layers."""
    layers = {path: path.rpartition("/")[0] or path for path in arrays}
    with_elements = {layers[path] for path, array in arrays.items() if array.size}
    empty = [path for path, array in arrays.items() if not array.size]
    return list(dict.fromkeys(path if layers[path] in with_elements else layers[path] for path in empty))


class _Reader(NamedTuple):
    """The product that reads a param.

    Attributes:
      step: The product.
      side: The operand that is the param: 1, or 0 in a matrix product.
      kernel: The param in the form in which the product reads it, such as its transpose. It keeps its type if the network casts it.
    """

    step: Step
    side: int
    kernel: np.ndarray

    @property
    def data(self) -> Atom:
        """The number of the other operand."""
        return self.step.inputs[1 - self.side]

    @property
    def axes(self) -> tuple[list[int], list[int]]:
        """The contracted axes of the data, in ascending order, and those of the kernel in the same order. For matrix products."""
        contracted = self.step.params["dimension_numbers"][0]
        pairs = sorted(zip(contracted[1 - self.side], contracted[self.side], strict=True))
        return [data for data, _ in pairs], [kernel for _, kernel in pairs]


def _readers(program: Program, values: Sequence[Any], num_params: int) -> dict[int, _Reader]:
    """The first product that reads each param, by the number of the param."""
    depends = data_dependent(program, num_params)
    # The params, and the values that are computed from one param and constants alone: the number of the param, and the value.
    forms: dict[int, tuple[int, Any]] = {number: (number, values[number]) for number in program.inputs[:num_params]}
    mixed = set[int]()  # Values that are computed from more than one param.
    readers: dict[int, _Reader] = {}
    for step in program.steps:
        if step.name in PRODUCTS and depends.intersection(step.inputs):
            for side in (1, 0) if step.name == "dot_general" else (1,):
                if step.inputs[side] in forms:
                    param, form = forms[step.inputs[side]]
                    readers.setdefault(param, _Reader(step, side, form))
        origins = {forms[number][0] for number in step.inputs if number in forms}
        if depends.intersection(step.inputs):
            continue
        if len(origins) > 1 or mixed.intersection(step.inputs):
            mixed.update(step.outputs)
        elif origins:
            (param,) = origins
            form = forms[step.inputs[0]][1] if len(step.inputs) == 1 else None
            for number in step.outputs:
                forms[number] = (param, values[number] if form is None else _moved(step, form, values[number]))
    return readers


def _moved(step: Step, form: np.ndarray, result: np.ndarray) -> np.ndarray:
    """The result of a step that reads a param alone, in the type of the param if the step only moves or casts elements."""
    if step.name == "convert_element_type":
        return form
    return np.asarray(step.bind(form)[0]) if step.name in MOVES_OF_FIRST else result


def _torch_entries(path: str, array: np.ndarray, reader: _Reader | None, order: OrderTracker) -> dict[str, np.ndarray]:
    """The entries of a PyTorch layer for one array of a Flax layer.

    Args:
      path: The path of the array.
      array: The array.
      reader: The product that reads the array, or None.
      order: The tracker of the network.
    """
    name = path.split("/")[-1]
    torch_name = _TORCH_NAMES.get(name, name)
    if reader is not None and reader.step.name == "conv_general_dilated":
        return {torch_name: _convolution_weight(reader, path)}
    if reader is not None and not any(reader.step.params["dimension_numbers"][1]):
        flattening = order.flattening(reader.data, reader.axes[0], path)
        return _with_channels_first(torch_name, _dense_weight(reader), flattening)
    if name == "kernel" and array.ndim > 1:
        raise ValueError(
            f"{path} of shape {array.shape} has no PyTorch layout: it is not used as the kernel of a dense layer or a convolution."
        )
    return {torch_name: array.reshape(-1) if name == "bias" else array}


def _dense_weight(reader: _Reader) -> np.ndarray:
    """The weight [out, in] of a dense layer. Several input or output axes become one."""
    _, contracted = reader.axes
    rest = [axis for axis in range(reader.kernel.ndim) if axis not in contracted]
    weight = reader.kernel.transpose(*rest, *contracted)
    return weight.reshape(math.prod(weight.shape[: len(rest)]), -1)


def _convolution_weight(reader: _Reader, path: str) -> np.ndarray:
    if {*reader.step.params["lhs_dilation"]} != {1}:
        raise ValueError(f"{path} belongs to a transposed convolution, which has no PyTorch layout here.")
    return reader.kernel.transpose(reader.step.params["dimension_numbers"].rhs_spec)


def _with_channels_first(name: str, weight: np.ndarray, flattening: Flattening | None) -> dict[str, np.ndarray]:
    """The weight [out, in] of a dense layer in PyTorch's order of the inputs, and the places of the inputs if it does not read all."""
    if flattening is None:
        return {name: weight}
    places = np.ravel_multi_index(flattening.indices, flattening.sizes)
    order = np.argsort(places)
    entries = {name: weight[:, order]}
    if len(places) != math.prod(flattening.sizes):
        entries["input_indices"] = places[order].astype(np.int64)
    return entries
