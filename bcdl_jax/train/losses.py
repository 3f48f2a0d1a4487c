"""Losses for the usual kinds of targets: negative log-likelihoods in nats for ``fit``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from bcdl_jax._tree import PyTree


@runtime_checkable
class Loss(Protocol):
    """A negative log-likelihood of observations. It may have params of its own, which are trained with the network."""

    def start(self, outputs: Any, targets: Any) -> PyTree:
        """The start values of the params of the loss, from the outputs of the trained network and their targets."""
        ...

    def nats(self, params: PyTree, outputs: Any, targets: Any) -> jax.Array:
        """The negative log-likelihood of each observation in nats. It is 0 for an observation that does not count."""
        ...

    def counts(self, targets: Any) -> jax.Array:
        """1 for each observation that counts and 0 for the others, of the shape of ``nats``."""
        ...


@dataclasses.dataclass(frozen=True)
class SoftmaxLoss:
    """One class out of many: outputs are logits [examples, ..., classes], targets are integers [examples, ...].

    Each target is an observation: for a sequence model, each token.

    Attributes:
      ignore: The target of observations that do not count, such as padding, or None.
    """

    ignore: int | None = None

    def start(self, outputs: jax.Array, targets: jax.Array) -> PyTree:
        """No params. The arguments are checked."""
        if outputs.shape[:-1] != targets.shape or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"SoftmaxLoss has outputs of shape {outputs.shape} and targets of shape {targets.shape} and type {targets.dtype}; "
                f"the targets must be integers of shape {outputs.shape[:-1]}."
            )
        classes = outputs.shape[-1]
        wrong = (self.counts(targets) > 0) & ((targets < 0) | (targets >= classes))
        if bool(jnp.any(wrong)):
            raise ValueError(
                f"SoftmaxLoss has a target {targets[wrong][0]} for {classes} classes; targets must be from 0 to {classes - 1}, or the value of "
                "ignore."
            )
        return {}

    def nats(self, params: PyTree, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The cross-entropy of each observation, [examples, ...]."""
        counts = self.counts(targets)
        classes = jnp.where(counts > 0, targets, 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), classes)
        return jnp.where(counts > 0, nats, 0)

    def counts(self, targets: jax.Array) -> jax.Array:
        """1 for each target that is not ignored, [examples, ...]."""
        return jnp.ones(targets.shape) if self.ignore is None else (targets != self.ignore).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SigmoidLoss:
    """Several labels that are each true or false: outputs are logits [examples, ...], targets are 0 or 1 of the same shape.

    Each example is an observation.
    """

    def start(self, outputs: jax.Array, targets: jax.Array) -> PyTree:
        """No params. The arguments are checked."""
        _check_same_shape("SigmoidLoss", outputs, targets)
        return {}

    def nats(self, params: PyTree, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The binary cross-entropy of each example, summed over its labels, [examples]."""
        outputs, targets = outputs.astype(jnp.float32), targets.astype(jnp.float32)
        return _sum_per_example(optax.sigmoid_binary_cross_entropy(outputs, targets))

    def counts(self, targets: jax.Array) -> jax.Array:
        """1 for each example, [examples]."""
        return jnp.ones(targets.shape[:1])


@dataclasses.dataclass(frozen=True)
class GaussianLoss:
    """Real targets of any scale: outputs are the means of a Gaussian, [examples, ...], targets have the same shape.

    The standard deviations of the noise, one for each entry of the last axis, are learned. They start at those of the errors of the trained
    network. Each example is an observation.
    """

    def start(self, outputs: jax.Array, targets: jax.Array) -> PyTree:
        """The logarithms of the standard deviations of the errors, for each entry of the last axis."""
        _check_same_shape("GaussianLoss", outputs, targets)
        errors = targets.astype(jnp.float32) - outputs.astype(jnp.float32)
        axes = tuple(range(max(1, errors.ndim - 1)))
        return {"log_deviation": 0.5 * jnp.log(jnp.maximum(jnp.mean(errors**2, axes), jnp.finfo(jnp.float32).tiny))}

    def nats(self, params: PyTree, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The negative log-density of each example, summed over its targets, [examples]."""
        log_deviation = params["log_deviation"]
        error = (targets.astype(jnp.float32) - outputs.astype(jnp.float32)) * jnp.exp(-log_deviation)
        return _sum_per_example(0.5 * error**2 + log_deviation + 0.5 * jnp.log(2 * jnp.pi))

    def counts(self, targets: jax.Array) -> jax.Array:
        """1 for each example, [examples]."""
        return jnp.ones(targets.shape[:1])


@dataclasses.dataclass(frozen=True)
class OwnLoss:
    """A function as a loss.

    Attributes:
      function: A function (outputs, targets) -> the negative log-likelihood in nats: its mean over the examples, or one number for each
        example, [examples].
    """

    function: Callable[[Any, Any], jax.Array]

    def start(self, outputs: Any, targets: Any) -> PyTree:
        """No params. The result of the function is checked."""
        shape = jax.eval_shape(self.function, outputs, targets).shape
        examples = jax.tree.leaves(targets)[0].shape[:1]
        if shape not in ((), examples):
            raise ValueError(
                f"loss returns an array of shape {shape}; it must return the mean over the examples, a scalar, or one number for each of the "
                f"{examples[0]} examples."
            )
        return {}

    def nats(self, params: PyTree, outputs: Any, targets: Any) -> jax.Array:
        """The loss of each example, [examples]. If the function returns a mean, each example has that mean."""
        return jnp.broadcast_to(self.function(outputs, targets), self.counts(targets).shape)

    def counts(self, targets: Any) -> jax.Array:
        """1 for each example, [examples]."""
        return jnp.ones(jax.tree.leaves(targets)[0].shape[:1])


def mean_nats(loss: Loss, params: PyTree, outputs: Any, targets: Any) -> jax.Array:
    """The mean of a loss over the observations that count, a scalar."""
    return jnp.sum(loss.nats(params, outputs, targets)) / jnp.maximum(jnp.sum(loss.counts(targets)), 1)


def _check_same_shape(name: str, outputs: jax.Array, targets: jax.Array) -> None:
    if outputs.shape != targets.shape:
        raise ValueError(
            f"{name} has outputs of shape {outputs.shape} and targets of shape {targets.shape}; both must be equal."
        )


def _sum_per_example(values: jax.Array) -> jax.Array:
    return jnp.sum(values, tuple(range(1, values.ndim)))
