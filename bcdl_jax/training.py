"""Training: one pure step on any optax optimiser, whole epochs as one compiled loop, many seeds at once by ``vmap``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from bcdl_jax.batches import count_examples, epoch_rows, steps_per_epoch, take_batch
from bcdl_jax.kl import clip_variances, kl_divergence_per_layer
from bcdl_jax.objective import Schedule, check_num_examples
from bcdl_jax.posterior import Posterior, PyTree, layer_name, posteriors
from bcdl_jax.pruning import Thresholds, kept_groups

NegativeLogLikelihood = Callable[[PyTree, Any, jax.Array], jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a training step reads and returns. Stack states along a new leading axis to train many seeds at once.

    Attributes:
      step: number of steps taken, int32.
      params: tree with variational layers.
      optimizer_state: of the optax optimiser.
      key: the PRNG key that all noise and the data order of this run derive from.
      halted: True once a loss or an update was not finite; from then on the state stays the last good one.
      blamed: [parts] of bool, which parts of the params (in the order of ``part_names``) were not finite at that step.
    """

    step: jax.Array
    params: PyTree
    optimizer_state: optax.OptState
    key: jax.Array
    halted: jax.Array
    blamed: jax.Array


def create_train_state(params: PyTree, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step. Raises ValueError if the params hold no variational layers."""
    posteriors(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer_state=optimizer.init(params),
        key=key,
        halted=jnp.zeros((), bool),
        blamed=jnp.zeros((len(part_names(params)),), bool),
    )


def parameter_kinds(params: PyTree) -> PyTree:
    """Labels every parameter, for a learning rate per kind with ``optax.partition(transforms, parameter_kinds)``.

    Returns:
      A tree like ``params`` with one of these strings per array: the field's name within a posterior, such as "kernel_mean",
      "kernel_log_variance", "bias_mean", "bias_log_variance", "scale_mean", "scale_log_variance", "input_mask", "output_mask";
      "deterministic" elsewhere.
    """

    def label(path: tuple[Any, ...], _: Any) -> str:
        return path[-1].name if path and isinstance(path[-1], jax.tree_util.GetAttrKey) else "deterministic"

    return jax.tree_util.tree_map_with_path(label, params)


def scale_by_kind(factors: dict[str, float]) -> optax.GradientTransformation:
    """An optax transform that multiplies the updates of each kind of parameter by a factor; 1 for kinds not named.

    Chained after an optimiser it is a learning rate per kind, in one pass over the params. A factor of 0 freezes a kind, so that
    ``scale_by_kind({"kernel_log_variance": 0, ...})`` fine-tunes the means alone.

    Args:
      factors: by the names of ``parameter_kinds``.

    Raises:
      ValueError: (at the first update) a name that is no kind of parameter.
    """

    def update(updates: PyTree, _: Any = None) -> PyTree:
        layers = [part for part in _parts(updates) if _is_posterior(part)]
        known = {"deterministic"} | {field.name for layer in layers for field in dataclasses.fields(layer)}
        for name in factors:
            if name not in known:
                raise ValueError(f"factors names kind {name}; the kinds are {', '.join(sorted(known))}.")
        return jax.tree.map(lambda kind, value: value * factors.get(kind, 1.0), parameter_kinds(updates), updates)

    return optax.stateless(update)


def make_train_step(
    negative_log_likelihood: NegativeLogLikelihood,
    optimizer: optax.GradientTransformation,
    *,
    num_examples: int,
    kl_weight: float | Schedule = 1.0,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
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
        params = clip_variances(_keep_masks(optax.apply_updates(state.params, updates), state.params))

        bad_kl = jnp.stack(
            [~jnp.isfinite(per_layer[name]) if name in per_layer else jnp.array(False) for name in part_names(params)]
        )
        bad_update = jnp.stack(
            [_not_finite(slope, move) for slope, move in zip(_parts(gradients), _parts(updates), strict=True)]
        )
        bad = ~jnp.isfinite(value) | jnp.any(bad_update)
        # A layer whose own KL overflowed is the culprit; gradients are then broken everywhere.
        blamed = jnp.where(jnp.any(bad_kl), bad_kl, bad_update)
        go_on = ~(bad | state.halted)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            optimizer_state=optimizer_state,
            key=state.key,
            halted=state.halted,
            blamed=state.blamed,
        )
        old_state = state.replace(halted=state.halted | bad, blamed=jnp.where(state.halted, state.blamed, blamed))  # type: ignore[attr-defined]
        state = jax.tree.map(lambda new, old: jnp.where(go_on, new, old), new_state, old_state)
        return state, {"loss": value, "nll": nll, "kl": kl}

    return step


def make_train_epoch(
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]], *, batch_size: int, shards: int = 1
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
    """Builds one epoch as a ``lax.scan`` over random batches: ``epoch(state, data) -> (state, mean metrics)``.

    Args:
      step: from ``make_train_step``.
      batch_size: examples per step; the last incomplete batch of each epoch's order is left out.
      shards: how many devices the data is spread over, so that each batch takes equally many examples from each; see ``batches``.

    Returns:
      A pure function. ``data`` is a tree of arrays [examples, ...]. The order derives from the state's key and the epoch. For many seeds at
      once: ``jax.jit(jax.vmap(epoch, in_axes=(0, None)), donate_argnums=0)``.

    Raises:
      ValueError: (when called) there are fewer examples than ``batch_size``, arrays of different lengths, or numbers that are no
        multiple of ``shards``.
    """

    def epoch(state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        examples = count_examples(data)
        number = state.step // steps_per_epoch(examples, batch_size, shards)
        order = epoch_rows(state.key, number, examples, batch_size, shards)
        state, metrics = jax.lax.scan(lambda s, rows: step(s, take_batch(data, rows, shards)), state, order)
        return state, jax.tree.map(jnp.mean, metrics)

    return epoch


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Many trees of arrays (states, params) as one, along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: PyTree, index: int) -> PyTree:
    """Entry ``index`` of every array's leading axis: one seed's part of an ensemble."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """What one epoch of one run came to.

    Attributes:
      epoch: counted from 1.
      seed: name of the run, usually its seed.
      loss: negative ELBO in nats per example, mean over the epoch.
      nll: cross-entropy part.
      kl: KL / num_examples, unweighted.
      validation_error: in percent, at the posterior means.
      kept: groups per layer that would be kept at the families' default thresholds, or at the given ones.
      failure: one sentence if the run was halted by a value that is not finite, else None.
    """

    epoch: int
    seed: int
    loss: float
    nll: float
    kl: float
    validation_error: float
    kept: dict[str, int]
    failure: str | None


@dataclasses.dataclass(frozen=True)
class EnsembleReport:
    """One epoch of an ensemble: a report per seed, and what a person should know now, in plain words."""

    reports: tuple[EpochReport, ...]
    messages: tuple[str, ...]


def train_ensemble(
    states: TrainState,
    data: PyTree,
    *,
    train_epoch: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]],
    epochs: int,
    validation_error: Callable[[PyTree, PyTree], jax.Array],
    validation_data: PyTree,
    seeds: Sequence[int],
    first_epoch: int = 1,
    thresholds: Thresholds | None = None,
) -> Iterator[tuple[TrainState, EnsembleReport]]:
    """Trains many seeds at once and reports after each epoch.

    Args:
      states: stacked states, one per seed. Their buffers are donated, and so are those of each state that is yielded once
        the next one is asked for: copy what must outlive its epoch.
      data: tree of arrays [examples, ...], shared by all seeds.
      train_epoch: from ``make_train_epoch``, for one seed.
      epochs: how many.
      validation_error: (params of one seed, validation_data) -> percent, a pure function.
      validation_data: what ``validation_error`` is measured on, a tree of arrays.
      seeds: a name per seed.
      first_epoch: number of the first epoch in the reports.
      thresholds: by which the kept groups of the reports are counted, as for ``kept_groups``.

    Yields:
      The states and the report of each epoch. A seed whose loss or gradient is not finite stays at its last good state while the others go
      on; messages also warn, once each, of a layer with nothing left and of a run in which nothing is being pruned.

    Raises:
      ValueError: ``epochs`` is not positive, or seeds do not name the stacked states one by one.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1.")
    if len(set(seeds)) != len(seeds) or len(seeds) != states.step.shape[0]:
        raise ValueError(
            f"seeds is {list(seeds)}; it must name each of the {states.step.shape[0]} stacked states, each once."
        )
    return _epochs(states, data, train_epoch, epochs, validation_error, validation_data, seeds, first_epoch, thresholds)


def _epochs(
    states: TrainState,
    data: PyTree,
    train_epoch: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]],
    epochs: int,
    validation_error: Callable[[PyTree, PyTree], jax.Array],
    validation_data: PyTree,
    seeds: Sequence[int],
    first_epoch: int,
    thresholds: Thresholds | None,
) -> Iterator[tuple[TrainState, EnsembleReport]]:
    run_epoch = jax.jit(jax.vmap(train_epoch, in_axes=(0, None)), donate_argnums=0)
    measure = jax.jit(
        jax.vmap(
            lambda params, held_out: (validation_error(params, held_out), kept_groups(params, thresholds)),
            in_axes=(0, None),
        )
    )
    names = part_names(states.params)
    totals = {name: posterior.group_mask.shape[-1] for name, posterior in posteriors(states.params).items()}
    told: set[tuple[int, str]] = set()
    failures: dict[int, str] = {}

    for epoch in range(first_epoch, first_epoch + epochs):
        states, metrics = run_epoch(states, data)
        metrics, (errors, kept), halted, blamed, steps = jax.device_get(
            (metrics, measure(states.params, validation_data), states.halted, states.blamed, states.step)
        )
        reports: list[EpochReport] = []
        messages: list[str] = []

        def tell(seed: int, subject: str, message: str, messages: list[str] = messages) -> None:
            if (seed, subject) not in told:
                told.add((seed, subject))
                messages.append(message)

        for index, seed in enumerate(seeds):
            kept_here = {name: int(counts[index]) for name, counts in kept.items()}
            if halted[index]:
                if seed not in failures:
                    culprits = [name for name, bad in zip(names, blamed[index], strict=True) if bad]
                    failures[seed] = _failure_sentence(epoch, int(steps[index]) + 1, seed, culprits, names)
                tell(seed, "failure", failures[seed])
            else:
                for warning in _pruning_warnings(
                    epoch,
                    seed,
                    kept_here,
                    totals,
                    late=epoch - first_epoch + 1 >= (max(10, (epochs + 1) // 2) if epochs > 10 else epochs),
                ):
                    tell(seed, warning, warning.replace("EPOCH", str(epoch)))
            reports.append(
                EpochReport(
                    epoch=epoch,
                    seed=seed,
                    loss=float(metrics["loss"][index]),
                    nll=float(metrics["nll"][index]),
                    kl=float(metrics["kl"][index]),
                    validation_error=float(errors[index]),
                    kept=kept_here,
                    failure=failures.get(seed),
                )
            )
        yield states, EnsembleReport(tuple(reports), tuple(messages))


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


def _keep_masks(new: PyTree, old: PyTree) -> PyTree:
    """Masks are decided by pruning: no optimiser (weight decay, say) may move them."""

    def restore(new_node: Any, old_node: Any) -> Any:
        if not _is_posterior(new_node):
            return new_node
        return new_node.replace(input_mask=old_node.input_mask, output_mask=old_node.output_mask)

    return jax.tree.map(restore, new, old, is_leaf=_is_posterior)


def _failure_sentence(epoch: int, step: int, seed: int, blamed: list[str], names: list[str]) -> str:
    if not blamed:
        where = "although no layer is at fault (look at the loss function and its inputs)"
    elif len(blamed) == len(names) and len(names) > 1:
        where = "in all layers (inputs that are not finite, or a learning rate that is too high?)"
    else:
        where = f"in layer{'s' * (len(blamed) > 1)} {', '.join(blamed)}"
    return (
        f"Seed {seed} was stopped in epoch {epoch}, step {step}: the loss or an update was not finite {where}. "
        "Its last good state is kept; lower the learning rate, clip gradients, or warm up the KL."
    )


def _pruning_warnings(epoch: int, seed: int, kept: dict[str, int], totals: dict[str, int], late: bool) -> list[str]:
    found = [
        f"Seed {seed}, epoch EPOCH: everything would be pruned in layer {name} (none of its {totals[name]} groups "
        "is below the threshold), and the network's output would no longer depend on its input; use a KL warm-up, a lower learning rate, or check num_examples."
        for name, count in kept.items()
        if count == 0
    ]
    if late and all(kept[name] == totals[name] for name in kept):
        found.append(
            f"Seed {seed}, epoch EPOCH: nothing is pruned yet (all {sum(totals.values())} groups are kept); train longer, raise the learning "
            "rate of the log-variances, or check num_examples."
        )
    return found
