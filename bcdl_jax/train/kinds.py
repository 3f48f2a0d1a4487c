"""The fields and the kinds of parameters, for a learning rate of each."""

from __future__ import annotations

from typing import Any

import jax
import optax

from bcdl_jax._tree import PyTree
from bcdl_jax.priors.posterior import array_kinds
from bcdl_jax.train.parts import is_posterior, parts


def parameter_fields(params: PyTree) -> PyTree:
    """Labels every parameter with its field, for ``optax.partition(transforms, parameter_fields)``.

    Args:
      params: A tree with variational layers.

    Returns:
      A tree like ``params`` with one string per array: the name of its field within a posterior ("kernel_mean", "kernel_log_variance",
      "bias_mean", "bias_log_variance", "scale_mean", "scale_log_variance", "input_mask", "output_mask", "weight_mask" and so on), or
      "deterministic" outside the posteriors. ``array_kinds`` gives the coarser kinds.
    """

    def labels(part: Any) -> Any:
        if not is_posterior(part):
            return "deterministic"
        names = [name for name in array_kinds(part) if getattr(part, name) is not None]
        return part.replace(**dict(zip(names, names, strict=True)))

    return jax.tree.map(labels, params, is_leaf=is_posterior)


def scale_by_kind(factors: dict[str, float]) -> optax.GradientTransformation:
    """An optax transform that multiplies the updates of each kind of parameter by a factor.

    Chained after an optimiser, it sets a learning rate per kind in one pass over the params. A factor of 0 freezes a kind:
    ``scale_by_kind({"log_variance": 0})`` trains the means alone.

    Args:
      factors: Factors by the names of ``parameter_fields``, or for all arrays of a posterior that declare one kind: "mean", "log_variance",
        "scale" (the locations of the scales) or "mask". A factor by name overrides the factor of its kind. Kinds without a factor
        keep their updates.

    Raises:
      ValueError: A factor has a name that is no kind of parameter. The first update raises it.
    """

    def scaled(part: Any) -> Any:
        if not is_posterior(part):
            return part * factors.get("deterministic", 1.0)
        present = [(name, kind) for name, kind in array_kinds(part).items() if getattr(part, name) is not None]
        return part.replace(
            **{name: getattr(part, name) * factors.get(name, factors.get(kind, 1.0)) for name, kind in present}
        )

    def update(updates: PyTree, _: Any = None) -> PyTree:
        kinds = {
            name: kind for part in parts(updates) if is_posterior(part) for name, kind in array_kinds(part).items()
        }
        known = {"deterministic", *kinds, *kinds.values()}
        for name in factors:
            if name not in known:
                raise ValueError(f"factors names kind {name}; the kinds are {', '.join(sorted(known))}.")
        return jax.tree.map(scaled, updates, is_leaf=is_posterior)

    return optax.stateless(update)
