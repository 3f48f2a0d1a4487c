"""Training of many seeds, all in one program or one after the other, with a report per epoch. It can be stopped and resumed at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import Thresholds
from bcdl_jax.compression.scores import Score, log_dropout_rate
from bcdl_jax.train.reports import EnsembleReport, Reporter
from bcdl_jax.train.seeds import select_seed, stack_seeds
from bcdl_jax.train.shrinking_config import ShrinkingConfig
from bcdl_jax.train.state import TrainState, TrainStep
from bcdl_jax.train.trainer import Run, Trainer, compile_steps
from bcdl_jax.train.validation import Validation


def train_ensemble(
    states: TrainState,
    data: PyTree,
    *,
    step: TrainStep,
    batch_size: int,
    epochs: int,
    validation_error: Callable[[PyTree, PyTree], jax.Array],
    validation_data: PyTree,
    seeds: Sequence[int],
    first_epoch: int = 1,
    thresholds: Thresholds | None = None,
    score: Score = log_dropout_rate,
    shards: int = 1,
    in_turn: bool = False,
    shrinking: ShrinkingConfig | None = None,
    stop: Callable[[], bool] | None = None,
    program: Callable[..., Any] | None = None,
) -> Iterator[tuple[TrainState, EnsembleReport | None]]:
    """Trains many seeds and reports after each epoch.

    Args:
      states: The stacked states, one per seed: new ones, or the last ones of an earlier call. Their buffers are donated. The buffers of a
        yielded state are donated too, when the next one is requested; copy a state to keep it.
      data: A tree of arrays [examples, ...] that all seeds share.
      step: The training step of one seed, from ``make_train_step``.
      batch_size: The number of examples per step.
      epochs: The number of epochs of the whole run, counted from step 0. It includes the epochs that ``states`` have completed.
      validation_error: A pure function (params of one seed, validation_data) -> validation error in percent.
      validation_data: The data for ``validation_error``, a tree of arrays. If the arrays are [examples, ...] and there is ``shrinking``,
        the error is computed without the groups that are left out.
      seeds: One name per seed.
      first_epoch: The number that the epoch of step 0 has in the reports.
      thresholds: The thresholds for the kept groups of the reports, see ``kept_groups``.
      score: The score for the kept groups of the reports.
      shards: The number of devices that the data are spread over, see ``make_train_loop``.
      in_turn: True to train the seeds one after the other within each epoch; False for one program for all seeds, see ``each_seed``.
      shrinking: The configuration of networks that shrink while they are trained. It requires ``in_turn``, since each seed has its own
        shapes.
      stop: A function that returns True to end the training. It is called before and after the first step, and then about every two
        seconds. With many processes, process 0 decides.
      program: The program from ``compile_ensemble`` for the same arguments; None to compile it here.

    Yields:
      The stacked full-size states and the report of each epoch. A seed whose loss or update is not finite stays at its last good state while
      the others continue; the epochs end once all seeds are halted. The messages also warn, once each, of a layer that would lose all its
      groups, of a run that prunes nothing, and after the last epoch of a layer that keeps all its groups and of a KL far above the
      likelihood. If ``stop`` ends an epoch early, the last item is the states and None. A later call
      continues from any yielded states to the same result bit by bit.

    Raises:
      ValueError: ``epochs`` is not positive, the states are not stacked, ``seeds`` does not name each state once, or there is ``shrinking``
        without ``in_turn``.
    """
    _check_arguments(states, epochs, seeds, in_turn, shrinking)
    stacked = not in_turn
    trainer = Trainer(step, data, batch_size, shards, stacked=stacked, shrinking=shrinking, stop=stop, program=program)
    validation = Validation(
        validation_error, validation_data, thresholds=thresholds, score=score, shrinking=shrinking, stacked=stacked
    )
    return _epochs(trainer, validation, states, epochs, tuple(seeds), first_epoch, thresholds)


def compile_ensemble(
    states: TrainState, data: PyTree, *, step: TrainStep, batch_size: int, shards: int = 1, in_turn: bool = False
) -> Callable[..., Any]:
    """Compiles the full-size program of ``train_ensemble`` ahead of time, for example in a thread while the states are being computed.

    Args:
      states: The stacked states, or their shapes from ``jax.eval_shape`` for training on one device.
      data: The data for ``train_ensemble``.
      step: The step for ``train_ensemble``.
      batch_size: The number of examples per step.
      shards: The number of devices that the data are spread over.
      in_turn: True if the seeds are trained one after the other.

    Returns:
      The program, for ``train_ensemble(..., program=program)``.
    """
    if in_turn:
        states = jax.eval_shape(lambda stacked: select_seed(stacked, 0), states)
    return compile_steps(states, data, step, batch_size, shards, stacked=not in_turn)


def _check_arguments(
    states: TrainState, epochs: int, seeds: Sequence[int], in_turn: bool, shrinking: ShrinkingConfig | None
) -> None:
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1.")
    if states.step.ndim != 1:
        raise ValueError(
            f"states.step has shape {states.step.shape}; states must be stacked along one axis, also for a single seed: stack_seeds([state])."
        )
    if len(set(seeds)) != len(seeds) or len(seeds) != states.step.shape[0]:
        raise ValueError(
            f"seeds is {list(seeds)}; it must name each of the {states.step.shape[0]} stacked states, each once."
        )
    if shrinking is not None and not in_turn:
        raise ValueError("in_turn is False; it must be True with shrinking, since each seed has its own shapes.")


def _epochs(
    trainer: Trainer,
    validation: Validation,
    states: TrainState,
    epochs: int,
    seeds: tuple[int, ...],
    first_epoch: int,
    thresholds: Thresholds | None,
) -> Iterator[tuple[TrainState, EnsembleReport | None]]:
    reporter = Reporter(
        states.params,
        seeds=seeds,
        epochs=epochs,
        first_epoch=first_epoch,
        steps=trainer.steps,
        thresholds=thresholds,
    )
    runs = [Run(states)] if trainer.stacked else [Run(select_seed(states, index)) for index in range(len(seeds))]
    # The runs hold the states from here on: these buffers would take memory in vain.
    del states

    def stacked_states() -> TrainState:
        full = [run.full_state() for run in runs]
        return full[0] if trainer.stacked else stack_seeds(full)

    while (epoch := trainer.epoch(runs)) is not None and epoch < epochs:
        for run in runs:
            if not trainer.advance(run, epoch + 1):
                yield stacked_states(), None
                return
        shrink_messages = []
        # The last epoch needs no check: nothing is trained after it.
        if trainer.shrinking is not None and epoch + 1 < epochs:
            for seed, run in zip(seeds, runs, strict=True):
                if sizes := trainer.check_pruning(run, epoch + 1):
                    shrink_messages.append(f"Seed {seed}, epoch {first_epoch + epoch}: {sizes}")
        states = stacked_states()
        each = [validation.measure(run, epoch + 1) for run in runs]
        measured = each[0] if trainer.stacked else stack_seeds(each)
        yield states, reporter.report(states, measured, epoch, shrink_messages)
