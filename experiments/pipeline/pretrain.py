"""Pre-training: the plain twin of a variational network, trained by Adam; its weights are where variational training starts."""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bcdl_jax
from experiments.io import files
from experiments.io.checkpoints import Checkpoints
from experiments.io.data import Dataset
from experiments.io.logs import Logs
from experiments.pipeline import batch_norm
from experiments.pipeline import bayesian as compress
from experiments.pipeline.augmentation import augmented
from experiments.pipeline.recipe import Training
from experiments.runtime import interruption

# An epoch's steps run in so many compiled loops, between which Ctrl-C is heard and the progress bar moves.
_PARTS = 10


# Between two checkpoints of a net under way.
_CHECKPOINT_SECONDS = 900.0


class Progress(NamedTuple):
    """A net under way.

    Attributes:
      state: params, fixed part and the optimiser's state.
      loss_sum: sum of the losses of this epoch's steps so far.
      parts: number of parts taken, ``_PARTS`` of which make an epoch.
    """

    state: Any
    loss_sum: jax.Array
    parts: int


def cross_entropy(twin: nn.Module, params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of a plain network in training; ``key`` is that of its dropout, if it has any."""
    logits: Any = twin.apply({"params": params}, images, deterministic=False, rngs={"dropout": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_fit(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    data: tuple[jax.Array, jax.Array],
    batch_size: int,
    after_step: Callable[[Any, Any, jax.Array], Any] = lambda params, fixed, step: fixed,
    mirror: bool = False,
    shift: int = 0,
) -> Callable[..., tuple[Any, Any]]:
    """Minimises a loss over plain params, step by step in compiled loops.

    Args:
      loss: ``loss(params, fixed, images, labels, key)``, a scalar.
      optimizer: of the params.
      data: images and labels.
      batch_size: examples per step; those left over in an epoch are not seen in it.
      after_step: ``after_step(params, fixed, step)``, the new fixed part.
      mirror, shift: how images are changed at random, see ``augmented``.

    Returns:
      ``fit(params, fixed, key, epochs, progress, report)``, which gives the trained params and the last fixed part. ``key`` orders the
      examples, changes them and makes the keys of the loss; ``progress`` is a bar that counts steps; after each epoch
      ``report(epoch, params, fixed, mean_loss, images_per_second)`` is called. ``start`` goes on with a net under way, and ``after_part``
      gets it after each part of an epoch, to be kept or to end the training by an exception.
    """
    steps = len(data[1]) // batch_size

    @functools.partial(jax.jit, donate_argnums=0)
    def take_steps(
        state: Any, loss_sum: jax.Array, key: jax.Array, order: jax.Array, first: Any, last: Any, before: Any, data: Any
    ) -> Any:
        def step(number: jax.Array, state: Any) -> Any:
            (params, fixed, optimizer_state), loss_sum = state
            rows = jax.lax.dynamic_slice_in_dim(order, number * batch_size, batch_size)
            images, labels = (array[rows] for array in data)
            step_key = jax.random.fold_in(key, before + number)
            images = augmented(images, step_key, mirror=mirror, shift=shift)
            value, gradients = jax.value_and_grad(loss)(params, fixed, images, labels, step_key)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            params = optax.apply_updates(params, updates)
            return (params, after_step(params, fixed, before + number), optimizer_state), loss_sum + value

        return jax.lax.fori_loop(first, last, step, (state, loss_sum))

    order_of = jax.jit(lambda key, epoch: jax.random.permutation(jax.random.fold_in(key, epoch), len(data[1])))

    def fit(
        params: Any,
        fixed: Any,
        key: jax.Array,
        epochs: int,
        progress: tqdm,
        report: Callable[..., None],
        start: Progress | None = None,
        after_part: Callable[[Progress], None] = lambda reached: None,
    ) -> tuple[Any, Any]:
        # Copies, since the buffers are donated.
        now = start or Progress((params, fixed, optimizer.init(params)), jnp.zeros(()), 0)
        state, loss_sum = jax.tree.map(jnp.array, (now.state, now.loss_sum))
        step_keys = jax.random.fold_in(key, epochs)  # those before it order the examples
        ends = np.linspace(0, steps, _PARTS + 1).astype(np.int32)
        first_epoch, first_part = divmod(now.parts, _PARTS)
        progress.update(first_epoch * steps + int(ends[first_part]))
        for epoch in range(first_epoch, epochs):
            begin, seen = time.perf_counter(), 0
            order = order_of(key, epoch)
            for part in range(first_part, _PARTS):
                first, last = ends[part : part + 2]
                state, loss_sum = take_steps(
                    state, loss_sum, step_keys, order, first, last, np.int32(epoch * steps), data
                )
                progress.update(int(last - first))
                seen += int(last - first) * batch_size
                if part + 1 < _PARTS:
                    after_part(Progress(state, loss_sum, epoch * _PARTS + part + 1))
            mean_loss = float(loss_sum) / steps
            loss_sum, first_part = jnp.zeros(()), 0
            report(epoch + 1, *state[:2], mean_loss, seen / (time.perf_counter() - begin))
            if epoch + 1 < epochs:
                after_part(Progress(state, loss_sum, (epoch + 1) * _PARTS))
        return state[:2]

    return fit


def pretrain(
    model: nn.Module,
    dataset: Dataset,
    recipe: Training,
    *,
    seeds: Sequence[int],
    out: Path,
    logs: Logs,
    checkpoints: Checkpoints,
) -> list[dict[str, np.ndarray]]:
    """Trains the plain twin, one net per seed, by cross-entropy alone; with batch norms, which are then folded in, where it knows them.

    A checkpoint is written every quarter of an hour, on SIGTERM and on Ctrl-C, and after each net.

    Args:
      model: variational, with a field ``family`` that None makes plain, and with the dropout that the plain network is to have.
      dataset: only its training and validation parts are used.
      recipe: see ``Training``.
      seeds: one run each, one after the other.
      out: directory for pretrained_seed*.npz, written in the form that --pretrained reads.
      logs: where the metrics go.
      checkpoints: of this run.

    Returns:
      For each seed, the weights by "layer/kernel" and "layer/bias".
    """
    twin: Any = model.clone(family=None)  # type: ignore[call-arg]
    learner = batch_norm.with_batch_norm(twin)
    train, validation = compress.on_device(dataset.train), compress.on_device(dataset.validation)
    total = len(dataset.train) // recipe.batch_size * recipe.pretrain_epochs
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.pretrain_learning_rate, total))
    measure = jax.jit(functools.partial(compress.error_percent, twin))

    def loss(params: Any, _: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        if learner is None:
            return cross_entropy(twin, params, images, labels, key)
        return batch_norm.cross_entropy(learner, params, images, labels, key)

    def as_twin(params: Any) -> Any:
        return params if learner is None else batch_norm.fold(learner, params, train[0])

    def start(net: nn.Module, key: jax.Array) -> Any:
        return net.init(key, train[0][:1])["params"]

    fresh = jax.jit(functools.partial(start, twin if learner is None else learner))
    fit = make_fit(loss, optimizer, train, recipe.batch_size, mirror=recipe.mirror, shift=recipe.shift)
    shapes = jax.eval_shape(functools.partial(start, twin), jax.random.key(0))
    learner_shapes = jax.eval_shape(fresh, jax.random.key(0))
    # The nets of seeds that are yet to come hold zeros, as does what is under way between two nets.
    nothing_under_way = {
        "state": _zeros((learner_shapes, None, jax.eval_shape(optimizer.init, learner_shapes))),
        "loss_sum": jnp.zeros(()),
    }
    nets = _zeros(shapes, len(seeds))
    restored = checkpoints.restore("pretrain", {"nets": nets, "under_way": nothing_under_way})
    done, under_way = 0, None
    if restored is not None:
        nets, done = restored.state["nets"], restored.facts["nets"]
        if restored.facts["parts"]:
            under_way = Progress(**restored.state["under_way"], parts=restored.facts["parts"])
    last_saved = time.perf_counter()
    with interruption.noted() as stop:
        for index, seed in list(enumerate(seeds))[done:]:
            key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 3))
            params = fresh(key)
            with compress.bar(total, f"pre-train seed {seed}", "step") as progress:

                def report(epoch: int, params: Any, _: Any, mean_loss: float, speed: float, seed: int = seed) -> None:
                    error = float(measure(as_twin(params), validation))
                    progress.set_postfix_str(f"validation error {error:.2f} %")
                    metrics = {"epoch": epoch, "seed": seed, "loss": mean_loss, "validation_error": error}
                    logs.log_epoch("pretrain", [metrics], images_per_second=speed)

                def after_part(reached: Progress, index: int = index, nets: Any = nets) -> None:
                    nonlocal last_saved
                    if not stop.signal and time.perf_counter() - last_saved < _CHECKPOINT_SECONDS:
                        return
                    kept = {"nets": nets, "under_way": {"state": reached.state, "loss_sum": reached.loss_sum}}
                    facts = {
                        "nets": index,
                        "parts": reached.parts,
                        "step": reached.parts * total // (_PARTS * recipe.pretrain_epochs),
                    }
                    saved = checkpoints.save("pretrain", kept, facts=facts, frames={})
                    last_saved = time.perf_counter()
                    if stop.signal == signal.SIGINT:
                        raise KeyboardInterrupt
                    if stop.signal == signal.SIGTERM:
                        advice = (
                            "could not be saved"
                            if saved is None
                            else f"is saved in {saved}; --resume goes on from there"
                        )
                        print(f"\nStopped by SIGTERM; what was trained so far {advice}.", file=sys.stderr)
                        raise SystemExit(128 + signal.SIGTERM)

                epochs = recipe.pretrain_epochs
                params, _ = fit(params, None, order_key, epochs, progress, report, under_way, after_part)
            under_way = None
            nets = jax.tree.map(lambda all_nets, net, index=index: all_nets.at[index].set(net), nets, as_twin(params))
            complete = index + 1 == len(seeds)
            facts = {"nets": index + 1, "parts": 0, "step": total}
            kept = {"nets": nets, "under_way": nothing_under_way}
            checkpoints.save("pretrain", kept, facts=facts, frames={}, complete=complete)
            last_saved = time.perf_counter()
    logs.flush()
    trained_on = {files.TRAINED_ON: np.array(dataset.name)}
    named = [files.named_arrays(jax.device_get(bcdl_jax.train.select_seed(nets, index))) for index in range(len(seeds))]
    for seed, net in zip(seeds, named, strict=True):
        files.write_arrays(out / compress.params_file(compress.PRETRAINED, seed), net | trained_on)
    return named


def _zeros(shapes: Any, *leading: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), shapes)
