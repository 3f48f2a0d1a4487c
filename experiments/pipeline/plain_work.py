"""The part that all plain methods share: training of a plain network with auxiliary values, such as masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax

import bcdl_jax
from experiments.pipeline.fit import make_fit
from experiments.pipeline.measures import Batch
from experiments.pipeline.progress import bar
from experiments.pipeline.recipe import PlainRecipe

# The result of a method: the params of the plain network, masks of the same structure, and the assignments and levels of its shared weights;
# None in place of the last two if the method finds no levels.
Found = tuple[Any, Any, tuple[dict[str, Any], dict[str, Any]] | None]


def _same(params: Any, auxiliary: Any, step: jax.Array) -> Any:
    return auxiliary


@dataclasses.dataclass(frozen=True)
class PlainWork:
    """The plain network, the data and the recipe of a plain method.

    Attributes:
      model: The plain network.
      train: The training images and labels, on the device.
      recipe: The recipe.
      chain: Layer names in the order of the data flow.
      report: A function that is called after each epoch: ``report(phase, epoch, weights, kept, loss, speed)``, with the weights in use, their
        number, the mean loss and the images per second.
    """

    model: nn.Module
    train: Batch
    recipe: PlainRecipe
    chain: Sequence[str]
    report: Callable[..., None]

    @property
    def steps(self) -> int:
        """The number of steps per epoch."""
        return len(self.train[1]) // self.recipe.batch_size

    def with_dropout(self, rate: float) -> Any:
        """The network with dropout at a rate; the network itself if the rate is 0."""
        return self.model.clone(dropout=rate) if rate else self.model  # type: ignore[call-arg]

    def fit(
        self,
        loss: Callable[..., jax.Array],
        optimizer: optax.GradientTransformation,
        params: Any,
        auxiliary: Any,
        key: jax.Array,
        epochs: int,
        *,
        net: Callable[[Any, Any], tuple[Any, Any]],
        phase: str = "train",
        done: int = 0,
        after_step: Callable[..., Any] = _same,
    ) -> tuple[Any, Any]:
        """Trains for a number of epochs, see ``make_fit``.

        Args:
          loss, optimizer, params, auxiliary, key, epochs, after_step: The arguments of ``make_fit`` and its function.
          net: A function (params, auxiliary) that returns the weights in use and their number, for the reports.
          phase: The name of the phase in the reports.
          done: The number of epochs of earlier calls, for the reports.

        Returns:
          The trained params and the last auxiliary values.
        """
        measure = jax.jit(net)

        def report(epoch: int, params: Any, auxiliary: Any, mean_loss: float, speed: float) -> None:
            weights, kept = measure(params, auxiliary)
            self.report(phase, done + epoch, weights, int(kept), mean_loss, speed)

        with bar(epochs * self.steps, phase, "step") as progress:
            fit = make_fit(
                loss,
                optimizer,
                self.train,
                self.recipe.batch_size,
                after_step,
                mirror=self.recipe.mirror,
                shift=self.recipe.shift,
            )
            return fit(params, auxiliary, key, epochs, progress, report)

    def round_limits(self, number: int) -> list[tuple[int, int]]:
        """The first epoch and the end of each round, as a half-open range. All rounds but the last are equally long, up to rounding."""
        last = (number + 1) / (2 * number) if self.recipe.last_round is None else self.recipe.last_round
        each = self.recipe.epochs * (1 - last) / max(1, number - 1)
        starts = [math.floor(before * each + 1e-6) for before in range(number)]
        return list(zip(starts, [*starts[1:], self.recipe.epochs], strict=True))

    def cosine(self, epochs: int) -> optax.GradientTransformation:
        """AdamW with the recipe's learning rate, which falls to 0 along a cosine over a number of epochs."""
        schedule = optax.cosine_decay_schedule(self.recipe.learning_rate, max(1, epochs * self.steps))
        return optax.adamw(schedule, weight_decay=self.recipe.weight_decay)

    def by_layer(self, values: Sequence[Any]) -> dict[str, Any]:
        """The values by layer name, from values in the order of the chain."""
        return dict(zip(self.chain, values, strict=True))


def kept_count(masks: Any) -> jax.Array:
    """The number of kept weights of all kernels."""
    return jax.numpy.stack([mask.sum() for mask in bcdl_jax.baselines.kernels_by_layer(masks).values()]).sum()
