"""Pruning: pure transforms of the params tree that set the masks of its variational_layers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree, check_layers_exist, map_named_layers, values_by_layer
from bcdl_jax.priors.posterior import Posterior, variational_layers

Thresholds = float | Mapping[str, float]
# From a layer to the scores of its units, of the shape of its ``unit_mask``; a module-level function, since it is a key of what is compiled.
Score = Callable[[Posterior], jax.Array]


def log_dropout_rate(layer: Posterior) -> jax.Array:
    """The family's own score, the paper's: that of the scales alone where the family has scales, see ``Posterior.log_dropout_rate``."""
    return layer.log_dropout_rate()


def log_noise_to_signal(layer: Posterior) -> jax.Array:
    """log(sum of Var[w] / sum of E[w]^2) over the weights of each unit, see ``Posterior.log_noise_to_signal``.

    Better than the scales alone where those of a layer are all alike while its weights are noisy: wide layers that start from trained weights
    with balanced scales. It depends on what is masked: of what is left, pruning by the same thresholds again may take more. Biases do not
    count. Where single weights are pruned, it is their log dropout rate.
    """
    return layer.log_noise_to_signal()


# More ways to cut a layer are not tried: with so many, of hundreds of thousands of weights, each step takes about a hundredth of them.
_MOST_CUTS = 1024


def prune(
    params: PyTree, thresholds: Thresholds, chain: Sequence[str] | None = None, score: Score = log_dropout_rate
) -> PyTree:
    """Masks every group (every weight, where the family prunes those) whose score is not below its layer's threshold.

    A masked group (a row of a dense kernel; the kernels and the bias of an output channel) is exactly zero from then on, sampled or not, and
    no longer counts in the KL. Groups that were pruned before stay so.

    Args:
      params: tree with variational layers.
      thresholds: one for all layers, or one for each by layer name.
      chain: names of layers that feed one another in this order, with nothing but elementwise functions that map 0 to 0 (ReLU, tanh),
        pooling and a flatten (channels last) between them. With it, what the next layer does not read is pruned too, and so is what reads
        only pruned outputs.
      score: what is compared with the thresholds: ``log_dropout_rate`` or ``log_noise_to_signal``.

    Returns:
      A new tree.

    Raises:
      ValueError: a layer without threshold, a threshold or a chain entry for an unknown layer, or a chain whose widths do not fit.
    """
    by_layer = thresholds_by_layer(thresholds, variational_layers(params))
    return _prune(params, by_layer, chain if isinstance(chain, str) else tuple(chain or ()), score)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _prune(params: PyTree, thresholds: dict[str, jax.Array], chain: tuple[str, ...], score: Score) -> PyTree:
    masks = {name: score(posterior) < thresholds[name] for name, posterior in variational_layers(params).items()}
    return prune_units(params, masks, chain)


def prune_units(params: PyTree, masks: Mapping[str, jax.Array], chain: Sequence[str] | None = None) -> PyTree:
    """Prunes what is not in the masks, and lets that spread along the chain.

    Args:
      params: tree with variational layers.
      masks: by layer name, bools of the shape of the layer's ``unit_mask``: one for each group, or for each weight where the family prunes
        those. A layer without one loses nothing but what the chain takes.
      chain: as for ``prune``.

    Raises:
      ValueError: a mask for an unknown layer, or of another shape, or a chain that does not fit.
    """
    layers = variational_layers(params)
    check_layers_exist(masks, layers, "masks")
    for name, mask in masks.items():
        if jnp.shape(mask) != layers[name].unit_mask.shape:
            raise ValueError(
                f"The mask of layer {name} has shape {jnp.shape(mask)}; it must have {layers[name].unit_mask.shape}."
            )
    layers = {name: layer.prune_units(masks[name]) if name in masks else layer for name, layer in layers.items()}
    inputs = {name: layer.input_mask > 0 for name, layer in layers.items()}
    outputs = {name: layer.output_mask > 0 for name, layer in layers.items()}

    pairs = list(itertools.pairwise(_checked_chain(chain or (), layers)))
    # Twice, since a layer without outputs makes everything before it unread, which shows on the second way forwards.
    for _ in range(2):
        for first, second in pairs:
            inputs[second] = inputs[second] & jnp.tile(outputs[first], inputs[second].size // outputs[first].size)
        for first, second in reversed(pairs):
            read = inputs[second] & layers[second].inputs_read_by(outputs[second])
            outputs[first] = outputs[first] & jnp.any(read.reshape(-1, outputs[first].size), axis=0)

    def masked(name: str, _: Posterior) -> Posterior:
        return layers[name].with_masks(inputs[name], outputs[name])

    return map_named_layers(masked, params, Posterior)


@functools.partial(jax.jit, static_argnames="score")
def pruning_scores(params: PyTree, score: Score = log_dropout_rate) -> dict[str, jax.Array]:
    """The score of every group (of every weight, where the family prunes those), of the shape of ``unit_mask``, by layer name.

    A group with a low score is worth keeping.

    Args:
      params: A tree with variational layers.
      score: The score to compute, ``log_dropout_rate`` or ``log_noise_to_signal``.
    """
    return {name: score(posterior) for name, posterior in variational_layers(params).items()}


def kept_groups(
    params: PyTree, thresholds: Thresholds | None = None, score: Score = log_dropout_rate
) -> dict[str, jax.Array]:
    """Number of groups of each layer that would be kept (of weights, where the family prunes those), int32 by layer name.

    Args:
      params: tree with variational layers.
      thresholds: as for ``prune``; the default thresholds of the families, which are log dropout rates, if None.
      score: as for ``prune``.
    """
    layers = variational_layers(params)
    by_layer = (
        {name: posterior.default_threshold for name, posterior in layers.items()}
        if thresholds is None
        else thresholds_by_layer(thresholds, layers)
    )
    return {
        name: jnp.sum((posterior.unit_mask > 0) & (score(posterior) < by_layer[name]))
        for name, posterior in layers.items()
    }


def thresholds_by_layer(thresholds: Thresholds, names: Iterable[str]) -> dict[str, float]:
    """One threshold per layer name. Raises ValueError if names and thresholds do not match."""
    for value in thresholds.values() if isinstance(thresholds, Mapping) else [thresholds]:
        if not isinstance(value, jax.core.Tracer) and not _is_threshold(value):
            raise ValueError(
                f"thresholds holds {value!r}; it must be a number, a score such as a log dropout rate or infinite, or one for each layer by name."
            )
    return values_by_layer(thresholds, names, "thresholds")


def _is_threshold(value: object) -> bool:
    return isinstance(value, SupportsFloat) and np.ndim(value) == 0 and not math.isnan(float(value))  # type: ignore[arg-type]


def choose_thresholds(
    params: PyTree,
    error: Callable[[PyTree], float | jax.Array],
    *,
    max_increase: float,
    chain: Sequence[str] | None = None,
    score: Score = log_dropout_rate,
) -> dict[str, float]:
    """Finds thresholds of the smallest network whose error stays within ``max_increase`` of the unpruned one.

    Size is the number of kept weights. First the lowest common threshold that does not raise the error at all is found
    by bisection; from there the search repeatedly prunes a little more of the layer where a given relative saving raises
    the error least, in ever smaller portions, until no layer can lose a single group. This is a greedy search: nothing
    smaller is one step away, but the optimum is not guaranteed.

    Args:
      params: tree with variational layers, trained.
      error: params -> validation error, in the units of ``max_increase`` (percent, say). Called some hundred times,
        always with trees of the same shapes, so jit it. Use validation data, never test data.
      max_increase: how much the error may rise, at least 0.
      chain, score: as for ``prune``.

    Returns:
      A threshold per layer name, for ``prune`` with the same score: between the scores of the last group kept and the first one pruned, or
      infinite where all are kept. Groups of equal score stay together, and a layer that had groups keeps at least one. Where weights are
      pruned one by one, the same holds of weights; of very many some thousand cuts are tried.

    Raises:
      ValueError: ``max_increase`` is negative or not a number, or the error of the unpruned network is not a number.
    """
    if not max_increase >= 0:
        raise ValueError(f"max_increase is {max_increase}; it must be 0 or more.")
    layers = variational_layers(params)
    _checked_chain(chain or (), layers)
    scores = jax.device_get({name: score(layer) for name, layer in layers.items()})
    cuts = {name: _cuts(layer, scores[name]) for name, layer in layers.items()}

    def measure(positions: Mapping[str, int]) -> tuple[float, int]:
        pruned = prune(params, {name: cuts[name][position][1] for name, position in positions.items()}, chain, score)
        return float(error(pruned)), int(_kept_weights(pruned))

    # The search moves, per layer, along the list of cuts, from the last one (all is kept) towards the first.
    positions = {name: len(choices) - 1 for name, choices in cuts.items()}
    start_error, size = measure(positions)
    if start_error != start_error:
        raise ValueError("error(params) is not a number; it must be the validation error of the unpruned network.")
    current_error, limit = start_error, start_error + max_increase

    common = sorted({threshold for choices in cuts.values() for _, threshold in choices})
    low, high = -1, len(common) - 1  # common[high] is known to cost nothing
    while high - low > 1:
        middle = (low + high) // 2
        at_middle = {
            name: max((place for place, cut in enumerate(choices) if cut[1] <= common[middle]), default=0)
            for name, choices in cuts.items()
        }
        candidate_error, candidate_size = measure(at_middle)
        if candidate_error <= start_error and candidate_size > 0:
            high, positions, current_error, size = middle, at_middle, candidate_error, candidate_size
        else:
            low = middle

    def look(name: str, portion: int) -> _Look:
        """What it would cost, as things stand, to prune a portion more of a layer."""
        count = cuts[name][positions[name]][0]
        target = count - max(1, count // portion)
        lower = [place for place in range(positions[name]) if cuts[name][place][0] <= target]
        if not lower:
            return _Look(math.inf, 0.0, positions, current_error, size)
        candidate = positions | {name: lower[-1]}
        candidate_error, candidate_size = measure(candidate)
        cost, saving = math.inf, 0.0
        if candidate_error <= limit and candidate_size > 0:
            saving = math.log(size / candidate_size)
            rise = candidate_error - current_error
            # What saves nothing (a unit that reads a pruned channel) still goes where it costs nothing: others lie behind it.
            cost = rise / saving if saving else (-math.inf if rise <= 0 else math.inf)
        return _Look(cost, -saving, candidate, candidate_error, candidate_size)

    portion, finest = 16, 2 * max(count for choices in cuts.values() for count, _ in choices)
    while size > 0 and portion <= max(finest, 16):
        # Looks are stale once another layer was pruned. That hardly ever makes a layer cheaper, so a stale one is taken again
        # only where it seems the cheapest, or at the very end.
        looks, stale = {name: look(name, portion) for name in positions}, set[str]()
        while True:
            name = min(looks, key=lambda name: (looks[name].cost, looks[name].minus_saving))
            if looks[name].cost == math.inf:
                if not stale or 2 * portion <= max(finest, 16):
                    break
                name = min(stale)
            if name not in stale:
                positions, current_error, size = looks[name].positions, looks[name].error, looks[name].size
                stale = set(looks)
            looks[name] = look(name, portion)
            stale.remove(name)
        portion *= 2

    return {name: cuts[name][position][1] for name, position in positions.items()}


class _Look(NamedTuple):
    """A step that ``choose_thresholds`` might take, and where it leads."""

    cost: float
    minus_saving: float
    positions: dict[str, int]
    error: float
    size: int


def _cuts(posterior: Posterior, rates: np.ndarray) -> list[tuple[int, float]]:
    """Ways to cut a layer by its scores: (units kept, threshold), from one unit, or one set of equals, to all; of very many, some."""
    kept = np.sort(rates[np.asarray(posterior.unit_mask) > 0])
    counts = np.flatnonzero(kept[:-1] < kept[1:]) + 1
    if len(counts) > _MOST_CUTS:
        # Each keeps about the same share of what the one above it keeps.
        wanted = np.geomspace(counts[0], counts[-1], _MOST_CUTS)
        counts = np.unique(counts[np.searchsorted(counts, wanted).clip(max=len(counts) - 1)])
    cuts = []
    for count in counts.tolist():
        below, above = kept[count - 1], kept[count]
        midway = below + (above - below) / 2
        cuts.append((count, float(midway if midway > below else above)))
    return [*cuts, (len(kept), math.inf)]


@jax.jit
def _kept_weights(params: PyTree) -> jax.Array:
    return jnp.stack([posterior.kept_weights() for posterior in variational_layers(params).values()]).sum()


def _checked_chain(chain: Sequence[str], layers: Mapping[str, Posterior]) -> Sequence[str]:
    if isinstance(chain, str):
        raise ValueError(f"chain is {chain!r}; it must be a sequence of layer names.")
    check_layers_exist(chain, layers, "chain")
    for first, second in itertools.pairwise(chain):
        outputs, inputs = layers[first].output_mask.shape[-1], layers[second].input_mask.shape[-1]
        if inputs % outputs:
            raise ValueError(
                f"chain has {first} before {second}, but {second} has {inputs} inputs, not a multiple of {first}'s {outputs} outputs."
            )
    return chain
