"""Plain training of a gallery network, with checkpoints from which it continues bit by bit."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.gallery.entry import Examples, GalleryNetwork, PlainRecipe, Splits
from experiments.gallery.losses import LOSSES
from experiments.io.checkpoints import Checkpoints
from experiments.io.logs import Logs
from experiments.pipeline.augmentation import augmented
from experiments.pipeline.progress import bar
from experiments.pipeline.stopping import stop_for
from experiments.runtime import interruption

PHASE = "train"
# The longest time between two checkpoints, and the shortest time before one at the end of an epoch.
_CHECKPOINT_SECONDS, _EPOCH_END_SECONDS = 300.0, 30.0


class State(NamedTuple):
    """The state of a training.

    Attributes:
      variables: The variables of the network.
      optimizer: The state of the optimiser.
      loss_sum: The sum of the losses of this epoch's steps so far.
    """

    variables: Any
    optimizer: Any
    loss_sum: jax.Array


class Training:
    """The plain training of one network.

    Attributes:
      steps: The number of steps per epoch.
      measure: A function (variables, examples) that returns the measure of the network.
    """

    def __init__(self, network: GalleryNetwork, recipe: PlainRecipe, splits: Splits):
        """Trains nothing yet.

        Args:
          network: The network.
          recipe: The recipe, the network's own or a changed one.
          splits: The data.
        """
        self._network, self._recipe = network, recipe
        self._train, self._validation = (jax.tree.map(jnp.asarray, part) for part in (splits.train, splits.validation))
        self._keys = jax.random.split(jax.random.key(recipe.seed), 3)
        self._apply, self._start = network.make(self._keys[0])
        self._loss = LOSSES[network.loss]
        self.steps = splits.train.size // recipe.batch_size
        self.measure = self._loss.measure_of(self._apply)
        self._optimizer = make_optimizer(recipe, self.steps)
        self._step = jax.jit(self._take_step, donate_argnums=0)

    def first_state(self) -> State:
        """The state before the first step."""
        params, _ = self._trained(self._start)
        # Copies, since the buffers of a state are donated.
        return State(jax.tree.map(jnp.array, self._start), self._optimizer.init(params), jnp.zeros(()))

    def run(self, checkpoints: Checkpoints, logs: Logs) -> Any:
        """Trains from the last checkpoint, or from the start.

        Args:
          checkpoints: The checkpoints of the run.
          logs: The metrics of the run.

        Returns:
          The trained variables.
        """
        state, done = self._restored(checkpoints)
        total = self.steps * self._recipe.epochs
        saved_at = time.perf_counter()
        with interruption.noted() as stop, bar(total, self._network.name, "step", done) as progress:
            for step in range(done, total):
                if step == done or not step % self.steps:
                    order, begin, seen = self._order(step // self.steps), time.perf_counter(), 0
                state = self.take_step(state, order, step)
                seen += self._recipe.batch_size
                progress.update()
                is_end = not (step + 1) % self.steps
                if is_end:
                    mean_loss, state = float(state.loss_sum) / self.steps, state._replace(loss_sum=jnp.zeros(()))
                    speed = seen / (time.perf_counter() - begin)
                    progress.write(self._report((step + 1) // self.steps, state.variables, mean_loss, speed, logs))
                    sys.stdout.flush()
                waited = time.perf_counter() - saved_at
                if stop.signal or waited > _CHECKPOINT_SECONDS or (is_end and waited > _EPOCH_END_SECONDS):
                    saved = checkpoints.save(PHASE, jax.tree.leaves(state), facts={"step": step + 1}, frames={})
                    stop_for(stop.signal, saved)
                    saved_at = time.perf_counter()
        return state.variables

    def take_step(self, state: State, order: np.ndarray, step: int) -> State:
        """One step of the optimiser. The buffers of ``state`` are donated.

        Args:
          state: The state before the step.
          order: The order of the training examples in the epoch.
          step: The number of the step, from 0.
        """
        first = step % self.steps * self._recipe.batch_size
        state = self._step(state, self._train, order[first : first + self._recipe.batch_size], step)
        # Steps are dispatched asynchronously. Without this wait the signals and the times would run ahead of them.
        jax.block_until_ready(state.loss_sum)
        return state

    def _take_step(self, state: State, train: Examples, rows: jax.Array, step: jax.Array) -> State:
        batch = jax.tree.map(lambda array: array[rows], train)
        if self._recipe.mirror or self._recipe.shift:
            key = jax.random.fold_in(self._keys[1], step)
            changed = augmented(batch.inputs, key, mirror=self._recipe.mirror, shift=self._recipe.shift)
            batch = batch._replace(inputs=changed)
        params, rest = self._trained(state.variables)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, updates = self._learn(params, rest, batch.inputs)
            return self._loss.mean(outputs, batch), updates

        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        variables = params if self._network.learn is None else {"params": params, **rest}
        return State(variables, optimizer, state.loss_sum + value)

    def _trained(self, variables: Any) -> tuple[Any, Any]:
        """The trained variables and the others."""
        if self._network.learn is None:
            return variables, {}
        return variables["params"], {name: value for name, value in variables.items() if name != "params"}

    def _learn(self, params: Any, rest: Any, inputs: jax.Array) -> tuple[Any, Any]:
        if self._network.learn is None:
            return self._apply(params, inputs), {}
        return self._network.learn({"params": params, **rest}, inputs)

    def _order(self, epoch: int) -> np.ndarray:
        """The order of the training examples, which depends on the epoch alone."""
        key = jax.random.fold_in(self._keys[2], epoch)
        return np.asarray(jax.random.permutation(key, self._train.size))

    def _report(self, epoch: int, variables: Any, loss: float, speed: float, logs: Logs) -> str:
        """Adds an epoch to the metrics, and describes it in one line."""
        error = self.measure(variables, self._validation)
        metrics = {"epoch": epoch, "seed": self._recipe.seed, "loss": loss, "validation": error}
        logs.log_epoch(PHASE, [metrics], images_per_second=speed)
        return f"epoch {epoch}: loss {loss:.4g}, validation {error:.4g} ({self._loss.measure})"

    def _restored(self, checkpoints: Checkpoints) -> tuple[State, int]:
        """The state of the last checkpoint and the number of its steps, or the first state."""
        state = self.first_state()
        restored = checkpoints.restore(PHASE, jax.tree.leaves(state))
        if restored is None:
            return state, 0
        return jax.tree.unflatten(jax.tree.structure(state), restored.state), restored.facts["step"]


def make_optimizer(recipe: PlainRecipe, steps: int) -> optax.GradientTransformation:
    """The optimiser of a recipe.

    Args:
      recipe: The recipe.
      steps: The number of steps per epoch.
    """
    total = steps * recipe.epochs
    rate = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, min(steps, total // 5), total)
    clip = optax.identity() if recipe.clip is None else optax.clip_by_global_norm(recipe.clip)
    decay = optax.add_decayed_weights(recipe.weight_decay, mask=_is_matrix)
    if recipe.optimizer == "adam":
        return optax.chain(clip, optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))
    if recipe.optimizer == "sgd":
        return optax.chain(clip, decay, optax.sgd(rate, momentum=0.9, nesterov=True))
    raise ValueError(f'optimizer is {recipe.optimizer!r}; it must be "adam" or "sgd".')


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda array: array.ndim > 1, params)
