"""A moving average of the params, as an optax transform."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bcdl_jax._arrays import in_float32
from bcdl_jax._tree import PyTree


class ParamsEmaState(NamedTuple):
    """The state of ``params_ema``.

    Attributes:
      steps: The number of updates so far, int32.
      average: The average of the params after each update, a tree like the params. Half-precision arrays have averages in float32.
    """

    steps: jax.Array
    average: PyTree


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the params in the optimiser's state. The updates themselves stay unchanged.

    Chain it last, so that it receives the final updates: ``optax.chain(optax.adam(1e-3), params_ema(0.999))``. With a constant learning
    rate the params move around the optimum, and their average lies closer to it [PJ92]. ``averaged_params`` reads the
    average.

    Args:
      decay: The weight of the past, from 0 to less than 1. The first updates use the smaller weight steps / (steps + 1), so that the
        start values soon lose their influence.

    Raises:
      ValueError: ``decay`` is out of range. Or (at an update) ``params`` is None.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; it must be at least 0 and less than 1.")

    def init(params: PyTree) -> ParamsEmaState:
        # A copy, since the state may be donated together with the params.
        return ParamsEmaState(jnp.zeros((), jnp.int32), jax.tree.map(lambda leaf: _wide(jnp.array(leaf)), params))

    def update(updates: PyTree, state: ParamsEmaState, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params is None; params_ema needs the params at each update.")
        weight = jnp.minimum(decay, state.steps / (state.steps + 1))
        average = jax.tree.map(
            lambda old, value, move: (weight * old + (1 - weight) * (value + move)).astype(old.dtype),
            state.average,
            jax.tree.map(_wide, params),
            updates,
        )
        return updates, ParamsEmaState(state.steps + 1, average)

    return optax.GradientTransformation(init, update)


def averaged_params(optimizer_state: PyTree) -> PyTree:
    """The average of the params that an optimiser's state holds.

    Args:
      optimizer_state: The state of an optimiser with one ``params_ema``.

    Raises:
      ValueError: The state holds no average, or more than one.
    """
    states = [
        part
        for part in jax.tree.leaves(optimizer_state, is_leaf=lambda part: isinstance(part, ParamsEmaState))
        if isinstance(part, ParamsEmaState)
    ]
    if len(states) != 1:
        raise ValueError(
            f"optimizer_state holds {len(states)} averages of params; it must hold exactly one, from params_ema."
        )
    return states[0].average


def _wide(leaf: Any) -> jax.Array:
    """The array in which an average moves: small updates of a half-precision average would be rounded away."""
    array = jnp.asarray(leaf)
    return in_float32(array) if jnp.issubdtype(array.dtype, jnp.floating) else array
