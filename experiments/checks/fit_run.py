"""A small call of ``bcdl_jax.train.fit`` that can be killed and resumed, for ``experiments.crash_test --fit``."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import bcdl_jax
from experiments.io import data, files

_CHECKPOINTS, _PARAMS, _RESULT = "checkpoints", "params.npz", "result.json"
# The text that a round prints once its network has shrunk and is trained.
SHRUNK = "fit: round 1"


def _network(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    x = images.reshape(len(images), -1) / 255.0
    return jax.nn.relu(x @ params["first"] + params["bias"]) @ params["last"]


def _start_params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    first, last = jax.random.normal(keys[0], (784, 40)) / 28, jax.random.normal(keys[1], (40, 10)) / 6
    return {"first": first, "bias": jnp.zeros(40), "last": last}


def train(out: Path, examples: int) -> None:
    """The run that is killed: starts it, or goes on from the checkpoints in ``out``.

    Args:
      out: The output directory. The params and the result of the finished run stay in it.
      examples: The number of training images.
    """
    out.mkdir(exist_ok=True)
    digits = data.load(data.EMBEDDED)
    # At even distances, since the images are sorted by class.
    rows = slice(None, None, len(digits.train) // examples)
    split: Any = digits.train.images[rows], digits.train.labels[rows].astype(jnp.int32)
    fit_data, validation = ((split[0][part], split[1][part]) for part in (slice(0, None, 2), slice(1, None, 2)))
    config = bcdl_jax.train.FitConfig(
        steps=300,
        rounds=2,
        round_steps=60,
        fine_tune_steps=60,
        batch_size=50,
        steps_per_report=10,
        least_rise=0.5,
        pruning_rise=0.1,
    )
    model = bcdl_jax.variational(_network, _start_params(), fit_data[0][:2])
    result = bcdl_jax.train.fit(
        model, bcdl_jax.train.SoftmaxLoss(), fit_data, validation, config=config, checkpoints=out / _CHECKPOINTS
    )
    files.write_arrays(out / _PARAMS, result.params)
    reports = [dataclasses.asdict(report) for report in result.reports]
    files.write_json(out / _RESULT, {"losses": result.losses, "kept weights": result.kept_weights, "reports": reports})
    shutil.rmtree(out / _CHECKPOINTS)


def being_written(out: Path) -> list[Path]:
    """The checkpoints that are being written, or were when the process ended."""
    return list((out / _CHECKPOINTS).glob(".fit-*"))


def progress(out: Path) -> str:
    """The progress of a killed run according to its files."""
    newest = max((out / _CHECKPOINTS).glob("fit-*"), default=None)
    text = "no checkpoint" if newest is None else newest.name
    return f"{text}, while a checkpoint was written" if being_written(out) else text
