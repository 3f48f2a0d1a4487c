"""One phase of ``fit``: steps with reports and a progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from tqdm import tqdm

from bcdl_jax.compression.pruning import kept_groups
from bcdl_jax.train.feeds import Advance
from bcdl_jax.train.settings import setting_of
from bcdl_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class FitReport:
    """The state of the training after some steps.

    Attributes:
      phase: The phase, "train", "round 1" and so on, or "fine-tune".
      step: The number of steps of this phase.
      loss: The mean sampled training loss since the last report, in nats per observation.
      kl: The KL divergence in nats per observation, without its weight.
      kl_weight: The KL weight.
      kept_groups: The number of groups whose score is below the default threshold of their family.
    """

    phase: str
    step: int
    loss: float
    kl: float
    kl_weight: float
    kept_groups: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, KL {self.kl:.3f} x {self.kl_weight:.3f}, {self.kept_groups:,} groups"


# A function from the state and its report to the state from which training continues.
OnReport = Callable[[TrainState, FitReport], TrainState]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of ``fit``.

    Attributes:
      name: The name of the phase.
      steps_per_epoch: The number of steps of an epoch.
      steps: The number of steps.
      steps_per_report: The number of steps between two reports.
      show: True to show a progress bar.
    """

    name: str
    steps_per_epoch: int
    steps: int
    steps_per_report: int
    show: bool

    def run(self, advance: Advance, state: TrainState, on_report: OnReport, until: int) -> TrainState:
        """Takes steps of the phase.

        Args:
          advance: The function that takes steps of a state with the setting "kl_weight".
          state: The state at the start or after a report.
          on_report: The function that is called with each report.
          until: The number of steps of the phase after which this call ends.

        Raises:
          ValueError: The loss or an update is not finite.
        """
        per_epoch = self.steps_per_epoch
        state = jax.tree.map(jax.numpy.array, state)  # The steps donate its buffers.
        taken, since, sums = int(state.step), 0, dict.fromkeys(state.metric_sums, 0.0)
        with tqdm(
            total=self.steps,
            initial=taken,
            desc=self.name,
            unit="step",
            mininterval=1,
            leave=until == self.steps,
            disable=not self.show,
        ) as bar:
            bar.set_postfix_str("compiling")
            while taken < until:
                count = min(self.steps_per_report - since, per_epoch - taken % per_epoch, until - taken)
                state, added = advance(state, count)
                sums = {name: total + float(added[name]) for name, total in sums.items()}
                taken, since = taken + count, since + count
                bar.update(count)
                if bool(state.halted):
                    raise ValueError(f"The loss or an update is not finite at step {int(state.step)} of {self.name}.")
                if since < self.steps_per_report and taken < until:
                    continue
                report = self._report(state, {name: total / since for name, total in sums.items()})
                bar.set_postfix_str(str(report))
                since, sums = 0, dict.fromkeys(sums, 0.0)
                state = on_report(state, report)
        return state

    def _report(self, state: TrainState, means: dict[str, float]) -> FitReport:
        kept = sum(int(count) for count in kept_groups(state.params).values())
        weight = float(setting_of(state)["kl_weight"])
        return FitReport(self.name, int(state.step), means["nll"], means["kl"], weight, kept)
