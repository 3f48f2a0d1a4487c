"""From a network that holds zeros to a smaller network that computes the same."""

from bcdl_jax.shrinking.cpu import for_cpu
from bcdl_jax.shrinking.network import LeafReport, ShrinkReport, cut, expand, shrink

__all__ = [
    "LeafReport",
    "ShrinkReport",
    "cut",
    "expand",
    "for_cpu",
    "shrink",
]
