"""The stages of ``fit``: measure, train, rounds of pruning, fine-tune."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.common_threshold import choose_common_threshold
from bcdl_jax.compression.pruning import ConvertedNetwork, prune
from bcdl_jax.graph.example_inputs import as_inputs
from bcdl_jax.priors.kl import kl_divergence
from bcdl_jax.priors.posterior import variational_layers
from bcdl_jax.shrinking import ShrinkReport, cut, expand
from bcdl_jax.train.averaging import averaged_params, params_ema
from bcdl_jax.train.checkpoints import Checkpoints, restored
from bcdl_jax.train.constants import merge_constants
from bcdl_jax.train.feeds import Advance, Batch, Feed, first_examples, some_batches
from bcdl_jax.train.fit_config import FitConfig
from bcdl_jax.train.fit_phase import FitReport, Phase
from bcdl_jax.train.fit_progress import Progress, progress_from
from bcdl_jax.train.kinds import scale_by_kind
from bcdl_jax.train.kl_control import KLControl
from bcdl_jax.train.losses import Loss, mean_nats
from bcdl_jax.train.mesh import fetch, place_state
from bcdl_jax.train.parts import is_posterior
from bcdl_jax.train.settings import make_step_by_setting, with_setting
from bcdl_jax.train.shrinking_config import ShrinkingConfig
from bcdl_jax.train.state import NegativeLogLikelihood, TrainState, TrainStep, create_train_state
from bcdl_jax.train.step import make_train_step
from bcdl_jax.train.while_shrinking import leave_out_pruned

# The largest number of training examples for the first measures.
_MOST_MEASURED = 5000
# The number of reports whose KL weights are averaged.
_AVERAGED_REPORTS = 10


class Network(Protocol):
    """The part of a variational network that ``fit`` needs. ``VariationalModel`` has it."""

    @property
    def params(self) -> PyTree: ...

    def apply(self, params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> PyTree: ...


# A function of the params of the network and a report.
Callback = Callable[[PyTree, FitReport], None]


@dataclasses.dataclass(frozen=True)
class FitRun:
    """A call of ``fit``. Its params are a pair of entries: "network" without the constant arrays, and "loss".

    Attributes:
      network: The variational network.
      constant: The constant arrays of its params.
      loss: The loss.
      config: The recipe.
      train: The training data.
      observations: The number of observations in them.
      validation: The validation data.
      key: A PRNG key.
      mesh: The devices of training, or None for one.
      checkpoints: The checkpoints, or None for none.
      show: True to show a progress bar and messages.
      callback: A function of the whole params of the network and a report, or None.
    """

    network: Network
    constant: PyTree
    loss: Loss
    config: FitConfig
    train: Feed
    observations: int
    validation: Feed
    key: jax.Array
    mesh: Mesh | None
    checkpoints: Checkpoints | None
    show: bool
    callback: Callback | None

    def run(self, trained: PyTree) -> Progress:
        """Runs all phases that are left, from the params to train."""
        progress = self._start(trained)
        last = self._fine_tuning
        while progress.phase <= last:
            state, reports = self._run_phase(progress)
            progress = dataclasses.replace(progress, reports=reports)
            if progress.phase == 0:
                progress = self._after_training(progress, state)
            elif progress.phase < last:
                progress = self._after_round(progress, state)
            else:
                progress = self._after_fine_tuning(progress, state)
            self._save(progress)
        return progress

    @property
    def _fine_tuning(self) -> int:
        """The number of the last phase."""
        return self.config.rounds + 1

    # The loss.

    def _outputs(self, params: dict[str, PyTree], inputs: PyTree, key: jax.Array | None) -> PyTree:
        return self.network.apply(merge_constants(params["network"], self.constant), *as_inputs(inputs), key=key)

    def _likelihood(self, params: dict[str, PyTree], batch: Batch, key: jax.Array) -> jax.Array:
        return mean_nats(self.loss, params["loss"], self._outputs(params, batch[0], key), batch[1])

    @functools.cached_property
    def _sums(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """A function from params and data to the sum of the loss of the mean weights, and the number of observations."""

        def sums(params: dict[str, PyTree], inputs: PyTree, targets: PyTree) -> tuple[jax.Array, jax.Array]:
            nats = self.loss.nats(params["loss"], self._outputs(params, inputs, None), targets)
            return jnp.sum(nats), jnp.sum(self.loss.counts(targets))

        return jax.jit(sums)

    def _mean_loss(self, params: dict[str, PyTree], batches: Iterable[Batch]) -> float:
        """The loss of the mean weights, in nats per observation."""
        sums = [self._sums(params, *batch) for batch in batches]
        nats, counts = (sum(float(value) for value in values) for values in zip(*sums, strict=True))
        return nats / max(counts, 1.0)

    def _validation_loss(self, params: dict[str, PyTree]) -> float:
        return self._mean_loss(params, self.validation.batches())

    # The phases.

    def _start(self, trained: PyTree) -> Progress:
        """The progress at the start, or that of the newest checkpoint."""
        some = some_batches(self.train, _MOST_MEASURED)
        outputs = jax.jit(functools.partial(self._outputs, key=None))({"network": trained}, some[0][0])
        params = {"network": trained, "loss": self.loss.start(outputs, some[0][1])}
        if (found := self._resumed(params)) is not None:
            return found
        base, held_out = self._mean_loss(params, some), self._validation_loss(params)
        if not math.isfinite(base + held_out):
            raise ValueError(
                f"The loss of the trained network is {base} on data and {held_out} on validation; both must be finite."
            )
        given = self.config.kl_weight is not None
        state = self._state(0, params, self._given_weight(0) if given else self.config.start_kl_weight)
        progress = Progress(0, state, params, base, {"plain": held_out}, {}, {}, 1.0, ())
        kl = float(kl_divergence(trained)) / self.observations
        aim = "" if given else f" The sampled training loss may rise to {self._control(progress).aim:.4f}."
        self.say(
            f"The loss of the trained network is {base:.4f} on data and {held_out:.4f} on validation, in nats per observation; the KL is "
            f"{kl:.2f} nats per observation.{aim}"
        )
        return progress

    def _resumed(self, params: dict[str, PyTree]) -> Progress | None:
        """The progress of the newest checkpoint, or None. ``params`` are those at the start."""
        found = None if self.checkpoints is None else self.checkpoints.newest()
        if found is None:
            return None
        facts, arrays = found
        # The state of the end is that of the last phase.
        like = self._state(min(facts["phase"], self._fine_tuning), params, 1.0), params
        progress = progress_from(facts, *restored(like, arrays))
        self.train.go_to(facts["position"])
        if progress.phase > self._fine_tuning:
            self.say("The run in checkpoints is complete; this is its result.")
        else:
            self.say(f"Continues with {self._name(progress.phase)} at step {int(progress.state.step)}.")
        return progress

    def _run_phase(self, progress: Progress) -> tuple[TrainState, tuple[FitReport, ...]]:
        """The state at the end of the current phase, at full size, and all reports."""
        steps, every = self._steps(progress.phase), self.config.check_steps if progress.phase == 0 else 0
        trainer = self._trainer(progress)
        while True:
            taken = int(progress.state.step)
            until = min(steps, taken - taken % every + every) if every else steps
            state, reports = self._take_steps(progress, trainer, until)
            if until == steps:
                return state, reports
            checked = self._checked(state)
            progress = dataclasses.replace(progress, state=checked, reports=reports)
            if checked is not state:
                trainer = self._trainer(progress)
            self._save_if_due(progress)

    def _trainer(self, progress: Progress) -> _Trainer:
        """The trainer without the groups that are pruned in the state."""
        make_step = self._step_maker(self._optimizer(progress.phase))
        shrinking = ShrinkingConfig(self._likelihood, make_step, thresholds=math.inf, multiple_of=1)
        small = leave_out_pruned(shrinking, progress.state, first_examples(next(self.train.batches()), 2))
        step = make_step(self._likelihood) if small is None else small.step
        return _Trainer(self.train.trainer(step), None if small is None else small.report, self.mesh)

    def _take_steps(
        self, progress: Progress, trainer: _Trainer, until: int
    ) -> tuple[TrainState, tuple[FitReport, ...]]:
        """The state after this number of steps of the current phase, at full size, and all reports."""
        number, reports = progress.phase, list(progress.reports)

        def at_full_size(state: TrainState) -> TrainState:
            return trainer.expanded(state, progress.state)

        def on_report(state: TrainState, report: FitReport) -> TrainState:
            reports.append(report)
            if number == 0:
                state = with_setting(state, {"kl_weight": self._next_weight(progress, report)})
            if self.callback is not None:
                # A copy, since the next step donates the buffers.
                params = jax.tree.map(jnp.array, at_full_size(state).params["network"])
                self.callback(merge_constants(params, self.constant), report)
            # A pruning check, or the choice of the next phase, follows the last step.
            if report.step < until:
                self._save_if_due(dataclasses.replace(progress, reports=tuple(reports)), lambda: at_full_size(state))
            return state

        phase = Phase(
            self._name(number), self.train.steps, self._steps(number), self.config.steps_per_report, self.show
        )
        state = phase.run(trainer.advance, trainer.small(progress.state), on_report, until)
        return at_full_size(state), tuple(reports)

    def _checked(self, state: TrainState) -> TrainState:
        """The state after a pruning check, ``state`` itself if nothing is pruned."""
        params = state.params
        thresholds = self._thresholds(params, self.config.check_rise)
        pruned = prune_network(params, thresholds, self._converted)
        before, after = (kept_weights(each["network"])[0] for each in (params, pruned))
        if after > (1 - self.config.check_saving) * before:
            return state
        self.say(f"{self._name(0)}: {after:,} of {before:,} weights are kept from step {int(state.step)} on.")
        return state.replace(params=pruned)

    def _after_training(self, progress: Progress, state: TrainState) -> Progress:
        losses = progress.losses | {"trained": self._validation_loss(state.params)}
        return self._next(dataclasses.replace(progress, params=state.params, losses=losses))

    def _after_round(self, progress: Progress, state: TrainState) -> Progress:
        """Keeps the result of a round if its loss is low enough, and starts the next phase."""
        params = averaged_params(state.optimizer_state)
        loss, limit = self._validation_loss(params), self._limit(progress)
        counts = loss <= limit
        kept, total = kept_weights(params["network"] if counts else progress.params["network"])
        self.say(
            f"{self._name(progress.phase)}: validation loss {loss:.4f}, limit {limit:.4f}; {'' if counts else 'undone, '}"
            f"{kept:,} of {total:,} weights are kept."
        )
        if not counts:
            return self._next(dataclasses.replace(progress, share=progress.share / 2))
        losses = progress.losses | {"pruned": loss}
        return self._next(dataclasses.replace(progress, params=params, losses=losses, thresholds=progress.candidate))

    def _next(self, progress: Progress) -> Progress:
        """The progress at the start of the next phase."""
        number, params, candidate = progress.phase + 1, progress.params, progress.thresholds
        if number < self._fine_tuning:
            candidate = self._thresholds(params, progress.share * self.config.pruning_rise)
            params = prune_network(params, candidate, self._converted)
        elif not self.config.fine_tune_steps:
            return dataclasses.replace(progress, phase=self._fine_tuning + 1)
        weight = self._found_weight(progress)
        if number == self._fine_tuning:
            weight *= self.config.fine_tune_kl_share
        return dataclasses.replace(
            progress, phase=number, candidate=candidate, state=self._state(number, params, weight)
        )

    def _after_fine_tuning(self, progress: Progress, state: TrainState) -> Progress:
        """The end, with the fine-tuned params if their loss is lower."""
        params, before = averaged_params(state.optimizer_state), list(progress.losses.values())[-1]
        loss = self._validation_loss(params)
        if loss > before:
            self.say(f"fine-tune: validation loss {loss:.4f}, {before:.4f} before; undone.")
            return dataclasses.replace(progress, phase=self._fine_tuning + 1)
        losses = progress.losses | {"fine-tuned": loss}
        return dataclasses.replace(progress, phase=self._fine_tuning + 1, params=params, losses=losses)

    def _thresholds(self, params: dict[str, PyTree], rise: float) -> dict[str, float]:
        """The lowest common threshold that raises the validation loss by at most ``rise``."""
        return choose_common_threshold(
            params["network"],
            lambda network: self._validation_loss(params | {"network": network}),
            max_increase=rise,
            network=self._converted,
        )

    def _next_weight(self, progress: Progress, report: FitReport) -> float:
        """The KL weight of training after a report."""
        if self.config.kl_weight is None:
            return self._control(progress).next_weight(report.kl_weight, report.loss)
        return self._given_weight(report.step)

    def _given_weight(self, step: int) -> float:
        """The given KL weight of the steps from this one to the next report."""
        assert self.config.kl_weight is not None
        return self.config.kl_weight * min(
            1.0, (step + self.config.steps_per_report) / max(1, self.config.warmup_steps)
        )

    def _control(self, progress: Progress) -> KLControl:
        """The control of the KL weight."""
        gap = progress.losses["plain"] - progress.base
        rise = max(self.config.least_rise, self.config.gap_share * gap)
        return KLControl(progress.base, progress.base + rise, self.config.most_kl_weight)

    def _limit(self, progress: Progress) -> float:
        """The largest validation loss of a pruned network."""
        return min(progress.losses["plain"], progress.losses["trained"]) + self.config.least_rise

    def _found_weight(self, progress: Progress) -> float:
        """The KL weight at the end of training: the geometric mean of the last reports, since the control moves it up and down."""
        weights = [report.kl_weight for report in progress.reports if report.phase == self._name(0)]
        return math.exp(statistics.fmean(map(math.log, weights[-_AVERAGED_REPORTS:])))

    @property
    def _converted(self) -> ConvertedNetwork | None:
        """The network, which finds the useless units of params without the constant arrays."""
        return _WithoutConstants(self.network, self.constant) if hasattr(self.network, "prune_useless") else None

    # The parts of a phase.

    def _name(self, number: int) -> str:
        if number == 0:
            return "train"
        return f"round {number}" if number < self._fine_tuning else "fine-tune"

    def _steps(self, number: int) -> int:
        if number == 0:
            return self.config.steps
        return self.config.round_steps if number < self._fine_tuning else self.config.fine_tune_steps

    def _state(self, number: int, params: dict[str, PyTree], kl_weight: float) -> TrainState:
        """The state at the start of a phase."""
        key = jax.random.fold_in(self.key, number)
        return with_setting(create_train_state(params, self._optimizer(number), key), {"kl_weight": kl_weight})

    def _optimizer(self, number: int) -> optax.GradientTransformation:
        config, steps = self.config, self._steps(number)
        rate = config.learning_rate if number == 0 else config.round_learning_rate
        schedule = optax.cosine_decay_schedule(rate, steps, 0.05)
        factors = {"log_variance": config.variance_factor, "scale": config.scale_factor}
        averaging = [] if number == 0 else [params_ema(1 - 10 / max(20, steps))]
        return optax.chain(optax.adam(schedule), scale_by_kind(factors), *averaging)

    def _step_maker(self, optimizer: optax.GradientTransformation) -> Callable[[NegativeLogLikelihood], TrainStep]:
        """A function from a likelihood to the step of a state with the setting "kl_weight"."""

        def make_step(likelihood: NegativeLogLikelihood) -> TrainStep:
            def by_setting(setting: dict[str, jax.Array]) -> TrainStep:
                weight = lambda step: setting["kl_weight"]  # noqa: E731
                return make_train_step(likelihood, optimizer, num_examples=self.observations, kl_weight=weight)

            return make_step_by_setting(by_setting)

        return make_step

    def _save_if_due(self, progress: Progress, state: Callable[[], TrainState] | None = None) -> None:
        """Writes a checkpoint if the last one is old. ``state`` computes the state to save, if it is not that of ``progress``."""
        if self.checkpoints is not None and self.checkpoints.are_due:
            self._save(progress if state is None else dataclasses.replace(progress, state=state()))

    def _save(self, progress: Progress) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(progress.facts | {"position": self.train.position()}, progress.arrays)

    def say(self, message: str) -> None:
        """Prints a message."""
        if self.show:
            tqdm.write(f"fit: {message}", file=sys.stderr)  # where the progress bar is


@dataclasses.dataclass(frozen=True)
class _Trainer:
    """The training steps of a network whose pruned groups are left out.

    Attributes:
      advance: The function that takes the steps, for small states.
      report: The report of ``shrink``, or None if nothing is left out.
      mesh: The devices of training, or None for one.
    """

    advance: Advance
    report: ShrinkReport | None
    mesh: Mesh | None

    def small(self, state: TrainState) -> TrainState:
        """The small state on the devices of training."""
        state = state if self.report is None else cut(state, self.report)
        return state if self.mesh is None else place_state(state, self.mesh)

    def expanded(self, small: TrainState, whole: TrainState) -> TrainState:
        """The small state at full size. The groups that are left out have their values in ``whole``."""
        state = small if self.mesh is None else jax.tree.map(jnp.asarray, fetch(small))
        return state if self.report is None else expand(state, self.report, into=whole)


@dataclasses.dataclass(frozen=True)
class _WithoutConstants:
    """A converted network whose params lack the constant arrays."""

    network: Any
    constant: PyTree

    def prune_useless(self, params: PyTree) -> PyTree:
        """The params without useless units."""
        pruned = self.network.prune_useless(merge_constants(params, self.constant))
        return jax.tree.map(
            lambda leaf, other: None if leaf is None else other,
            params,
            pruned,
            is_leaf=lambda leaf: leaf is None or is_posterior(leaf),
        )


def prune_network(
    params: dict[str, PyTree], thresholds: dict[str, float], network: ConvertedNetwork | None
) -> dict[str, PyTree]:
    """The params with a pruned network."""
    return params | {"network": prune(params["network"], thresholds, network=network)}


def count_observations(loss: Loss, feed: Feed) -> int:
    """The number of observations in the data."""
    return round(sum(float(jnp.sum(loss.counts(targets))) for _, targets in feed.batches()))


def kept_weights(params: PyTree) -> tuple[int, int]:
    """The number of kept weights of the variational layers, and the number of all."""
    layers = variational_layers(params).values()
    kept = round(sum(float(layer.kept_weights()) for layer in layers))
    return kept, sum(math.prod(layer.kernel_shape) for layer in layers)
