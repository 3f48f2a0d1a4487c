"""The report of ``shrink``: the shape that each array keeps, and the reasons for dead channels that are left."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from bcdl_jax._tree import module_name


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """The report on one array of the params.

    Attributes:
      path: The name of the array, such as "Dense_0/kernel".
      before: The shape of the array.
      after: The shape of the array in the small params.
      kept: The indices that are kept along each axis, int64, ascending.
      reason: The reason why elements of dead channels are kept, or None if none are left.
      removable: The number of elements that a full removal of these channels would have saved.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: tuple[np.ndarray, ...]
    reason: str | None
    removable: int = 0


@dataclasses.dataclass(frozen=True)
class ShrinkReport:
    """The report of ``shrink``. Pairs hold a number before shrinking and the same number after shrinking.

    Attributes:
      leaves: One report for each array of the params, in the order of ``jax.tree.leaves``.
      bytes: The size of the params in bytes.
      multiply_adds: The number of multiply-adds of all matrix products and convolutions on the example inputs.
      difference: The largest absolute difference between the outputs before and after on the example inputs.
      structure: The tree structure of the params.
      remark: A sentence on the batch sizes that the network supports and the small function does not, or None.
    """

    leaves: tuple[LeafReport, ...]
    bytes: tuple[int, int]
    multiply_adds: tuple[int, int]
    difference: float
    structure: Any
    remark: str | None = None

    def __str__(self) -> str:
        width = max([len(leaf.path) for leaf in self.leaves], default=0)
        lines = [
            f"{leaf.path:<{width}}  {_shape_text(leaf.before)} -> {_shape_text(leaf.after)}"
            + f"  ({leaf.reason}; {leaf.removable:,} elements)" * bool(leaf.reason)
            for leaf in self.leaves
        ]
        for name, (before, after) in (("bytes", self.bytes), ("multiply-adds", self.multiply_adds)):
            lines.append(f"{name}: {before:,} -> {after:,}" + (f" ({before / after:.1f}x)" if after else ""))
        if removable := sum(leaf.removable for leaf in self.leaves):
            lines.append(f"elements of dead channels that are kept: {removable:,}")
        lines.append(f"largest difference of the outputs: {self.difference:.2g}")
        return "\n".join([*lines, self.remark] if self.remark else lines)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def warn_of_empty_layers(report: ShrinkReport, has_elements: Sequence[bool]) -> None:
    """Warns the caller of ``shrink`` if nothing is left of a layer.

    Args:
      report: The report.
      has_elements: A flag for each array of the params that has elements before shrinking.
    """
    layers: dict[str, list[bool]] = {}
    for leaf, filled in zip(report.leaves, has_elements, strict=True):
        if filled:
            layers.setdefault(leaf.path.rpartition("/")[0] or leaf.path, []).append(0 in leaf.after)
    empty = [module_name(name) for name, is_empty in layers.items() if all(is_empty)]
    if empty:
        theirs = "their" if len(empty) > 1 else "its"
        warnings.warn(
            f"Nothing is left of layer{'s' * (len(empty) > 1)} {', '.join(empty)}: {theirs} outputs are constant or are not read.",
            stacklevel=4,
        )
