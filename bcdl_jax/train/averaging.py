"""A running average of the parameters, as an optax transform."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class ParamsEmaState(NamedTuple):
    """Attributes: steps: updates so far, int32. average: of the params after each of them."""

    steps: jax.Array
    average: PyTree


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the params; updates pass through it unchanged.

    To be chained last, so that it sees the final updates: ``optax.chain(optax.adam(1e-3), params_ema(0.999))``. At a constant
    learning rate the average lies closer to the optimum than the params, which wander around it [Polyak and Juditsky 1992]. It is
    in the optimiser's state, see ``averaged_params``.

    Args:
      decay: weight of the past, from 0 to less than 1. Over the first updates it is steps / (steps + 1) while that is less, so that the
        start values do not linger.

    Raises:
      ValueError: ``decay`` is out of range; (at an update) no params were passed.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be at least 0 and less than 1.")

    def init(params: PyTree) -> ParamsEmaState:
        # A copy, since the state may be donated together with the params.
        return ParamsEmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: PyTree, state: ParamsEmaState, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params is None; params_ema needs the params at each update.")
        weight = jnp.minimum(decay, state.steps / (state.steps + 1))
        average = jax.tree.map(
            lambda old, value, move: (weight * old + (1 - weight) * (value + move)).astype(old.dtype),
            state.average,
            params,
            updates,
        )
        return updates, ParamsEmaState(state.steps + 1, average)

    return optax.GradientTransformation(init, update)


def averaged_params(optimizer_state: PyTree) -> PyTree:
    """The average out of an optimiser's state.

    Raises:
      ValueError: there is none, or more than one.
    """
    states = [
        part
        for part in jax.tree.leaves(optimizer_state, is_leaf=lambda part: isinstance(part, ParamsEmaState))
        if isinstance(part, ParamsEmaState)
    ]
    if len(states) != 1:
        raise ValueError(f"optimizer_state holds {len(states)} averages of params; it must hold one, of params_ema.")
    return states[0].average
