"""Weights in the names and the layout of PyTorch.

PyTorch flattens images with the channels first, Flax with the channels last. The weight of a dense layer behind a flatten therefore needs
another order of its columns. ``_OrderTracker`` follows the flattened values through the network to find that order. Values that are no
images, such as attention heads, have the same order in both.
"""

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
_MOVES = frozenset(
    ["broadcast_in_dim", "copy", "expand_dims", "gather", "reshape", "rev", "slice", "squeeze", "transpose"]
)


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
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    program = trace(apply, params, *inputs)
    values = [
        np.asarray(value) if not is_key(value) else value
        for value in program.evaluate(*jax.tree.leaves((params, *inputs)))
    ]
    num_params = len(jax.tree.leaves(params))
    readers = _readers(program, values, num_params)
    order = _OrderTracker(program, values, num_params)
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
    return np.asarray(step.bind(form)[0]) if step.name in _MOVES else result


def _torch_entries(path: str, array: np.ndarray, reader: _Reader | None, order: _OrderTracker) -> dict[str, np.ndarray]:
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
        return _with_channels_first(torch_name, _dense_weight(reader), order.flattening(reader, path))
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


class _Flattening(NamedTuple):
    """The values that a dense layer of PyTorch reads after a flatten.

    Attributes:
      indices: The index of each input along each axis that PyTorch flattens, [in].
      sizes: The sizes of these axes.
    """

    indices: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]


def _with_channels_first(name: str, weight: np.ndarray, flattening: _Flattening | None) -> dict[str, np.ndarray]:
    """The weight [out, in] of a dense layer in PyTorch's order of the inputs, and the places of the inputs if it does not read all."""
    if flattening is None:
        return {name: weight}
    places = np.ravel_multi_index(flattening.indices, flattening.sizes)
    order = np.argsort(places)
    entries = {name: weight[:, order]}
    if len(places) != math.prod(flattening.sizes):
        entries["input_indices"] = places[order].astype(np.int64)
    return entries


class _Layout(NamedTuple):
    """The places of a value's elements in the value from which they came.

    Attributes:
      shape: The shape of that value for one example. If it is an image, this is [*window, channels].
      places: The place of each element in the flattened example of that value, in the shape of the value.
      is_image: True if the channels of that value are last here, and first in PyTorch.
    """

    shape: tuple[int, ...]
    places: np.ndarray
    is_image: bool

    def coordinates(self, axes: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The index along each axis of ``shape``, [rows, places along the given axes of the value]."""
        rows = np.moveaxis(self.places, axes, range(-len(axes), 0))
        return np.unravel_index(rows.reshape(-1, math.prod(rows.shape[rows.ndim - len(axes) :])), self.shape)

    def axes_along(self, axes: Sequence[int]) -> list[int]:
        """The axes of ``shape`` over which the given axes of the value run."""
        if not self.places.size or not self.shape:
            return []
        return [number for number, places in enumerate(self.coordinates(axes)) if (places != places[:, :1]).any()]

    def is_flattened_image_along(self, axes: Sequence[int]) -> bool:
        """Whether the given axes run over channels and positions."""
        along = self.axes_along(axes) if self.is_image else []
        return len(along) > 1 and along[-1] == len(self.shape) - 1

    @property
    def is_flattened_image(self) -> bool:
        """Whether the last axis runs over channels and positions."""
        return self.is_flattened_image_along([-1])

    @property
    def repeats(self) -> bool:
        """Whether an element came to more than one place of an example."""
        example = self.places[:1]
        return len(np.unique(example)) < example.size


class _OrderTracker:
    """Follows the order of flattened values through a program.

    Args:
      program: The traced network.
      values: The values of the program, by number.
      num_params: The number of arrays of the params. They are the first inputs of the program.
    """

    def __init__(self, program: Program, values: Sequence[Any], num_params: int) -> None:
        self._values = values
        self._producers = {output: step for step in program.steps for output in step.outputs}
        self._depends = data_dependent(program, num_params)
        self._layouts: dict[int, _Layout | None] = {}

    def flattening(self, reader: _Reader, path: str) -> _Flattening | None:
        """The flatten before a dense layer, or None if PyTorch's inputs have the same order.

        Args:
          reader: The product of the dense layer.
          path: The path of its kernel, for errors.

        Raises:
          ValueError: The inputs were flattened, but their order is lost.
        """
        lost = ValueError(
            f"The inputs of {path} were flattened and then mixed, scaled or rearranged, so their order in PyTorch cannot be found."
        )
        (axes, _), layout = reader.axes, self._layout(reader.step.inputs[1 - reader.side])
        if layout is None:
            raise lost
        along = layout.axes_along(axes)
        if not along or along == [len(layout.shape) - 1]:
            return None
        is_image = layout.is_flattened_image_along(axes)
        if is_image:
            along = [along[-1], *along[:-1]]
        sizes = tuple(layout.shape[axis] for axis in along)
        coordinates = layout.coordinates(axes)
        places = np.ravel_multi_index([coordinates[axis] for axis in along], sizes)
        if not is_image and places.shape[1] == math.prod(sizes):
            return None
        if (places != places[:1]).any() or (not is_image and (np.diff(places[0]) <= 0).any()):
            raise lost
        return _Flattening(tuple(coordinates[axis][0] for axis in along), sizes)

    def _layout(self, number: int) -> _Layout | None:
        """The layout of a value, or None if flattened values were mixed."""
        if number not in self._layouts:
            self._layouts[number] = self._find_layout(number)
        return self._layouts[number]

    def _find_layout(self, number: int) -> _Layout | None:
        value, step = self._values[number], self._producers.get(number)
        if step is None or value.ndim < 1:
            return self._own_layout(number, value.ndim > 3)
        operands = [operand for operand in step.inputs if operand in self._depends]
        layouts = [self._layout(operand) for operand in operands]
        known = [layout for layout in layouts if layout is not None]
        is_image = any(layout.is_image for layout in known)
        if step.name in PRODUCTS:  # The results of a product have a new order, also where it reads flattened values.
            return self._own_layout(number, self._gives_image(step, layouts[0] if layouts else None))
        if len(known) < len(layouts):
            return None
        if step.name in _MOVES and operands[:1] == [step.inputs[0]]:
            others = (self._values[operand] for operand in step.inputs[1:])
            return self._moved(number, known[0]._replace(places=np.asarray(step.bind(known[0].places, *others)[0])))
        if not any(layout.is_flattened_image for layout in known):
            # Statistics that a norm subtracts, say, have no order of their own.
            known = [layout for layout in known if not layout.repeats] if step.elementwise else []
        elif not step.elementwise or any(
            self._values[operand].size > 1 for operand in step.inputs if operand not in self._depends
        ):
            return None
        if known and all(
            layout.shape == known[0].shape and np.array_equal(layout.places, known[0].places) for layout in known
        ):
            return known[0]._replace(is_image=is_image)
        flattened = any(layout.is_flattened_image for layout in known)
        return None if flattened else self._own_layout(number, is_image)

    def _moved(self, number: int, layout: _Layout) -> _Layout:
        """The layout of a value whose elements were only moved. An image that was rearranged is an image of its own."""
        if not layout.is_image or layout.is_flattened_image or not layout.places.size:
            return layout
        first, size = layout.places[0], math.prod(layout.shape)
        if first.ndim == 2 < len(layout.shape) and first.size == size and first.shape[-1] == layout.shape[-1]:
            # Positions have become tokens, which PyTorch has before the channels, too.
            return self._own_layout(number, False)
        keeps_order = bool((np.diff(first.reshape(-1)) > 0).all())
        return layout if first.ndim != len(layout.shape) or keeps_order else self._own_layout(number, True)

    def _gives_image(self, step: Step, layout: _Layout | None) -> bool:
        """Whether a product makes an image: a convolution, or a dense layer that reads the channels at each position."""
        if step.name == "conv_general_dilated":
            return True
        (contracted, _), (batch, _) = step.params["dimension_numbers"]
        rank = self._values[step.inputs[0]].ndim
        reads_channels = tuple(contracted) == (rank - 1,) and not batch and step.inputs[1] not in self._depends
        return layout is not None and layout.is_image and reads_channels and not layout.is_flattened_image

    def _own_layout(self, number: int, is_image: bool) -> _Layout:
        """The layout of a value that is its own origin."""
        value = self._values[number]
        places = np.arange(value[:1].size if value.ndim else 1, dtype=np.int32).reshape(1, *value.shape[1:])
        return _Layout(value.shape[1:], np.broadcast_to(places, value.shape), is_image)
