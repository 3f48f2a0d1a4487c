"""The control of the KL weight: the sampled training loss follows an aim."""

from __future__ import annotations

import dataclasses
import math

# The KL weight changes by at most these factors at a time. It falls faster than it rises, so that a network does not collapse.
_LEAST_FACTOR, _MOST_FACTOR = math.exp(-0.5), math.exp(0.25)
_LEAST_WEIGHT = 1e-4


@dataclasses.dataclass(frozen=True)
class KLControl:
    """Chooses the KL weight such that the sampled training loss reaches an aim.

    Attributes:
      base: The training loss of the trained network, in nats per observation.
      aim: The aim, above the base.
      most: The largest KL weight.
    """

    base: float
    aim: float
    most: float

    def next_weight(self, weight: float, loss: float) -> float:
        """The KL weight after some steps with a weight.

        Args:
          weight: The weight of these steps.
          loss: The mean sampled training loss of these steps, in nats per observation.
        """
        distance = (self.aim - loss) / (self.aim - self.base)
        factor = min(_MOST_FACTOR, max(_LEAST_FACTOR, math.exp(max(-1.0, min(1.0, distance)))))
        return min(self.most, max(_LEAST_WEIGHT, weight * factor))
