"""A greedy search for the pruning thresholds of the smallest network whose error is within a limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.compression.pruning import ConvertedNetwork, check_chain, check_chain_or_network, prune
from bcdl_jax.compression.scores import Score, log_dropout_rate
from bcdl_jax.priors.posterior import Posterior, variational_layers

# The largest number of cuts of one layer that the search tries. In a layer of hundreds of thousands of weights, each cut then removes about
# one weight in a hundred.
_MOST_CUTS = 1024

# The largest portion of a layer that one step prunes is a sixteenth of its kept units.
_FIRST_DIVISOR = 16


def choose_thresholds(
    params: PyTree,
    error: Callable[[PyTree], float | jax.Array],
    *,
    max_increase: float,
    chain: Sequence[str] | None = None,
    score: Score = log_dropout_rate,
    network: ConvertedNetwork | None = None,
) -> dict[str, float]:
    """Finds the thresholds of a small network whose error is at most ``max_increase`` above the error of the unpruned network.

    The size of a network is the number of its kept weights. First, bisection finds the lowest common threshold that does not raise the error.
    Each further step prunes a portion of the layer with the smallest increase of the error per relative saving. The portions become smaller and
    smaller, until no layer can lose a single group. The search is greedy: no network that is smaller by one step is within the limit, but the
    result need not be the optimum.

    Args:
      params: A tree with trained variational layers.
      error: A function from params to the validation error, in the units of ``max_increase`` (percent, for example). It is called some hundred
        times, always with trees of the same shapes, so jit it. Use validation data, never test data.
      max_increase: The largest allowed increase of the error, at least 0.
      chain: The names of layers that feed one another, see ``prune``.
      score: The score that ``prune`` will compare with the thresholds.
      network: The converted network whose params these are, see ``prune``, or None. The sizes then count no useless weights.

    Returns:
      A threshold per layer name, for ``prune`` with the same arguments. It lies between the scores of the last kept group and the first pruned one,
      and is infinite if all are kept. Groups of equal score stay together. A layer with groups keeps at least one below its threshold. If the family prunes
      single weights, the same holds for weights; in a layer of very many weights, only about a thousand cuts are tried.

    Raises:
      ValueError: ``max_increase`` is negative or not a number, the error of the unpruned network is not a number, the tree holds no variational
        layer, the chain does not fit, or both ``chain`` and ``network`` are given.
    """
    if not max_increase >= 0:
        raise ValueError(f"max_increase is {max_increase}; it must be 0 or more.")
    layers = variational_layers(params)
    check_chain(chain or (), layers)
    check_chain_or_network(chain, network)
    scores = jax.device_get({name: score(layer) for name, layer in layers.items()})
    cuts = {name: _cuts_of(layer, scores[name]) for name, layer in layers.items()}

    search = _Search(params, error, chain, score, network, cuts)
    unpruned = search.measure({name: len(choices) - 1 for name, choices in cuts.items()})
    if math.isnan(unpruned.error):
        raise ValueError("error(params) is not a number; it must be the validation error of the unpruned network.")
    found = _prune_greedily(search, _prune_for_free(search, unpruned), unpruned.error + max_increase)
    return search.thresholds(found.positions)


class _Cut(NamedTuple):
    """One way to cut a layer.

    Attributes:
      kept: The number of kept units.
      threshold: The threshold that keeps them.
    """

    kept: int
    threshold: float


class _Network(NamedTuple):
    """A pruned network that the search has measured.

    Attributes:
      positions: The index of each layer's cut in its list of cuts, by layer name.
      error: The error of the network.
      size: The number of its kept weights.
    """

    positions: dict[str, int]
    error: float
    size: int


class _Step(NamedTuple):
    """A step from one network to a smaller one.

    Attributes:
      cost: The increase of the error per relative saving. It is infinite for a step that is not allowed.
      saving: The logarithm of the ratio of the sizes.
      network: The network after the step.
    """

    cost: float
    saving: float
    network: _Network


@dataclasses.dataclass(frozen=True)
class _Search:
    """The inputs of a search that stay the same.

    Attributes:
      params: A tree with variational layers.
      error: A function from params to the error.
      chain: The names of layers that feed one another, or None.
      score: The pruning score.
      network: The converted network, or None.
      cuts: The possible cuts of each layer by layer name, from the fewest kept units to all of them.
    """

    params: PyTree
    error: Callable[[PyTree], float | jax.Array]
    chain: Sequence[str] | None
    score: Score
    network: ConvertedNetwork | None
    cuts: Mapping[str, Sequence[_Cut]]

    def thresholds(self, positions: Mapping[str, int]) -> dict[str, float]:
        """The thresholds of the cuts at these positions."""
        return {name: self.cuts[name][position].threshold for name, position in positions.items()}

    def measure(self, positions: dict[str, int]) -> _Network:
        """Prunes the network by the cuts at these positions, and measures its error and size."""
        pruned = prune(self.params, self.thresholds(positions), self.chain, self.score, self.network)
        return _Network(positions, float(self.error(pruned)), int(_kept_weights(pruned)))

    def positions_up_to(self, threshold: float) -> dict[str, int]:
        """The position of each layer's last cut whose threshold is not above this one, or of its first cut if there is none."""
        return {
            name: max((place for place, cut in enumerate(choices) if cut.threshold <= threshold), default=0)
            for name, choices in self.cuts.items()
        }

    def try_step(self, current: _Network, name: str, divisor: int, limit: float) -> _Step:
        """Measures the network after pruning 1/``divisor`` of the layer's kept units, at least one."""
        kept = self.cuts[name][current.positions[name]].kept
        target = kept - max(1, kept // divisor)
        smaller = [place for place in range(current.positions[name]) if self.cuts[name][place].kept <= target]
        if not smaller:
            return _Step(math.inf, 0.0, current)
        candidate = self.measure(current.positions | {name: smaller[-1]})
        if not (candidate.error <= limit and candidate.size > 0):
            return _Step(math.inf, 0.0, candidate)
        saving = math.log(current.size / candidate.size)
        increase = candidate.error - current.error
        if saving:
            return _Step(increase / saving, saving, candidate)
        # A unit that reads a pruned channel saves nothing. It is still pruned if that costs nothing, since further cuts lie behind it.
        return _Step(-math.inf if increase <= 0 else math.inf, saving, candidate)


def _prune_for_free(search: _Search, unpruned: _Network) -> _Network:
    """The network of the lowest common threshold that does not raise the error, by bisection."""
    common = sorted({cut.threshold for choices in search.cuts.values() for cut in choices})
    # The threshold at ``high`` does not raise the error; ``best`` is its network.
    low, high, best = -1, len(common) - 1, unpruned
    while high - low > 1:
        middle = (low + high) // 2
        candidate = search.measure(search.positions_up_to(common[middle]))
        if candidate.error <= unpruned.error and candidate.size > 0:
            high, best = middle, candidate
        else:
            low = middle
    return best


def _prune_greedily(search: _Search, current: _Network, limit: float) -> _Network:
    """The network after steps of smaller and smaller portions, until no layer can lose a single unit within the limit."""
    most_units = max(cut.kept for choices in search.cuts.values() for cut in choices)
    divisor, last_divisor = _FIRST_DIVISOR, max(2 * most_units, _FIRST_DIVISOR)
    while current.size > 0 and divisor <= last_divisor:
        current = _take_steps(search, current, divisor, limit, is_last_round=2 * divisor > last_divisor)
        divisor *= 2
    return current


def _take_steps(search: _Search, current: _Network, divisor: int, limit: float, is_last_round: bool) -> _Network:
    """Takes the cheapest steps of one portion, until no step is allowed.

    A step is stale once another layer was pruned. Pruning hardly ever makes the step of another layer cheaper. So a stale step is measured again
    only if it seems the cheapest, or if no step seems allowed in the last round.
    """
    steps = {name: search.try_step(current, name, divisor, limit) for name in current.positions}
    stale = set[str]()
    while True:
        name = min(steps, key=lambda name: (steps[name].cost, -steps[name].saving))
        if steps[name].cost == math.inf:
            if not stale or not is_last_round:
                return current
            name = min(stale)
        if name not in stale:
            current = steps[name].network
            stale = set(steps)
        steps[name] = search.try_step(current, name, divisor, limit)
        stale.remove(name)


def _cuts_of(posterior: Posterior, scores: np.ndarray) -> list[_Cut]:
    """The possible cuts of a layer, from one kept unit (or one set of units of equal score) to all. A layer of very many units gets a selection."""
    kept = np.sort(scores[np.asarray(posterior.unit_mask) > 0])
    counts = np.flatnonzero(kept[:-1] < kept[1:]) + 1
    if len(counts) > _MOST_CUTS:
        # Each cut keeps about the same share of the units that the next larger cut keeps.
        wanted = np.geomspace(counts[0], counts[-1], _MOST_CUTS)
        counts = np.unique(counts[np.searchsorted(counts, wanted).clip(max=len(counts) - 1)])
    cuts = []
    for count in counts.tolist():
        below, above = kept[count - 1], kept[count]
        midway = below + (above - below) / 2
        cuts.append(_Cut(count, float(midway if midway > below else above)))
    return [*cuts, _Cut(len(kept), math.inf)]


@jax.jit
def _kept_weights(params: PyTree) -> jax.Array:
    return jnp.stack([posterior.kept_weights() for posterior in variational_layers(params).values()]).sum()
