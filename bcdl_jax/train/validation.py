"""The measures of an ensemble after each epoch: the validation error, and the number of groups that would be kept."""

from __future__ import annotations

from collections.abc import Callable

import jax

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import Thresholds, kept_groups
from bcdl_jax.compression.scores import Score
from bcdl_jax.shrinking import cut
from bcdl_jax.shrinking.network import shrink_at_any_batch_size
from bcdl_jax.train.shrinking_config import ShrinkingConfig
from bcdl_jax.train.trainer import Run

Measured = tuple[jax.Array, dict[str, jax.Array]]


class Validation:
    """Measures runs at full size. Once the sizes of a shrunk run change rarely, it measures them without the pruned groups."""

    def __init__(
        self,
        error: Callable[[PyTree, PyTree], jax.Array],
        data: PyTree,
        *,
        thresholds: Thresholds | None,
        score: Score,
        shrinking: ShrinkingConfig | None,
        stacked: bool,
    ):
        """The measures of an ensemble.

        Args:
          error: A function (params of one seed, data) -> validation error in percent.
          data: The validation data.
          thresholds: The thresholds for ``kept_groups``.
          score: The score for ``kept_groups``.
          shrinking: The configuration of the shrinking, or None.
          stacked: True if the params of a run are stacked.
        """

        def measure_one(params: PyTree, data: PyTree) -> Measured:
            return error(params, data), kept_groups(params, thresholds, score)

        self._error, self._data, self._shrinking = error, data, shrinking
        self._measure_whole = jax.jit(jax.vmap(measure_one, in_axes=(0, None)) if stacked else measure_one)
        self._count_kept = jax.jit(lambda params: kept_groups(params, thresholds, score))

    def measure(self, run: Run, epochs: int) -> Measured:
        """The validation error and the numbers of kept groups of a run after this number of epochs."""
        params = run.full_state().params
        if run.shrunk is None or self._shrinking is None or not self._shrinking.is_settled(epochs):
            return self._measure_whole(params, self._data)
        if run.shrunk_error is None:
            run.shrunk_error = shrink_measure(self._error, params, self._data)
        return run.shrunk_error(params, self._data), self._count_kept(params)


def shrink_measure(
    measure: Callable[[PyTree, PyTree], jax.Array], params: PyTree, data: PyTree
) -> Callable[[PyTree, PyTree], jax.Array]:
    """Compiles a measure of the params, such as a validation error, without the groups that the masks prune.

    Args:
      measure: A pure function ``measure(params, data)``.
      params: The params of one seed, at full size.
      data: A tree of arrays [examples, ...]. The first two examples serve to trace the measure.

    Returns:
      A function of the data and of full-size params with the same masks. The function computes the whole network if the measure cannot be
      shrunk. This happens if a leading axis does not count examples, or if shrinking changes the measure on the two examples, such as by
      breaking a tie differently.
    """
    try:
        small, small_params, report = shrink_at_any_batch_size(
            measure, params, (jax.tree.map(lambda array: array[:2], data),)
        )
        jax.eval_shape(small, small_params, data)
    except (ValueError, TypeError, IndexError):
        return jax.jit(measure)
    compiled = jax.jit(small)
    return lambda params, data: compiled(cut(params, report), data)
