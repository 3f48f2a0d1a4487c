"""The reports on the single layers and arrays of a compressed network."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from bcdl_jax._tree import PyTree
from bcdl_jax.budget.compressed import EntryReport
from bcdl_jax.codec import RecordSummary, encode, summarize
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.compression.quantized_layer import QuantizedLayer


def entry_reports(params: PyTree, reduced: PyTree, small: PyTree) -> tuple[EntryReport, ...]:
    """The reports, in the order of the params.

    Args:
      params: The params before compression, with posteriors.
      reduced: The pruned and rounded params at full size.
      small: The small params.
    """
    summaries = summarize(encode(small, names=True))
    nodes = (jax.tree.leaves(tree, is_leaf=is_layer) for tree in (params, reduced))
    return tuple(_entry(*each) for each in zip(*nodes, summaries, strict=True))


def _entry(node: Any, reduced: Any, summary: RecordSummary) -> EntryReport:
    if not isinstance(reduced, QuantizedLayer):
        return EntryReport(
            summary.name,
            np.shape(node),
            summary.shape,
            summary.bits,
            summary.bytes,
            is_layer=False,
            is_rounded=summary.dtype is None,
            scores=np.zeros(0),
            kept=np.zeros(0, bool),
        )
    before = np.asarray(node.group_mask) > 0
    scores = np.zeros(0) if isinstance(node, QuantizedLayer) else np.asarray(node.in_float32().group_scores())
    return EntryReport(
        summary.name,
        node.kernel_shape,
        summary.shape,
        summary.bits,
        summary.bytes,
        is_layer=True,
        is_rounded=True,
        scores=scores[before] if scores.size else scores,
        kept=np.asarray(reduced.group_mask)[before] > 0,
    )
