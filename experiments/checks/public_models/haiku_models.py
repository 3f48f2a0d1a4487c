"""Models of dm-haiku."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax

from experiments.checks.public_models.model import PublicModel, Units, images, quick_jit, sequences

WIDTH, HEADS, CLASSES = 24, 4, 5


def transformed(forward: Callable[[jax.Array, bool], jax.Array], inputs: jax.Array, **hints: Any) -> PublicModel:
    """A model of a function that calls Haiku's modules. Its params hold the weights and the averages of norms.

    Args:
      forward: The function of the inputs and of a flag for training.
      inputs: The inputs.
      **hints: Further fields of the model.
    """
    both = hk.transform_with_state(forward)
    params, state = quick_jit(lambda key, x: both.init(key, x, True))(jax.random.key(0), inputs)

    def apply(tree: Any, x: jax.Array) -> jax.Array:
        return both.apply(tree["params"], tree["state"], None, x, False)[0]

    tree = {"params": params, "state": state}
    return PublicModel(apply, tree, (inputs,), kept=frozenset([CLASSES]), averages=("'state'",), **hints)


def resnet(x: jax.Array, is_training: bool) -> jax.Array:
    """``hk.nets.ResNet`` with one bottleneck block in each group."""
    widths = {"bottleneck": False, "resnet_v2": True, "channels_per_group": (8, 12, 16, 20)}
    return hk.nets.ResNet((1, 1, 1, 1), CLASSES, **widths)(x, is_training)


def mobilenet(x: jax.Array, is_training: bool) -> jax.Array:
    """``hk.nets.MobileNetV1`` with four blocks."""
    return hk.nets.MobileNetV1((1, 2, 1, 2), (16, 24, 24, 32), CLASSES)(x, is_training)


def lstm(x: jax.Array, is_training: bool) -> jax.Array:
    """An LSTM over a sequence."""
    core = hk.LSTM(WIDTH)
    outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(CLASSES)(outputs[:, -1])


def gru(x: jax.Array, is_training: bool) -> jax.Array:
    """A GRU over a sequence."""
    core = hk.GRU(WIDTH)
    outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
    return hk.Linear(CLASSES)(outputs[:, -1])


def attention(x: jax.Array, is_training: bool) -> jax.Array:
    """Attention with a residual connection and an MLP."""
    scale = hk.initializers.VarianceScaling(1.0)
    x = hk.Linear(WIDTH)(x)
    x += hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=scale, model_size=WIDTH)(x, x, x)
    x = hk.LayerNorm(-1, True, True)(x)
    return hk.nets.MLP((2 * WIDTH, CLASSES))(x.mean(1))


def models() -> dict[str, Callable[[], PublicModel]]:
    """The models by name, as functions that make them."""
    steps = sequences(6, 7)
    return {
        "resnet": lambda: transformed(resnet, images(32)),
        "mobilenet_v1": lambda: transformed(mobilenet, images(16)),
        "lstm": lambda: transformed(lstm, steps, units={4 * WIDTH: Units(repeats=4)}),
        "gru": lambda: transformed(gru, steps, units={3 * WIDTH: Units(repeats=3), 2 * WIDTH: Units(repeats=2)}),
        "attention": lambda: transformed(attention, steps, units={WIDTH: Units(block=WIDTH // HEADS)}),
    }
