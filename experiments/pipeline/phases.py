"""The phases of variational training: "train" from the start values, and "fine_tune" from the pruned params."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import bcdl_jax
from experiments.io import files
from experiments.io.checkpoints import Restored
from experiments.io.logs import profile
from experiments.pipeline.context import INTERRUPTED, RunContext
from experiments.pipeline.measures import Batch, error_percent, measure_change, sampled_cross_entropy
from experiments.pipeline.progress import Progress
from experiments.pipeline.snapshots import Snapshot, score_of, take_snapshot
from experiments.pipeline.stopping import stop_for
from experiments.runtime import devices, interruption, startup

_MOST_FRAMES = 60
_SHRINKING_IMAGES = 500
# From a seed and its given tree to the params that a phase starts from.
StartParams = Callable[[jax.Array, Any], Any]


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """The end of a phase.

    Attributes:
      params: Stacked params of all seeds.
      failures: The sentence that says why a seed was stopped, or None, per seed.
      snapshots: The frames of the pictures.
    """

    params: Any
    failures: list[str | None]
    snapshots: list[Snapshot]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of training of all seeds.

    Attributes:
      context: The context of the run.
      name: "train" or "fine_tune".
      train: The training data, on the devices.
      validation: The validation data, on the devices.
    """

    context: RunContext
    name: str
    train: Batch
    validation: Batch

    @property
    def fine_tunes(self) -> bool:
        return self.name == "fine_tune"

    @property
    def title(self) -> str:
        return self.name.replace("_", "-")

    @property
    def epochs(self) -> int:
        recipe = self.context.recipe
        return recipe.fine_tune_epochs if self.fine_tunes else recipe.epochs

    @property
    def first_epoch(self) -> int:
        return self.context.recipe.epochs + 1 if self.fine_tunes else 1

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train[1]) // self.context.recipe.batch_size

    @property
    def shards(self) -> int:
        return 1 if self.context.mesh is None else self.context.mesh.size

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a learning rate per kind of parameter; fine-tuning averages the params too."""
        recipe = self.context.recipe
        total = max(1, self.epochs * self.steps_per_epoch)
        schedule = (
            recipe.fine_tune_learning_rate
            if self.fine_tunes
            else optax.cosine_decay_schedule(recipe.learning_rate, total)
        )
        factor = recipe.fine_tune_log_variance_factor if self.fine_tunes else recipe.log_variance_factor
        decay = 1 - 1 / max(1, recipe.fine_tune_averaging_epochs * self.steps_per_epoch)
        averaging = bcdl_jax.train.params_ema(decay) if self.fine_tunes else optax.identity()
        factors = {"log_variance": factor, "scale": recipe.scale_factor}
        return optax.chain(optax.adam(schedule), bcdl_jax.train.scale_by_kind(factors), averaging)

    def make_step(self, likelihood: Callable[..., jax.Array]) -> Callable[..., Any]:
        """The training step on a negative log-likelihood."""
        recipe = self.context.recipe
        kl_weight = (
            recipe.fine_tune_kl_weight
            if self.fine_tunes
            else bcdl_jax.kl_warmup(recipe.warmup_epochs * self.steps_per_epoch, to=recipe.kl_weight)
        )
        return bcdl_jax.train.make_train_step(
            likelihood, self.optimizer(), num_examples=len(self.train[1]), kl_weight=kl_weight
        )

    def likelihood(self) -> Callable[..., jax.Array]:
        """The negative log-likelihood of a batch."""
        recipe = self.context.recipe
        return functools.partial(sampled_cross_entropy, self.context.model, mirror=recipe.mirror, shift=recipe.shift)

    def shrinking(self) -> bcdl_jax.train.ShrinkingConfig | None:
        """The way the networks shrink while they train; None where the recipe keeps them at full size."""
        recipe, chain = self.context.recipe, self.context.chain
        if recipe.max_shrinking_change is None:
            return None
        # The groups are chosen before fine-tuning: there the masked groups are left out, and no more.
        thresholds = math.inf if self.fine_tunes else self._prunable_groups()
        # A CPU gains by every channel that is left out. An accelerator computes eight channels as fast as seven, and compiling a smaller
        # step takes longer than all of the training there: the network shrinks once, for the fine-tuning.
        on_cpu = jax.default_backend() == "cpu"
        return bcdl_jax.train.ShrinkingConfig(
            self.likelihood(),
            self.make_step,
            thresholds,
            chain,
            score=score_of(recipe),
            first_check=recipe.first_shrinking,
            regular_checks=recipe.regular_shrinking and not self.fine_tunes,
            least_saving=recipe.least_shrinking_saving,
            multiple_of=1 if on_cpu else 8,
            leave_out=on_cpu or self.fine_tunes,
        )

    def _prunable_groups(self) -> Callable[[Any], dict[str, float]]:
        """From params to thresholds: the smallest network that hardly changes the predictions on a few images."""
        recipe, images = self.context.recipe, self.train[0]
        change_from = measure_change(self.context.model, images[:: max(1, len(images) // _SHRINKING_IMAGES)])

        def thresholds(params: Any) -> dict[str, float]:
            return bcdl_jax.choose_thresholds(
                params,
                change_from(params),
                max_increase=recipe.max_shrinking_change,
                chain=self.context.chain,
                score=score_of(recipe),
            )

        return thresholds

    def thresholds_for_reports(self) -> Any:
        """The thresholds by which progress reports count groups. Masked groups never count as kept."""
        recipe, thresholds = self.context.recipe, self.context.thresholds
        # The default thresholds of the families are log dropout rates.
        other_score = thresholds is None and recipe.score != "log_dropout_rate"
        return math.inf if self.fine_tunes or other_score else thresholds

    def how(self) -> dict[str, Any]:
        """The arguments that compiling and training share."""
        recipe = self.context.recipe
        return {"batch_size": recipe.batch_size, "in_turn": recipe.in_turn, "shards": self.shards}


def run_phase(phase: Phase, start_params: StartParams, given: Any) -> PhaseResult:
    """Runs one phase of all seeds, from its last checkpoint if there is one.

    Args:
      phase: The phase.
      start_params: ``start_params(seed, given)``, the params of one seed that the phase starts from.
      given: A stacked tree, an entry per seed.

    Raises:
      KeyboardInterrupt: Ctrl-C came, and a checkpoint was written.
      SystemExit: SIGTERM came, and a checkpoint was written; the status is 143.
    """
    context = phase.context
    step, shrinking = phase.make_step(phase.likelihood()), phase.shrinking()
    with startup.CompileTime() as compile_time:
        start, program = _start(phase, step, shrinking, start_params, given)
        snapshots = [take_snapshot(0, start.params, context.recipe)]
    startup.release_memory()
    failures: list[str | None] = [None] * len(context.seeds)
    restored = context.checkpoints.restore(phase.name, start)
    if restored is not None:
        start, failures = restored.state, restored.facts["failures"]
        snapshots = [Snapshot.from_arrays(epoch, arrays) for epoch, arrays in sorted(restored.frames.items())]
    if context.profile_steps and not phase.fine_tunes:
        _profile(phase, step, start)
    progress = _Training(phase, compile_time, start, failures, snapshots)
    states = progress.run(step, shrinking, program, restored)
    context.logs.flush()
    if context.mesh is not None:
        states = bcdl_jax.train.fetch(states)
    params = states.params
    if phase.fine_tunes:
        params = jax.jit(bcdl_jax.clip_variances)(bcdl_jax.train.averaged_params(states.optimizer_state))
    return PhaseResult(params, progress.failures, progress.snapshots)


def _start(
    phase: Phase, step: Callable[..., Any], shrinking: Any, start_params: StartParams, given: Any
) -> tuple[bcdl_jax.train.TrainState, Callable[..., Any] | None]:
    """The stacked start states, and the program of the first epochs, which is compiled in a thread meanwhile."""
    context, optimizer = phase.context, phase.optimizer()

    # It runs once: optimised compilation would take longer than it saves.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @jax.vmap
    def make_start(seed: jax.Array, given: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), 1 + phase.fine_tunes)
        return bcdl_jax.train.create_train_state(start_params(seed, given), optimizer, key)

    given, seeds = devices.same_everywhere(given), np.array(context.seeds)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        compiling = None
        # A resumed or pruned network may start at a smaller size, which the full-size program does not fit.
        if context.mesh is None and not context.checkpoints.resumed and (shrinking is None or not phase.fine_tunes):
            shapes = jax.eval_shape(make_start, seeds, given)
            compiling = thread.submit(bcdl_jax.train.compile_ensemble, shapes, phase.train, step=step, **phase.how())
        start = make_start(seeds, given)
        start = start.replace(params=devices.same_everywhere(start.params))
        if context.mesh is not None:
            start = bcdl_jax.train.place_state(start, context.mesh)
        return start, None if compiling is None else compiling.result()


def _profile(phase: Phase, step: Any, states: Any) -> None:
    """Writes a profile of a few training steps: of all seeds at once, or of the first seed where they train in turn."""
    recipe, context = phase.context.recipe, phase.context
    train_steps: Any = bcdl_jax.train.make_train_loop(step, batch_size=recipe.batch_size, shards=phase.shards)
    if recipe.in_turn:
        states = bcdl_jax.train.select_seed(states, 0)
    else:
        train_steps = bcdl_jax.train.each_seed(train_steps)
    few_steps = jax.jit(train_steps)
    profile(context.out, lambda: few_steps(states, phase.train, np.int32(context.profile_steps)))


class _Training:
    """A phase under way: its states, failures and snapshots, with the logs and checkpoints after each epoch."""

    def __init__(
        self,
        phase: Phase,
        compile_time: startup.CompileTime,
        start: bcdl_jax.train.TrainState,
        failures: list[str | None],
        snapshots: list[Snapshot],
    ):
        self.phase, self.context, self.compile_time = phase, phase.context, compile_time
        self.states, self.failures, self.snapshots = start, failures, snapshots
        self.done = int(start.step.max()) // phase.steps_per_epoch

    def run(
        self,
        step: Callable[..., Any],
        shrinking: Any,
        program: Callable[..., Any] | None,
        restored: Restored | None,
    ) -> bcdl_jax.train.TrainState:
        """Trains to the end of the phase, or until a signal comes; returns the states."""
        phase, context = self.phase, self.context
        with (
            Progress(phase.epochs, phase.title, self.done) as progress,
            interruption.noted() as stop,
            self.compile_time,
        ):
            watch = startup.FirstStep(stop)
            epochs = bcdl_jax.train.train_ensemble(
                self.states,
                phase.train,
                step=step,
                epochs=phase.epochs,
                validation_error=functools.partial(error_percent, context.model),
                validation_data=phase.validation,
                seeds=context.seeds,
                first_epoch=phase.first_epoch,
                thresholds=phase.thresholds_for_reports(),
                score=score_of(context.recipe),
                shrinking=shrinking,
                stop=watch,
                program=program,
                **phase.how(),
            )
            self._follow(epochs, progress, watch)
            complete = self.done == phase.epochs or all(self.failures)
            saved = None
            received = devices.same_facts(stop.signal)  # process 0 decides
            if received or (context.checkpoints.every and not (restored is not None and restored.complete)):
                saved = self._save(complete)
            if received == signal.SIGINT:
                files.write_arrays(context.out / INTERRUPTED, self.states.params)
            stop_for(received, saved)
        return self.states

    def _follow(self, epochs: Any, progress: Progress, watch: startup.FirstStep) -> None:
        """Logs each epoch, takes snapshots and writes checkpoints."""
        phase, context = self.phase, self.context
        every = math.ceil(phase.epochs / (_MOST_FRAMES - 1))
        clock, compiled = time.perf_counter(), self.compile_time.seconds
        taken, announced = int(self.states.step.sum()), False
        for self.states, report in epochs:
            if report is None:
                break
            if not announced:
                first_step = "" if phase.fine_tunes else watch.sentence()
                progress.write(f"{phase.title}: {first_step}{self.compile_time.sentence()}")
                announced = True
            progress.show(report)
            seconds = time.perf_counter() - clock - (self.compile_time.seconds - compiled)
            before, taken = taken, int(self.states.step.sum())
            reports = [dataclasses.asdict(seed_report) for seed_report in report.reports]
            images = (taken - before) * context.recipe.batch_size
            context.logs.log_epoch(phase.name, reports, images_per_second=images / seconds)
            self.failures = [seed_report.failure for seed_report in report.reports]
            self.done = report.reports[0].epoch - phase.first_epoch + 1
            if self.done % every == 0 or self.done == phase.epochs:
                self.snapshots.append(take_snapshot(report.reports[0].epoch, self.states.params, context.recipe))
            if context.checkpoints.every and self.done % context.checkpoints.every == 0 and self.done < phase.epochs:
                self._save()
            if report.news:
                jax.clear_caches()  # a network that has shrunk leaves a hundred megabytes of programs and traces
            if self.compile_time.seconds > compiled:
                startup.release_memory()
            clock, compiled = time.perf_counter(), self.compile_time.seconds

    def _save(self, complete: bool = False) -> Path | None:
        frames = {} if self.phase.fine_tunes else {frame.epoch: frame.to_arrays() for frame in self.snapshots}
        facts = {"failures": self.failures, "step": int(self.states.step.max())}
        return self.context.checkpoints.save(
            self.phase.name, self.states, facts=facts, frames=frames, complete=complete
        )
