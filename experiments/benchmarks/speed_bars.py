"""The picture of the inference benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bcdl_jax.codec import write_atomically

_COLORS = ("#c9c9c9", "#1f3fbf", "#c4161c")


def draw(path: Path, results: list[dict[str, Any]]) -> None:
    """Draws the speed-up of shrunk and masked networks over dense ones beside the ratio of multiply-adds, for each network and batch size.

    Args:
      path: The PNG file.
      results: The results of ``benchmark_inference``.
    """
    labels = [f"{result['title']}\nbatch {result['batch']}" for result in results]
    ratios = [before / after for before, after in (result["multiply_adds"] for result in results)]
    rows = np.arange(len(results))
    figure, axes = plt.subplots(figsize=(7, 1 + 0.6 * len(results)), layout="constrained")
    bars = {
        "fewer multiply-adds": ratios,
        "shrunk, measured": [result["speed_up"]["shrunk"] for result in results],
        "masked, measured": [result["speed_up"]["masked"] for result in results],
    }
    for number, (label, values) in enumerate(bars.items()):
        drawn = axes.barh(rows + 0.27 * (number - 1), values, 0.25, label=label, color=_COLORS[number])
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = (1, 2, 3, 5, 10, 20)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as the dense network, the fastest way of each")
    axes.legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)
