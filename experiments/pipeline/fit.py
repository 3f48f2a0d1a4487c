"""Minimisation of a loss over plain params, in compiled loops that can be resumed within an epoch."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.pipeline.augmentation import augmented
from experiments.pipeline.measures import Batch

# The number of compiled loops per epoch. Between two of them Ctrl-C takes effect, the progress bar moves and a checkpoint can be written.
PARTS = 10


class Reached(NamedTuple):
    """The state of an unfinished minimisation.

    Attributes:
      state: The params, the auxiliary values and the optimiser's state.
      loss_sum: The sum of the losses of this epoch's steps so far.
      parts: The number of finished parts; ``PARTS`` of them make an epoch.
    """

    state: Any
    loss_sum: jax.Array
    parts: int


def make_fit(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    data: Batch,
    batch_size: int,
    after_step: Callable[[Any, Any, jax.Array], Any] = lambda params, auxiliary, step: auxiliary,
    mirror: bool = False,
    shift: int = 0,
) -> Callable[..., tuple[Any, Any]]:
    """Builds a function that minimises a loss.

    Args:
      loss: A function (params, auxiliary, images, labels, key) that returns a scalar.
      optimizer: The optimiser of the params.
      data: The images and labels.
      batch_size: The number of examples per step. An epoch leaves out its last incomplete batch.
      after_step: A function (params, auxiliary, step) that returns the new auxiliary values.
      mirror, shift: The random changes of the images, see ``augmented``.

    Returns:
      A function that minimises the loss, see ``_Fit.fit``.
    """
    steps = len(data[1]) // batch_size

    @functools.partial(jax.jit, donate_argnums=0)
    def take_steps(
        state: Any, loss_sum: jax.Array, key: jax.Array, order: jax.Array, first: Any, last: Any, before: Any, data: Any
    ) -> Any:
        def step(number: jax.Array, state: Any) -> Any:
            (params, auxiliary, optimizer_state), loss_sum = state
            rows = jax.lax.dynamic_slice_in_dim(order, number * batch_size, batch_size)
            images, labels = (array[rows] for array in data)
            step_key = jax.random.fold_in(key, before + number)
            images = augmented(images, step_key, mirror=mirror, shift=shift)
            value, gradients = jax.value_and_grad(loss)(params, auxiliary, images, labels, step_key)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            params = optax.apply_updates(params, updates)
            return (params, after_step(params, auxiliary, before + number), optimizer_state), loss_sum + value

        return jax.lax.fori_loop(first, last, step, (state, loss_sum))

    order_of = jax.jit(lambda key, epoch: jax.random.permutation(jax.random.fold_in(key, epoch), len(data[1])))
    return _Fit(take_steps, order_of, optimizer, data, batch_size, steps).fit


@dataclasses.dataclass(frozen=True)
class _Fit:
    take_steps: Callable[..., Any]
    order_of: Callable[..., jax.Array]
    optimizer: optax.GradientTransformation
    data: Batch
    batch_size: int
    steps: int

    def fit(
        self,
        params: Any,
        auxiliary: Any,
        key: jax.Array,
        epochs: int,
        progress: tqdm,
        report: Callable[..., None],
        start: Reached | None = None,
        after_part: Callable[[Reached], None] = lambda reached: None,
    ) -> tuple[Any, Any]:
        """Minimises the loss.

        Args:
          params: The params to start from.
          auxiliary: Values that the loss reads without gradient and that ``after_step`` replaces, such as masks.
          key: A PRNG key, for the order of the examples, their changes and the keys of the loss.
          epochs: The number of epochs.
          progress: A bar that counts steps.
          report: A function (epoch, params, auxiliary, mean_loss, images_per_second) that is called after each epoch.
          start: The state to resume from; None to start from the params.
          after_part: A function that is called with the state after each part but the last. It may store the state, or raise to stop.

        Returns:
          The trained params and the last auxiliary values.
        """
        # Copies, since the buffers are donated.
        now = start or Reached((params, auxiliary, self.optimizer.init(params)), jnp.zeros(()), 0)
        state, loss_sum = jax.tree.map(jnp.array, (now.state, now.loss_sum))
        step_keys = jax.random.fold_in(key, epochs)  # the keys before it order the examples
        ends = np.linspace(0, self.steps, PARTS + 1).astype(np.int32)
        first_epoch, first_part = divmod(now.parts, PARTS)
        progress.update(first_epoch * self.steps + int(ends[first_part]))
        for epoch in range(first_epoch, epochs):
            begin, seen = time.perf_counter(), 0
            order = self.order_of(key, epoch)
            for part in range(first_part, PARTS):
                first, last = ends[part : part + 2]
                state, loss_sum = self.take_steps(
                    state, loss_sum, step_keys, order, first, last, np.int32(epoch * self.steps), self.data
                )
                # Dispatch is asynchronous: without this wait, no checkpoint and no Ctrl-C would take effect between two parts.
                jax.block_until_ready(loss_sum)
                progress.update(int(last - first))
                seen += int(last - first) * self.batch_size
                if part + 1 < PARTS:
                    after_part(Reached(state, loss_sum, epoch * PARTS + part + 1))
            mean_loss = float(loss_sum) / self.steps
            loss_sum, first_part = jnp.zeros(()), 0
            report(epoch + 1, *state[:2], mean_loss, seen / (time.perf_counter() - begin))
            if epoch + 1 < epochs:
                after_part(Reached(state, loss_sum, (epoch + 1) * PARTS))
        return state[:2]
