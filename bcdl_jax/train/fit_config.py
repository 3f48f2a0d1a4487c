"""The recipe of ``fit``."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """The recipe of ``fit``.

    Training aims at a loss: the KL weight rises while the sampled training loss is below the aim, and falls while it is above. The aim is
    the training loss of the trained network plus a *rise*: ``gap_share`` of the difference between its validation and training loss, but
    at least ``least_rise``. So a network that overfits is regularised, and any other network pays a small, known price.

    Attributes:
      steps: The largest number of training steps before pruning. Training ends earlier once the KL is flat.
      fine_tune_steps: The number of steps after pruning.
      batch_size: The number of examples per step.
      learning_rate: The learning rate of Adam for the weights. It falls to a twentieth along a cosine.
      variance_learning_rate: The learning rate of the logarithms of the variances.
      gap_share: The share of the difference between validation and training loss by which the sampled training loss may rise.
      least_rise: The least rise of the sampled training loss, in nats per observation.
      start_kl_weight: The KL weight at the start.
      most_kl_weight: The largest KL weight. Bayes' theorem gives 1.
      fine_tune_kl_share: The KL weight of fine-tuning, as a share of the last KL weight of training.
      pruning_share: The share of the rise by which pruning may raise the validation loss, before fine-tuning.
      steps_per_report: The number of steps between two reports. The KL weight changes after each report of training.

    Raises:
      ValueError: A number is out of range.
    """

    steps: int = 6000
    fine_tune_steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 1e-3
    variance_learning_rate: float = 2e-2
    gap_share: float = 0.75
    least_rise: float = 0.03
    start_kl_weight: float = 0.05
    most_kl_weight: float = 1.0
    fine_tune_kl_share: float = 0.3
    pruning_share: float = 0.25
    steps_per_report: int = 50

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.type == "int" and field.name != "fine_tune_steps" else 0
            if not least <= value < math.inf:
                raise ValueError(f"{field.name} is {value}; it must be at least {least} and finite.")
