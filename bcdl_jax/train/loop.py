"""Loops over random batches: some steps of an epoch, or a whole epoch, as one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree
from bcdl_jax.train.batches import count_examples, epoch_rows, steps_per_epoch, take_batch
from bcdl_jax.train.state import Metrics, TrainState, TrainStep


def make_train_loop(
    step: TrainStep, *, batch_size: int, shards: int = 1
) -> Callable[[TrainState, PyTree, jax.Array | int], tuple[TrainState, Metrics]]:
    """Builds a loop over random batches: ``train_steps(state, data, count) -> (state, metrics)``.

    The steps of an epoch can be divided into calls in any way: the result is the same, and so is the compiled program, since ``count`` is
    an input of it. For many seeds at once, compile ``jax.jit(each_seed(train_steps), donate_argnums=0)``.

    Args:
      step: A step from ``make_train_step``, or any step whose metrics have the names of ``state.metric_sums``.
      batch_size: The number of examples per step. Each epoch leaves out the last incomplete batch of its order.
      shards: The number of devices that the data are spread over. Each batch takes the same number of examples from each device, see
        ``epoch_rows``.

    Returns:
      A pure function. ``data`` is a tree of arrays [examples, ...], and ``count`` is the number of steps, at most the number that is left
      of the epoch. The state's key and the epoch determine the order of the examples. The metrics are means over the steps of the epoch
      so far. They are not a number once the state is halted, and the state then stays the same.

    Raises:
      ValueError: (at a call) The data have fewer examples than ``batch_size``, or arrays of different lengths. Or a number is no multiple
        of ``shards``. Or ``state.metric_sums`` lacks a metric of the step.
    """

    def train_steps(state: TrainState, data: PyTree, count: jax.Array | int) -> tuple[TrainState, Metrics]:
        examples = count_examples(data)
        steps = steps_per_epoch(examples, batch_size, shards)
        order = epoch_rows(state.key, state.step // steps, examples, batch_size, shards)

        def take_step(_: Any, state: TrainState) -> TrainState:
            place = state.step % steps
            after, metrics = step(state, take_batch(data, order[place], shards))
            return after.replace(metric_sums=_add_metrics(state.metric_sums, metrics, place, after.halted))

        state = jax.lax.fori_loop(0, count, take_step, state)
        return state, mean_metrics(state, steps)

    return train_steps


def make_train_epoch(
    step: TrainStep, *, batch_size: int, shards: int = 1
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """Builds one epoch: ``epoch(state, data) -> (state, mean metrics)``, for a state at the start of an epoch.

    Arguments and errors are the same as for ``make_train_loop``. For many seeds at once, compile
    ``jax.jit(each_seed(epoch), donate_argnums=0)``.
    """
    train_steps = make_train_loop(step, batch_size=batch_size, shards=shards)

    def epoch(state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        return train_steps(state, data, steps_per_epoch(count_examples(data), batch_size, shards))

    return epoch


def mean_metrics(state: TrainState, steps: int) -> Metrics:
    """The means of the metrics over the steps of the current epoch. ``steps`` is the number of steps of a whole epoch."""
    taken = (state.step - 1) % steps + 1
    return {name: total / taken.astype(total.dtype) for name, total in state.metric_sums.items()}


def sums_before(state: TrainState, steps: int) -> Metrics:
    """The sums of the metrics to which the next step adds: zeros at the start of an epoch. ``steps`` is the number of steps of an epoch."""
    is_start = state.step % steps == 0
    return {name: jnp.where(is_start, 0, total) for name, total in state.metric_sums.items()}


def _add_metrics(sums: Metrics, metrics: Metrics, place: jax.Array, halted: jax.Array) -> Metrics:
    """The sums after a step. ``place`` is the number of the step within its epoch; the sums start anew at 0."""
    if metrics.keys() != sums.keys():
        raise ValueError(
            f"The metrics of the step are {', '.join(sorted(metrics))}; they must be {', '.join(sorted(sums))}, as in state.metric_sums."
        )
    return {
        name: jnp.where(halted, jnp.nan, jnp.where(place == 0, 0, total) + metrics[name]).astype(total.dtype)
        for name, total in sums.items()
    }
