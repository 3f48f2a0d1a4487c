"""Running a phase of all seeds, from its start or from its last checkpoint."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import bcdl_jax
from experiments.io.logs import profile
from experiments.pipeline.phase import Phase
from experiments.pipeline.phase_loop import PhaseLoop
from experiments.pipeline.snapshots import Snapshot, take_snapshot
from experiments.runtime import devices, memory, timing

# From a seed and its given tree to the params that a phase starts from.
StartParams = Callable[[jax.Array, Any], Any]


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """The end of a phase.

    Attributes:
      params: Stacked params of all seeds.
      failures: The failure message of each seed, or None.
      snapshots: The frames of the pictures.
    """

    params: Any
    failures: list[str | None]
    snapshots: list[Snapshot]


def run_phase(phase: Phase, start_params: StartParams, given: Any) -> PhaseResult:
    """Runs one phase of all seeds, from its last checkpoint if there is one.

    Args:
      phase: The phase.
      start_params: A function (seed, given) that returns the params of one seed that the phase starts from.
      given: A stacked tree, an entry per seed.

    Raises:
      KeyboardInterrupt: Ctrl-C came, and a checkpoint was written.
      SystemExit: SIGTERM came, and a checkpoint was written; the status is 143.
    """
    context = phase.context
    step, shrinking = phase.make_step(phase.likelihood()), phase.shrinking()
    with timing.CompileTime() as compile_time:
        start, program = _start(phase, step, shrinking, start_params, given)
        snapshots = [take_snapshot(0, start.params, context.recipe)]
    memory.release_memory()
    failures: list[str | None] = [None] * len(context.seeds)
    restored = context.checkpoints.restore(phase.name, start)
    if restored is not None:
        start, failures = restored.state, restored.facts["failures"]
        snapshots = [Snapshot.from_arrays(epoch, arrays) for epoch, arrays in sorted(restored.frames.items())]
    if context.profile_steps and not phase.fine_tunes:
        _profile(phase, step, start)
    loop = PhaseLoop(phase, compile_time, start, failures, snapshots)
    states = loop.run(step, shrinking, program, restored)
    context.logs.flush()
    if context.mesh is not None:
        states = bcdl_jax.train.fetch(states)
    params = states.params
    if phase.fine_tunes:
        params = jax.jit(bcdl_jax.clip_variances)(bcdl_jax.train.averaged_params(states.optimizer_state))
    return PhaseResult(params, loop.failures, loop.snapshots)


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
            compiling = thread.submit(
                bcdl_jax.train.compile_ensemble, shapes, phase.train, step=step, **phase.batch_arguments()
            )
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
