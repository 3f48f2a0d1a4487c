"""The objective, cross-entropy + kl_weight * KL / num_examples, and schedules of the KL weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree
from bcdl_jax.priors.kl import kl_divergence

Schedule = Callable[[jax.Array | int], jax.Array]


def negative_elbo(
    negative_log_likelihood: jax.Array, params: PyTree, *, num_examples: int, kl_weight: jax.Array | float = 1.0
) -> jax.Array:
    """The negative evidence lower bound per training example, in nats [L17 eq. 3].

    Args:
      negative_log_likelihood: The mean over the batch from a sampled forward pass, a scalar.
      params: A tree with variational layers.
      num_examples: The number of examples in the training set, not the batch size and not the number of batches.
      kl_weight: The factor of the KL, below 1 during warm-up.

    Raises:
      ValueError: ``num_examples`` is not a positive number, or there are no variational layers.
    """
    check_num_examples(num_examples)
    return negative_log_likelihood + kl_weight * kl_divergence(params) / num_examples


def check_num_examples(num_examples: int) -> None:
    """Raises ValueError unless ``num_examples`` is a positive finite number."""
    if not 0 < num_examples < math.inf:
        raise ValueError(f"num_examples is {num_examples}; it must be the number of training examples, at least 1.")


def kl_warmup(
    steps: int, shape: Literal["linear", "cosine"] = "linear", delay: int = 0, *, to: float = 1.0
) -> Schedule:
    """A KL weight that is 0 for ``delay`` steps, rises to ``to`` over ``steps`` steps, and then stays constant.

    Args:
      steps: The number of steps of the rise; 0 for a jump.
      shape: The shape of the rise: "linear", or "cosine" with a slow start and a slow end.
      delay: The number of steps before the rise.
      to: The final weight. A weight of 1 gives the evidence lower bound; a smaller one prunes less and fits the data better.

    Returns:
      A function from the step to the weight, like an optax schedule.

    Raises:
      ValueError: ``steps``, ``delay`` or ``to`` is negative, ``to`` is not finite, or ``shape`` is another word.
    """
    if steps < 0 or delay < 0:
        raise ValueError(f"steps is {steps} and delay is {delay}; both must be 0 or more.")
    if not 0 <= to < math.inf:
        raise ValueError(f"to is {to}; it must be a finite number of 0 or more.")
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape is {shape!r}; it must be 'linear' or 'cosine'.")

    def weight(step: jax.Array | int) -> jax.Array:
        progress = (
            jnp.clip((jnp.asarray(step) - delay) / steps, 0.0, 1.0)
            if steps
            else jnp.where(jnp.asarray(step) >= delay, 1.0, 0.0)
        )
        return to * (0.5 - 0.5 * jnp.cos(jnp.pi * progress) if shape == "cosine" else progress)

    return weight
