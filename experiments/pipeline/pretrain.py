"""Pre-training: Adam trains the plain twin of a variational network; variational training starts from its weights."""

from __future__ import annotations

import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcdl_jax
from experiments.io import files
from experiments.pipeline import batch_norm
from experiments.pipeline.context import PRETRAINED, RunContext, params_file
from experiments.pipeline.fit import PARTS, Reached, make_fit
from experiments.pipeline.measures import error_percent, mean_cross_entropy, on_device
from experiments.pipeline.progress import bar
from experiments.pipeline.stopping import stop_for
from experiments.runtime import interruption

_PHASE = "pretrain"
# The time between two checkpoints of an unfinished network.
_CHECKPOINT_SECONDS = 900.0


def cross_entropy(twin: nn.Module, params: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """The mean cross-entropy in nats of a plain network in training; ``key`` is the key of its dropout, if it has any."""
    logits: Any = twin.apply({"params": params}, images, deterministic=False, rngs={"dropout": key})
    return mean_cross_entropy(logits, labels)


def pretrain(context: RunContext) -> list[dict[str, np.ndarray]]:
    """Trains the plain twin by cross-entropy alone, one network per seed, one after the other.

    A network with batch norms is trained with them, and they are folded in afterwards. The checkpoints of the context get the state
    every quarter of an hour, on SIGTERM and on Ctrl-C, and after each network.

    Args:
      context: The context of the run. Its model has the dropout that the plain network is trained with.

    Returns:
      The weights of each seed, by "layer/kernel" and "layer/bias". They are also written to pretrained_seed*.npz in the directory of the
      run, in the form that --pretrained reads.
    """
    nets = _Pretraining(context).run()
    context.logs.flush()
    trained_on = {files.TRAINED_ON: np.array(context.dataset.name)}
    select = bcdl_jax.train.select_seed
    named = [files.arrays_by_layer_field(jax.device_get(select(nets, index))) for index in range(len(context.seeds))]
    for seed, net in zip(context.seeds, named, strict=True):
        files.write_arrays(context.out / params_file(PRETRAINED, seed), net | trained_on)
    return named


class _Pretraining:
    """The pre-training of all seeds, with its checkpoints."""

    def __init__(self, context: RunContext):
        self.context, recipe = context, context.recipe
        self.twin = context.plain_model
        self.learner = batch_norm.with_batch_norm(self.twin)
        self.train, self.validation = on_device(context.dataset.train), on_device(context.dataset.validation)
        self.total = len(context.dataset.train) // recipe.batch_size * recipe.pretrain_epochs
        schedule = optax.cosine_decay_schedule(recipe.pretrain_learning_rate, self.total)
        self.optimizer = optax.adam(schedule)
        self.measure = jax.jit(functools.partial(error_percent, self.twin))
        learner = self.twin if self.learner is None else self.learner
        self.fresh = jax.jit(functools.partial(self._init, learner))
        self.fit = make_fit(
            self._loss, self.optimizer, self.train, recipe.batch_size, mirror=recipe.mirror, shift=recipe.shift
        )
        self.saved_at = time.perf_counter()

    def run(self) -> Any:
        """Trains all networks that are not finished; returns the stacked params of the twins."""
        context = self.context
        nets, done, unfinished = self._restored()
        with interruption.noted() as stop:
            for index, seed in list(enumerate(context.seeds))[done:]:
                params = self._train(index, seed, nets, unfinished, stop)
                unfinished = None
                nets = jax.tree.map(
                    lambda all_nets, net, index=index: all_nets.at[index].set(net), nets, self._as_twin(params)
                )
                facts = {"nets": index + 1, "parts": 0, "step": self.total}
                self._save(nets, None, facts, complete=index + 1 == len(context.seeds))
        return nets

    def _train(self, index: int, seed: int, nets: Any, unfinished: Reached | None, stop: Any) -> Any:
        context, epochs = self.context, self.context.recipe.pretrain_epochs
        key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 3))
        params = self.fresh(key)
        with bar(self.total, f"pre-train seed {seed}", "step") as progress:

            def report(epoch: int, params: Any, _: Any, mean_loss: float, speed: float) -> None:
                error = float(self.measure(self._as_twin(params), self.validation))
                progress.set_postfix_str(f"validation error {error:.2f} %")
                metrics = {"epoch": epoch, "seed": seed, "loss": mean_loss, "validation_error": error}
                context.logs.log_epoch(_PHASE, [metrics], images_per_second=speed)

            def after_part(reached: Reached) -> None:
                if not stop.signal and time.perf_counter() - self.saved_at < _CHECKPOINT_SECONDS:
                    return
                step = reached.parts * self.total // (PARTS * epochs)
                saved = self._save(nets, reached, {"nets": index, "parts": reached.parts, "step": step})
                stop_for(stop.signal, saved)

            params, _ = self.fit(params, None, order_key, epochs, progress, report, unfinished, after_part)
        return params

    def _loss(self, params: Any, _: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        if self.learner is None:
            return cross_entropy(self.twin, params, images, labels, key)
        return batch_norm.cross_entropy(self.learner, params, images, labels, key)

    def _as_twin(self, params: Any) -> Any:
        return params if self.learner is None else batch_norm.fold(self.learner, params, self.train[0])

    def _init(self, net: nn.Module, key: jax.Array) -> Any:
        return net.init(key, self.train[0][:1])["params"]

    # The state of a checkpoint. The networks of later seeds, and the unfinished one between two networks, hold zeros.

    def _restored(self) -> tuple[Any, int, Reached | None]:
        """The networks, the number of finished ones, and the unfinished one if there is one."""
        shapes = jax.eval_shape(functools.partial(self._init, self.twin), jax.random.key(0))
        nets = _zeros(shapes, len(self.context.seeds))
        restored = self.context.checkpoints.restore(_PHASE, {"nets": nets, "under_way": self._nothing()})
        if restored is None:
            return nets, 0, None
        parts = restored.facts["parts"]
        unfinished = Reached(**restored.state["under_way"], parts=parts) if parts else None
        return restored.state["nets"], restored.facts["nets"], unfinished

    def _save(self, nets: Any, reached: Reached | None, facts: dict[str, int], complete: bool = False) -> Any:
        unfinished = self._nothing() if reached is None else {"state": reached.state, "loss_sum": reached.loss_sum}
        state = {"nets": nets, "under_way": unfinished}
        self.saved_at = time.perf_counter()
        return self.context.checkpoints.save(_PHASE, state, facts=facts, frames={}, complete=complete)

    def _nothing(self) -> dict[str, Any]:
        params = jax.eval_shape(self.fresh, jax.random.key(0))
        state = _zeros((params, None, jax.eval_shape(self.optimizer.init, params)))
        return {"state": state, "loss_sum": jnp.zeros(())}


def _zeros(shapes: Any, *leading: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), shapes)
