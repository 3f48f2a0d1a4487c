"""The parts of a params tree: each variational layer, and each array outside the variational layers. Failures are reported by part."""

from __future__ import annotations

from typing import Any, TypeGuard

import jax

from bcdl_jax._tree import PyTree, layer_name
from bcdl_jax.priors.posterior import Posterior


def is_posterior(node: Any) -> TypeGuard[Posterior]:
    """True for the posterior of a variational layer."""
    return isinstance(node, Posterior)


def parts(tree: PyTree) -> list[PyTree]:
    """The parts of a tree like the params, in the order of the tree."""
    return jax.tree.leaves(tree, is_leaf=is_posterior)


def part_names(params: PyTree) -> list[str]:
    """The names of the parts, in the order of ``parts``."""
    return [layer_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_posterior)]
