"""Shrinks a network that holds zeros to a smaller network with the same outputs."""

from bcdl_jax.shrinking.cpu import for_cpu
from bcdl_jax.shrinking.cutting import cut, expand
from bcdl_jax.shrinking.network import shrink
from bcdl_jax.shrinking.report import LeafReport, ShrinkReport

__all__ = [
    "LeafReport",
    "ShrinkReport",
    "cut",
    "expand",
    "for_cpu",
    "shrink",
]
