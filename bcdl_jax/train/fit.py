"""The whole training of a variational network in one call: measure, train, prune, fine-tune."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import prune
from bcdl_jax.compression.threshold_search import choose_thresholds
from bcdl_jax.graph.example_inputs import as_inputs
from bcdl_jax.priors.kl import kl_divergence
from bcdl_jax.priors.posterior import variational_layers
from bcdl_jax.train.averaging import averaged_params, params_ema
from bcdl_jax.train.constants import merge_constants, split_constants
from bcdl_jax.train.feeds import Batch, Feed, first_examples, make_feed, some_batches
from bcdl_jax.train.fit_config import FitConfig
from bcdl_jax.train.fit_phase import FitReport, Phase
from bcdl_jax.train.kinds import scale_by_kind
from bcdl_jax.train.kl_control import KLControl
from bcdl_jax.train.losses import Loss, OwnLoss, mean_nats
from bcdl_jax.train.settings import make_step_by_setting, with_setting
from bcdl_jax.train.shrinking_config import ShrinkingConfig
from bcdl_jax.train.state import NegativeLogLikelihood, TrainState, TrainStep, create_train_state
from bcdl_jax.train.step import make_train_step
from bcdl_jax.train.while_shrinking import leave_out_pruned

# The largest number of examples for the first measures and for the choice of thresholds, which measures hundreds of networks.
_MOST_MEASURED = 2000


class Network(Protocol):
    """The part of a variational network that ``fit`` needs. ``VariationalModel`` has it."""

    @property
    def params(self) -> PyTree: ...

    def apply(self, params: PyTree, *inputs: PyTree, key: jax.Array | None = None) -> PyTree: ...


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The result of ``fit``.

    Attributes:
      params: The trained and pruned params of the network.
      loss_params: The params of the loss, such as the log standard deviations of ``GaussianLoss``.
      thresholds: The chosen thresholds by layer.
      losses: The validation loss of the mean weights in nats per observation, by stage: "plain" for the trained network, "trained", "pruned"
        and "fine-tuned".
      kept_weights: The number of kept weights of the variational layers, and the number of all.
      reports: The reports in their order.
    """

    params: PyTree
    loss_params: PyTree
    thresholds: dict[str, float]
    losses: dict[str, float]
    kept_weights: tuple[int, int]
    reports: tuple[FitReport, ...]

    def __str__(self) -> str:
        kept, total = self.kept_weights
        losses = ", ".join(f"{loss:.4f} {stage}" for stage, loss in self.losses.items())
        return f"{kept:,} of {total:,} weights of the variational layers are kept; validation loss {losses}"


def fit(
    network: Network,
    loss: Loss | Callable[[Any, Any], jax.Array],
    data: Any,
    validation: Any,
    *,
    key: jax.Array | None = None,
    config: FitConfig | None = None,
    frozen: Sequence[str] = (),
    progress: bool = True,
) -> FitResult:
    """Trains a variational network, prunes it and trains it further.

    The losses and the KL are measured first. Training then raises the KL weight as far as the loss allows, see ``FitConfig``. The thresholds
    are chosen on the validation data. Fine-tuning trains the kept weights at a small KL weight, and averages them.

    Args:
      network: The variational network, from ``variational``.
      loss: The loss: ``SoftmaxLoss()``, ``SigmoidLoss()``, ``GaussianLoss()``, or a function (outputs, targets) -> nats.
      data: The training data: a pair of inputs and targets, trees of arrays [examples, ...]; or batches of this form, as a function from the
        number of an epoch to its batches, or as an iterable that can be iterated again for each epoch. A tuple of inputs becomes several
        arguments of the network.
      validation: The validation data in one of these forms, which the network was not trained on. They set the aim of training and the
        thresholds.
      key: A PRNG key; None for ``jax.random.key(0)``.
      config: The recipe; None for ``FitConfig()``.
      frozen: Regular expressions for the paths of plain arrays that are not trained. Integers are never trained, nor are other collections of
        Flax's variables than "params", such as running averages.
      progress: True to show a progress bar and messages.

    Returns:
      The trained and pruned params with their measures. ``shrink``, ``reduce_precision`` and ``save`` take the params.

    Raises:
      ValueError: An argument is of a wrong kind, the data do not fit the network or the loss, the loss or an update is not finite, or
        ``frozen`` matches no array.
    """
    config = FitConfig() if config is None else config
    _check_arguments(network, loss, data, validation, config)
    train, held_out = make_feed("data", data, config.batch_size), make_feed("validation", validation, config.batch_size)
    own = loss if isinstance(loss, Loss) else OwnLoss(loss)
    trained, constant = split_constants(network.params, frozen)
    run = _Run(network, constant, own, config, train, held_out, progress)
    return run.fit(trained, jax.random.key(0) if key is None else key)


def _check_arguments(network: Any, loss: Any, data: Any, validation: Any, config: Any) -> None:
    """Raises ValueError for arguments of a wrong kind."""
    if not (hasattr(network, "params") and hasattr(network, "apply")):
        raise ValueError(
            f"network is a {type(network).__name__}; it must have params and apply, such as the result of variational."
        )
    if isinstance(loss, type) or not (callable(loss) or isinstance(loss, Loss)):
        raise ValueError(
            f"loss is {loss!r}; it must be a loss such as SoftmaxLoss(), or a function of outputs and targets."
        )
    if not isinstance(config, FitConfig):
        raise ValueError(f"config is a {type(config).__name__}; it must be a FitConfig.")
    if data is validation:
        raise ValueError("validation is data itself; it must hold examples that the network was not trained on.")


@dataclasses.dataclass(frozen=True)
class _Run:
    """A call of ``fit``. Its params are a pair of entries: "network" without the constant arrays, and "loss"."""

    network: Network
    constant: PyTree
    loss: Loss
    config: FitConfig
    train: Feed
    validation: Feed
    show: bool

    def fit(self, trained: PyTree, key: jax.Array) -> FitResult:
        """Runs all stages, from the params to train."""
        train_key, fine_tune_key = jax.random.split(key)
        params, control = self._measured(trained)
        losses = {"plain": self._mean_loss(params, self.validation.batches())}
        params, reports = self._trained(params, control, train_key)
        losses["trained"] = self._mean_loss(params, self.validation.batches())
        thresholds = self._thresholds(params, control)
        params = params | {"network": prune(params["network"], thresholds)}
        losses["pruned"] = self._mean_loss(params, self.validation.batches())
        if self.config.fine_tune_steps:
            weight = self.config.fine_tune_kl_share * reports[-1].kl_weight
            params, more = self._fine_tuned(params, weight, fine_tune_key)
            losses["fine-tuned"] = self._mean_loss(params, self.validation.batches())
            reports += more
        layers = variational_layers(params["network"]).values()
        kept = round(sum(float(layer.kept_weights()) for layer in layers))
        total = sum(math.prod(layer.kernel_shape) for layer in layers)
        whole = merge_constants(params["network"], self.constant)
        result = FitResult(whole, params["loss"], thresholds, losses, (kept, total), tuple(reports))
        self._say(f"fit: {result}.")
        return result

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

    @functools.cached_property
    def _observations(self) -> int:
        """The number of observations in the training data."""
        return round(sum(float(jnp.sum(self.loss.counts(batch[1]))) for batch in self.train.batches()))

    # The stages.

    def _measured(self, trained: PyTree) -> tuple[dict[str, PyTree], KLControl]:
        """The start params, and the control of the KL weight."""
        some = some_batches(self.train, _MOST_MEASURED)
        outputs = jax.jit(functools.partial(self._outputs, key=None))({"network": trained}, some[0][0])
        params = {"network": trained, "loss": self.loss.start(outputs, some[0][1])}
        base, held_out = self._mean_loss(params, some), self._mean_loss(params, self.validation.batches())
        if not math.isfinite(base + held_out):
            raise ValueError(
                f"The loss of the trained network is {base} on data and {held_out} on validation; both must be finite."
            )
        aim = base + max(self.config.least_rise, self.config.gap_share * (held_out - base))
        kl = float(kl_divergence(trained)) / self._observations
        message = (
            f"fit: the loss of the trained network is {base:.4f} on data and {held_out:.4f} on validation, in nats per observation; the KL is "
            f"{kl:.2f} nats per observation. The sampled training loss may rise to {aim:.4f}."
        )
        self._say(message)
        return params, KLControl(base, aim, self.config.most_kl_weight)

    def _trained(
        self, params: dict[str, PyTree], control: KLControl, key: jax.Array
    ) -> tuple[dict[str, PyTree], list[FitReport]]:
        """The params after training, and the reports."""
        optimizer = self._optimizer(self.config.steps)
        state = create_train_state(params, optimizer, key)
        reports: list[FitReport] = []

        def on_report(state: TrainState, report: FitReport) -> TrainState:
            reports.append(report)
            weight = control.next_weight(report.kl_weight, report.loss)
            return with_setting(state, {"kl_weight": weight})

        step = self._step_maker(optimizer)(self._likelihood)
        start = with_setting(state, {"kl_weight": self.config.start_kl_weight})
        return self._phase("train", self.config.steps).run(step, start, on_report).params, reports

    def _thresholds(self, params: dict[str, PyTree], control: KLControl) -> dict[str, float]:
        some = some_batches(self.validation, _MOST_MEASURED)
        most = self.config.pruning_share * (control.aim - control.base)
        return choose_thresholds(
            params["network"],
            lambda network: self._mean_loss(params | {"network": network}, some),
            max_increase=most,
        )

    def _fine_tuned(
        self, params: dict[str, PyTree], kl_weight: float, key: jax.Array
    ) -> tuple[dict[str, PyTree], list[FitReport]]:
        """The averaged params after training without the pruned groups, and the reports."""
        steps = self.config.fine_tune_steps
        optimizer = optax.chain(self._optimizer(steps), params_ema(1 - 10 / max(20, steps)))
        make_step = self._step_maker(optimizer)
        state = with_setting(create_train_state(params, optimizer, key), {"kl_weight": kl_weight})
        shrinking = ShrinkingConfig(self._likelihood, make_step, thresholds=math.inf, multiple_of=1)
        small = leave_out_pruned(shrinking, state, first_examples(next(self.train.batches()), 2))
        reports: list[FitReport] = []

        def on_report(state: TrainState, report: FitReport) -> TrainState:
            reports.append(report)
            return state

        step, start = (make_step(self._likelihood), state) if small is None else (small.step, small.state)
        state = self._phase("fine-tune", steps).run(step, start, on_report)
        state = state if small is None else small.expand(state)
        return averaged_params(state.optimizer_state), reports

    def _say(self, message: str) -> None:
        if self.show:
            tqdm.write(message)

    def _phase(self, name: str, steps: int) -> Phase:
        return Phase(name, self.train, steps, self.config.steps_per_report, self.show)

    def _optimizer(self, steps: int) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(self.config.learning_rate, steps, 0.05)
        factor = self.config.variance_learning_rate / self.config.learning_rate
        return optax.chain(optax.adam(schedule), scale_by_kind({"log_variance": factor}))

    def _step_maker(self, optimizer: optax.GradientTransformation) -> Callable[[NegativeLogLikelihood], TrainStep]:
        """A function from a likelihood to the step of a state with the setting "kl_weight"."""

        def make_step(likelihood: NegativeLogLikelihood) -> TrainStep:
            def by_setting(setting: dict[str, jax.Array]) -> TrainStep:
                weight = lambda step: setting["kl_weight"]  # noqa: E731
                return make_train_step(likelihood, optimizer, num_examples=self._observations, kl_weight=weight)

            return make_step_by_setting(by_setting)

        return make_step
