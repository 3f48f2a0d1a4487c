"""The search of ``compress`` over pruning and precision together, within a budget."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from bcdl_jax._tree import PyTree
from bcdl_jax.budget.candidates import RELATIVE_STEPS, SHARES, Pruner, count_weights, estimated_bytes
from bcdl_jax.budget.errors import ExampleErrors, Increase, increase_from
from bcdl_jax.codec import encode
from bcdl_jax.compression.quantization import reduce_precision

# The number of halvings of the interval between the last share that is within the budget and the first one that is not.
_HALVINGS = 4
# The number of halvings of the share for an amount of work, each of which shrinks a network.
_WORK_HALVINGS = 8
# The number of candidates whose files are written.
_CODED = 5
# The ratio of sizes up to which the better network counts.
_ALIKE = 1.05


@dataclasses.dataclass(frozen=True)
class Point:
    """A network that the search measured.

    Attributes:
      share: The share of the kept weights of the given network that the pruning aimed at.
      kept_weights: The number of kept weights of the layers.
      relative_step: The relative step of the rounding, see ``reduce_precision``.
      bytes: The size of the coded weights: that of the file, or an estimate if ``is_coded`` is False.
      is_coded: True if the file was written.
      increase: The error on the search examples, and its increase.
    """

    share: float
    kept_weights: int
    relative_step: float
    bytes: float
    is_coded: bool
    increase: Increase


class Search:
    """Measures candidates, each of them once."""

    def __init__(self, pruner: Pruner, errors: ExampleErrors, before: np.ndarray, progress: bool) -> None:
        """Measures nothing yet.

        Args:
          pruner: The pruner of the network.
          errors: The errors of networks on the search examples.
          before: The errors of the given network on them.
          progress: True to show a progress bar.
        """
        self._pruner, self._errors, self._before = pruner, errors, before
        self._points: dict[tuple[float, float], Point] = {}
        self._pruned: tuple[float, PyTree] | None = None
        self._bar = tqdm(desc="compress", unit="network", disable=not progress)

    @property
    def points(self) -> tuple[Point, ...]:
        """The points so far, the largest estimate first."""
        return tuple(sorted(self._points.values(), key=lambda point: -point.bytes))

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def network(self, share: float, relative_step: float) -> PyTree:
        """The pruned and rounded params."""
        if self._pruned is None or self._pruned[0] != share:
            self._pruned = share, self._pruner.pruned(share)
        return reduce_precision(self._pruned[1], relative_step)

    def point(self, share: float, relative_step: float) -> Point:
        """The point of a candidate."""
        if (share, relative_step) not in self._points:
            params = self.network(share, relative_step)
            increase = increase_from(self._before, self._errors(params))
            kept, _ = count_weights(params)
            self._points[share, relative_step] = Point(
                share, kept, relative_step, estimated_bytes(params), False, increase
            )
            self._bar.update()
        return self._points[share, relative_step]

    def coded(self, point: Point) -> Point:
        """The point with the size of its file."""
        if not point.is_coded:
            size = len(encode(self.network(point.share, point.relative_step), names=True))
            point = dataclasses.replace(point, bytes=size, is_coded=True)
            self._points[point.share, point.relative_step] = point
        return point

    def coarsest(self, share: float, limit: float) -> Point | None:
        """The point with the largest step whose error increases by at most ``limit``, or None.

        Larger steps are tried until one is above the limit by more than a standard error. A smaller excess may be noise.
        """
        found = None
        for step in RELATIVE_STEPS:
            point = self.point(share, step)
            if point.increase.increase <= limit:
                found = point
            elif point.increase.increase - point.increase.standard_error > limit:
                break
        return found

    def finest(self, share: float, allowed: Callable[[Point], bool]) -> Point | None:
        """The point with the smallest step that is allowed, where larger steps are allowed, too; or None."""
        low, high = 0, len(RELATIVE_STEPS)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if allowed(self.point(share, RELATIVE_STEPS[middle])) else (middle + 1, high)
        return self.point(share, RELATIVE_STEPS[low]) if low < len(RELATIVE_STEPS) else None


def smallest_within(search: Search, limit: float) -> Point | None:
    """The point with the smallest file whose error increases by at most ``limit``, or a better one of almost its size; None if there is none.

    A share counts only if all larger shares that were tried count, so that a small network is not chosen by chance.
    """
    found, last, refused = list[Point](), 1.0, 0.0
    for share in SHARES:
        point = search.coarsest(share, limit)
        if point is None:
            refused = share
            break
        found.append(point)
        last = share
    for _ in range(_HALVINGS if refused else 0):
        middle = (last + refused) / 2
        point = search.coarsest(middle, limit)
        last, refused = (last, middle) if point is None else (middle, refused)
        found += [] if point is None else [point]
    best = [search.coded(point) for point in sorted(found, key=lambda point: point.bytes)[:_CODED]]
    least = min((point.bytes for point in best), default=0)
    # A few bytes more are worth a much lower error.
    alike = [point for point in best if point.bytes <= _ALIKE * least]
    return min(alike, key=lambda point: point.increase.increase, default=None)


def best_of_size(search: Search, target: float) -> Point | None:
    """The point with the lowest error whose file has at most ``target`` bytes, or None."""
    # The estimate is corrected by the real size of the best point, until that one fits.
    factor = 1.0
    for _ in range(6):
        limit = target / factor
        points = [search.finest(share, functools.partial(_is_within, limit)) for share in SHARES]
        found = [point for point in points if point is not None]
        if not found:
            return None
        estimated = min(found, key=lambda point: point.increase.increase)
        size = len(encode(search.network(estimated.share, estimated.relative_step), names=True))
        if size <= target:
            return search.coded(estimated)
        factor = max(1.01 * factor, size / estimated.bytes)
    return None


def _is_within(limit: float, point: Point) -> bool:
    return point.bytes <= limit


def least_work(search: Search, work: Callable[[PyTree], float], target: float) -> Point | None:
    """The point with the most weights whose work is at most ``target``, rounded where that hardly changes the error; None if there is none.

    Args:
      search: The search.
      work: A function from pruned params to the work of their network.
      target: The largest work.
    """
    low, high = 0.0, 1.0  # The work at ``low`` is within the target, that at ``high`` is not known.
    if work(search.network(1.0, RELATIVE_STEPS[0])) <= target:
        low = 1.0
    for _ in range(0 if low else _WORK_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if work(search.network(middle, RELATIVE_STEPS[0])) <= target else (low, middle)
    if not low:
        return None
    finest = search.point(low, RELATIVE_STEPS[0]).increase
    point = search.coarsest(low, finest.increase + finest.standard_error)
    return None if point is None else search.coded(point)


def pareto_front(points: Iterable[Point]) -> Iterator[Point]:
    """The points of which no other one has fewer bytes and a lower error, the smallest first."""
    lowest = float("inf")
    for point in sorted(points, key=lambda point: (point.bytes, point.increase.increase)):
        if point.increase.increase < lowest:
            lowest = point.increase.increase
            yield point
