"""The plot of test errors against bytes: the files of the results, and published models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bcdl_jax
from experiments.registry import EXPERIMENTS, method_names
from experiments.report.published import MODELS
from experiments.report.tables import Key, our_row, title_of

# The bytes and the test error in percent of a network.
_Point = tuple[int, float]


def draw(path: Path, results: dict[Key, dict[str, Any]], dataset: str | None = None) -> None:
    """Draws test errors against bytes, with one panel per network.

    Args:
      path: The PNG file.
      results: The results from ``read_results``.
      dataset: The data set of all results; None for the paper's.
    """
    import matplotlib  # It takes a second to import.

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    experiments = [name for name in EXPERIMENTS if _of_experiment(name, results)]
    figure, grid = plt.subplots(
        1, len(experiments), figsize=(6.4 * len(experiments), 6), dpi=110, layout="constrained", squeeze=False
    )
    for panel, experiment in zip(grid[0], experiments, strict=True):
        points = _draw_files(panel, _of_experiment(experiment, results))
        _draw_models(panel, experiment, points)
        _label(panel, title_of(experiment, dataset))
    bcdl_jax.codec.write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def _of_experiment(experiment: str, results: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of an experiment, in the order of the methods."""
    order = method_names()
    keys = [key for key in results if key.experiment == experiment]
    return [results[key] for key in sorted(keys, key=lambda key: (order.index(key.method), key))]


def _draw_files(panel: Any, results: Sequence[dict[str, Any]]) -> list[_Point]:
    """Draws the compressed files of all seeds; returns their points."""
    points: list[_Point] = []
    for result in results:
        runs = [run for run in result["runs"] if not run["failure"]]
        if runs:
            sizes, errors = [run["file_bytes"] for run in runs], [run["test_error"]["file"] for run in runs]
            panel.scatter(sizes, errors, s=36, label=f"{our_row(result)[0]}: files")
            points += zip(sizes, errors, strict=True)
    return points


def _draw_models(panel: Any, experiment: str, points: Sequence[_Point]) -> None:
    """Draws the published models, and sets limits that include them and the points."""
    models = [model for model in MODELS if model.network == experiment]
    sizes = [size for size, _ in points] + [model.bytes for model in models]
    # The limits leave room for the names of the models, and for points that are close together.
    low, high = min(sizes, default=1), max(sizes, default=1)
    panel.set_xlim(low / 2, high * 2)
    panel.margins(y=0.1)
    for number, model in enumerate(models):
        panel.scatter(model.bytes, model.error, marker="x", color="#555555", label="published" if not number else None)
        is_right = model.bytes**2 > low * high
        panel.annotate(
            f"{model.title} ({model.kind})",
            (model.bytes, model.error),
            xytext=(-5 if is_right else 5, 3),
            textcoords="offset points",
            horizontalalignment="right" if is_right else "left",
            fontsize=6,
        )


def _label(panel: Any, title: str) -> None:
    from matplotlib import ticker

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.set_title(title)
    panel.set_xlabel("bytes of the compressed network")
    panel.set_ylabel("test error in %")
    panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
