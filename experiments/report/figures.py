"""Pictures of a run: GIFs of the weights and of the feature importance, and histograms of the scores."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from bcdl_jax.codec import write_atomically
from experiments.pipeline.pictures import FEATURE_IMPORTANCE, SCORES, weights_picture
from experiments.pipeline.snapshots import Snapshot

_MILLISECONDS_PER_FRAME = 150
_MILLISECONDS_LAST_FRAME = 2500
# White is zero, and so the colour of pruned weights.
_SIGNED = LinearSegmentedColormap.from_list("signed", ["#1f3fbf", "#ffffff", "#c4161c"])
_DIGITS = (0, 3, 4, 7, 8)
# Groups without a signal have larger scores: ``bcdl_jax.compression.log_noise_to_signal`` gives them 1e9.
_FAR = 1e8


def draw(
    out: Path,
    snapshots: list[Snapshot],
    thresholds: dict[str, float],
    images: np.ndarray,
    labels: np.ndarray,
    seed: int,
    only: Collection[str],
    score: str = "log dropout rate",
) -> None:
    """Draws the pictures of one seed.

    Args:
      out: The directory to write to.
      snapshots: The snapshots, in the order of the epochs.
      thresholds: The thresholds by layer name, in the order of the layers. A group counts as pruned if its score is not below its threshold.
      images: The test images, uint8. For the feature importance, which shows five digits, they must be [n, 28, 28, 1].
      labels: The labels of the images, [n].
      seed: The seed, for the titles.
      only: The names of the GIFs to draw. The histograms of the scores are always drawn.
      score: The name of the score that the groups were pruned by, in words.
    """
    names = list(thresholds)
    for number, (name, following) in enumerate(itertools.pairwise(names), start=1):
        path = out / weights_picture(number)
        if path.name not in only:
            continue
        if snapshots[0].kernels[name].ndim == 2:
            weights_gif(path, snapshots, name, following, thresholds, number, seed)
        else:
            kernels_gif(path, snapshots, name, thresholds[name], number, seed)
    if FEATURE_IMPORTANCE in only:
        digits = np.stack([_example(images, labels, digit) for digit in _DIGITS])
        importance_gif(out / FEATURE_IMPORTANCE, snapshots, names[0], thresholds[names[0]], digits, seed, score)
    score_histogram(out / SCORES, snapshots[-1], thresholds, seed, score)


def _example(images: np.ndarray, labels: np.ndarray, digit: int) -> np.ndarray:
    """The first image of a digit; another image if there is none."""
    rows = np.flatnonzero(labels == digit)
    return images[rows[0] if rows.size else digit, ..., 0]


def weights_gif(
    path: Path,
    snapshots: list[Snapshot],
    name: str,
    following: str,
    thresholds: dict[str, float],
    number: int,
    seed: int,
) -> None:
    """Draws the mean weights of a dense layer over the epochs, with one column per input unit and one row per output unit."""
    inputs, outputs = snapshots[0].kernels[name].shape
    frames = []
    for snapshot in snapshots:
        kept_inputs = snapshot.scores[name] < thresholds[name]
        kept_outputs = snapshot.scores[following] < thresholds[following]
        weights = np.where(kept_inputs[:, None] & kept_outputs, snapshot.kernels[name], 0).T.astype(np.float32)
        kept = f"{kept_inputs.sum()} of {inputs} inputs, {kept_outputs.sum()} of {outputs} outputs kept"
        frames.append((snapshot.epoch, weights, kept))
    figure, axes = plt.subplots(figsize=(10.4, 4.9 if number == 1 else 4.2), dpi=100, layout="constrained")
    axes.set_xlabel(f"input unit ({inputs})")
    axes.set_ylabel(f"output unit ({outputs})")
    _signed_gif(path, figure, axes, frames, f"Layer {number} (seed {seed})", aspect="auto")


def kernels_gif(path: Path, snapshots: list[Snapshot], name: str, threshold: float, number: int, seed: int) -> None:
    """Draws the mean kernels of a two-dimensional convolution over the epochs, with one tile for each pair of an output and an input channel.

    With several input channels there is one column of tiles per output channel and one row per input channel. The tiles of a single input
    channel fill a rectangle.
    """
    height, width, inputs, outputs = snapshots[0].kernels[name].shape
    columns = outputs if inputs > 1 else math.ceil(math.sqrt(2 * outputs))
    rows = inputs * math.ceil(outputs / columns)
    frames = []
    for snapshot in snapshots:
        kept = snapshot.scores[name] < threshold
        kernels = np.where(kept, snapshot.kernels[name], 0).astype(np.float32)
        tiles = kernels.transpose(2, 3, 0, 1).reshape(-1, height, width)
        # NaN fills the lines between the tiles and the tiles without a kernel, since colour maps leave NaN blank.
        tiles = np.concatenate([tiles, np.full((rows * columns - len(tiles), height, width), np.nan, np.float32)])
        tiles = np.pad(tiles, ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
        grid = tiles.reshape(rows, columns, height + 1, width + 1).transpose(0, 2, 1, 3)
        weights = grid.reshape(rows * (height + 1), -1)[:-1, :-1]
        frames.append((snapshot.epoch, weights, f"{kept.sum()} of {outputs} output channels kept"))
    figure, axes = plt.subplots(figsize=(10.4, 5.4), dpi=100, layout="constrained")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("#d9d9d9")
    if inputs > 1:
        axes.set_xlabel(f"output channel ({outputs})")
        axes.set_ylabel(f"input channel ({inputs})")
    else:
        axes.set_xlabel(f"the kernels of the {outputs} output channels")
    _signed_gif(path, figure, axes, frames, f"Layer {number} (seed {seed})", aspect="equal")


def _signed_gif(
    path: Path, figure: Any, axes: Any, frames: list[tuple[int, np.ndarray, str]], title: str, aspect: Any
) -> None:
    """Draws signed weights. A frame holds an epoch, the weights, and a sentence on the kept units."""
    # All frames have one scale. The few largest weights saturate, since the others would be pale otherwise.
    last = np.nan_to_num(frames[-1][1])
    limit = float(np.percentile(np.abs(last[last != 0]), 99)) if np.any(last) else 1.0
    picture = axes.imshow(frames[0][1], cmap=_SIGNED, vmin=-limit, vmax=limit, interpolation="nearest", aspect=aspect)
    figure.colorbar(picture, ax=axes, label="posterior mean of the weight", extend="both")

    def show(frame: tuple[int, np.ndarray, str]) -> None:
        epoch, weights, kept = frame
        picture.set_data(weights)
        colours = "negative blue, positive red, pruned white"
        axes.set_title(f"{title}, epoch {epoch}: {kept}\n{colours}", fontsize=11)

    _write_gif(path, figure, show, frames)


def importance_gif(
    path: Path, snapshots: list[Snapshot], name: str, threshold: float, digits: np.ndarray, seed: int, score: str
) -> None:
    """Draws the importance of the input pixels over the epochs: minus the score of each pixel, the kept pixels, and five digits on them."""
    rates = [np.asarray(snapshot.scores[name], np.float32).reshape(28, 28) for snapshot in snapshots]
    low, high = -threshold if np.isfinite(threshold) else float(np.min(-rates[-1])), float(np.max(-rates[-1]))
    figure, grid = plt.subplots(2, 4, figsize=(8.4, 4.8), dpi=100, layout="constrained")
    panels = grid.ravel()
    importance = panels[0].imshow(-rates[0], cmap="viridis", vmin=low, vmax=max(high, low + 1e-3))
    panels[0].set_title(f"importance\n(-{score})", fontsize=10)
    figure.colorbar(importance, ax=panels[0], shrink=0.8, extend="both")
    mask = panels[1].imshow(np.ones((28, 28)), cmap="gray", vmin=0, vmax=1)
    panels[1].set_title("kept pixels (white)", fontsize=10)
    shown = []
    for number, panel in enumerate(panels[2 : 2 + len(digits)]):
        # Pruned pixels have a colour of their own, since black would look like background.
        shown.append(panel.imshow(np.zeros((28, 28, 3))))
        panel.set_title("digits, kept pixels only" if number == 0 else "", fontsize=10)
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
    panels[7].axis("off")
    panels[7].text(0.5, 0.5, "pruned pixels\nare drawn\nin blue", ha="center", va="center", fontsize=10)

    def show(frame: tuple[int, np.ndarray]) -> None:
        epoch, log_rates = frame
        kept = log_rates < threshold
        importance.set_data(-log_rates)
        mask.set_data(kept.astype(float))
        for picture, digit in zip(shown, digits, strict=True):
            gray = np.repeat(digit[..., None] / 255.0, 3, axis=-1)
            picture.set_data(np.where(kept[..., None], gray, np.array([0.25, 0.35, 0.75])))
        figure.suptitle(f"Input pixels (seed {seed}), epoch {epoch}: {kept.sum()} of {kept.size} kept", fontsize=11)

    _write_gif(path, figure, show, [(snapshot.epoch, rate) for snapshot, rate in zip(snapshots, rates, strict=True)])


def score_histogram(path: Path, snapshot: Snapshot, thresholds: dict[str, float], seed: int, score: str) -> None:
    """Draws a histogram of the scores of each layer's groups, with the threshold."""
    columns = min(5, len(thresholds))
    rows = math.ceil(len(thresholds) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.6 * rows), dpi=100, layout="constrained", squeeze=False
    )
    for panel in grid.flat[len(thresholds) :]:
        panel.set_axis_off()
    for panel, name in zip(grid.flat, thresholds, strict=False):
        rates, threshold = snapshot.scores[name], thresholds[name]
        kept = rates < min(threshold, _FAR)
        # The last bar includes all larger scores.
        edges = np.histogram_bin_edges(rates[rates < _FAR] if np.any(rates < _FAR) else rates, bins=40)
        rates = np.clip(rates, edges[0], edges[-1])
        panel.hist(
            [rates[kept], rates[~kept]],
            bins=edges,
            stacked=True,
            color=["#2a6f97", "#c9c9c9"],
            label=[f"kept: {kept.sum()}", f"pruned: {(~kept).sum()}"],
        )
        if np.isfinite(threshold):
            panel.axvline(threshold, color="#c4161c", linewidth=1.5, label=f"threshold {threshold:.2f}")
        groups = "output channels" if snapshot.group_axes[name] == "output" else "input units"
        panel.set_title(f"{name}: {rates.size} {groups}")
        panel.set_xlabel(score)
        panel.set_ylabel(f"number of {groups}")
        panel.legend(fontsize=8)
    figure.suptitle(f"{score.capitalize()} of the groups after epoch {snapshot.epoch} (seed {seed})")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def _write_gif(path: Path, figure: Any, show: Callable[[Any], None], frames: Iterable[Any]) -> None:
    pictures = []
    for frame in frames:
        show(frame)
        figure.canvas.draw()
        pictures.append(
            Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(128, dither=Image.Dither.NONE)
        )
    plt.close(figure)
    durations = [_MILLISECONDS_PER_FRAME] * (len(pictures) - 1) + [_MILLISECONDS_LAST_FRAME]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
