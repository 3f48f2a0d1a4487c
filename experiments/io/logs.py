"""The metrics of a run: one line of metrics.jsonl for each epoch and seed, optional TensorBoard event files, and a profile of a few steps."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.io import files
from experiments.runtime import machine
from experiments.runtime.errors import UserError

METRICS, TENSORBOARD, PROFILE = "metrics.jsonl", "tensorboard", "profile"
# Patterns of the files below the output directory.
WRITTEN = (METRICS, f"{TENSORBOARD}/seed*/events.out.tfevents.*", f"{PROFILE}/plugins/profile/*/*")
# The entries of the metrics that depend on the machine: they differ from run to run, unlike those that depend on the training.
SPEED, PROCESS_MEMORY, DEVICE_MEMORY = "images_per_second", "peak_memory_mb", "peak_device_memory_mb"
MACHINE_ENTRIES = (SPEED, PROCESS_MEMORY, DEVICE_MEMORY)


def check_tensorboard() -> None:
    """Raises UserError if tensorboardX, which writes event files, is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard needs tensorboardX: pip install 'bcdl-jax[tensorboard]'.")


class Logs:
    """Writes the metrics of a run. A context manager that closes its files."""

    def __init__(self, out: Path, *, tensorboard: bool = False):
        """Writes nothing yet.

        Args:
          out: The output directory.
          tensorboard: True to write event files too, one directory for each seed. They need no TensorFlow.
        """
        self._out, self._tensorboard = out, tensorboard
        self._writers: dict[int, Any] | None = None
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tensorboard:
            for writer in self._event_writers().values():
                writer.close()

    def log_epoch(self, phase: str, metrics: Sequence[Mapping[str, Any]], *, images_per_second: float) -> None:
        """Adds the metrics of one epoch.

        If the file cannot be written, on a full disk for example, a warning is printed and the lines are written with those of the next epoch.

        Args:
          phase: The phase of the run, such as "train".
          metrics: The metrics of each seed, with the entries "epoch" and "seed". Values that are not finite become null.
          images_per_second: The speed of the epoch, the images of all seeds together.
        """
        writers = self._event_writers() if self._tensorboard else {}
        speed = _jsonable(speed_and_memory(images_per_second))
        lines = [{"phase": phase} | _jsonable(dict(entries)) | speed for entries in metrics]
        self._waiting += lines
        try:
            self.flush()
        except OSError as error:
            path = self._out / METRICS
            print(f"warning: {path} could not be written ({error.strerror}); training continues.", file=sys.stderr)
        if self._tensorboard:
            self._add_events(writers, lines)

    def flush(self) -> None:
        """Writes the lines that could not be written before.

        Raises:
          OSError: The file cannot be written.
        """
        if self._waiting:
            files.append_json_lines(self._out / METRICS, self._waiting)
            self._waiting = []

    def _event_writers(self) -> dict[int, Any]:
        """The writers of event files by seed. A resumed run writes all events again, from its metrics, so that no event is there twice."""
        if self._writers is None:
            self._writers, path = {}, self._out / METRICS
            if path.exists():
                self._add_events(self._writers, [json.loads(line) for line in path.read_text().splitlines()])
        return self._writers

    def _add_events(self, writers: dict[int, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        from tensorboardX import SummaryWriter

        for line in lines:
            seed = line["seed"]
            if seed not in writers:
                writers[seed] = SummaryWriter(str(self._out / TENSORBOARD / f"seed{seed}"))
            for name, value in _scalars(line):
                writers[seed].add_scalar(f"{line['phase']}/{name}", value, line["epoch"])
        for writer in writers.values():
            writer.flush()


def speed_and_memory(images_per_second: float) -> dict[str, float]:
    """The entries of the metrics in ``MACHINE_ENTRIES``: the speed, and the peak memory in MB, the devices' if they report one."""
    of_devices = machine.peak_device_bytes()
    memory = (
        {PROCESS_MEMORY: machine.peak_process_megabytes()}
        if of_devices is None
        else {DEVICE_MEMORY: round(of_devices / 2**20)}
    )
    return {SPEED: round(images_per_second, 1)} | memory


def profile(out: Path, run: Callable[[], Any]) -> None:
    """Writes a JAX profile of ``run``. The function is called once before, so that the profile does not contain its compilation.

    Args:
      out: The output directory.
      run: A function that takes a few training steps and returns their arrays.
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
    """The numbers of nested metrics by path, without the epoch and the seed."""
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("epoch", "seed"):
            found.append((prefix + name, value))
    return found


def _jsonable(value: Any) -> Any:
    """The value with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
