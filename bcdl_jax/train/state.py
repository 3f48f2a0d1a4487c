"""The state of a training run.

A run continues from its state alone: ``state.step`` determines the epoch, the position within the epoch, the order of the examples, the
noise and the schedules. A run that continues from a saved state gives the same result bit by bit, also from the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bcdl_jax._tree import PyTree, is_key
from bcdl_jax.priors.posterior import variational_layers
from bcdl_jax.train.parts import part_names

# (params, batch, key) -> the mean negative log-likelihood of the batch in nats, a scalar.
NegativeLogLikelihood = Callable[[PyTree, Any, jax.Array], jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a training step reads and returns. States that are stacked along a new leading axis train many seeds at once.

    Attributes:
      step: The number of steps taken, int32.
      params: A tree with variational layers.
      optimizer_state: The state of the optax optimiser.
      key: The PRNG key from which all noise and the order of the examples are derived.
      halted: True once a loss or an update was not finite. A halted state stays at the values before that step.
      failed_parts: A mask of the parts of the params whose update was not finite at that step, [parts] of bool, in the order of ``part_names``.
      metric_sums: The sum of each metric over the steps of the current epoch, float32.
    """

    step: jax.Array
    params: PyTree
    optimizer_state: optax.OptState
    key: jax.Array
    halted: jax.Array
    failed_parts: jax.Array
    metric_sums: Metrics


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def create_train_state(params: PyTree, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step.

    Args:
      params: A tree with variational layers.
      optimizer: The optax optimiser of the training step.
      key: A PRNG key, typed or raw.

    Raises:
      ValueError: ``params`` holds no variational layer, or ``key`` is not a PRNG key.
    """
    variational_layers(params)
    if not _is_prng_key(key):
        raise ValueError(f"key is {key!r}; it must be a PRNG key, such as jax.random.key(0).")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_state=optimizer.init(params),
        key=key,
        halted=jnp.zeros((), bool),
        failed_parts=jnp.zeros((len(part_names(params)),), bool),
        metric_sums={name: jnp.zeros((), jnp.float32) for name in ("loss", "nll", "kl")},
    )


def _is_prng_key(key: Any) -> bool:
    """True for a typed PRNG key, and for a raw one: uint32 with a last axis of 2, or of 4 for some generators."""
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    raw = key.dtype == np.uint32 and key.ndim > 0 and key.shape[-1] in (2, 4)
    return raw or is_key(key)
