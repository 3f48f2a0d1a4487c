"""The recipe of ``fit``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def _at_least(least: int, default: float) -> Any:
    """A field with a least value. All other fields must be above 0."""
    return dataclasses.field(default=default, metadata={"least": least})


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """The recipe of ``fit``.

    Training aims at a loss: the KL weight rises while the sampled training loss is below the aim, and falls while it is above. The aim is
    the training loss of the trained network plus a *rise*: ``gap_share`` of the difference between its validation and training loss, but
    at least ``least_rise``. So a network that overfits is regularised, and any other network pays a small, known price.

    With ``kl_weight``, the KL weight is given instead. This suits a network that was not trained before, whose loss is no aim.

    Then rounds of pruning follow. Each round prunes until the validation loss has risen by ``pruning_rise``, and trains the smaller network.
    The round counts if the validation loss is then at most ``least_rise`` above the lowest one before pruning. If not, it is undone, and the
    next round prunes half as far.

    Attributes:
      steps: The number of training steps before pruning.
      rounds: The number of rounds of pruning.
      round_steps: The number of training steps after each pruning.
      fine_tune_steps: The number of steps after the last round.
      batch_size: The number of examples per step.
      learning_rate: The learning rate of Adam for the weights. It falls to a twentieth along a cosine.
      round_learning_rate: The learning rate of the weights at the start of each round and of fine-tuning. It falls in the same way.
      variance_factor: The learning rate of the logarithms of the variances, relative to that of the weights.
      scale_factor: The learning rate of the scales of the groups, relative to that of the weights.
      gap_share: The share of the difference between validation and training loss by which the sampled training loss may rise.
      least_rise: The least rise of the sampled training loss, and the largest rise of the validation loss, in nats per observation.
      kl_weight: A given KL weight of training, in place of the aim; None to follow the aim.
      warmup_steps: The number of steps in which a given KL weight rises from 0.
      start_kl_weight: The KL weight at the start, without a given one.
      most_kl_weight: The largest KL weight. Bayes' theorem gives 1.
      fine_tune_kl_share: The KL weight of fine-tuning, as a share of the KL weight at the end of training. The rounds use this weight itself.
      pruning_rise: The rise of the validation loss by the pruning of a round, before its training, in nats per observation.
      check_steps: The number of training steps between two pruning checks before the rounds; 0 for none. A check prunes as far as the validation
        loss rises by ``check_rise``, if this removes at least ``check_saving`` of the weights. Checks make long trainings faster.
      check_rise: The rise of the validation loss by the pruning of a check, in nats per observation.
      check_saving: The least share of the kept weights that a check removes. The smaller network is compiled again, which takes time.
      steps_per_report: The number of steps between two reports. The KL weight changes after each report of training.

    Raises:
      ValueError: A number is out of range.
    """

    steps: int = _at_least(1, 2500)
    rounds: int = _at_least(0, 8)
    round_steps: int = _at_least(1, 400)
    fine_tune_steps: int = _at_least(0, 800)
    batch_size: int = _at_least(1, 128)
    learning_rate: float = 2e-3
    round_learning_rate: float = 1e-3
    variance_factor: float = 20.0
    scale_factor: float = 5.0
    gap_share: float = _at_least(0, 0.75)
    least_rise: float = 0.03
    kl_weight: float | None = None
    warmup_steps: int = _at_least(0, 0)
    start_kl_weight: float = 0.05
    most_kl_weight: float = 1.0
    fine_tune_kl_share: float = _at_least(0, 0.3)
    pruning_rise: float = _at_least(0, 0.02)
    check_steps: int = _at_least(0, 0)
    check_rise: float = _at_least(0, 0.001)
    check_saving: float = 0.1
    steps_per_report: int = _at_least(1, 50)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata.get("least")
            if value is None and field.default is None:
                continue
            if least is None and not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {value}; it must be above 0 and finite.")
            if least is not None and not least <= value < math.inf:
                raise ValueError(f"{field.name} is {value}; it must be at least {least} and finite.")
        if self.check_steps % self.steps_per_report:
            raise ValueError(
                f"check_steps is {self.check_steps}; it must be a multiple of steps_per_report, {self.steps_per_report}."
            )
