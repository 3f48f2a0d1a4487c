"""The reports of an ensemble: one per epoch, with the metrics of each seed and messages for users."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import Thresholds
from bcdl_jax.priors.posterior import variational_layers
from bcdl_jax.train.loop import mean_metrics
from bcdl_jax.train.messages import end_warnings, failure_sentence, pruning_warnings
from bcdl_jax.train.parts import part_names
from bcdl_jax.train.seeds import select_seed
from bcdl_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """The results of one epoch of one seed.

    Attributes:
      epoch: The number of the epoch, from 1.
      seed: The name of the run, usually its seed.
      loss: The negative ELBO in nats per example, mean over the epoch.
      nll: The cross-entropy, a part of ``loss``.
      kl: KL / num_examples, unweighted.
      validation_error: The validation error in percent, at the posterior means.
      kept: The number of groups that each layer would keep at the given thresholds, or at the default thresholds of the families.
      failure: One sentence if a value that is not finite halted the run, else None.
    """

    epoch: int
    seed: int
    loss: float
    nll: float
    kl: float
    validation_error: float
    kept: dict[str, int]
    failure: str | None


@dataclasses.dataclass(frozen=True)
class EnsembleReport:
    """The results of one epoch of an ensemble.

    Attributes:
      reports: One report per seed.
      messages: Failures and warnings, each of them once in a run.
      shrink_messages: Sentences about networks that have become smaller.
    """

    reports: tuple[EpochReport, ...]
    messages: tuple[str, ...]
    shrink_messages: tuple[str, ...] = ()


class Reporter:
    """Makes the reports of an ensemble, and remembers the messages that were already reported."""

    def __init__(
        self,
        params: PyTree,
        *,
        seeds: Sequence[int],
        epochs: int,
        first_epoch: int,
        steps: int,
        thresholds: Thresholds | None,
    ):
        """The reporter of an ensemble.

        Args:
          params: The stacked params.
          seeds: One name per seed.
          epochs: The number of epochs of the whole run.
          first_epoch: The number that the first epoch has in the reports.
          steps: The number of steps per epoch.
          thresholds: The thresholds of the kept groups in the reports.
        """
        self._seeds, self._epochs, self._first_epoch, self._steps = seeds, epochs, first_epoch, steps
        self._names = part_names(params)
        layers = variational_layers(jax.eval_shape(lambda stacked: select_seed(stacked, 0), params))
        self._totals = {name: layer.unit_mask.size for name, layer in layers.items()}
        self._units = "weights" if any(layer.prunes_weights for layer in layers.values()) else "groups"
        self._thresholds = thresholds
        self._already_reported: set[tuple[int, str]] = set()

    def report(self, states: TrainState, measured: Any, epoch: int, shrink_messages: Sequence[str]) -> EnsembleReport:
        """The report of one epoch.

        Args:
          states: The stacked states after the epoch.
          measured: The stacked validation errors and numbers of kept groups.
          epoch: The number of the epoch, from 0.
          shrink_messages: Sentences about networks that have become smaller.
        """
        metrics, (errors, kept), halted, failed_parts, steps = jax.device_get(
            (mean_metrics(states, self._steps), measured, states.halted, states.failed_parts, states.step)
        )
        number = self._first_epoch + epoch
        reports: list[EpochReport] = []
        messages: list[str] = []
        for index, seed in enumerate(self._seeds):
            seed_kept = {name: int(counts[index]) for name, counts in kept.items()}
            failure = self._failure(seed, int(steps[index]), failed_parts[index]) if halted[index] else None
            if failure is None:
                late = self._is_late(epoch)
                found = pruning_warnings(seed, number, seed_kept, self._totals, self._units, late)
                if late and epoch + 1 == self._epochs:
                    nll, kl = (float(metrics[name][index]) for name in ("nll", "kl"))
                    found |= end_warnings(seed, number, seed_kept, self._totals, self._units, nll, kl)
            else:
                found = {"failure": failure}
            messages += self._new_messages(seed, found)
            reports.append(
                EpochReport(
                    epoch=number,
                    seed=seed,
                    loss=float(metrics["loss"][index]),
                    nll=float(metrics["nll"][index]),
                    kl=float(metrics["kl"][index]),
                    validation_error=float(errors[index]),
                    kept=seed_kept,
                    failure=failure,
                )
            )
        return EnsembleReport(tuple(reports), tuple(messages), tuple(shrink_messages))

    def _failure(self, seed: int, steps: int, failed_parts: Sequence[bool]) -> str:
        failed_names = [name for name, bad in zip(self._names, failed_parts, strict=True) if bad]
        epoch = self._first_epoch + steps // self._steps
        return failure_sentence(seed, epoch, steps + 1, failed_names, self._names)

    def _is_late(self, epoch: int) -> bool:
        """True if some pruning can be expected: in the second half of a run, from epoch 10 on; in the last epoch of a short run."""
        if self._thresholds == math.inf:  # Infinite thresholds prune nothing that is not masked already.
            return False
        return epoch + 1 >= (max(10, (self._epochs + 1) // 2) if self._epochs > 10 else self._epochs)

    def _new_messages(self, seed: int, found: dict[str, str]) -> list[str]:
        """The messages on subjects that were not reported before for this seed."""
        new = {subject: text for subject, text in found.items() if (seed, subject) not in self._already_reported}
        self._already_reported.update((seed, subject) for subject in new)
        return list(new.values())
