"""Many settings at once: one learning rate, KL weight or other number per run of an ensemble.

    def make_step(setting):
        optimizer = optax.adam(setting["learning_rate"])
        return bcdl_jax.train.make_train_step(nll, optimizer, num_examples=n, kl_weight=setting["kl_weight"])


    states = [
        bcdl_jax.train.with_setting(state, {"learning_rate": rate, "kl_weight": weight})
        for rate in (1e-3, 3e-3)
        for weight in (0.1, 1.0)
    ]
    step = bcdl_jax.train.make_step_by_setting(make_step)
    epoch = bcdl_jax.train.make_train_epoch(step, batch_size=128)
    train = jax.jit(bcdl_jax.train.each_seed(epoch))
    states, metrics = train(bcdl_jax.train.stack_seeds(states), data)

``train_ensemble`` takes the same ``step`` and reports on every setting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bcdl_jax._tree import PyTree
from bcdl_jax.train.state import Metrics, TrainState, TrainStep


class SettingState(NamedTuple):
    """The state of an optimiser together with the setting of its run, so that both are stacked, saved and cut together."""

    setting: PyTree
    optimizer_state: optax.OptState


def with_setting(state: TrainState, setting: PyTree) -> TrainState:
    """A state that carries the setting of its run. It replaces an earlier setting.

    Args:
      state: The state of one run, from ``create_train_state``. The state of its optimiser must not depend on the setting.
      setting: A tree of numbers.
    """
    numbers, carried = jax.tree.map(jnp.asarray, setting), state.optimizer_state
    optimizer_state = carried.optimizer_state if isinstance(carried, SettingState) else carried
    return state.replace(optimizer_state=SettingState(numbers, optimizer_state))


def setting_of(state: TrainState) -> PyTree:
    """The setting that a state carries."""
    return state.optimizer_state.setting


def make_step_by_setting(make_step: Callable[[PyTree], TrainStep]) -> TrainStep:
    """The training step for states that carry a setting.

    Args:
      make_step: A function from the setting to ``step(state, batch)``, such as a call of ``make_train_step``. The numbers of the setting
        are traced: they may appear in arithmetic, in a learning rate and in a schedule, but not in an ``if``.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        setting, optimizer_state = state.optimizer_state
        after, metrics = make_step(setting)(state.replace(optimizer_state=optimizer_state), batch)
        return after.replace(optimizer_state=SettingState(setting, after.optimizer_state)), metrics

    return step
