"""Snapshots of a network while it trains: the frames of the pictures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bcdl_jax
from experiments.pipeline.measures import score_of
from experiments.pipeline.recipe import Recipe

# The most weights of a layer that is drawn, since every frame stays in memory.
_LARGEST_DRAWN = 500_000


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One frame of the pictures, of the first seed.

    Where single weights are pruned, a kernel is zero at the weights that the default threshold prunes, and the score of a group is its lowest.

    Attributes:
      epoch: The epoch, counted from 1; 0 for the start.
      kernels: Mean kernels by layer name. The largest layers are left out.
      scores: Scores of the groups by layer name.
      group_axes: The sides of the groups, "input" or "output", by layer name.
    """

    epoch: int
    kernels: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    group_axes: Mapping[str, str]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the snapshot by name, as a checkpoint stores them."""
        axes = {name: np.array(axis) for name, axis in self.group_axes.items()}
        parts = {"kernels": self.kernels, "scores": self.scores, "group_axes": axes}
        return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, epoch: int, arrays: dict[str, np.ndarray]) -> Snapshot:
        """Undoes ``to_arrays``."""
        parts: dict[str, dict[str, np.ndarray]] = {"kernels": {}, "scores": {}, "group_axes": {}}
        for path, array in arrays.items():
            part, _, name = path.partition("/")
            parts[part][name] = array
        axes = {name: str(axis) for name, axis in parts["group_axes"].items()}
        return cls(epoch, parts["kernels"], parts["scores"], axes)


def take_snapshot(epoch: int, stacked_params: Any, recipe: Recipe) -> Snapshot:
    """The snapshot of the first seed of stacked params."""
    kernels, scores = jax.device_get(_snapshot_arrays(stacked_params, score_of(recipe)))
    shapes = jax.eval_shape(lambda params: bcdl_jax.train.select_seed(params, 0), stacked_params)
    group_axes = {name: layer.group_axis for name, layer in bcdl_jax.variational_layers(shapes).items()}
    return Snapshot(epoch, kernels, scores, group_axes)


@functools.partial(jax.jit, static_argnums=1)
def _snapshot_arrays(
    stacked_params: Any, score: bcdl_jax.compression.Score
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    params = bcdl_jax.train.select_seed(stacked_params, 0)
    layers = bcdl_jax.variational_layers(params).items()
    small = [(name, layer) for name, layer in layers if math.prod(layer.kernel_shape) <= _LARGEST_DRAWN]
    kernels = {name: _kernel_to_draw(layer).astype(jnp.float16) for name, layer in small}
    return kernels, {name: layer.group_scores() if layer.prunes_weights else score(layer) for name, layer in layers}


def _kernel_to_draw(layer: bcdl_jax.Posterior) -> jax.Array:
    kernel = layer.kernel_moments()[0]
    if not layer.prunes_weights:
        return kernel
    return jnp.where(layer.log_dropout_rate() < layer.default_threshold, kernel, 0)
