"""Primitives that only move elements.

The *sources* of an output give, for each of its elements, the place of the same element in the flattened and concatenated inputs. They are
computed for the smallest possible arrays: an axis gets size 1 if no element differs along it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bcdl_jax.graph.facts import Flags, Shape, any_along
from bcdl_jax.graph.program import Step
from bcdl_jax.graph.reshapes import AxisGroups, reshape_groups


def move_forward(
    step: Step, in_shapes: Sequence[Shape], out_shapes: Sequence[Shape], arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Moves the elements of compact arrays.

    Args:
      step: A step whose primitive is in ``STRUCTURAL``.
      in_shapes: The shapes of its inputs.
      out_shapes: The shapes of its outputs.
      arrays: Compact arrays in place of its inputs.

    Returns:
      Compact arrays in place of its outputs.
    """
    moves = [move for move in _moves(step, in_shapes, out_shapes) if _is_compact(arrays, move.ins, move.copies)]
    small_in, _, params = _reduced(step, in_shapes, out_shapes, moves)
    sources = STRUCTURAL[step.name](params, small_in)
    parts = [np.broadcast_to(array, shape).ravel() for array, shape in zip(arrays, small_in, strict=True)]
    flat = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return [flat[source] for source in sources]


def move_backward(
    step: Step, in_shapes: Sequence[Shape], out_shapes: Sequence[Shape], lives: Sequence[Flags]
) -> list[Flags]:
    """Flags of the input elements that are the sources of flagged output elements, as compact arrays."""
    moves = _moves(step, in_shapes, out_shapes)
    copied = [axis for move in moves if move.copies for axis in move.outs]
    lives = [any_along(live, copied) for live in lives]
    moves = [move for move in moves if not move.forward_only and _is_compact(lives, move.outs, move.copies)]
    small_in, small_out, params = _reduced(step, in_shapes, out_shapes, moves)
    sizes = [math.prod(shape) for shape in small_in]
    flat = np.zeros(sum(sizes), bool)
    for source, live, shape in zip(STRUCTURAL[step.name](params, small_in), lives, small_out, strict=True):
        flat[source[np.broadcast_to(live, shape)]] = True
    ends = list(itertools.accumulate(sizes))
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), small_in, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Move:
    """Axes of the inputs and of the outputs that hold the same elements.

    If nothing differs along the former, nothing differs along the latter. The reverse is true unless ``forward_only``.

    Attributes:
      ins: Axes of the inputs.
      outs: Axes of the outputs.
      forward_only: True if the output holds a part of the elements.
      copies: True if the output repeats one element.
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    forward_only: bool = False
    copies: bool = False


def _is_compact(arrays: Sequence[np.ndarray], axes: Sequence[int], copies: bool) -> bool:
    return copies or all(array.shape[axis] == 1 for array in arrays if array.ndim for axis in axes)


def _moves(step: Step, in_shapes: Sequence[Shape], out_shapes: Sequence[Shape]) -> list[_Move]:
    """The axes that a structural primitive moves as a whole."""
    params, rank = step.params, len(in_shapes[0])
    if step.name == "reshape":
        groups: AxisGroups = reshape_groups(in_shapes[0], out_shapes[0])
        return [_Move(ins, outs) for ins, outs in groups]
    if step.name == "transpose":
        return [_Move((axis,), (place,)) for place, axis in enumerate(params["permutation"])]
    if step.name in ("squeeze", "expand_dims"):
        removed = params["dimensions"] if step.name == "squeeze" else ()
        added = params["dimensions"] if step.name == "expand_dims" else ()
        pairs = zip(_without(removed, rank), _without(added, len(out_shapes[0])), strict=True)
        return [_Move((axis,), (out,)) for axis, out in pairs]
    if step.name == "broadcast_in_dim":
        mapped = dict(zip(params["broadcast_dimensions"], range(rank), strict=True))
        moves = []
        for out, size in enumerate(out_shapes[0]):
            copies = out not in mapped or in_shapes[0][mapped[out]] != size
            moves.append(_Move((mapped[out],) if out in mapped else (), (out,), copies=copies))
        return moves
    if step.name == "concatenate":
        return [_Move((axis,), (axis,)) for axis in _without([params["dimension"]], rank)]
    if step.name == "split":
        return [_Move((axis,), (axis,), forward_only=axis == params["axis"]) for axis in range(rank)]
    if step.name == "pad":
        return [_Move((axis,), (axis,)) for axis in range(rank) if not any(params["padding_config"][axis])]
    return [
        _Move((axis,), (axis,), forward_only=step.name == "slice" and in_shapes[0][axis] != out_shapes[0][axis])
        for axis in range(rank)
    ]


def _without(axes: Sequence[int], rank: int) -> list[int]:
    return [axis for axis in range(rank) if axis not in axes]


def _reduced(
    step: Step, in_shapes: Sequence[Shape], out_shapes: Sequence[Shape], moves: Sequence[_Move]
) -> tuple[list[Shape], list[Shape], Mapping[str, Any]]:
    """The shapes and parameters of a step whose moved axes get size 1."""
    ins = {axis for move in moves for axis in move.ins}
    outs = {axis for move in moves for axis in move.outs}
    small_in = [_with_ones(shape, ins) for shape in in_shapes]
    small_out = [_with_ones(shape, outs) for shape in out_shapes]
    params = step.params
    if step.name == "reshape":
        params = params | {"new_sizes": small_out[0]}
    elif step.name == "broadcast_in_dim":
        params = params | {"shape": small_out[0]}
    elif step.name == "tile":
        params = params | {"reps": tuple(1 if axis in ins else count for axis, count in enumerate(params["reps"]))}
    elif step.name == "slice":
        strides = params["strides"] or (1,) * len(in_shapes[0])
        cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        reduced = [(0, 1, 1) if axis in ins else cut for axis, cut in enumerate(cuts)]
        params = params | dict(
            zip(("start_indices", "limit_indices", "strides"), zip(*reduced, strict=True), strict=False)
        )
    elif step.name == "split" and params["axis"] in ins:
        params = params | {"sizes": (), "copies": len(out_shapes)}
    return small_in, small_out, params


def _with_ones(shape: Shape, axes: set[int]) -> Shape:
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


# The sources of each primitive.


def _places(shapes: Sequence[Shape]) -> list[np.ndarray]:
    """The place of each element of the inputs."""
    starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    return [start + np.arange(math.prod(shape)).reshape(shape) for start, shape in zip(starts, shapes, strict=False)]


def _broadcast_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    (places,) = _places(shapes[:1])
    sizes = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], shapes[0], strict=True):
        sizes[axis] = size
    return [np.broadcast_to(places.reshape(sizes), params["shape"])]


def _pad_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    places, padding = _places(shapes)
    for axis, (low, high, interior) in enumerate(params["padding_config"]):
        size = places.shape[axis]
        spread = np.arange(size) * (interior + 1) + low
        length = low + high + size + max(size - 1, 0) * interior
        inside = (spread >= 0) & (spread < length)
        out = np.full((*places.shape[:axis], length, *places.shape[axis + 1 :]), padding)
        np.moveaxis(out, axis, 0)[spread[inside]] = np.moveaxis(places, axis, 0)[inside]
        places = out
    return [places]


def _slice_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    strides = params["strides"] or (1,) * len(shapes[0])
    cuts = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return [_places(shapes)[0][tuple(slice(*cut) for cut in cuts)]]


def _split_source(params: Mapping[str, Any], shapes: Sequence[Shape]) -> list[np.ndarray]:
    if not params["sizes"]:  # Nothing differs along the axis, so all outputs are the same.
        return _places(shapes) * params["copies"]
    ends = list(itertools.accumulate(params["sizes"]))
    return np.split(_places(shapes)[0], ends[:-1], params["axis"])


STRUCTURAL: dict[str, Callable[[Mapping[str, Any], Sequence[Shape]], list[np.ndarray]]] = {
    "reshape": lambda params, shapes: [_places(shapes)[0].reshape(params["new_sizes"])],
    "squeeze": lambda params, shapes: [np.squeeze(_places(shapes)[0], params["dimensions"])],
    "expand_dims": lambda params, shapes: [np.expand_dims(_places(shapes)[0], params["dimensions"])],
    "transpose": lambda params, shapes: [np.transpose(_places(shapes)[0], params["permutation"])],
    "broadcast_in_dim": _broadcast_source,
    "slice": _slice_source,
    "rev": lambda params, shapes: [np.flip(_places(shapes)[0], params["dimensions"])],
    "concatenate": lambda params, shapes: [np.concatenate(_places(shapes), params["dimension"])],
    "pad": _pad_source,
    "tile": lambda params, shapes: [np.tile(_places(shapes)[0], params["reps"])],
    "split": _split_source,
}
