"""The whole training of a variational network in one call: measure, train, prune in rounds, fine-tune."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from bcdl_jax._tree import PyTree, is_key
from bcdl_jax.train.checkpoints import Checkpoints, checksum
from bcdl_jax.train.constants import merge_constants, split_constants
from bcdl_jax.train.feeds import Feed, make_feed
from bcdl_jax.train.fit_config import FitConfig
from bcdl_jax.train.fit_phase import FitReport
from bcdl_jax.train.fit_run import Callback, FitRun, Network, count_observations, kept_weights
from bcdl_jax.train.losses import Loss, OwnLoss


@dataclasses.dataclass(frozen=True)
class FitResult:
    """The result of ``fit``.

    Attributes:
      params: The trained and pruned params of the network.
      loss_params: The params of the loss, such as the log standard deviations of ``GaussianLoss``.
      thresholds: The chosen thresholds by layer.
      losses: The validation loss of the mean weights in nats per observation, by stage: "plain" for the given network, "trained", "pruned"
        after the last round that counts, and "fine-tuned" if fine-tuning lowered it.
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
    mesh: Mesh | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains a variational network, and prunes it as far as the validation loss allows.

    The losses and the KL are measured first. Training then raises the KL weight as far as the loss allows. Rounds of pruning and training
    follow: each one chooses thresholds on the validation data, and trains the kept weights at a small KL weight. ``FitConfig`` describes the
    recipe. The pruned groups are left out of the training steps, so that these become faster.

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
      mesh: The devices over which the examples of a step are spread, from ``make_mesh``; None for one device.
      checkpoints: A directory for checkpoints, or None. A later call with the same arguments goes on from the newest one, and ends with the
        same result bit by bit. The data must then be arrays, a list of batches, a function of the epoch, or an iterable whose iterators have
        ``get_state`` and ``set_state``.
      callback: A function (params, report), which is called after each report with the params of the network and the ``FitReport``, for logs and
        pictures. What it raises ends the training. After an interruption, it is called again for the reports since the last checkpoint.
      progress: True to show a progress bar and messages.

    Returns:
      The trained and pruned params with their measures. ``shrink``, ``reduce_precision`` and ``save`` take the params.

    Raises:
      ValueError: An argument is of a wrong kind, the data do not fit the network or the loss, the loss or an update is not finite, ``frozen`` matches no array,
        the position in the data cannot be saved, or ``checkpoints`` holds a run with other arguments.
    """
    config = FitConfig() if config is None else config
    _check_arguments(network, loss, data, validation, config)
    train = make_feed("data", data, config.batch_size, mesh)
    held_out = make_feed("validation", validation, config.batch_size)
    own = loss if isinstance(loss, Loss) else OwnLoss(loss)
    trained, constant = split_constants(network.params, frozen)
    key = jax.random.key(0) if key is None else key
    if not is_key(key):  # An untyped key is an array of two numbers, which shrink could take for two examples.
        key = jax.random.wrap_key_data(key)
    saved = None
    if checkpoints is not None:
        train.check_resumable()
        saved = Checkpoints(checkpoints, _settings(network.params, own, train, held_out, key, config, frozen))
    observations = count_observations(own, train)
    run = FitRun(network, constant, own, config, train, observations, held_out, key, mesh, saved, progress, callback)
    ended = run.run(trained)
    whole = merge_constants(ended.params["network"], constant)
    result = FitResult(
        whole,
        ended.params["loss"],
        ended.thresholds,
        ended.losses,
        kept_weights(ended.params["network"]),
        ended.reports,
    )
    run.say(f"{result}.")
    return result


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


def _settings(
    params: PyTree, loss: Loss, train: Feed, validation: Feed, key: jax.Array, config: FitConfig, frozen: Sequence[str]
) -> dict[str, Any]:
    """The facts that determine the result, as JSON values."""
    return {
        "config": dataclasses.asdict(config),
        "network": checksum(params),
        "loss": repr(loss) if dataclasses.is_dataclass(loss) and not isinstance(loss, OwnLoss) else type(loss).__name__,
        "data": train.description,
        "validation": validation.description,
        "key": checksum(key),
        "frozen": list(frozen),
    }
