"""The order of flattened values in PyTorch.

PyTorch flattens images with the channels first, Flax with the channels last. The weight of a dense layer behind a flatten therefore needs
another order of its columns. ``OrderTracker`` follows the flattened values through the network to find that order. Values that are no
images, such as attention heads, have the same order in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bcdl_jax.graph.primitives import MOVES
from bcdl_jax.graph.products import PRODUCTS
from bcdl_jax.graph.program import Atom, Program, Step, data_dependent

# Primitives that only move the elements of their first operand. Any other operands are indices.
MOVES_OF_FIRST = MOVES | {"gather", "slice"}


class Flattening(NamedTuple):
    """The values that a dense layer of PyTorch reads after a flatten.

    Attributes:
      indices: The index of each input along each axis that PyTorch flattens, [in].
      sizes: The sizes of these axes.
    """

    indices: tuple[np.ndarray, ...]
    sizes: tuple[int, ...]


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


class OrderTracker:
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

    def flattening(self, inputs: Atom, axes: Sequence[int], path: str) -> Flattening | None:
        """The flatten before a dense layer, or None if PyTorch's inputs have the same order.

        Args:
          inputs: The number of the inputs of the layer.
          axes: The axes of the inputs that the layer sums over.
          path: The path of the kernel of the layer, for errors.

        Raises:
          ValueError: The inputs were flattened, but their order is lost.
        """
        lost = ValueError(
            f"The inputs of {path} were flattened and then mixed, scaled or rearranged, so their order in PyTorch cannot be found."
        )
        layout = self._layout(inputs)
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
        return Flattening(tuple(coordinates[axis][0] for axis in along), sizes)

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
        if step.name in MOVES_OF_FIRST and operands[:1] == [step.inputs[0]]:
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
