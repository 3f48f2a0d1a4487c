"""The epochs of a phase, with logs, snapshots and checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import bcdl_jax
from experiments.io import files
from experiments.io.checkpoints import Restored
from experiments.pipeline.context import INTERRUPTED
from experiments.pipeline.measures import error_percent, score_of
from experiments.pipeline.phase import Phase
from experiments.pipeline.progress import Progress
from experiments.pipeline.snapshots import Snapshot, take_snapshot
from experiments.pipeline.stopping import stop_for
from experiments.runtime import devices, interruption, memory, timing

_MOST_FRAMES = 60


class PhaseLoop:
    """A phase under way: its states, failures and snapshots, with the logs and checkpoints after each epoch."""

    def __init__(
        self,
        phase: Phase,
        compile_time: timing.CompileTime,
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
            watch = timing.FirstStep(stop)
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
                **phase.batch_arguments(),
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

    def _follow(self, epochs: Any, progress: Progress, watch: timing.FirstStep) -> None:
        """Logs each epoch, takes snapshots and writes checkpoints."""
        phase, context = self.phase, self.context
        every = math.ceil(phase.epochs / (_MOST_FRAMES - 1))
        clock, compiled = time.perf_counter(), self.compile_time.seconds
        taken, announced = int(self.states.step.sum()), False
        for states, report in epochs:
            self.states = states
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
            if report.shrink_messages:
                jax.clear_caches()  # a network that has shrunk leaves a hundred megabytes of programs and traces
            if self.compile_time.seconds > compiled:
                memory.release_memory()
            clock, compiled = time.perf_counter(), self.compile_time.seconds

    def _save(self, complete: bool = False) -> Path | None:
        frames = {} if self.phase.fine_tunes else {frame.epoch: frame.to_arrays() for frame in self.snapshots}
        facts = {"failures": self.failures, "step": int(self.states.step.max())}
        return self.context.checkpoints.save(
            self.phase.name, self.states, facts=facts, frames=frames, complete=complete
        )
