"""The layers of a params tree that pruning and rounding work on: variational layers before the precision is reduced, quantised ones after."""

from __future__ import annotations

from typing import Any

from bcdl_jax.compression.quantized_layer import QuantizedLayer
from bcdl_jax.priors.posterior import Posterior

LAYER_TYPES = (Posterior, QuantizedLayer)


def is_layer(node: Any) -> bool:
    """Whether a part of a params tree is the node of a variational or of a quantised layer, for the ``is_leaf`` of ``jax.tree.map``."""
    return isinstance(node, LAYER_TYPES)
