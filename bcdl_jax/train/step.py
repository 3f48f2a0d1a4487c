"""The training step: a pure function of a state and a batch, for any optax optimiser."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bcdl_jax._tree import PyTree
from bcdl_jax.priors.kl import clip_variances, kl_divergence_per_layer
from bcdl_jax.priors.posterior import array_kinds
from bcdl_jax.train.objective import Schedule, check_num_examples
from bcdl_jax.train.parts import is_posterior, part_names, parts
from bcdl_jax.train.state import Metrics, NegativeLogLikelihood, TrainState, TrainStep


def make_train_step(
    negative_log_likelihood: NegativeLogLikelihood,
    optimizer: optax.GradientTransformation,
    *,
    num_examples: int,
    kl_weight: float | Schedule = 1.0,
) -> TrainStep:
    """Builds the training step: the gradient of the negative ELBO, the update of the optimiser, and the limit on the variances.

    Args:
      negative_log_likelihood: A function (params, batch, key) -> mean over the batch in nats, a scalar. It samples weights with that key.
      optimizer: Any optax optimiser, also one that needs the value of the loss. Gradient clipping and learning rates per kind of parameter are parts of it.
      num_examples: The number of training examples.
      kl_weight: The factor of the KL, or a schedule from the step to the factor, see ``kl_warmup``.

    Returns:
      A pure function ``step(state, batch) -> (state, metrics)`` for use under ``jit``, ``vmap`` and ``lax.scan``. The metrics are "loss",
      "nll" and "kl" in nats per example; "kl" is divided by ``num_examples`` but not weighted. If the loss or an update is not finite,
      the state keeps its values from before the step and is halted.

    Raises:
      ValueError: ``num_examples`` is not positive.
    """
    check_num_examples(num_examples)
    optimizer = optax.with_extra_args_support(optimizer)

    def loss(params: PyTree, batch: Any, key: jax.Array, weight: jax.Array | float):
        nll = negative_log_likelihood(params, batch, key)
        per_layer = kl_divergence_per_layer(params)
        kl = jnp.stack(list(per_layer.values())).sum() / num_examples
        return nll + weight * kl, (nll, kl, per_layer)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step)
        weight = kl_weight(state.step) if callable(kl_weight) else kl_weight
        (value, (nll, kl, per_layer)), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params, batch, key, weight
        )
        # Polyak steps, line searches and schedules that react to a plateau need the loss.
        updates, optimizer_state = optimizer.update(
            gradients,
            state.optimizer_state,
            state.params,
            value=value,
            grad=gradients,
            value_fn=lambda params: loss(params, batch, key, weight)[0],
        )
        params = clip_variances(keep_masks(optax.apply_updates(state.params, updates), state.params))
        bad, failed_parts = _find_failure(value, per_layer, gradients, updates)
        state = _update_unless_halted(state, params, optimizer_state, bad, failed_parts)
        return state, {"loss": value, "nll": nll, "kl": kl}

    return step


def _find_failure(
    loss: jax.Array, kl_per_layer: dict[str, jax.Array], gradients: PyTree, updates: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Checks that the loss and the updates are finite.

    Returns:
      True if a value is not finite, a scalar, and a mask of the parts of the params that caused it, [parts] of bool.
    """
    bad_kl = jnp.stack(
        [
            ~jnp.isfinite(kl_per_layer[name]) if name in kl_per_layer else jnp.array(False)
            for name in part_names(gradients)
        ]
    )
    bad_update = jnp.stack(
        [_not_finite(slope, move) for slope, move in zip(parts(gradients), parts(updates), strict=True)]
    )
    bad = ~jnp.isfinite(loss) | jnp.any(bad_update)
    # A layer whose own KL overflows makes the gradients of all layers not finite. It alone is the cause.
    return bad, jnp.where(jnp.any(bad_kl), bad_kl, bad_update)


def _update_unless_halted(
    state: TrainState, params: PyTree, optimizer_state: optax.OptState, bad: jax.Array, failed_parts: jax.Array
) -> TrainState:
    """The state after a step: with the new values, or halted with the old ones if the step was bad or the state was halted before."""
    # The condition depends on all layers, and the update of every parameter depends on the condition. XLA would compute a cheap condition
    # again for each parameter: the program, and the time to compile it, would grow with the square of the number of layers. It does not
    # repeat a division.
    go_on = 1 / (1 + (bad | state.halted).astype(jnp.float32)) > 0.75
    new_state = state.replace(step=state.step + 1, params=params, optimizer_state=optimizer_state)
    old_state = state.replace(
        halted=state.halted | bad, failed_parts=jnp.where(state.halted, state.failed_parts, failed_parts)
    )
    return jax.tree.map(lambda new, old: jnp.where(go_on, new, old), new_state, old_state)


def _not_finite(*gradient_and_update: PyTree) -> jax.Array:
    """True if the gradient or the update of a part of the params is not finite.

    The arrays of the kernel are left out, which saves a pass over nearly all parameters. A value that is not finite and flows back into
    the layer reaches the gradients of its biases and scales too; a kernel that overflows makes the KL of its layer not finite. The masks
    are left out too, since ``keep_masks`` restores them after every update.
    """
    small = [_without_kernel_and_masks(part) if is_posterior(part) else part for part in gradient_and_update]
    # Zero times a value that is not finite is not a number. This compiles to a smaller program than a test of each value.
    return ~jnp.isfinite(sum(jnp.sum(leaf * 0) for leaf in jax.tree.leaves(small)))


def _without_kernel_and_masks(part: Any) -> Any:
    masks = [name for name, kind in array_kinds(part).items() if kind == "mask"]
    return part.replace(**dict.fromkeys(["kernel_mean", "kernel_log_variance", *masks]))


def keep_masks(new: PyTree, old: PyTree) -> PyTree:
    """The new params with the masks of the old ones.

    Pruning alone sets masks. They are arrays of the params without a gradient, so that weight decay or the noise of an optimiser would
    move them, and would prune the strongest groups in time. ``make_train_step`` calls this function; a training loop of your own with
    such an optimiser must call it after each update.

    Args:
      new: The params after an update.
      old: The params before it.

    Returns:
      A tree like ``new``.
    """

    def restore(new_node: Any, old_node: Any) -> Any:
        if not is_posterior(new_node):
            return new_node
        masks = [name for name, kind in array_kinds(old_node).items() if kind == "mask"]
        return new_node.replace(**{name: getattr(old_node, name) for name in masks})

    return jax.tree.map(restore, new, old, is_leaf=is_posterior)
