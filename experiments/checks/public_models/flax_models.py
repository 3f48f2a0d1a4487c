"""Models of Flax's own layers: Linen and NNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from experiments.checks.public_models.model import PublicModel, images, quick_jit, sequences

WIDTH, HEADS, CLASSES = 24, 4, 5
KEPT = frozenset([CLASSES])
AVERAGES = ("batch_stats", "'mean'", "'var'")


class LinenMLP(nn.Module):
    """Two hidden layers and an output layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(CLASSES)(x)


class LinenConvolutions(nn.Module):
    """Convolutions with batch norms, one of them with a window for each channel, and a dense layer behind a flatten."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(12, (3, 3))(x)))
        x = nn.avg_pool(nn.relu(nn.Conv(12, (3, 3), feature_group_count=12)(x)), (2, 2), (2, 2))
        x = nn.relu(nn.GroupNorm(num_groups=None, group_size=1)(nn.Conv(16, (1, 1))(x)))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


class LinenRecurrent(nn.Module):
    """An LSTM and a GRU over a sequence."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.RNN(nn.LSTMCell(WIDTH))(x)  # type: ignore[assignment]
        x = nn.RNN(nn.GRUCell(WIDTH))(x)  # type: ignore[assignment]
        return nn.Dense(CLASSES)(x[:, -1])


class LinenBlock(nn.Module):
    """A block of a transformer, as ``nn.scan`` expects it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        attended = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(attended)))
        return attended + nn.Dense(WIDTH)(hidden), None


class LinenTransformer(nn.Module):
    """Two blocks one after the other."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH)(x)
        for _ in range(2):
            x, _ = LinenBlock()(x)
        return nn.Dense(CLASSES)(x.mean(1))


class LinenScan(nn.Module):
    """Three blocks whose weights are stacked, under ``nn.scan``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks()(nn.Dense(WIDTH)(x), None)
        return nn.Dense(CLASSES)(x.mean(1))


class LinenBfloat16(nn.Module):
    """Dense layers that compute in bfloat16, with a last layer in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.relu(nn.Dense(4 * WIDTH, dtype=jnp.bfloat16)(x))
        return nn.Dense(CLASSES)(x.astype(jnp.float32))


class NnxMLP(nnx.Module):
    """A hidden layer with a batch norm, and an output layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(7, WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.norm(self.first(x))))


class NnxTransformer(nnx.Module):
    """A block of a transformer."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Linear(7, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)])
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embedding(x)
        x += self.attention(self.norms[0](x))
        x += self.down(nnx.silu(self.up(self.norms[1](x))))
        return self.last(x.mean(1))


class NnxRecurrent(nnx.Module):
    """An LSTM over a sequence."""

    def __init__(self, rngs: nnx.Rngs):
        self.cells = nnx.RNN(nnx.LSTMCell(7, WIDTH, rngs=rngs))
        self.last = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.cells(x)[:, -1])


def linen(module: nn.Module, inputs: jax.Array, **hints: Any) -> PublicModel:
    """A model of a Linen module."""
    variables = quick_jit(module.init)(jax.random.key(0), inputs)
    return PublicModel(module.apply, variables, (inputs,), kept=KEPT, averages=AVERAGES, is_flax=True, **hints)


def of_nnx(module: type[nnx.Module], inputs: jax.Array, **hints: Any) -> PublicModel:
    """A model of an NNX module. Its params are nested dictionaries; keys of random numbers stay in the function."""
    made: Any = module
    graph, *states = nnx.split(made(rngs=nnx.Rngs(0)), (nnx.Param, nnx.BatchStat), ...)
    params, rest = states

    def apply(tree: Any, x: jax.Array) -> jax.Array:
        state = nnx.State(params)
        nnx.replace_by_pure_dict(state, tree)
        return nnx.merge(graph, state, rest, copy=True)(x)

    return PublicModel(apply, nnx.to_pure_dict(params), (inputs,), kept=KEPT, averages=AVERAGES, is_flax=True, **hints)


def models() -> dict[str, Callable[[], PublicModel]]:
    """The models by name, as functions that make them."""
    vectors, steps = sequences(7, 1)[..., 0], sequences(6, 7)
    return {
        "linen_mlp": lambda: linen(LinenMLP(), vectors),
        "linen_convolutions": lambda: linen(LinenConvolutions(), images(8)),
        "linen_lstm_gru": lambda: linen(LinenRecurrent(), steps),
        "linen_transformer": lambda: linen(LinenTransformer(), steps, heads=HEADS),
        "linen_scan": lambda: linen(LinenScan(), steps, heads=HEADS),
        "linen_bfloat16": lambda: linen(LinenBfloat16(), vectors, tolerance=0.05),
        "nnx_mlp": lambda: of_nnx(NnxMLP, vectors),
        "nnx_transformer": lambda: of_nnx(NnxTransformer, steps, heads=HEADS),
        "nnx_lstm": lambda: of_nnx(NnxRecurrent, steps),
    }
