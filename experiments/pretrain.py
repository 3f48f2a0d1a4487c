"""Pre-training: the plain twin of a variational network, trained by Adam; its weights are where variational training starts."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bcdl_jax
from experiments import batch_norm, compress, files
from experiments.augmentation import augmented
from experiments.checkpoints import Checkpoints
from experiments.data import Dataset
from experiments.logs import Logs
from experiments.recipe import Training

# An epoch's steps run in so many compiled loops, between which Ctrl-C is heard and the progress bar moves.
_PARTS = 10


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
      ``report(epoch, params, fixed, mean_loss, images_per_second)`` is called.
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
        params: Any, fixed: Any, key: jax.Array, epochs: int, progress: tqdm, report: Callable[..., None]
    ) -> tuple[Any, Any]:
        # Copies, since the buffers are donated.
        state = jax.tree.map(jnp.array, (params, fixed, optimizer.init(params)))
        step_keys = jax.random.fold_in(key, epochs)  # those before it order the examples
        for epoch in range(epochs):
            begin = time.perf_counter()
            order, loss_sum = order_of(key, epoch), jnp.zeros(())
            ends = np.linspace(0, steps, _PARTS + 1).astype(np.int32)
            for first, last in itertools.pairwise(ends):
                state, loss_sum = take_steps(
                    state, loss_sum, step_keys, order, first, last, np.int32(epoch * steps), data
                )
                progress.update(int(last - first))
            mean_loss = float(loss_sum) / steps
            report(epoch + 1, *state[:2], mean_loss, steps * batch_size / (time.perf_counter() - begin))
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

    A net that is cut short starts again; a finished one is kept in a checkpoint.

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
    # Those of seeds that are yet to come hold zeros.
    shapes = jax.eval_shape(functools.partial(start, twin), jax.random.key(0))
    nets = jax.tree.map(lambda leaf: jnp.zeros((len(seeds), *leaf.shape), leaf.dtype), shapes)
    restored = checkpoints.restore("pretrain", nets)
    done = 0
    if restored is not None:
        nets, done = restored.state, restored.facts["nets"]
    for index, seed in list(enumerate(seeds))[done:]:
        key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 3))
        params = fresh(key)
        with compress.bar(total, f"pre-train seed {seed}", "step") as progress:

            def report(epoch: int, params: Any, _: Any, mean_loss: float, speed: float, seed: int = seed) -> None:
                error = float(measure(as_twin(params), validation))
                progress.set_postfix_str(f"validation error {error:.2f} %")
                metrics = {"epoch": epoch, "seed": seed, "loss": mean_loss, "validation_error": error}
                logs.log_epoch("pretrain", [metrics], images_per_second=speed)

            params, _ = fit(params, None, order_key, recipe.pretrain_epochs, progress, report)
        nets = jax.tree.map(lambda all_nets, net, index=index: all_nets.at[index].set(net), nets, as_twin(params))
        complete = index + 1 == len(seeds)
        facts = {"nets": index + 1, "step": total}
        checkpoints.save("pretrain", nets, facts=facts, frames={}, complete=complete)
    logs.flush()
    trained_on = {files.TRAINED_ON: np.array(dataset.name)}
    named = [files.named_arrays(jax.device_get(bcdl_jax.unstack(nets, index))) for index in range(len(seeds))]
    for seed, net in zip(seeds, named, strict=True):
        files.write_arrays(out / compress.params_file(compress.PRETRAINED, seed), net | trained_on)
    return named
