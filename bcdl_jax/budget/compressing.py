"""Compression of a trained variational network within a budget, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from bcdl_jax._tree import PyTree, check_arrays
from bcdl_jax.budget.candidates import Pruner, count_weights
from bcdl_jax.budget.compressed import Compressed, CompressionReport
from bcdl_jax.budget.entries import entry_reports
from bcdl_jax.budget.errors import Error, ExampleErrors, increase_from
from bcdl_jax.budget.search import Point, Search, best_of_size, least_work, smallest_within
from bcdl_jax.codec import encode
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.compression.plain_arrays import round_plain_arrays
from bcdl_jax.graph.example_inputs import as_inputs
from bcdl_jax.graph.program import dtype_of
from bcdl_jax.shrinking import shrink

# The numbers of bits that are tried for arrays outside of the layers.
_PLAIN_BITS = (8, 10, 12, 16)
# The share of the allowed increase, or of the error before, that rounding these arrays may take.
_PLAIN_SHARE, _PLAIN_SHARE_OF_ERROR = 0.1, 0.002


class Network(Protocol):
    """The part of a variational network that ``compress`` needs. ``VariationalModel`` has it."""

    def apply(self, params: PyTree, *inputs: PyTree) -> PyTree: ...


def compress(
    network: Network,
    params: PyTree,
    validation: tuple[Any, Any],
    error: Error,
    *,
    max_increase: float | None = None,
    max_relative_increase: float | None = None,
    target_bytes: int | None = None,
    target_multiply_adds: int | None = None,
    held_out: float = 0.25,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Compressed:
    """Prunes, rounds and shrinks a trained variational network as far as a budget allows.

    Pruning and precision are searched together. Units are pruned in the order of their log dropout rates. The kept weights are rounded to
    steps in proportion to their posterior deviations. Arrays outside of the layers are rounded, too, to 8 bits if that hardly changes the
    error. The report shows the error on data that the search did not use. If the training saw them, use test data for a final number.

    Args:
      network: The variational network, from ``variational``.
      params: Its trained params, such as those from ``train.fit``.
      validation: A pair of inputs and targets, trees of arrays [examples, ...], that the network was not trained on. A tuple of inputs becomes
        several arguments of the network.
      error: A function (outputs, targets) -> the errors of the examples, [examples, ...], such as ``wrong_class`` or ``squared_error``.
      max_increase: The largest increase of the mean error, in its own unit: percentage points for ``wrong_class``. This is one budget; give
        exactly one.
      max_relative_increase: The largest increase of the mean error, as a share of the error before: 0.05 for five percent.
      target_bytes: The largest size of the coded params, with their names and without the program.
      target_multiply_adds: The largest number of multiply-adds on two examples, see ``shrink``.
      held_out: The share of the validation data that the search does not use.
      key: A PRNG key, which divides the validation data; None for ``jax.random.key(0)``.
      progress: True to show a progress bar.

    Returns:
      The small network with its report.

    Raises:
      ValueError: There is no budget or more than one, a number is out of range, the data do not fit, the error before compression is not
        finite, or no network within the budget was found.
    """
    budget = check_budget(max_increase, max_relative_increase, target_bytes, target_multiply_adds)
    check_arrays(params)
    inputs, targets = _checked_data(validation, held_out)
    example = jax.tree.map(lambda array: array[:2], as_inputs(inputs))
    searched, rest = _parts(inputs, targets, held_out, jax.random.key(0) if key is None else key)
    (errors, before), (others, before_rest) = (_measured(network, params, error, part) for part in (searched, rest))
    limit = max_increase if max_relative_increase is None else max_relative_increase * abs(float(before.mean()))
    rounded, plain_bits = _with_rounded_arrays(params, errors, before, limit)
    pruner = Pruner.of(rounded, network if hasattr(network, "prune_useless") else None)  # type: ignore[arg-type]
    search = Search(pruner, errors, before, progress)
    try:
        chosen = _chosen(search, limit, target_bytes, target_multiply_adds, network.apply, example)
    finally:
        search.close()
    if chosen is None:
        raise ValueError(_nothing_found(budget, search))
    reduced = search.network(chosen.share, chosen.relative_step)
    small_apply, small, report = shrink(network.apply, reduced, example)
    after = increase_from(before, errors(reduced)), increase_from(before_rest, others(reduced))
    return Compressed(
        small_apply,
        small,
        reduced,
        example,
        CompressionReport(
            budget,
            chosen,
            search.points,
            error=(float(before.mean()), after[0]),
            held_out=(float(before_rest.mean()), after[1]),
            bytes=(_bytes_of_weights(params), len(encode(small, names=True))),
            multiply_adds=report.multiply_adds,
            kept_weights=count_weights(reduced),
            plain_bits=plain_bits,
            plain_bytes=_plain_bytes(params),
            entries=entry_reports(params, reduced, small),
        ),
    )


def _measured(
    network: Network, params: PyTree, error: Error, part: tuple[Any, Any]
) -> tuple[ExampleErrors, np.ndarray]:
    """The errors on a part of the data, and those of the given network. Raises ValueError if one of these is not finite."""
    errors = ExampleErrors(network.apply, error, *part)
    before = errors(params)
    if not np.isfinite(before).all():
        raise ValueError("The error of the given network is not finite on all examples of validation.")
    return errors, before


def _chosen(
    search: Search,
    limit: float | None,
    target_bytes: int | None,
    target_multiply_adds: int | None,
    apply: Callable[..., PyTree],
    example: tuple[PyTree, ...],
) -> Point | None:
    """The best point within the budget, or None."""
    if limit is not None:
        return smallest_within(search, limit)
    if target_bytes is not None:
        return best_of_size(search, target_bytes)
    assert target_multiply_adds is not None
    return least_work(search, lambda params: shrink(apply, params, example)[2].multiply_adds[1], target_multiply_adds)


def check_budget(
    max_increase: float | None = None,
    max_relative_increase: float | None = None,
    target_bytes: int | None = None,
    target_multiply_adds: int | None = None,
) -> str:
    """The budget in words. Raises ValueError if there is not exactly one, or if it is out of range."""
    budgets = {
        "max_increase": max_increase,
        "max_relative_increase": max_relative_increase,
        "target_bytes": target_bytes,
        "target_multiply_adds": target_multiply_adds,
    }
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or 'No budget'} {'are' if given else 'is'} given; give exactly one of {', '.join(budgets)}."
        )
    ((name, value),) = given.items()
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number of 0 or more.")
    return f"{name}={value:,}" if isinstance(value, int) else f"{name}={value:g}"


def _checked_data(validation: Any, held_out: float) -> tuple[Any, Any]:
    """The inputs and the targets. Raises ValueError for another form, or arrays of different lengths."""
    if not (isinstance(validation, tuple | list) and len(validation) == 2):
        raise ValueError(f"validation is a {type(validation).__name__}; it must be a pair of inputs and targets.")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must be more than 0 and less than 1.")
    counts = sorted({len(leaf) if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(tuple(validation))})
    if len(counts) != 1 or counts[0] < 8:
        raise ValueError(
            f"The arrays of validation have {counts} examples; all must have the same number of them, at least 8."
        )
    return validation[0], validation[1]


def _parts(inputs: Any, targets: Any, held_out: float, key: jax.Array) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The examples of the search and the others, each a pair of inputs and targets."""
    count = len(jax.tree.leaves(targets)[0])
    order = np.asarray(jax.random.permutation(key, count))
    rest = min(count - 2, max(2, round(held_out * count)))
    first, second = order[rest:], order[:rest]

    def rows(chosen: np.ndarray) -> tuple[Any, Any]:
        return jax.tree.map(lambda array: array[chosen], (inputs, targets))

    return rows(first), rows(second)


def _with_rounded_arrays(
    params: PyTree, errors: ExampleErrors, before: np.ndarray, limit: float | None
) -> tuple[PyTree, int | None]:
    """The params with rounded arrays outside of the layers, and the number of their bits; None if rounding costs too much."""
    if not _plain_bytes(params):
        return params, None
    allowed = _PLAIN_SHARE_OF_ERROR * abs(float(before.mean())) if limit is None else _PLAIN_SHARE * limit
    for bits in _PLAIN_BITS:
        rounded = round_plain_arrays(params, bits)
        found = increase_from(before, errors(rounded))
        # A few examples change either way, which is noise. The search needs a start within the budget.
        is_within = limit is None or found.increase <= limit / 2
        if is_within and found.increase - found.standard_error <= allowed:
            return rounded, bits
    return params, None


def _plain_bytes(params: PyTree) -> int:
    """The size of the floating-point arrays outside of the layers."""
    nodes = [node for node in jax.tree.leaves(params, is_leaf=is_layer) if not is_layer(node)]
    return sum(np.asarray(node).nbytes for node in nodes if jax.numpy.issubdtype(dtype_of(node), jax.numpy.floating))


def _bytes_of_weights(params: PyTree) -> int:
    """The size of the weights, biases and other arrays in their own types."""
    return sum(
        (math.prod(node.kernel_shape) + node.bias_size) * node.dtype.itemsize
        if is_layer(node)
        else np.asarray(node).nbytes
        for node in jax.tree.leaves(params, is_leaf=is_layer)
    )


def _nothing_found(budget: str, search: Search) -> str:
    """The message for a budget that no network keeps to."""
    points = search.points
    smallest, best = points[-1], min(points, key=lambda point: point.increase.increase)
    return (
        f"No network keeps to {budget}. The smallest one that was tried takes about {smallest.bytes:,.0f} bytes; the lowest increase of the "
        f"error is {best.increase.increase:.2g}."
    )
