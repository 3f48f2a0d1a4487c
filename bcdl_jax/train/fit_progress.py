"""The progress of ``fit``: all that a later process needs to go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from bcdl_jax._tree import PyTree
from bcdl_jax.train.fit_phase import FitReport
from bcdl_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a call of ``fit`` at a report or between two phases.

    Attributes:
      phase: The number of the phase: 0 for training, then one number for each round, then fine-tuning. The next number means the end.
      state: The state of the phase, at full size.
      params: The params that count so far: those of the trained network, of the last round that counts, or the result.
      base: The loss of the trained network on training data, in nats per observation.
      losses: The validation losses so far, see ``FitResult``.
      thresholds: The thresholds of the last round that counts.
      candidate: The thresholds of the current round.
      share: The share of the rise of the recipe by which the next pruning may raise the validation loss.
      reports: The reports so far.
    """

    phase: int
    state: TrainState
    params: PyTree
    base: float
    losses: dict[str, float]
    thresholds: dict[str, float]
    candidate: dict[str, float]
    share: float
    reports: tuple[FitReport, ...]

    @property
    def arrays(self) -> PyTree:
        """The arrays."""
        return self.state, self.params

    @property
    def facts(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        facts = {name: getattr(self, name) for name in _FACTS}
        return facts | {"reports": [dataclasses.asdict(report) for report in self.reports]}


_FACTS = [field.name for field in dataclasses.fields(Progress) if field.name not in ("state", "params", "reports")]


def progress_from(facts: Mapping[str, Any], state: TrainState, params: PyTree) -> Progress:
    """The progress with these facts and arrays, see ``Progress.facts``."""
    known = {name: facts[name] for name in _FACTS}
    reports = tuple(FitReport(**report) for report in facts["reports"])
    return Progress(state=jax.tree.map(jax.numpy.asarray, state), params=params, reports=reports, **known)
