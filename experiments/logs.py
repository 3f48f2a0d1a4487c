"""The metrics of a run: a line of metrics.jsonl for each epoch and seed, the same in TensorBoard event files where wanted,
and a profile of a few steps."""

from __future__ import annotations

import importlib.util
import math
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments import files
from experiments.errors import UserError

METRICS, TENSORBOARD, PROFILE = "metrics.jsonl", "tensorboard", "profile"
# Patterns of the files below the output directory.
WRITTEN = (METRICS, f"{TENSORBOARD}/seed*/events.out.tfevents.*", f"{PROFILE}/plugins/profile/*/*")


def check_tensorboard() -> None:
    """Raises UserError where the library that writes event files is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard needs tensorboardX: pip install 'bcdl-jax[tensorboard]'.")


class Logs:
    """Writes the metrics of a run; a context manager that closes its files.

    Args:
      out: the output directory.
      tensorboard: whether to write event files too, one directory for each seed, without TensorFlow.
    """

    def __init__(self, out: Path, *, tensorboard: bool = False):
        self._out, self._tensorboard = out, tensorboard
        self._writers: dict[int, Any] = {}

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: Any) -> None:
        for writer in self._writers.values():
            writer.close()

    def log_epoch(self, phase: str, metrics: Mapping[str, Any], *, images_per_second: float) -> None:
        """Adds an epoch of one seed.

        Args:
          phase: of the run, such as "train".
          metrics: with the entries "epoch" and "seed"; values that are not finite become null.
          images_per_second: that all seeds together went through.
        """
        speed = {"images_per_second": round(images_per_second, 1)} | memory()
        line = {"phase": phase} | _jsonable(dict(metrics)) | speed
        files.append_json_line(self._out / METRICS, line)
        if self._tensorboard:
            writer = self._writer(line["seed"])
            for name, value in _scalars(line):
                writer.add_scalar(f"{phase}/{name}", value, line["epoch"])
            writer.flush()

    def _writer(self, seed: int) -> Any:
        from tensorboardX import SummaryWriter

        if seed not in self._writers:
            self._writers[seed] = SummaryWriter(str(self._out / TENSORBOARD / f"seed{seed}"))
        return self._writers[seed]


def memory() -> dict[str, int]:
    """Peak memory in MB so far: "peak_device_memory_mb", the largest of the devices, where they tell; else "peak_memory_mb" of the process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return {"peak_device_memory_mb": round(max(known) / 2**20)} if known else {"peak_memory_mb": process_memory()}


def process_memory() -> int:
    """Peak resident memory of the process in MB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def profile(out: Path, run: Callable[[], Any]) -> None:
    """Writes a JAX profile of ``run``, which is called once before, so that its compilation stays out of it.

    Args:
      out: the output directory.
      run: does a few steps and returns arrays to wait for.
    """
    jax.block_until_ready(run())
    directory = out / PROFILE
    with jax.profiler.trace(directory):
        jax.block_until_ready(run())
    print(
        f"A profile of a few steps is in {directory}: pip install xprof, then xprof --logdir {directory}; "
        "or open its trace.json.gz at https://ui.perfetto.dev.",
        flush=True,
    )


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("epoch", "seed"):
            found.append((prefix + name, value))
    return found


def _jsonable(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
