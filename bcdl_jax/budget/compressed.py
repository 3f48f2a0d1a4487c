"""The result of ``compress``: a small network with its report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.budget.errors import Increase
from bcdl_jax.budget.search import Point
from bcdl_jax.codec import save
from bcdl_jax.export.network_file import save_network


@dataclasses.dataclass(frozen=True)
class EntryReport:
    """The report on one layer, or on one array outside of the layers.

    Attributes:
      name: The path in the params.
      shape: The shape of the kernel or the array in the given network.
      small_shape: Its shape in the small network.
      bits: The bits of an integer, or the bits of the type of an array that is not rounded.
      bytes: The size in the file.
      is_layer: True for a layer.
      is_rounded: True if integers are stored.
      scores: The pruning scores of the units of a layer before this compression, [units]; empty for an array.
      kept: Flags of the units that are kept, [units].
    """

    name: str
    shape: tuple[int, ...]
    small_shape: tuple[int, ...]
    bits: int
    bytes: float
    is_layer: bool
    is_rounded: bool
    scores: np.ndarray
    kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """The report of ``compress``. Pairs hold a number of the given network, and the same number of the small one.

    Attributes:
      budget: The budget in words.
      chosen: The chosen point.
      points: All points that were measured, the largest first.
      error: The error on the search examples.
      held_out: The error on the examples that the search did not use.
      bytes: The size of the params in their own types, and the size of the coded params.
      multiply_adds: The multiply-adds of all matrix products and convolutions on the example inputs.
      kept_weights: The number of kept weights of the layers, and the number of all.
      plain_bits: The number of bits to which the arrays outside of the layers are rounded, or None if they stay as they are.
      plain_bytes: The size of the arrays outside of the layers, in their own types.
      entries: The reports on the layers and arrays, in the order of the params.
    """

    budget: str
    chosen: Point
    points: tuple[Point, ...]
    error: tuple[float, Increase]
    held_out: tuple[float, Increase]
    bytes: tuple[int, int]
    multiply_adds: tuple[int, int]
    kept_weights: tuple[int, int]
    plain_bits: int | None
    plain_bytes: int
    entries: tuple[EntryReport, ...]

    def __str__(self) -> str:
        (before, after), (work, less) = self.bytes, self.multiply_adds
        kept, total = self.kept_weights
        plain = "as they are" if self.plain_bits is None else f"rounded to {self.plain_bits} bits"
        return "\n".join(
            [
                f"budget: {self.budget}",
                f"coded params: {before:,} -> {after:,} bytes ({before / max(1, after):.1f}x), without the program",
                f"multiply-adds of two examples: {work:,} -> {less:,} ({work / max(1, less):.1f}x)",
                f"weights of the layers: {total:,} -> {kept:,}, in steps of {self.chosen.relative_step:.2g} deviations",
                f"other arrays: {self.plain_bytes:,} bytes, {plain}",
                f"error in the search: {self.error[0]:.4g} -> {self.error[1]}",
                f"error on held-out data: {self.held_out[0]:.4g} -> {self.held_out[1]}",
            ]
        )


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed network, the result of ``compress``.

    Attributes:
      apply: The small function ``apply(params, *inputs)``.
      params: Its params: quantised layers and arrays.
      full_params: The params of the given network, pruned and rounded, at full size.
      example_inputs: Inputs of two examples.
      report: The report.
    """

    apply: Callable[..., PyTree]
    params: PyTree
    full_params: PyTree
    example_inputs: tuple[Any, ...]
    report: CompressionReport

    def __call__(self, *inputs: PyTree) -> PyTree:
        """The outputs of the small network."""
        return self.apply(self.params, *inputs)

    def save(self, path: str | os.PathLike[str], *, program: bool = True) -> int:
        """Writes the network to a file.

        Args:
          path: The file.
          program: True for a file with the program, some kilobytes more, which ``load_network`` reads without the code of the model. False
            for the coded params of the small network alone: ``load`` reads them for ``apply``.

        Returns:
          The number of bytes of the file.

        Raises:
          ValueError: The network does not run at every batch size.
          OSError: The file cannot be written.
        """
        if not program:
            return save(path, self.params, names=True)
        save_network(path, self.apply, self.params, self.example_inputs)
        return os.path.getsize(path)
