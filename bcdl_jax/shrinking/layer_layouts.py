"""Layouts of variational and quantised layers, in which all arrays of a layer keep the same inputs and outputs.

The function of a network reads some arrays of a layer, such as its means. The other arrays, such as the variances that only sampling
reads, follow them, so that a shrunk layer is a layer of smaller width: it can be pruned, rounded, saved and rated like any other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.shrinking.layouts import Layout, as_axis

# A row is an input of the kernel: in a grouped convolution, its place within its feature group.
_Side = Literal["input", "row", "output"]
# The sides that the axes of an array run along; None for a window axis and for an array that no side determines.
_Axes = tuple[_Side | None, ...]


def layer_layouts(params: PyTree, layouts: Sequence[Layout | None]) -> list[Layout | None]:
    """The layouts in which each layer of the params is cut as a whole.

    An input or output of a layer is kept if the function reads it in one of the layer's arrays. An axis that belongs to neither, such as
    that of a window, stays whole. A layer of which the function reads nothing keeps no inputs and no outputs.

    Args:
      params: The params of the whole network.
      layouts: The layout in which the function needs each array, in the order of ``jax.tree.leaves``; None for an array that it does
        not read.

    Returns:
      The new layouts. Each holds all indices of the given one. Arrays outside the layers keep their layout.
    """
    rest, result = iter(layouts), list[Layout | None]()
    for node in jax.tree.leaves(params, is_leaf=is_layer):
        own = list(itertools.islice(rest, len(jax.tree.leaves(node))))
        result += _layouts_of_layer(node, own) if is_layer(node) else own
    return result


def _layouts_of_layer(layer: Any, layouts: Sequence[Layout | None]) -> list[Layout | None]:
    arrays = _array_fields(layer)
    axes = [_axes(layer, field) for field in arrays]
    shapes = [np.shape(getattr(layer, field.name)) for field in arrays]
    kept: dict[_Side, np.ndarray] = {
        "input": np.zeros(layer.input_mask.shape[-1], bool),
        "row": np.zeros(layer.kernel_shape[-2], bool),
        "output": np.zeros(layer.output_mask.shape[-1], bool),
    }
    for sides, layout in zip(axes, layouts, strict=True):
        for side, indices in zip(sides, layout or (), strict=layout is not None):
            if side is not None:
                kept[side][slice(None) if indices is None else indices] = True
    kept = _with_equal_groups(kept, layer.feature_groups)
    is_gone = not any(flags.any() for flags in kept.values())

    def layout_of(sides: _Axes, shape: tuple[int, ...]) -> Layout | None:
        if is_gone and shape and not any(sides):
            return None
        return tuple(
            None if side is None else as_axis(np.flatnonzero(kept[side]), size)
            for side, size in zip(sides, shape, strict=True)
        )

    return list(map(layout_of, axes, shapes))


def _array_fields(layer: Any) -> list[dataclasses.Field[Any]]:
    """The fields that hold arrays, in the order of the leaves."""
    return [
        field
        for field in dataclasses.fields(layer)
        if field.metadata.get("pytree_node", True) and getattr(layer, field.name) is not None
    ]


def _axes(layer: Any, field: dataclasses.Field[Any]) -> _Axes:
    """The axes of an array, which its field declares. All axes before them, such as those of a window or of a stack, are None."""
    rank, axis = np.ndim(getattr(layer, field.name)), field.metadata["axis"]
    sides: _Axes = (layer.group_axis if axis == "group" else axis,)
    if axis == "kernel":
        sides = ("row", "output")
    elif axis is None:
        sides = ()
    return (*(None,) * (rank - len(sides)), *sides)


def _with_equal_groups(kept: dict[_Side, np.ndarray], groups: int) -> dict[_Side, np.ndarray]:
    """The kept indices with further ones, such that all feature groups that are left keep the same rows and numbers of outputs."""
    inputs, outputs = kept["input"].reshape(groups, kept["row"].size), kept["output"].reshape(groups, -1).copy()
    in_use = np.asarray(inputs.any(1) | outputs.any(1))
    kept_rows = (kept["row"] | inputs.any(0)) & in_use.any()
    count = outputs.sum(1).max()
    for group in np.flatnonzero(in_use):
        spare = np.flatnonzero(~outputs[group])
        outputs[group, spare[: count - outputs[group].sum()]] = True
    return {
        "input": (in_use[:, None] & kept_rows).ravel(),
        "row": kept_rows,
        "output": outputs.ravel(),
    }
