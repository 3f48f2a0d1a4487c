"""The priors of variational methods. ``--method`` takes their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.pipeline.recipe import Recipe
from experiments.registry.registry import Registry

if TYPE_CHECKING:  # Importing JAX takes seconds, and --help should appear at once.
    import bcdl_jax


@dataclasses.dataclass(frozen=True)
class Prior:
    """A prior of the weights, and the method that compresses with it.

    Attributes:
      name: The name for ``--method`` and results.
      title: The name in tables.
      family: The library's family for a recipe.
    """

    name: str
    title: str
    family: Callable[[Recipe], bcdl_jax.Family]


def _normal_jeffreys(recipe: Recipe) -> bcdl_jax.Family:
    import bcdl_jax

    return bcdl_jax.GroupNormalJeffreys()


def _horseshoe(recipe: Recipe) -> bcdl_jax.Family:
    import bcdl_jax

    return bcdl_jax.GroupHorseshoe(tau0=recipe.tau0)


def _sparse_variational_dropout(recipe: Recipe) -> bcdl_jax.Family:
    import bcdl_jax

    return bcdl_jax.SparseVariationalDropout()


PRIORS = Registry(
    "prior",
    Prior("gnj", "group normal-Jeffreys prior", _normal_jeffreys),
    Prior("ghs", "group horseshoe prior", _horseshoe),
    Prior("sparse_vd", "sparse variational dropout", _sparse_variational_dropout),
)
