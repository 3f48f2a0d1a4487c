"""Many settings at once: learning rates, KL weights and whatever else is a number, one per run of an ensemble.

    def make_step(setting):
        optimizer = optax.adam(setting["learning_rate"])
        return bcdl_jax.train.make_train_step(nll, optimizer, num_examples=n, kl_weight=setting["kl_weight"])


    states = [
        bcdl_jax.train.with_setting(state, {"learning_rate": rate, "kl_weight": weight})
        for rate in (1e-3, 3e-3)
        for weight in (0.1, 1.0)
    ]
    step = bcdl_jax.train.make_step_by_setting(make_step)
    train = jax.jit(jax.vmap(bcdl_jax.train.make_train_epoch(step, batch_size=128), in_axes=(0, None)))
    states, metrics = train(bcdl_jax.train.stack_seeds(states), data)

or the same ``step`` in ``train_ensemble``, with a report for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bcdl_jax._tree import PyTree
from bcdl_jax.train.step import Metrics, TrainState


class SettingState(NamedTuple):
    """In place of an optimiser's state, that state and the setting of the run, so that both are stacked, saved and cut together."""

    setting: PyTree
    optimizer_state: optax.OptState


def with_setting(state: TrainState, setting: PyTree) -> TrainState:
    """A state, from ``create_train_state``, that carries the setting of its run.

    Args:
      state: of one run. The state of the optimiser must not depend on the setting.
      setting: tree of numbers.
    """
    numbers = jax.tree.map(jnp.asarray, setting)
    return state.replace(optimizer_state=SettingState(numbers, state.optimizer_state))


def make_step_by_setting(
    make_step: Callable[[PyTree], Callable[[TrainState, Any], tuple[TrainState, Metrics]]],
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The training step of states that carry a setting.

    Args:
      make_step: setting -> ``step(state, batch)``, mostly by ``make_train_step``. The numbers of the setting are traced: they may be
        used in arithmetic, as a learning rate, within a schedule, but not in an ``if``.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        setting, optimizer_state = state.optimizer_state
        after, metrics = make_step(setting)(state.replace(optimizer_state=optimizer_state), batch)
        return after.replace(optimizer_state=SettingState(setting, after.optimizer_state)), metrics

    return step
