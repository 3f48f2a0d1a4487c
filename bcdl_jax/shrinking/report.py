"""The report of ``shrink``: the shape that each array keeps, and the reasons for remaining zeros."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from bcdl_jax._tree import module_name
from bcdl_jax.graph.facts import Analysis, Fact, along
from bcdl_jax.graph.program import Atom, Program
from bcdl_jax.shrinking.layouts import Layout
from bcdl_jax.shrinking.plan import Plan


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """The report on one array of the params.

    Attributes:
      path: The name of the array, such as "Dense_0/kernel".
      before: The shape of the array.
      after: The shape of the array in the small params.
      kept: The indices that are kept along each axis, int64, ascending.
      reason: The reason why slices of zeros are kept, or None if no such slice is left.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: tuple[np.ndarray, ...]
    reason: str | None


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
            + f"  ({leaf.reason})" * bool(leaf.reason)
            for leaf in self.leaves
        ]
        for name, (before, after) in (("bytes", self.bytes), ("multiply-adds", self.multiply_adds)):
            lines.append(f"{name}: {before:,} -> {after:,}" + (f" ({before / after:.1f}x)" if after else ""))
        lines.append(f"largest difference of the outputs: {self.difference:.2g}")
        return "\n".join([*lines, self.remark] if self.remark else lines)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def reasons_for_zeros(program: Program, analysis: Analysis, plan: Plan, numbers: Sequence[Atom]) -> list[str | None]:
    """For each of the values ``numbers``, the reason why slices of zeros are kept, or None if no such slice is left."""
    readers = _opaque_readers(program, analysis)
    reasons: list[str | None] = []
    for number in numbers:
        layout, reason = plan.layouts[number], None
        if layout is not None and _keeps_zeros(analysis.facts[number], layout, program.shapes[number].shape):
            names = ", ".join(sorted(readers.get(number, set())))
            reason = f"zeros kept: read whole by {names}" if names else "zeros kept: other parts need them"
        reasons.append(reason)
    return reasons


def _opaque_readers(program: Program, analysis: Analysis) -> dict[Atom, set[str]]:
    """For each value, the names of the primitives without a rule that depend on it."""
    readers: dict[Atom, set[str]] = {}
    for index, step in reversed(list(enumerate(program.steps))):
        names = {step.name} if index in analysis.opaque else set()
        for number in step.outputs:
            names |= readers.get(number, set())
        for number in step.inputs:
            readers.setdefault(number, set()).update(names)
    return readers


def _keeps_zeros(fact: Fact, layout: Layout, shape: tuple[int, ...]) -> bool:
    """Whether a kept and needed slice of a fixed array, across one of several axes, holds zeros alone."""
    if not fact.fixed or fact.value.ndim < 2:
        return False
    for axis, kept in enumerate(layout):
        nonzero, live = (along(flags, axis, shape[axis]) for flags in (fact.nonzero, fact.live))
        zeros = live & ~nonzero
        if (zeros if kept is None else zeros[kept]).any():
            return True
    return False


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
