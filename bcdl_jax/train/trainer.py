"""The trainer of an ensemble: it advances runs by whole epochs in chunks of steps, and shrinks their networks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bcdl_jax._tree import PyTree
from bcdl_jax.train.batches import count_examples, steps_per_epoch
from bcdl_jax.train.loop import make_train_loop
from bcdl_jax.train.mesh import jit_step, replicated
from bcdl_jax.train.seeds import each_seed
from bcdl_jax.train.shrinking_config import ShrinkingConfig
from bcdl_jax.train.state import TrainState, TrainStep
from bcdl_jax.train.while_shrinking import ShrunkTraining, leave_out_pruned, mask_further, prune_and_shrink

# The time between two calls of ``stop``. Each chunk draws the order of the examples anew: a chunk of this length makes that cheap, and the
# run stops soon after a signal.
_CHUNK_SECONDS = 2.0

# program(state, data, count) -> (state, metrics), compiled.
Program = Callable[..., Any]


def compile_steps(
    state: TrainState, data: PyTree, step: TrainStep, batch_size: int, shards: int, *, stacked: bool
) -> Program:
    """Compiles the loop over the steps of an epoch, for a state of one seed or for stacked states."""
    train_steps: Any = make_train_loop(step, batch_size=batch_size, shards=shards)
    if stacked:
        on_mesh = replicated(state) is not None
        train_steps = jax.vmap(train_steps, in_axes=(0, None, None)) if on_mesh else each_seed(train_steps)
    jitted: Any = jit_step(train_steps, state)
    return jitted.lower(state, data, np.int32(1)).compile()


@dataclasses.dataclass(eq=False)
class Run:
    """The training that one program advances: the training of one seed, or of all seeds, stacked.

    Attributes:
      state: The current state, at full size or small.
      shrunk: The shrunk training that ``state`` belongs to, or None at full size.
      program: The compiled program for the current size, or None before the first use.
      seconds_per_step: The duration of a step in the last chunk, or None before the first chunk of this size.
      shrunk_error: The validation error, compiled for the current size, or None before the first use.
      start_checked: True once the masks that the run started with are left out.
    """

    state: TrainState
    shrunk: ShrunkTraining | None = None
    program: Program | None = None
    seconds_per_step: float | None = None
    shrunk_error: Callable[[PyTree, PyTree], jax.Array] | None = None
    start_checked: bool = False

    def full_state(self) -> TrainState:
        """The current state at full size."""
        return self.state if self.shrunk is None else self.shrunk.expand(self.state)

    def continue_with(self, shrunk: ShrunkTraining) -> None:
        """Replaces the training by a smaller one."""
        self.state, self.shrunk = shrunk.state, shrunk
        self.program = self.seconds_per_step = self.shrunk_error = None

    def steps_taken(self) -> int | None:
        """The number of steps taken, the smallest one among seeds that are not halted. None if all seeds are halted."""
        steps, halted = jax.device_get((self.state.step, self.state.halted))
        moving = np.atleast_1d(steps)[~np.atleast_1d(halted)]
        return int(moving.min()) if moving.size else None


class Trainer:
    """Advances runs by whole epochs, chunk by chunk. All runs share the step, the data and the configuration."""

    def __init__(
        self,
        step: TrainStep,
        data: PyTree,
        batch_size: int,
        shards: int,
        *,
        stacked: bool,
        shrinking: ShrinkingConfig | None,
        stop: Callable[[], bool] | None,
        program: Program | None,
    ):
        self.data, self.batch_size, self.shards = data, batch_size, shards
        self.steps = steps_per_epoch(count_examples(data), batch_size, shards)
        self.stacked, self.shrinking = stacked, shrinking
        self._step, self._stop = step, stop
        self._full_size_program = program

    def epoch(self, runs: Sequence[Run]) -> int | None:
        """The epoch, from 0, of the run that has taken the fewest steps. Halted seeds do not count; None if all seeds are halted."""
        steps = [steps for run in runs if (steps := run.steps_taken()) is not None]
        return min(steps) // self.steps if steps else None

    def advance(self, run: Run, epochs: int) -> bool:
        """Trains a run until this number of epochs is complete, or all its seeds are halted. False if ``stop`` ended it earlier."""
        while (taken := run.steps_taken()) is not None and taken < epochs * self.steps:
            program = run.program or self._compile(run)
            count = self._chunk_steps(run, epochs * self.steps - taken)
            if count == 0:
                return False
            start = time.perf_counter()
            run.state, _ = program(run.state, self.data, np.int32(count))
            jax.block_until_ready(run.state.step)
            run.seconds_per_step = (time.perf_counter() - start) / count
        return True

    def check_pruning(self, run: Run, epochs: int) -> str | None:
        """Makes a pruning check if one is due after this number of epochs. Returns a sentence on the new size if the network shrinks."""
        assert self.shrinking is not None
        if not self.shrinking.is_due(epochs) or bool(run.state.halted):
            return None
        if not self.shrinking.remove_masked:
            run.state = mask_further(self.shrinking, run.state)
            return None
        self._leave_out_start(run)
        shrunk = prune_and_shrink(self.shrinking, run.full_state(), self._example_batch(), run.shrunk)
        if shrunk is None:
            return None
        run.continue_with(shrunk)
        return str(shrunk)

    def _compile(self, run: Run) -> Program:
        self._leave_out_start(run)
        if run.shrunk is None and self._full_size_program is not None:
            run.program = self._full_size_program
            return run.program
        step = self._step if run.shrunk is None else run.shrunk.step
        run.program = compile_steps(run.state, self.data, step, self.batch_size, self.shards, stacked=self.stacked)
        if run.shrunk is None:
            self._full_size_program = run.program
        return run.program

    def _leave_out_start(self, run: Run) -> None:
        """Leaves out, once, the groups that were already masked when the run started."""
        if self.shrinking is None or not self.shrinking.remove_masked or run.start_checked:
            return
        run.start_checked = True
        shrunk = leave_out_pruned(self.shrinking, run.state, self._example_batch())
        if shrunk is not None:
            run.continue_with(shrunk)

    def _example_batch(self) -> PyTree:
        return jax.tree.map(lambda array: array[: self.batch_size], self.data)

    def _chunk_steps(self, run: Run, left: int) -> int:
        """The number of steps of the next chunk, the same in all processes; 0 to stop. ``left`` is the number of steps that remain."""
        if self._stop is None:
            return left
        if self._stop():
            count = 0
        elif run.seconds_per_step is None:
            count = 1
        else:
            count = min(left, max(1, int(_CHUNK_SECONDS / run.seconds_per_step)))
        if jax.process_count() > 1:
            count = int(multihost_utils.broadcast_one_to_all(np.int32(count)))
        return count
