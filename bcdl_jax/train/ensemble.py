"""Many seeds: trained in one program or in turn, with one report per epoch, to be ended and taken up again anywhere."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bcdl_jax._backend import on_cpu
from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import Score, Thresholds, kept_groups, log_dropout_rate
from bcdl_jax.priors.posterior import variational_layers
from bcdl_jax.train.batches import count_examples, steps_per_epoch
from bcdl_jax.train.mesh import jit_step, replicated
from bcdl_jax.train.step import (
    TrainState,
    TrainStep,
    make_train_loop,
    mean_metrics,
    part_names,
    select_seed,
    stack_seeds,
)
from bcdl_jax.train.while_shrinking import (
    Shrinking,
    SmallTraining,
    leave_out_pruned,
    mask_further,
    prune_and_shrink,
    shrink_measure,
)

# What a program runs before its caller is asked whether to stop: long enough that drawing the order of the examples anew, at the start of
# each chunk, costs little; short enough to answer a signal.
_CHUNK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """What one epoch of one run came to.

    Attributes:
      epoch: counted from 1.
      seed: name of the run, usually its seed.
      loss: negative ELBO in nats per example, mean over the epoch.
      nll: cross-entropy part.
      kl: KL / num_examples, unweighted.
      validation_error: in percent, at the posterior means.
      kept: groups per layer that would be kept at the families' default thresholds, or at the given ones.
      failure: one sentence if the run was halted by a value that is not finite, else None.
    """

    epoch: int
    seed: int
    loss: float
    nll: float
    kl: float
    validation_error: float
    kept: dict[str, int]
    failure: str | None


@dataclasses.dataclass(frozen=True)
class EnsembleReport:
    """One epoch of an ensemble: a report per seed, what a person should know now, and the news, in plain words."""

    reports: tuple[EpochReport, ...]
    messages: tuple[str, ...]
    news: tuple[str, ...] = ()


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
    shrinking: Shrinking | None = None,
    stop: Callable[[], bool] | None = None,
    program: Callable[..., Any] | None = None,
) -> Iterator[tuple[TrainState, EnsembleReport | None]]:
    """Trains many seeds and reports after each epoch.

    Args:
      states: stacked states, one per seed, at the start or from wherever an earlier call left them. Their buffers are donated, and so are
        those of each state that is yielded once the next one is asked for: copy what must outlive its epoch.
      data: tree of arrays [examples, ...], shared by all seeds.
      step: from ``make_train_step``, for one seed.
      batch_size: examples per step, see ``make_train_loop``.
      epochs: how many from step 0 to the end, those that ``states`` have behind them included.
      validation_error: (params of one seed, validation_data) -> percent, a pure function.
      validation_data: what ``validation_error`` is measured on, a tree of arrays. Where there is ``shrinking`` and these are
        [examples, ...], it is measured without the groups that are left out, see ``shrink_measure``.
      seeds: a name per seed.
      first_epoch: number in the reports of the epoch that starts with step 0.
      thresholds, score: by which the kept groups of the reports are counted, as for ``kept_groups``.
      shards: see ``make_train_loop``.
      in_turn: whether the seeds are trained one after the other within each epoch, and not all in one program, see ``each_seed``.
      shrinking: how the networks shrink while they are trained, see ``Shrinking``; needs ``in_turn``, since each takes its own shape.
      stop: asked every two seconds or so whether to end now, first of all before and after the first step. With many processes, process 0
        decides.
      program: from ``compile_ensemble``, for states, data, step, batch_size, shards and in_turn as they are here; compiled here if None.

    Yields:
      The states, at full size, and the report of each epoch. A seed whose loss or gradient is not finite stays at its last good state while
      the others go on; messages also warn, once each, of a layer with nothing left and of a run in which nothing is being pruned.
      There are no more epochs once all seeds have been stopped. If ``stop`` ends an epoch early, the last that is yielded is the
      states and None; from them, or from those of any epoch, training goes on to the same result bit by bit.

    Raises:
      ValueError: ``epochs`` is not positive, states are not stacked, seeds do not name the stacked states one by one, or there is
        ``shrinking`` without ``in_turn``.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1.")
    if states.step.ndim != 1:
        raise ValueError(
            f"states.step has shape {states.step.shape}; states must be stacked once, that of a single seed too: stack_seeds([state])."
        )
    if len(set(seeds)) != len(seeds) or len(seeds) != states.step.shape[0]:
        raise ValueError(
            f"seeds is {list(seeds)}; it must name each of the {states.step.shape[0]} stacked states, each once."
        )
    if shrinking is not None and not in_turn:
        raise ValueError(
            "in_turn is False; it must be True where there is shrinking, since each seed is pruned by itself."
        )
    trainer = _Trainer(
        step, data, batch_size, shards, stacked=not in_turn, shrinking=shrinking, stop=stop, program=program
    )
    return _epochs(
        trainer, states, epochs, validation_error, validation_data, tuple(seeds), first_epoch, thresholds, score
    )


def compile_ensemble(
    states: TrainState, data: PyTree, *, step: TrainStep, batch_size: int, shards: int = 1, in_turn: bool = False
) -> Callable[..., Any]:
    """Compiles what ``train_ensemble`` runs first, at full size: ahead of time, in a thread while the states are being made, say.

    Args:
      states: stacked states, or their shapes from ``jax.eval_shape``.
      data: as for ``train_ensemble``, like all else.

    Returns:
      The program, for ``train_ensemble(..., program=program)``.
    """
    if in_turn:
        states = jax.eval_shape(lambda stacked: select_seed(stacked, 0), states)
    return _compile(states, data, step, batch_size, shards, stacked=not in_turn)


def _compile(
    state: TrainState, data: PyTree, step: TrainStep, batch_size: int, shards: int, *, stacked: bool
) -> Callable[..., Any]:
    train_steps: Any = make_train_loop(step, batch_size=batch_size, shards=shards)
    if stacked:
        on_mesh = replicated(state) is not None
        train_steps = jax.vmap(train_steps, in_axes=(0, None, None)) if on_mesh else each_seed(train_steps)
    jitted: Any = jit_step(train_steps, state)
    return jitted.lower(state, data, np.int32(1)).compile()


def each_seed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of one seed's state, for the stacked states of many: on a CPU a loop over them, else ``jax.vmap``.

    An accelerator has room for many seeds at once. A CPU is filled by one: products over a further axis are slower there than one
    product after the other, and one seed's state fits the cache.

    Args:
      function: ``function(state, *shared)``, such as an epoch or ``make_train_loop``.

    Returns:
      ``function(states, *shared)`` for one device, to be compiled; what it returns is stacked along a new leading axis. For seeds spread
      over the devices of a mesh use ``jax.vmap``.
    """

    def for_each(states: PyTree, *shared: Any) -> Any:
        if on_cpu():
            return jax.lax.map(lambda state: function(state, *shared), states)
        return jax.vmap(lambda state: function(state, *shared))(states)

    return for_each


def _epochs(
    trainer: _Trainer,
    states: TrainState,
    epochs: int,
    validation_error: Callable[[PyTree, PyTree], jax.Array],
    validation_data: PyTree,
    seeds: tuple[int, ...],
    first_epoch: int,
    thresholds: Thresholds | None,
    score: Score,
) -> Iterator[tuple[TrainState, EnsembleReport | None]]:
    def measure_one(params: PyTree, held_out: PyTree) -> tuple[jax.Array, dict[str, jax.Array]]:
        return validation_error(params, held_out), kept_groups(params, thresholds, score)

    measure_whole = jax.jit(jax.vmap(measure_one, in_axes=(0, None)) if trainer.stacked else measure_one)
    count = jax.jit(lambda params: kept_groups(params, thresholds, score))

    def measure(part: _Part, epochs: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = part.whole().params
        if part.small is None or trainer.shrinking is None or not trainer.shrinking.is_settled(epochs):
            return measure_whole(params, validation_data)
        if part.small_error is None:
            part.small_error = shrink_measure(validation_error, params, validation_data)
        return part.small_error(params, validation_data), count(params)

    names = part_names(states.params)
    layers = variational_layers(jax.eval_shape(lambda params: select_seed(params, 0), states.params))
    totals = {name: layer.unit_mask.size for name, layer in layers.items()}
    units = "weights" if any(layer.prunes_weights for layer in layers.values()) else "groups"
    told: set[tuple[int, str]] = set()
    parts = [_Part(states)] if trainer.stacked else [_Part(select_seed(states, index)) for index in range(len(seeds))]
    del states

    def all_states() -> TrainState:
        whole = [part.whole() for part in parts]
        return whole[0] if trainer.stacked else stack_seeds(whole)

    while (epoch := trainer.epoch(parts)) is not None and epoch < epochs:
        for part in parts:
            if not trainer.advance(part, epoch + 1):
                yield all_states(), None
                return
        news = []
        for seed, part in zip(seeds, parts, strict=True) if trainer.shrinking else ():
            if epoch + 1 < epochs and (sizes := trainer.shrink(part, epoch + 1)):
                news.append(f"Seed {seed}, epoch {first_epoch + epoch}: {sizes}")
        states = all_states()
        each = [measure(part, epoch + 1) for part in parts]
        measured = each[0] if trainer.stacked else stack_seeds(each)
        metrics, (errors, kept), halted, blamed, steps = jax.device_get(
            (mean_metrics(states, trainer.steps), measured, states.halted, states.blamed, states.step)
        )
        reports: list[EpochReport] = []
        messages: list[str] = []

        def tell(seed: int, subject: str, message: str, messages: list[str] = messages) -> None:
            if (seed, subject) not in told:
                told.add((seed, subject))
                messages.append(message)

        number = first_epoch + epoch
        for index, seed in enumerate(seeds):
            kept_here = {name: int(counts[index]) for name, counts in kept.items()}
            failure = None
            if halted[index]:
                culprits = [name for name, bad in zip(names, blamed[index], strict=True) if bad]
                halted_in = first_epoch + int(steps[index]) // trainer.steps
                failure = _failure_sentence(halted_in, int(steps[index]) + 1, seed, culprits, names)
                tell(seed, "failure", failure)
            else:
                # By infinite thresholds nothing is pruned that is not masked.
                late = thresholds != math.inf and epoch + 1 >= (max(10, (epochs + 1) // 2) if epochs > 10 else epochs)
                for warning in _pruning_warnings(number, seed, kept_here, totals, units, late):
                    tell(seed, warning, warning.replace("EPOCH", str(number)))
            reports.append(
                EpochReport(
                    epoch=number,
                    seed=seed,
                    loss=float(metrics["loss"][index]),
                    nll=float(metrics["nll"][index]),
                    kl=float(metrics["kl"][index]),
                    validation_error=float(errors[index]),
                    kept=kept_here,
                    failure=failure,
                )
            )
        yield states, EnsembleReport(tuple(reports), tuple(messages), tuple(news))


class _Part:
    """What one program trains: all seeds, or one of them, at full size or shrunk."""

    def __init__(self, state: TrainState):
        self.state = state
        self.small: SmallTraining | None = None
        self.settled = False
        self.program: Callable[..., Any] | None = None
        self.seconds_per_step: float | None = None
        self.small_error: Callable[[PyTree, PyTree], jax.Array] | None = None  # made when it is first asked for

    def whole(self) -> TrainState:
        return self.state if self.small is None else self.small.expand(self.state)

    def take(self, small: SmallTraining) -> None:
        """Goes on with a smaller training."""
        self.state, self.small, self.program, self.seconds_per_step = small.state, small, None, None
        self.small_error = None


class _Trainer:
    """Advances parts by whole epochs, chunk by chunk."""

    def __init__(
        self,
        step: TrainStep,
        data: PyTree,
        batch_size: int,
        shards: int,
        *,
        stacked: bool,
        shrinking: Shrinking | None,
        stop: Callable[[], bool] | None,
        program: Callable[..., Any] | None,
    ):
        self.data, self.batch_size, self.shards = data, batch_size, shards
        self.steps = steps_per_epoch(count_examples(data), batch_size, shards)
        self.stacked, self.shrinking = stacked, shrinking
        self._step, self._stop = step, stop
        self._full_size_program = program

    def epoch(self, parts: Sequence[_Part]) -> int | None:
        """The epoch, from 0, that the part furthest behind is in; None if all seeds are halted. Halted ones stand still and do not count."""
        steps = [steps for part in parts if (steps := _steps_taken(part.state)) is not None]
        return min(steps) // self.steps if steps else None

    def advance(self, part: _Part, epochs: int) -> bool:
        """Trains until so many epochs are over, or nothing moves any more; False if ``stop`` came before."""
        while (taken := _steps_taken(part.state)) is not None and taken < epochs * self.steps:
            program = part.program or self._compile(part)
            count = self._count(part, epochs * self.steps - taken)
            if count == 0:
                return False
            start = time.perf_counter()
            part.state, _ = program(part.state, self.data, np.int32(count))
            jax.block_until_ready(part.state.step)
            part.seconds_per_step = (time.perf_counter() - start) / count
        return True

    def shrink(self, part: _Part, epochs: int) -> str | None:
        """Masks what is safely gone and shrinks the part, where it is due and pays; says what became of its size."""
        assert self.shrinking is not None
        if not self.shrinking.is_due(epochs) or bool(part.state.halted):
            return None
        if not self.shrinking.leave_out:
            part.state = mask_further(self.shrinking, part.state)
            return None
        self._settle(part)
        small = prune_and_shrink(self.shrinking, part.whole(), self._example(), part.small)
        if small is None:
            return None
        part.take(small)
        return str(small)

    def _compile(self, part: _Part) -> Callable[..., Any]:
        self._settle(part)
        if part.small is None and self._full_size_program is not None:
            part.program = self._full_size_program
            return part.program
        step = self._step if part.small is None else part.small.step
        part.program = _compile(part.state, self.data, step, self.batch_size, self.shards, stacked=self.stacked)
        if part.small is None:
            self._full_size_program = part.program
        return part.program

    def _settle(self, part: _Part) -> None:
        """Shrinks, at the start, what an earlier call masked."""
        if self.shrinking is None or not self.shrinking.leave_out or part.settled:
            return
        part.settled = True
        small = leave_out_pruned(self.shrinking, part.state, self._example())
        if small is not None:
            part.take(small)

    def _example(self) -> PyTree:
        return jax.tree.map(lambda array: array[: self.batch_size], self.data)

    def _count(self, part: _Part, left: int) -> int:
        """How many steps to run as one; 0 to stop. The same in all processes."""
        if self._stop is None:
            return left
        if self._stop():
            count = 0
        elif part.seconds_per_step is None:
            count = 1
        else:
            count = min(left, max(1, int(_CHUNK_SECONDS / part.seconds_per_step)))
        if jax.process_count() > 1:
            count = int(multihost_utils.broadcast_one_to_all(np.int32(count)))
        return count


def _steps_taken(state: TrainState) -> int | None:
    """Of one state, or of stacked ones that move together; None if they are all halted."""
    steps, halted = jax.device_get((state.step, state.halted))
    moving = np.atleast_1d(steps)[~np.atleast_1d(halted)]
    return int(moving.min()) if moving.size else None


def _failure_sentence(epoch: int, step: int, seed: int, blamed: list[str], names: list[str]) -> str:
    if not blamed:
        where = "although no layer is at fault (look at the loss function and its inputs)"
    elif len(blamed) == len(names) and len(names) > 1:
        where = "in all layers (inputs that are not finite, or a learning rate that is too high?)"
    else:
        where = f"in layer{'s' * (len(blamed) > 1)} {', '.join(blamed)}"
    return (
        f"Seed {seed} was stopped in epoch {epoch}, step {step}: the loss or an update was not finite {where}. "
        "Its last good state is kept; lower the learning rate, clip gradients, or warm up the KL."
    )


def _pruning_warnings(
    epoch: int, seed: int, kept: dict[str, int], totals: dict[str, int], units: str, late: bool
) -> list[str]:
    found = [
        f"Seed {seed}, epoch EPOCH: everything would be pruned in layer {name} (none of its {totals[name]} {units} "
        "is below the threshold), and the network's output would no longer depend on its input; use a KL warm-up, a lower learning rate, or check num_examples."
        for name, count in kept.items()
        if count == 0
    ]
    if late and all(kept[name] == totals[name] for name in kept):
        found.append(
            f"Seed {seed}, epoch EPOCH: nothing is pruned yet (all {sum(totals.values())} {units} are kept); train longer, raise the learning "
            "rate of the log-variances, or check num_examples."
        )
    return found
