"""A phase of variational training: "train" from the start values, or "fine_tune" from the pruned params."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

import bcdl_jax
from experiments.pipeline.context import RunContext
from experiments.pipeline.measures import Batch, measure_change, sampled_cross_entropy, score_of
from experiments.runtime import backend

_SHRINKING_IMAGES = 500


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of training of all seeds.

    Attributes:
      context: The context of the run.
      name: The name of the phase, "train" or "fine_tune".
      train: The training data, on the devices.
      validation: The validation data, on the devices.
    """

    context: RunContext
    name: str
    train: Batch
    validation: Batch

    @property
    def fine_tunes(self) -> bool:
        return self.name == "fine_tune"

    @property
    def title(self) -> str:
        return self.name.replace("_", "-")

    @property
    def epochs(self) -> int:
        recipe = self.context.recipe
        return recipe.fine_tune_epochs if self.fine_tunes else recipe.epochs

    @property
    def first_epoch(self) -> int:
        return self.context.recipe.epochs + 1 if self.fine_tunes else 1

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train[1]) // self.context.recipe.batch_size

    @property
    def shards(self) -> int:
        return 1 if self.context.mesh is None else self.context.mesh.size

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a learning rate per kind of parameter; fine-tuning averages the params too."""
        recipe = self.context.recipe
        total = max(1, self.epochs * self.steps_per_epoch)
        schedule = (
            recipe.fine_tune_learning_rate
            if self.fine_tunes
            else optax.cosine_decay_schedule(recipe.learning_rate, total)
        )
        factor = recipe.fine_tune_log_variance_factor if self.fine_tunes else recipe.log_variance_factor
        decay = 1 - 1 / max(1, recipe.fine_tune_averaging_epochs * self.steps_per_epoch)
        averaging = bcdl_jax.train.params_ema(decay) if self.fine_tunes else optax.identity()
        factors = {"log_variance": factor, "scale": recipe.scale_factor}
        return optax.chain(optax.adam(schedule), bcdl_jax.train.scale_by_kind(factors), averaging)

    def make_step(self, likelihood: Callable[..., jax.Array]) -> Callable[..., Any]:
        """The training step on a negative log-likelihood."""
        recipe = self.context.recipe
        kl_weight = (
            recipe.fine_tune_kl_weight
            if self.fine_tunes
            else bcdl_jax.kl_warmup(recipe.warmup_epochs * self.steps_per_epoch, to=recipe.kl_weight)
        )
        return bcdl_jax.train.make_train_step(
            likelihood, self.optimizer(), num_examples=len(self.train[1]), kl_weight=kl_weight
        )

    def likelihood(self) -> Callable[..., jax.Array]:
        """The negative log-likelihood of a batch."""
        recipe = self.context.recipe
        return functools.partial(sampled_cross_entropy, self.context.model, mirror=recipe.mirror, shift=recipe.shift)

    def shrinking(self) -> bcdl_jax.train.ShrinkingConfig | None:
        """The way the networks shrink while they train; None where the recipe keeps them at full size."""
        recipe, chain = self.context.recipe, self.context.chain
        if recipe.max_shrinking_change is None:
            return None
        # The groups are chosen before fine-tuning: there the masked groups are left out, and no more.
        thresholds = math.inf if self.fine_tunes else self._prunable_groups()
        # A CPU gains by every channel that is left out. An accelerator computes eight channels as fast as seven, and compiling a smaller
        # step takes longer than all of the training there: the network shrinks once, for the fine-tuning.
        on_cpu = backend.on_cpu()
        return bcdl_jax.train.ShrinkingConfig(
            self.likelihood(),
            self.make_step,
            thresholds,
            chain,
            score=score_of(recipe),
            first_check=recipe.first_shrinking,
            regular_checks=recipe.regular_shrinking and not self.fine_tunes,
            least_saving=recipe.least_shrinking_saving,
            multiple_of=1 if on_cpu else 8,
            remove_masked=on_cpu or self.fine_tunes,
        )

    def _prunable_groups(self) -> Callable[[Any], dict[str, float]]:
        """From params to thresholds: the smallest network that hardly changes the predictions on a few images."""
        recipe, images = self.context.recipe, self.train[0]
        change_from = measure_change(self.context.model, images[:: max(1, len(images) // _SHRINKING_IMAGES)])

        def thresholds(params: Any) -> dict[str, float]:
            return bcdl_jax.choose_thresholds(
                params,
                change_from(params),
                max_increase=recipe.max_shrinking_change,
                chain=self.context.chain,
                score=score_of(recipe),
            )

        return thresholds

    def thresholds_for_reports(self) -> Any:
        """The thresholds by which progress reports count groups. Masked groups never count as kept."""
        recipe, thresholds = self.context.recipe, self.context.thresholds
        # The default thresholds of the families are log dropout rates.
        other_score = thresholds is None and recipe.score != "log_dropout_rate"
        return math.inf if self.fine_tunes or other_score else thresholds

    def batch_arguments(self) -> dict[str, Any]:
        """The arguments that compiling and training share."""
        recipe = self.context.recipe
        return {"batch_size": recipe.batch_size, "in_turn": recipe.in_turn, "shards": self.shards}
