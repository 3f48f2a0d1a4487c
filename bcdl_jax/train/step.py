"""Training: one pure step on any optax optimiser, many steps as one compiled loop.

Where a run stands follows from ``state.step`` alone: the epoch, the place within it, the order of the examples, the noise, the
schedules. So a state is all that is needed to go on, from any step, to the same result bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bcdl_jax._tree import PyTree, is_key, layer_name
from bcdl_jax.priors.kl import clip_variances, kl_divergence_per_layer
from bcdl_jax.priors.posterior import Posterior, array_kinds, variational_layers
from bcdl_jax.train.batches import count_examples, epoch_rows, steps_per_epoch, take_batch
from bcdl_jax.train.objective import Schedule, check_num_examples

NegativeLogLikelihood = Callable[[PyTree, Any, jax.Array], jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a training step reads and returns. Stack states along a new leading axis to train many seeds at once.

    Attributes:
      step: number of steps taken, int32.
      params: tree with variational layers.
      optimizer_state: of the optax optimiser.
      key: the PRNG key that all noise and the data order of this run derive from.
      halted: True once a loss or an update was not finite; from then on the state stays the last good one.
      blamed: [parts] of bool, which parts of the params (in the order of ``part_names``) were not finite at that step.
      metric_sums: of each metric of the step, float32, the sum over the steps of this epoch so far.
    """

    step: jax.Array
    params: PyTree
    optimizer_state: optax.OptState
    key: jax.Array
    halted: jax.Array
    blamed: jax.Array
    metric_sums: Metrics


TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def create_train_state(params: PyTree, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step. Raises ValueError if the params hold no variational layers, or ``key`` is no PRNG key."""
    variational_layers(params)
    if not _is_key_or_words(key):
        raise ValueError(f"key is {key!r}; it must be a PRNG key, such as jax.random.key(0).")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_state=optimizer.init(params),
        key=key,
        halted=jnp.zeros((), bool),
        blamed=jnp.zeros((len(part_names(params)),), bool),
        metric_sums={name: jnp.zeros((), jnp.float32) for name in ("loss", "nll", "kl")},
    )


def _is_key_or_words(key: Any) -> bool:
    """Whether it is a PRNG key, or as many uint32 as one is made of: a last axis of 2, or 4 for some generators."""
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    raw = key.dtype == np.uint32 and key.ndim > 0 and key.shape[-1] in (2, 4)
    return raw or is_key(key)


def parameter_kinds(params: PyTree) -> PyTree:
    """Labels every parameter, for a learning rate per kind with ``optax.partition(transforms, parameter_kinds)``.

    Returns:
      A tree like ``params`` with one of these strings per array: the field's name within a posterior, such as "kernel_mean",
      "kernel_log_variance", "bias_mean", "bias_log_variance", "scale_mean", "scale_log_variance", "input_mask", "output_mask", "weight_mask";
      "deterministic" elsewhere.
    """

    def labels(part: Any) -> Any:
        if not _is_posterior(part):
            return "deterministic"
        names = [name for name in array_kinds(part) if getattr(part, name) is not None]
        return part.replace(**dict(zip(names, names, strict=True)))

    return jax.tree.map(labels, params, is_leaf=_is_posterior)


def scale_by_kind(factors: dict[str, float]) -> optax.GradientTransformation:
    """An optax transform that multiplies the updates of each kind of parameter by a factor; 1 for kinds not named.

    Chained after an optimiser it sets a learning rate per kind, in one pass over the params. A factor of 0 freezes a kind:
    ``scale_by_kind({"log_variance": 0})`` fine-tunes the means alone.

    Args:
      factors: Factors by the names of ``parameter_kinds``, or for all arrays of a posterior that declare one kind: "mean", "log_variance",
        "scale" (the locations of the scales) or "mask". A factor by name precedes that of the kind.

    Raises:
      ValueError: A factor has a name that is no kind of parameter. The first update raises it.
    """

    def scaled(part: Any) -> Any:
        if not _is_posterior(part):
            return part * factors.get("deterministic", 1.0)
        present = [(name, kind) for name, kind in array_kinds(part).items() if getattr(part, name) is not None]
        return part.replace(
            **{name: getattr(part, name) * factors.get(name, factors.get(kind, 1.0)) for name, kind in present}
        )

    def update(updates: PyTree, _: Any = None) -> PyTree:
        kinds = {
            name: kind for part in _parts(updates) if _is_posterior(part) for name, kind in array_kinds(part).items()
        }
        known = {"deterministic", *kinds, *kinds.values()}
        for name in factors:
            if name not in known:
                raise ValueError(f"factors names kind {name}; the kinds are {', '.join(sorted(known))}.")
        return jax.tree.map(scaled, updates, is_leaf=_is_posterior)

    return optax.stateless(update)


def make_train_step(
    negative_log_likelihood: NegativeLogLikelihood,
    optimizer: optax.GradientTransformation,
    *,
    num_examples: int,
    kl_weight: float | Schedule = 1.0,
) -> TrainStep:
    """Builds the training step: gradient of the negative ELBO, optimiser update, variance clipping.

    Args:
      negative_log_likelihood: (params, batch, key) -> mean over the batch in nats, a scalar, with weights sampled by that key.
      optimizer: any optax optimiser. Gradient clipping and learning rates per parameter kind are its business.
      num_examples: number of training examples.
      kl_weight: a number, or a schedule from the step to one, see ``kl_warmup``.

    Returns:
      ``step(state, batch) -> (state, metrics)``, pure, to be used under ``jit``, ``vmap`` and ``lax.scan``. Metrics: "loss", "nll", "kl"
      in nats per example, "kl" already divided by ``num_examples`` but not weighted. If the loss or an update is not finite, the state
      keeps the values it had before the step and is halted.

    Raises:
      ValueError: ``num_examples`` is not positive.
    """
    check_num_examples(num_examples)

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
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
        params = clip_variances(keep_masks(optax.apply_updates(state.params, updates), state.params))

        bad_kl = jnp.stack(
            [~jnp.isfinite(per_layer[name]) if name in per_layer else jnp.array(False) for name in part_names(params)]
        )
        bad_update = jnp.stack(
            [_not_finite(slope, move) for slope, move in zip(_parts(gradients), _parts(updates), strict=True)]
        )
        bad = ~jnp.isfinite(value) | jnp.any(bad_update)
        # A layer whose own KL overflowed is the culprit; gradients are then broken everywhere.
        blamed = jnp.where(jnp.any(bad_kl), bad_kl, bad_update)
        # By a division, which XLA does not compute again for each of its uses: these are the updates of all parameters, and it comes from all
        # layers. Programs, and the time to compile them, would grow with the square of the layers.
        go_on = 1 / (1 + (bad | state.halted).astype(jnp.float32)) > 0.75
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            optimizer_state=optimizer_state,
            key=state.key,
            halted=state.halted,
            blamed=state.blamed,
            metric_sums=state.metric_sums,
        )
        old_state = state.replace(halted=state.halted | bad, blamed=jnp.where(state.halted, state.blamed, blamed))
        state = jax.tree.map(lambda new, old: jnp.where(go_on, new, old), new_state, old_state)
        return state, {"loss": value, "nll": nll, "kl": kl}

    return step


def make_train_loop(
    step: TrainStep, *, batch_size: int, shards: int = 1
) -> Callable[[TrainState, PyTree, jax.Array | int], tuple[TrainState, Metrics]]:
    """Builds a loop over random batches: ``train_steps(state, data, count) -> (state, metrics)``.

    However the steps of an epoch are divided into calls, the result is the same, and so is the compiled program, since ``count``
    is an input of it.

    Args:
      step: from ``make_train_step``, or any step whose metrics are those of ``state.metric_sums``.
      batch_size: examples per step; the last incomplete batch of each epoch's order is left out.
      shards: how many devices the data is spread over, so that each batch takes equally many examples from each; see ``batches``.

    Returns:
      A pure function. ``data`` is a tree of arrays [examples, ...]; ``count`` is the number of steps, at most those that are left of the
      epoch. The metrics are means over the steps of the epoch so far; not a number once the state is halted, when nothing moves
      any more. The order derives from the state's key and the epoch. For many seeds at once:
      ``jax.jit(each_seed(train_steps), donate_argnums=0)``.

    Raises:
      ValueError: (when called) there are fewer examples than ``batch_size``, arrays of different lengths, numbers that are no
        multiple of ``shards``, or metrics that ``state.metric_sums`` does not have.
    """

    def train_steps(state: TrainState, data: PyTree, count: jax.Array | int) -> tuple[TrainState, Metrics]:
        examples = count_examples(data)
        steps = steps_per_epoch(examples, batch_size, shards)
        order = epoch_rows(state.key, state.step // steps, examples, batch_size, shards)

        def take_step(_: Any, state: TrainState) -> TrainState:
            place = state.step % steps
            after, metrics = step(state, take_batch(data, order[place], shards))
            if metrics.keys() != state.metric_sums.keys():
                raise ValueError(
                    f"The step's metrics are {', '.join(sorted(metrics))}; state.metric_sums has {', '.join(sorted(state.metric_sums))}."
                )
            sums = {
                name: jnp.where(after.halted, jnp.nan, jnp.where(place == 0, 0, total) + metrics[name]).astype(
                    total.dtype
                )
                for name, total in state.metric_sums.items()
            }
            return after.replace(metric_sums=sums)

        state = jax.lax.fori_loop(0, count, take_step, state)
        return state, mean_metrics(state, steps)

    return train_steps


def mean_metrics(state: TrainState, steps: int) -> Metrics:
    """Means over the steps of the epoch so far, ``steps`` being those of a whole one."""
    taken = (state.step - 1) % steps + 1
    return {name: total / taken for name, total in state.metric_sums.items()}


def make_train_epoch(
    step: TrainStep, *, batch_size: int, shards: int = 1
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """Builds one epoch: ``epoch(state, data) -> (state, mean metrics)``, for a state at the start of an epoch.

    All else is as for ``make_train_loop``. For many seeds at once: ``jax.jit(each_seed(epoch), donate_argnums=0)``.
    """
    train_steps = make_train_loop(step, batch_size=batch_size, shards=shards)

    def epoch(state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        return train_steps(state, data, steps_per_epoch(count_examples(data), batch_size, shards))

    return epoch


def stack_seeds(trees: Sequence[PyTree]) -> PyTree:
    """Many trees of arrays (states, params) as one, along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def select_seed(tree: PyTree, index: int) -> PyTree:
    """Entry ``index`` of every array's leading axis: one seed's part of an ensemble."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def part_names(params: PyTree) -> list[str]:
    """The parts of a params tree by which failures are reported: each variational layer, and each array outside them."""
    return [layer_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_posterior)]


def _is_posterior(node: Any) -> bool:
    return isinstance(node, Posterior)


def _parts(tree: PyTree) -> list[PyTree]:
    return jax.tree.leaves(tree, is_leaf=_is_posterior)


def _not_finite(*parts: PyTree) -> jax.Array:
    """Whether the gradient or the update of a part is not finite.

    Of a variational layer the kernel is left out, which spares a pass over nearly all parameters: whatever is not finite
    in what flows back into the layer is summed into the gradients of its biases and scales, and a kernel that overflows
    by itself shows in the KL. Zero times a number that is not finite is not a number; that compiles to less than a test of each.
    """
    small = [
        part.replace(kernel_mean=None, kernel_log_variance=None) if _is_posterior(part) else part for part in parts
    ]
    return ~jnp.isfinite(sum(jnp.sum(leaf * 0) for leaf in jax.tree.leaves(small)))


def keep_masks(new: PyTree, old: PyTree) -> PyTree:
    """The new params with the masks of the old ones.

    Masks are decided by pruning, but are arrays of the params: what an optimiser does beside following the gradient, which they do not have
    (weight decay, noise), would move them, and in time prune what carries the most. ``make_train_step`` calls this; so must a training loop
    of your own with such an optimiser.

    Args:
      new: tree with variational layers, after an update.
      old: the same tree, before it.

    Returns:
      A tree like them.
    """

    def restore(new_node: Any, old_node: Any) -> Any:
        if not _is_posterior(new_node):
            return new_node
        masks = [name for name, kind in array_kinds(old_node).items() if kind == "mask"]
        return new_node.replace(**{name: getattr(old_node, name) for name in masks})

    return jax.tree.map(restore, new, old, is_leaf=_is_posterior)
