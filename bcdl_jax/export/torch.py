"""Weights in the names and the layout of PyTorch.

PyTorch flattens images with the channels first, Flax with the channels last. The weight of a dense layer behind a flatten therefore needs
another order of its columns. ``_OrderTracker`` follows the flattened values through the network to find that order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from bcdl_jax._tree import PyTree, check_arrays, is_key
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.export.safetensors import numpy_arrays
from bcdl_jax.graph.products import PRODUCTS
from bcdl_jax.graph.program import Program, Step, data_dependent
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
# Primitives that only move the elements of their first operand. Any other operands are indices.
_MOVES = frozenset(["copy", "expand_dims", "gather", "reshape", "rev", "slice", "squeeze", "transpose"])


def torch_state_dict(apply: Callable[..., PyTree], params: PyTree, example_inputs: Any) -> dict[str, np.ndarray]:
    """The params of a network of Flax layers, as the same layers of PyTorch hold them.

    A kernel becomes a ``weight`` [out, in] or [out, in, *window]. The scale of a norm becomes a ``weight``, its averages become
    ``running_mean`` and ``running_var``. PyTorch has the channels first: if a dense layer reads flattened channels-last values, the columns
    of its weight are put into PyTorch's order. If it reads only some of these values, as a shrunk network may, the further array
    ``<layer>.input_indices`` lists them: ``linear(torch.flatten(x, 1)[:, input_indices])``. Arrays without elements are left out, such as
    those of a layer of which ``shrink`` left nothing.

    The params alone become arrays, not the constants that ``shrink`` put in place of removed channels. Where these are not 0, the PyTorch
    network must add them.

    Args:
      apply: The network, ``apply(params, *inputs)``, such as the small function from ``shrink``. It is traced to find the use of each kernel.
      params: The params of the network, arrays only. ``mean_weights`` makes them from posteriors or quantised layers.
      example_inputs: A tuple of inputs, or a single array. Images have the channels last.

    Returns:
      The arrays by name, for ``load_state_dict`` or ``export_safetensors``. A name is a path, joined by dots, without Flax's collection.

    Raises:
      ValueError: ``params`` holds a posterior or a quantised layer, a kernel is not used by a dense layer or an ordinary convolution, the
        order of values between a flatten and a dense layer cannot be followed, or two arrays get the same name.

    Warns:
      UserWarning: A layer is left out.
    """
    check_arrays(params)
    for node in jax.tree.leaves(params, is_leaf=is_layer):
        if is_layer(node):
            raise ValueError(f"params holds a {type(node).__name__}; it must hold arrays only, see mean_weights.")
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    program = trace(apply, params, *inputs)
    values = [
        np.asarray(value) if not is_key(value) else value
        for value in program.evaluate(*jax.tree.leaves((params, *inputs)))
    ]
    readers = _products_by_operand(program)
    order = _OrderTracker(program, values, len(jax.tree.leaves(params)))
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


def _products_by_operand(program: Program) -> dict[int, Step]:
    """The product that reads a value as its second operand, directly or converted to another type, by the number of the value."""
    readers: dict[int, Step] = {}
    for step in reversed(program.steps):
        if step.name in PRODUCTS:
            readers[step.inputs[1]] = step
        elif step.name in ("convert_element_type", "copy") and step.outputs[0] in readers:
            readers[step.inputs[0]] = readers[step.outputs[0]]
    return readers


def _torch_entries(path: str, array: np.ndarray, reader: Step | None, order: _OrderTracker) -> dict[str, np.ndarray]:
    """The entries of a PyTorch layer for one array of a Flax layer.

    Args:
      path: The path of the array.
      array: The array.
      reader: The product that reads the array as its second operand, or None.
      order: The tracker of the network.
    """
    name = path.split("/")[-1]
    if reader is not None and reader.name == "conv_general_dilated":
        return {"weight": _convolution_weight(reader, array, path)}
    if reader is not None and _is_dense(reader, array):
        weight = array.T if reader.params["dimension_numbers"][0][1] == (0,) else array
        return _with_channels_first(weight, order.flattening(reader.inputs[0], path))
    if name == "kernel" and array.ndim > 1:
        raise ValueError(
            f"{path} of shape {array.shape} has no PyTorch layout: it is not used directly as the kernel of a dense layer or a "
            "convolution."
        )
    return {_TORCH_NAMES.get(name, name): array}


def _is_dense(step: Step, kernel: np.ndarray) -> bool:
    (_, contracted), batch = step.params["dimension_numbers"]
    return kernel.ndim == 2 and len(contracted) == 1 and not any(batch)


def _convolution_weight(step: Step, kernel: np.ndarray, path: str) -> np.ndarray:
    if {*step.params["lhs_dilation"]} != {1}:
        raise ValueError(f"{path} belongs to a transposed convolution, which has no PyTorch layout here.")
    return kernel.transpose(step.params["dimension_numbers"].rhs_spec)


class _Flattening(NamedTuple):
    """The values of one example that a dense layer reads after a flatten.

    Attributes:
      places: The place of each input of the layer among the flattened values, [in].
      shape: The shape of the values before the flatten, [*window, channels].
    """

    places: np.ndarray
    shape: tuple[int, ...]


def _with_channels_first(weight: np.ndarray, flattening: _Flattening | None) -> dict[str, np.ndarray]:
    """The weight [out, in] of a dense layer in PyTorch's order of the inputs, and the places of the inputs if it does not read all."""
    if flattening is None:
        return {"weight": weight}
    places, shape = flattening
    *window, channel = np.unravel_index(places, shape)
    torch_places = np.ravel_multi_index((channel, *window), (shape[-1], *shape[:-1]))
    order = np.argsort(torch_places)
    entries = {"weight": weight[:, order]}
    if len(places) != np.prod(shape):
        entries["input_indices"] = torch_places[order].astype(np.int64)
    return entries


class _Source(NamedTuple):
    """The source of a value's elements.

    Attributes:
      origin: The number of the value from which elements were only moved, or changed one by one.
      places: The place of each element's source in an example of the origin.
    """

    origin: int
    places: np.ndarray


class _OrderTracker:
    """Follows the order of flattened values through a program.

    Args:
      program: The traced network.
      values: The values of the program, by number.
      num_params: The number of arrays of the params. They are the first inputs of the program.
    """

    def __init__(self, program: Program, values: list[Any], num_params: int) -> None:
        self._values = values
        self._producers = {output: step for step in program.steps for output in step.outputs}
        self._depends = data_dependent(program, num_params)
        self._sources: dict[int, _Source | None] = {}

    def flattening(self, number: int, path: str) -> _Flattening | None:
        """The flatten before a dense layer, or None if its inputs were not flattened.

        Args:
          number: The number of the value that the layer reads.
          path: The path of its kernel, for errors.

        Raises:
          ValueError: The inputs were flattened, but their order is lost.
        """
        source = self._source(number)
        if source is not None and not self._is_flattened(source):
            return None
        if source is None or self._values[number].ndim != 2:
            raise ValueError(
                f"The inputs of {path} were flattened and then mixed, scaled or rearranged, so their order in PyTorch cannot be found."
            )
        return _Flattening(source.places[0], self._values[source.origin].shape[1:])

    def _is_flattened(self, source: _Source) -> bool:
        """Whether the last axis runs over more than one position of channels-last values."""
        origin, places = source
        shape = self._values[origin].shape
        if len(shape) < 3 or places.ndim < 2 or not places.size:
            return False
        positions = (places // shape[-1]).reshape(-1, places.shape[-1])
        return bool((positions != positions[:, :1]).any())

    def _source(self, number: int) -> _Source | None:
        """The source of a value, or None if flattened values were mixed."""
        if number not in self._sources:
            self._sources[number] = self._find_source(number)
        return self._sources[number]

    def _find_source(self, number: int) -> _Source | None:
        value, step = self._values[number], self._producers.get(number)
        if step is None or value.ndim < 1:
            return self._new_source(number)
        operands = [operand for operand in step.inputs if operand in self._depends]
        if step.name in _MOVES and operands[:1] == [step.inputs[0]]:
            before = self._source(step.inputs[0])
            if before is None:
                return None
            others = (self._values[operand] for operand in step.inputs[1:])
            return _Source(before.origin, np.asarray(step.bind(before.places, *others)[0]))
        if step.name in PRODUCTS:  # The results of a product have a new order, also where it reads flattened values.
            return self._new_source(number)
        sources = [self._source(operand) for operand in operands]
        if not sources:
            return self._new_source(number)
        first = sources[0]
        if first is None:
            return None
        flattened = any(source is None or self._is_flattened(source) for source in sources)
        scaled = any(self._values[operand].size > 1 for operand in step.inputs if operand not in self._depends)
        same = all(
            source is not None and source.origin == first.origin and np.array_equal(source.places, first.places)
            for source in sources
        )
        if step.elementwise and same and not (flattened and scaled):
            return first
        return None if flattened else self._new_source(number)

    def _new_source(self, number: int) -> _Source:
        """The source of a value that is its own origin."""
        value = self._values[number]
        places = np.arange(value[:1].size, dtype=np.int32).reshape(1, *value.shape[1:])
        return _Source(number, np.broadcast_to(places, value.shape))
