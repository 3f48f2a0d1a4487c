"""Training that shrinks: what is safely gone is masked and then left out of params, optimiser state and step.

    shrinking = bcdl_jax.train.Shrinking(negative_log_likelihood, make_step, thresholds=3.0, chain=chain)
    state = bcdl_jax.train.prune_state(state, 3.0, chain)
    small = bcdl_jax.train.leave_out_pruned(shrinking, state, batch)
    train_epoch = jax.jit(bcdl_jax.train.make_train_epoch(small.step, batch_size=128))
    small_state, metrics = train_epoch(small.state, data)
    state = small.expand(small_state)

``train_ensemble(..., shrinking=shrinking)`` does so by itself, between epochs. A small step computes what the step at full size computes
on the masked params, with the same noise for what is kept. The small form follows from the state at full size alone, so that
such a state is all that must be saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import Score, Thresholds, log_dropout_rate, prune
from bcdl_jax.graph.program import multiply_adds_by_owner, trace
from bcdl_jax.priors.posterior import Posterior, variational_layers
from bcdl_jax.shrinking.network import ShrinkReport, cut, expand, shrink
from bcdl_jax.train.averaging import ParamsEmaState
from bcdl_jax.train.step import NegativeLogLikelihood, TrainState, TrainStep, keep_masks


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """How a network shrinks while it is trained.

    Attributes:
      negative_log_likelihood: that of the training step.
      make_step: from a negative log-likelihood to the training step, such as
        ``lambda nll: make_train_step(nll, optimizer, num_examples=n)``; called again for every smaller network.
      thresholds: scores above which a group is safely gone, as for ``prune``; or a function from params to them, such as
        ``choose_thresholds`` with a small ``max_increase`` and the same score. Be more careful than in pruning: what is masked in training never comes back.
      chain, score: as for ``prune``.
      first: epochs before the first look at the groups. The next ones follow after 2, 3, 4, 6, 8, 12, 16, 24 times as many and so on: a
        net loses its groups ever more slowly.
      regular: whether they follow after 2, 3, 4, 5, 6 times as many and so on instead: for a net that loses groups as long as they are taken.
      leave_out: whether ``train_ensemble`` leaves out what is gone; otherwise it is only masked, whatever it would save, and all goes on at
        full size: where a step is so fast that compiling smaller ones takes longer than they save, as on a GPU.
      least_saving: share of the multiply-adds that a further shrinking must save, since each compiles a new program.
      multiple_of: kept widths are rounded up to a multiple of it, see ``shrink``.

    Raises:
      ValueError: a number is out of range.
    """

    negative_log_likelihood: NegativeLogLikelihood
    make_step: Callable[[NegativeLogLikelihood], TrainStep]
    thresholds: Thresholds | Callable[[PyTree], Thresholds]
    chain: Sequence[str] = ()
    first: int = 1
    least_saving: float = 0.25
    multiple_of: int = 8
    score: Score = log_dropout_rate
    regular: bool = False
    leave_out: bool = True

    def __post_init__(self):
        for name in ("first", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.least_saving < 1:
            raise ValueError(f"least_saving is {self.least_saving}; it must be at least 0 and less than 1.")

    def is_settled(self, epochs: int) -> bool:
        """Whether the looks are so rare after so many epochs that a program for the size of the time pays, beside that of the step.

        It follows from the epochs alone, so that a run that was cut short goes on the same way.
        """
        return epochs > 4 * self.first and not self.regular

    def is_due(self, epochs: int) -> bool:
        """Whether to look at the groups after so many epochs."""
        times, rest = divmod(epochs, self.first)
        while times > 3 and times % 2 == 0:
            times //= 2
        return rest == 0 and (times > 0 if self.regular else times in (1, 2, 3))


@dataclasses.dataclass(frozen=True)
class SmallTraining:
    """The training of a shrunk network.

    Attributes:
      step: the training step on small states.
      state: the small state.
      whole: the state at full size that it was cut from.
      report: of ``shrink``.
    """

    step: TrainStep
    state: TrainState
    whole: TrainState
    report: ShrinkReport

    def expand(self, state: TrainState) -> TrainState:
        """A small state at full size: the masked rest has the values it had when it was cut away."""
        return expand(state, self.report, into=self.whole)

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{name} {' x '.join(map(str, layer.kernel_shape))}"
            for name, layer in variational_layers(self.state.params).items()
        )
        before, after = self.report.multiply_adds
        return f"trained on as {sizes}; multiply-adds {before:,} -> {after:,}."


def prune_state(
    state: TrainState, thresholds: Thresholds, chain: Sequence[str] | None = None, score: Score = log_dropout_rate
) -> TrainState:
    """The state with its params pruned, see ``prune``, and with the same masks in the averages of ``params_ema``."""
    params = prune(state.params, thresholds, chain, score)

    def with_masks(part: Any) -> Any:
        if not _is_average(part):
            return part
        # Copies, since the state may be donated, params and averages together.
        return part._replace(average=keep_masks(part.average, jax.tree.map(jnp.array, params)))

    optimizer_state = jax.tree.map(with_masks, state.optimizer_state, is_leaf=_is_average)
    return state.replace(params=params, optimizer_state=optimizer_state)


def _is_average(part: Any) -> bool:
    return isinstance(part, ParamsEmaState)


def leave_out_pruned(shrinking: Shrinking, state: TrainState, batch: PyTree) -> SmallTraining | None:
    """Leaves out what the masks of the params say is pruned.

    Args:
      shrinking: see ``Shrinking``.
      state: of one seed.
      batch: an example batch of the training data.

    Returns:
      The small training, or None if nothing is masked, or nothing is left of a layer, or the family prunes single weights: a unit that
      has lost all of its weights still has a bias, which is trained, so that it cannot be folded into what reads it.
    """
    if any(layer.prunes_weights for layer in _layers(state)):
        return None
    masks = [mask for layer in _layers(state) for mask in (layer.input_mask, layer.output_mask)]
    if all(bool(jnp.all(mask > 0)) for mask in masks) or not all(bool(jnp.any(mask > 0)) for mask in masks):
        return None

    # One more than the likelihood, since shrink compares outputs relative to their size, and a good fit brings it close to 0.
    def shifted(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        return 1 + shrinking.negative_log_likelihood(params, batch, key)

    small_shifted, _, report = shrink(shifted, state.params, (batch, state.key), multiple_of=shrinking.multiple_of)

    def small_likelihood(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        return small_shifted(params, batch, key) - 1

    return SmallTraining(shrinking.make_step(small_likelihood), cut(state, report), state, report)


def shrink_measure(
    measure: Callable[[PyTree, PyTree], jax.Array], params: PyTree, data: PyTree
) -> Callable[[PyTree, PyTree], jax.Array]:
    """A measure of the params, such as a validation error, compiled without what their masks say is pruned.

    Args:
      measure: ``measure(params, data)``, a pure function.
      params: at full size, of one seed.
      data: tree of arrays [examples, ...]; the first two are the example to trace with.

    Returns:
      A function of params at full size with the same masks, and of data. It computes all of the network where the measure is not one of
      examples along the leading axes alone, or differs on the example, as a tie decided the other way makes it do.
    """
    try:
        small, small_params, report = shrink(measure, params, (jax.tree.map(lambda array: array[:2], data),))
        jax.eval_shape(small, small_params, data)
    except (ValueError, TypeError, IndexError):
        return jax.jit(measure)
    compiled = jax.jit(small)
    return lambda params, data: compiled(cut(params, report), data)


def mask_further(shrinking: Shrinking, state: TrainState) -> TrainState:
    """The state of one seed, at full size, with the groups masked that are safely gone; as it was if nothing would be left of a layer."""
    thresholds = shrinking.thresholds(state.params) if callable(shrinking.thresholds) else shrinking.thresholds
    masked = prune_state(state, thresholds, shrinking.chain, shrinking.score)
    return masked if all(float(layer.kept_weights()) > 0 for layer in _layers(masked)) else state


def prune_and_shrink(
    shrinking: Shrinking, state: TrainState, batch: PyTree, current: SmallTraining | None = None
) -> SmallTraining | None:
    """Masks the groups that are safely gone, and leaves them out, where that pays.

    Args:
      shrinking: see ``Shrinking``.
      state: of one seed, at full size.
      batch: an example batch of the training data.
      current: the small training that the state comes from, if any.

    Returns:
      The smaller training, or None if it would not save ``least_saving`` of the multiply-adds, or the family prunes single weights.
    """
    if any(layer.prunes_weights for layer in _layers(state)):
        return None
    masked = mask_further(shrinking, state)
    # A first look, since tracing a network takes seconds.
    shares = [
        float(new.kept_weights()) / max(1.0, float(old.kept_weights()))
        for new, old in zip(_layers(masked), _layers(state), strict=True)
    ]
    if min(shares) > 1 - shrinking.least_saving or not _may_save(shrinking, state, masked, batch):
        return None
    small = leave_out_pruned(shrinking, masked, batch)
    if small is None:
        return None
    before = small.report.multiply_adds[0] if current is None else current.report.multiply_adds[1]
    return small if small.report.multiply_adds[1] <= (1 - shrinking.least_saving) * before else None


# Of the saving that is asked for, how much an estimate must promise: folding and rounding up are not in it.
_PROMISED = 0.8


def _may_save(shrinking: Shrinking, state: TrainState, masked: TrainState, batch: PyTree) -> bool:
    """Whether the masks leave out enough multiply-adds, going by the share of each layer in those at full size: a trace, in place of a shrinking.

    Products that are no layer's do not count: what is promised in vain costs a shrinking, what is refused in error costs all that it saves.
    """
    nodes = jax.tree.leaves(state.params, is_leaf=lambda node: isinstance(node, Posterior))
    owners = [
        number if isinstance(node, Posterior) else None
        for number, node in enumerate(nodes)
        for _ in jax.tree.leaves(node)
    ]
    program = trace(shrinking.negative_log_likelihood, state.params, batch, state.key)
    owners += [None] * (len(program.inputs) - len(owners))
    totals = multiply_adds_by_owner(program, owners)
    numbers = [number for number, node in enumerate(nodes) if isinstance(node, Posterior)]

    def estimate(layers: list[Posterior]) -> float:
        kept = [float(layer.kept_weights()) / math.prod(layer.kernel_shape) for layer in layers]
        return sum(totals[number] * share for number, share in zip(numbers, kept, strict=True))

    promised = 1 - estimate(_layers(masked)) / max(1.0, estimate(_layers(state)))
    return promised >= _PROMISED * shrinking.least_saving


def _layers(state: TrainState) -> list[Posterior]:
    return list(variational_layers(state.params).values())
