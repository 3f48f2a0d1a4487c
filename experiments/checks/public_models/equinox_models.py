"""Models of Equinox. Its layers take one example, so the models are mapped over the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from experiments.checks.public_models.model import PublicModel, Units, sequences

WIDTH, HEADS, CLASSES = 24, 4, 5


class Recurrent(eqx.Module):
    """A recurrent cell over a sequence."""

    cell: Any
    last: eqx.nn.Linear

    def __init__(self, cell: Any, key: jax.Array):
        keys = jax.random.split(key)
        self.cell, self.last = cell(7, WIDTH, key=keys[0]), eqx.nn.Linear(WIDTH, CLASSES, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        zeros = jnp.zeros(WIDTH)
        is_lstm = isinstance(self.cell, eqx.nn.LSTMCell)
        start: Any = (zeros, zeros) if is_lstm else zeros
        end, _ = jax.lax.scan(lambda state, step: (self.cell(step, state), None), start, x)
        return self.last(end[0] if is_lstm else end)


class Attention(eqx.Module):
    """A block of a transformer."""

    first: eqx.nn.Linear
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    last: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(7, WIDTH, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[1])
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.last = eqx.nn.MLP(WIDTH, CLASSES, 2 * WIDTH, 1, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.vmap(self.first)(x)
        normed = jax.vmap(self.norm)(x)
        x += self.attention(normed, normed, normed)
        return self.last(x.mean(0))


def convolutions(key: jax.Array) -> eqx.nn.Sequential:
    """Two convolutions with pooling, and two dense layers. The channels come first."""
    keys = jax.random.split(key, 4)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 12, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(12, 16, 3, key=keys[1]),
            eqx.nn.Lambda(jax.nn.leaky_relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(64, WIDTH, key=keys[2]),
            eqx.nn.Lambda(jax.nn.softplus),
            eqx.nn.Linear(WIDTH, CLASSES, key=keys[3]),
        ]
    )


def mapped(module: Any, inputs: jax.Array, **hints: Any) -> PublicModel:
    """A model of a module for one example. Its params are the module's arrays in the module's own tree."""
    params, static = eqx.partition(module, eqx.is_array)

    def apply(tree: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(tree, static))(x)

    return PublicModel(apply, params, (inputs,), output_axis=0, kept=frozenset([CLASSES]), **hints)


def models() -> dict[str, Callable[[], PublicModel]]:
    """The models by name, as functions that make them."""
    key = jax.random.key(0)
    steps = sequences(6, 7)
    pictures = jax.random.normal(key, (steps.shape[0], 3, 8, 8))
    gates = {"units": {4 * WIDTH: Units(repeats=4), 3 * WIDTH: Units(repeats=3)}}
    return {
        "mlp": lambda: mapped(eqx.nn.MLP(7, CLASSES, WIDTH, 2, key=key), steps[:, 0]),
        "convolutions": lambda: mapped(convolutions(key), pictures),
        "lstm": lambda: mapped(Recurrent(eqx.nn.LSTMCell, key), steps, **gates),
        "gru": lambda: mapped(Recurrent(eqx.nn.GRUCell, key), steps, **gates),
        "attention": lambda: mapped(Attention(key), steps, units={WIDTH: Units(block=WIDTH // HEADS)}),
    }
