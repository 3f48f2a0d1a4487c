"""Training while the network shrinks: groups that can be pruned are masked, then left out of the params, the optimiser and the step.

    shrinking = bcdl_jax.train.ShrinkingConfig(negative_log_likelihood, make_step, thresholds=3.0, chain=chain)
    state = bcdl_jax.train.prune_state(state, 3.0, chain)
    small = bcdl_jax.train.leave_out_pruned(shrinking, state, batch)
    train_epoch = jax.jit(bcdl_jax.train.make_train_epoch(small.step, batch_size=128))
    small_state, metrics = train_epoch(small.state, data)
    state = small.expand(small_state)

``train_ensemble(..., shrinking=shrinking)`` shrinks networks between epochs. The small step computes the same as the full-size step
on the masked params, with the same noise for the kept groups. The small form follows from the full-size state alone, so that saving the
full-size state is enough.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import ConvertedNetwork, Thresholds, prune
from bcdl_jax.compression.scores import Score, log_dropout_rate
from bcdl_jax.graph.counting import multiply_adds_by_owner
from bcdl_jax.graph.tracing import trace
from bcdl_jax.priors.posterior import Posterior, variational_layers
from bcdl_jax.shrinking import ShrinkReport, cut, expand
from bcdl_jax.shrinking.network import shrink_at_any_batch_size
from bcdl_jax.train.averaging import ParamsEmaState
from bcdl_jax.train.parts import is_posterior, parts
from bcdl_jax.train.shrinking_config import ShrinkingConfig
from bcdl_jax.train.state import TrainState, TrainStep
from bcdl_jax.train.step import keep_masks


@dataclasses.dataclass(frozen=True)
class ShrunkTraining:
    """The training of a shrunk network.

    Attributes:
      step: The training step for small states.
      state: The small state.
      whole: The full-size state that the small state was cut from.
      report: The report of ``shrink``.
    """

    step: TrainStep
    state: TrainState
    whole: TrainState
    report: ShrinkReport

    def expand(self, state: TrainState) -> TrainState:
        """The full-size form of a small state. The groups that are left out have the values from before the cut."""
        return expand(state, self.report, into=self.whole)

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{name} {' x '.join(map(str, layer.kernel_shape))}"
            for name, layer in variational_layers(self.state.params).items()
        )
        before, after = self.report.multiply_adds
        return f"training continues with {sizes}; multiply-adds {before:,} -> {after:,}."


def prune_state(
    state: TrainState,
    thresholds: Thresholds,
    chain: Sequence[str] | None = None,
    score: Score = log_dropout_rate,
    network: ConvertedNetwork | None = None,
) -> TrainState:
    """Prunes the params of a state, and puts the same masks into the averages of ``params_ema``.

    Args:
      state: The state of one seed, at full size.
      thresholds: The thresholds for ``prune``.
      chain: The order of the layers for ``prune``.
      score: The score for ``prune``.
      network: The converted network for ``prune``, or None. The params of the state must be a tree like the network's params.
    """
    params = prune(state.params, thresholds, chain, score, network)

    def with_masks(part: Any) -> Any:
        if not _is_average(part):
            return part
        # Copies, since the state may be donated, params and averages together.
        return part._replace(average=keep_masks(part.average, jax.tree.map(jnp.array, params)))

    optimizer_state = jax.tree.map(with_masks, state.optimizer_state, is_leaf=_is_average)
    return state.replace(params=params, optimizer_state=optimizer_state)


def _is_average(part: Any) -> TypeGuard[ParamsEmaState]:
    return isinstance(part, ParamsEmaState)


def mask_further(shrinking: ShrinkingConfig, state: TrainState) -> TrainState:
    """Masks the groups of a full-size state that can be pruned. Returns ``state`` itself if a layer would lose its last group."""
    thresholds = shrinking.thresholds(state.params) if callable(shrinking.thresholds) else shrinking.thresholds
    masked = prune_state(state, thresholds, shrinking.chain, shrinking.score, shrinking.network)
    return masked if all(float(layer.kept_weights()) > 0 for layer in _layers(masked)) else state


def leave_out_pruned(shrinking: ShrinkingConfig, state: TrainState, batch: PyTree) -> ShrunkTraining | None:
    """Leaves out the groups that the masks of the params prune.

    Args:
      shrinking: The configuration.
      state: The state of one seed.
      batch: An example batch of the training data.

    Returns:
      The small training. None if nothing is masked, or a layer has no group left. None too if the family prunes single weights: a unit that
      has lost all of its weights still has a bias that is trained, so that the unit cannot be folded into the next layer.
    """
    if any(layer.prunes_weights for layer in _layers(state)):
        return None
    masks = [mask for layer in _layers(state) for mask in (layer.input_mask, layer.output_mask)]
    if all(bool(jnp.all(mask > 0)) for mask in masks) or not all(bool(jnp.any(mask > 0)) for mask in masks):
        return None

    # One more than the likelihood: shrink compares outputs relative to their size, and a good fit brings the likelihood close to 0.
    def shifted(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        return 1 + shrinking.negative_log_likelihood(params, batch, key)

    small_shifted, _, report = shrink_at_any_batch_size(
        shifted, state.params, (batch, state.key), multiple_of=shrinking.multiple_of
    )

    def small_likelihood(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
        return small_shifted(params, batch, key) - 1

    return ShrunkTraining(shrinking.make_step(small_likelihood), cut(state, report), state, report)


def prune_and_shrink(
    shrinking: ShrinkingConfig, state: TrainState, batch: PyTree, current: ShrunkTraining | None = None
) -> ShrunkTraining | None:
    """Makes a pruning check: masks the groups that can be pruned, and leaves them out if that saves enough.

    Args:
      shrinking: The configuration.
      state: The state of one seed, at full size.
      batch: An example batch of the training data.
      current: The small training that the state comes from, or None if it was trained at full size.

    Returns:
      The smaller training. None if it would not save ``least_saving`` of the multiply-adds, or the family prunes single weights.
    """
    if any(layer.prunes_weights for layer in _layers(state)):
        return None
    masked = mask_further(shrinking, state)
    # This comparison comes first, since tracing a network takes seconds.
    shares = [
        float(new.kept_weights()) / max(1.0, float(old.kept_weights()))
        for new, old in zip(_layers(masked), _layers(state), strict=True)
    ]
    if min(shares, default=1.0) > 1 - shrinking.least_saving or not _may_save(shrinking, state, masked, batch):
        return None
    small = leave_out_pruned(shrinking, masked, batch)
    if small is None:
        return None
    before = small.report.multiply_adds[0] if current is None else current.report.multiply_adds[1]
    return small if small.report.multiply_adds[1] <= (1 - shrinking.least_saving) * before else None


# The share of ``least_saving`` that an estimate must reach. The estimate counts neither folding nor rounding up to ``multiple_of``.
_ESTIMATED_SHARE = 0.8


def _may_save(shrinking: ShrinkingConfig, state: TrainState, masked: TrainState, batch: PyTree) -> bool:
    """True if the new masks seem to save enough multiply-adds.

    The estimate needs a trace of the full-size network, but no shrinking: each layer's multiply-adds are multiplied by the share of its
    kept weights. Products outside the layers do not count. If the estimate is too high, one shrinking is tried in vain; if it were too
    low, a useful shrinking would be missed.
    """
    nodes = parts(state.params)
    owners = [
        number if _has_weights(node) else None for number, node in enumerate(nodes) for _ in jax.tree.leaves(node)
    ]
    program = trace(shrinking.negative_log_likelihood, state.params, batch, state.key)
    owners += [None] * (len(program.inputs) - len(owners))
    totals = multiply_adds_by_owner(program, owners)
    numbers = [number for number, node in enumerate(nodes) if _has_weights(node)]

    def estimate(layers: list[Posterior]) -> float:
        kept = [float(layer.kept_weights()) / math.prod(layer.kernel_shape) for layer in layers]
        return sum(totals[number] * share for number, share in zip(numbers, kept, strict=True))

    saving = 1 - estimate(_layers(masked)) / max(1.0, estimate(_layers(state)))
    return saving >= _ESTIMATED_SHARE * shrinking.least_saving


def _layers(state: TrainState) -> list[Posterior]:
    """The variational layers, without those of which ``shrink`` left nothing before this training."""
    return [layer for layer in variational_layers(state.params).values() if _has_weights(layer)]


def _has_weights(node: Any) -> bool:
    return is_posterior(node) and math.prod(node.kernel_shape) > 0
