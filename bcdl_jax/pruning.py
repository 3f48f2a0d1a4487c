"""Pruning: pure transforms of the params tree that set the masks of its posteriors."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax.kl import log_dropout_rates
from bcdl_jax.posterior import Posterior, PyTree, map_named_layers, posteriors

Thresholds = float | Mapping[str, float]


def prune(params: PyTree, thresholds: Thresholds, chain: Sequence[str] | None = None) -> PyTree:
    """Masks every group whose log dropout rate is not below its layer's threshold.

    A masked group (a row of a dense kernel; the kernels and the bias of an output channel) is exactly zero from then on, sampled or not, and
    no longer counts in the KL. Groups that were pruned before stay so.

    Args:
      params: tree with variational layers.
      thresholds: one for all layers, or one for each by layer name.
      chain: names of layers that feed one another in this order, with nothing but elementwise functions that map 0 to 0 (ReLU, tanh),
        pooling and a flatten (channels last) between them. With it, what the next layer does not read is pruned too, and so is what reads
        only pruned outputs.

    Returns:
      A new tree.

    Raises:
      ValueError: a layer without threshold, a threshold or a chain entry for an unknown layer, or a chain whose widths do not fit.
    """
    by_layer = thresholds_by_layer(thresholds, list(posteriors(params)))
    return _prune(params, by_layer, tuple(chain or ()))


@functools.partial(jax.jit, static_argnums=2)
def _prune(params: PyTree, thresholds: dict[str, jax.Array], chain: tuple[str, ...]) -> PyTree:
    masks = {name: posterior.log_dropout_rate() < thresholds[name] for name, posterior in posteriors(params).items()}
    return set_group_masks(params, masks, chain)


def set_group_masks(params: PyTree, masks: Mapping[str, jax.Array], chain: Sequence[str] | None = None) -> PyTree:
    """Sets the masks of the layers' own groups, [groups] of bool by layer name, and lets them spread along the chain, see ``prune``."""
    layers = posteriors(params)
    inputs = {name: posterior.input_mask > 0 for name, posterior in layers.items()}
    outputs = {name: posterior.output_mask > 0 for name, posterior in layers.items()}
    for name, mask in masks.items():
        side = inputs if layers[name].group_axis == "input" else outputs
        side[name] = side[name] & mask

    pairs = list(itertools.pairwise(_checked_chain(chain or (), layers)))
    for first, second in pairs:
        inputs[second] = inputs[second] & jnp.tile(outputs[first], inputs[second].size // outputs[first].size)
    for first, second in reversed(pairs):
        read = jnp.where(jnp.any(outputs[second]), inputs[second], False).reshape(-1, outputs[first].size)
        outputs[first] = outputs[first] & jnp.any(read, axis=0)

    def with_masks(name: str, posterior: Posterior) -> Posterior:
        dtype = posterior.input_mask.dtype
        return posterior.replace(input_mask=inputs[name].astype(dtype), output_mask=outputs[name].astype(dtype))  # type: ignore[attr-defined]

    return map_named_layers(with_masks, params, Posterior)  # type: ignore[type-abstract]


def kept_groups(params: PyTree, thresholds: Thresholds | None = None) -> dict[str, jax.Array]:
    """Number of groups of each layer that would be kept, int32 by layer name.

    Args:
      params: tree with variational layers.
      thresholds: as for ``prune``; the default thresholds of the families if None.
    """
    layers = posteriors(params)
    by_layer = (
        {name: posterior.default_threshold for name, posterior in layers.items()}
        if thresholds is None
        else thresholds_by_layer(thresholds, list(layers))
    )
    return {
        name: jnp.sum((posterior.group_mask > 0) & (posterior.log_dropout_rate() < by_layer[name]))
        for name, posterior in layers.items()
    }


def thresholds_by_layer(thresholds: Thresholds, names: Sequence[str]) -> dict[str, float]:
    """One threshold per layer name. Raises ValueError if names and thresholds do not match."""
    if not isinstance(thresholds, Mapping):
        return dict.fromkeys(names, thresholds)
    for name in thresholds:
        if name not in names:
            raise ValueError(f"thresholds names layer {name}, which does not exist; the layers are {', '.join(names)}.")
    for name in names:
        if name not in thresholds:
            raise ValueError(f"thresholds has no value for layer {name}; the layers are {', '.join(names)}.")
    return dict(thresholds)


def choose_thresholds(
    params: PyTree,
    error: Callable[[PyTree], float | jax.Array],
    *,
    max_increase: float,
    chain: Sequence[str] | None = None,
) -> dict[str, float]:
    """Finds thresholds of the smallest network whose error stays within ``max_increase`` of the unpruned one.

    Size is the number of kept weights. First the lowest common threshold that does not raise the error at all is found by bisection; from there the
    search repeatedly prunes a little more of the layer where a given relative saving raises the error least, in ever smaller portions,
    until no layer can lose a single group. This is a greedy search: nothing smaller is one step away, but the optimum is not guaranteed.

    Args:
      params: tree with variational layers, trained.
      error: params -> validation error, in the units of ``max_increase`` (percent, say). Called some hundred times, always with trees of
        the same shapes, so jit it. Use validation data, never test data.
      max_increase: how much the error may rise, at least 0.
      chain: as for ``prune``.

    Returns:
      A threshold per layer name, for ``prune``. A threshold lies midway between the last kept and the first pruned score.

    Raises:
      ValueError: ``max_increase`` is negative or not a number.
    """
    if not max_increase >= 0:
        raise ValueError(f"max_increase is {max_increase}; it must be 0 or more.")
    layers = posteriors(params)
    _checked_chain(chain or (), layers)
    # Groups that are masked already sort last and are never counted as kept.
    scores = {
        name: np.where(np.asarray(layers[name].group_mask) > 0, np.asarray(rates, np.float64), np.inf)
        for name, rates in log_dropout_rates(params).items()
    }
    ordered = {name: np.sort(values) for name, values in scores.items()}
    ranks = {name: np.argsort(np.argsort(values, kind="stable"), kind="stable") for name, values in scores.items()}

    @jax.jit
    def masked(counts: dict[str, jax.Array]) -> tuple[PyTree, jax.Array]:
        pruned = set_group_masks(
            params, {name: jnp.asarray(ranks[name]) < count for name, count in counts.items()}, chain
        )
        return pruned, sum(map(_kept_weights, posteriors(pruned).values()), start=jnp.zeros((), jnp.int32))

    def measure(counts: Mapping[str, int]) -> tuple[float, float]:
        pruned, size = masked({name: jnp.int32(count) for name, count in counts.items()})
        return float(error(pruned)), float(size)

    def counts_at(threshold: float) -> dict[str, int]:
        return {name: int(np.searchsorted(values, threshold)) for name, values in ordered.items()}

    counts = {name: int(np.isfinite(values).sum()) for name, values in ordered.items()}
    start_error, size = measure(counts)
    current_error = start_error

    common = (
        np.unique(np.concatenate([values[np.isfinite(values)] for values in ordered.values()]))
        if any(counts.values())
        else np.zeros(0)
    )
    low, high = 0, len(common)  # common[low] may cost too much, common[high] (everything kept) is known to be fine
    while high - low > 1:
        middle = (low + high) // 2
        candidate_error, candidate_size = measure(candidate := counts_at(common[middle]))
        if candidate_error <= start_error and min(candidate.values()) > 0:
            high, counts, current_error, size = middle, candidate, candidate_error, candidate_size
        else:
            low = middle

    portion = 16
    while portion <= 2 * max(counts.values(), default=0) or portion == 16:
        best: tuple[float, dict[str, int], float, float] | None = None
        for name, count in counts.items():
            # The last group of a layer is never taken: a network without any path from input to output is no network.
            removed = max(1, count // portion) if count > 1 else 0
            if removed == 0:
                continue
            candidate_error, candidate_size = measure(candidate := counts | {name: count - removed})
            saving = math.log(size / candidate_size) if candidate_size else math.inf
            if candidate_error <= start_error + max_increase and saving > 0:
                cost = (candidate_error - current_error) / saving
                if best is None or (cost, -saving) < (best[0], -math.log(size / best[3])):
                    best = (cost, candidate, candidate_error, candidate_size)
        if best is None:
            portion *= 2
        else:
            _, counts, current_error, size = best

    return {name: _midway(ordered[name], count) for name, count in counts.items()}


def _midway(ordered: np.ndarray, count: int) -> float:
    """A threshold that keeps the first ``count`` of the sorted scores."""
    finite = ordered[np.isfinite(ordered)]
    if count >= len(finite):
        return math.inf
    return (
        float(ordered[count])
        if count == 0 or ordered[count - 1] == ordered[count]
        else float((ordered[count - 1] + ordered[count]) / 2)
    )


def _kept_weights(posterior: Posterior) -> jax.Array:
    return jnp.sum(posterior.kernel_mask) * math.prod(posterior.kernel_shape[:-2])


def _checked_chain(chain: Sequence[str], layers: Mapping[str, Posterior]) -> Sequence[str]:
    for name in chain:
        if name not in layers:
            raise ValueError(f"chain names layer {name}, which does not exist; the layers are {', '.join(layers)}.")
    for first, second in itertools.pairwise(chain):
        outputs, inputs = layers[first].output_mask.shape[-1], layers[second].input_mask.shape[-1]
        if inputs % outputs:
            raise ValueError(
                f"chain has {first} before {second}, but {second} has {inputs} inputs, not a multiple of {first}'s {outputs} outputs."
            )
    return chain
