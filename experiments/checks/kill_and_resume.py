"""Kills a run at random moments, goes on each time, and compares all its files with an undisturbed run's:
``python -m experiments.crash_test``.

The run is a small but whole one: LeNet-300-100 on some of the embedded digits, two seeds, which shrinks while it is trained, is pruned,
fine-tuned and rounded. Most kills are SIGKILL, some SIGTERM. Every third one waits for a checkpoint that is being written,
every third for a network that has just shrunk; the others come after a random time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.pipeline.recipe import Recipe
from experiments.runtime.errors import UserError

_CHAIN = ("Dense_0", "Dense_1", "Dense_2")
_LOG, _METRICS = "log.txt", "metrics.jsonl"
_OF_THE_MACHINE = ("images_per_second", "peak_memory_mb", "peak_device_memory_mb")
_SHRUNK = b"trained on as"
_LIMIT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Size:
    """How much a run trains."""

    examples: int
    epochs: int
    fine_tune_epochs: int
    seeds: tuple[int, ...]


WHOLE = Size(examples=1400, epochs=6, fine_tune_epochs=2, seeds=(0, 1))
SHORT = Size(examples=1400, epochs=4, fine_tune_epochs=1, seeds=(0,))


def train(out: Path, size: Size) -> None:
    """The run that is killed: starts, or goes on with what is in ``out``, and leaves its files there."""
    from experiments.io import checkpoints, data, files, logs
    from experiments.networks.models import LeNet300
    from experiments.pipeline import bayesian as compress

    digits = data.load(data.EMBEDDED)
    # Every so many, since they are sorted by class.
    rows = slice(None, None, len(digits.train) // size.examples)
    dataset = dataclasses.replace(digits, train=data.Split(digits.train.images[rows], digits.train.labels[rows]))
    recipe = Recipe(
        epochs=size.epochs,
        fine_tune_epochs=size.fine_tune_epochs,
        batch_size=50,
        # So that groups are gone within some epochs.
        learning_rate=5e-3,
        log_variance_factor=30.0,
        max_pruning_change=0.1,
        max_rounding_change=0.1,
        in_turn=True,
        max_shrinking_change=0.1,
        first_shrinking=2,
    )
    seeds = list(size.seeds)
    settings = checkpoints.settings("crash_test", recipe, dataset, seeds)
    out, kept = checkpoints.begin(str(out), settings, ["*.npz", "*.bcdl", logs.METRICS], logs.METRICS, 1, True, True)
    with logs.Logs(out) as log:
        run = compress.compress(
            LeNet300(),
            dataset,
            recipe,
            chain=_CHAIN,
            seeds=seeds,
            out=out,
            logs=log,
            profile_steps=0,
            thresholds=None,
            pretrained=None,
            checkpoints=kept,
        )
    frames = {str(frame.epoch): frame.kernels | {"rates": frame.scores} for frame in run.snapshots}
    files.write_arrays(out / "frames.npz", frames)
    kept.remove()


@dataclasses.dataclass(frozen=True)
class Process:
    """A run in a process of its own."""

    popen: subprocess.Popen[bytes]
    out: Path
    log_start: int
    start: float

    def log(self) -> bytes:
        """What it has printed."""
        return self.out.with_suffix(f".{_LOG}").read_bytes()[self.log_start :]


def start(out: Path, size: Size, cache: Path) -> Process:
    """Starts or resumes a run; compiled programs are kept in ``cache``."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "experiments.crash_test", "--train", str(out), *(["--short"] * (size == SHORT))]
    with out.with_suffix(f".{_LOG}").open("ab") as log:
        log_start = log.tell()
        popen = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=Path(__file__).parents[2])
    return Process(popen, out, log_start, time.monotonic())


def wait(process: Process, until: Callable[[], bool]) -> bool:
    """Waits until something is so; False if the process ended before.

    Raises:
      UserError: it failed, or takes too long.
    """
    while process.popen.poll() is None:
        if until():
            return True
        if time.monotonic() - process.start > _LIMIT_SECONDS:
            process.popen.kill()
            raise UserError(f"A run did not end within {_LIMIT_SECONDS} s; see {process.out}.")
        time.sleep(0.002)
    if process.popen.returncode:
        raise UserError(f"A run failed:\n{process.log().decode(errors='replace')[-2000:]}")
    return False


def moments(process: Process, generator: random.Random, seconds: float) -> dict[str, Callable[[], bool]]:
    """The moments to kill at, by name: conditions for ``wait``."""
    directory = process.out / "checkpoints"
    delay = generator.uniform(0.1, seconds)
    write, moment = generator.randint(1, 2), generator.uniform(0, 0.2)
    writes: dict[str, float] = {}
    shrunk: list[float] = []

    def being_written() -> bool:
        for path in directory.glob(".writing*"):
            writes.setdefault(path.name, time.monotonic())
        return len(writes) == write and time.monotonic() > max(writes.values()) + moment

    def just_shrunk() -> bool:
        if not shrunk and _SHRUNK in process.log():
            shrunk.append(time.monotonic())
        return bool(shrunk) and time.monotonic() > shrunk[0] + moment

    return {
        "random": lambda: time.monotonic() > process.start + delay,
        "checkpoint": being_written,
        "shrink": just_shrunk,
    }


def where(out: Path) -> str:
    """Where a killed run stands, from its files."""
    metrics = out / _METRICS
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    epoch = json.loads(lines[-1])["epoch"] if lines and lines[-1].endswith("}") else 0
    done = sorted(path for path in (out / "checkpoints").glob("0*") if (path / "about.json").exists())
    text = f"epochs reported {epoch}"
    if done:
        about = json.loads((done[-1] / "about.json").read_text())
        text += f", checkpoint {done[-1].name} of {about['phase']} step {about['facts']['step']}"
    if any((out / "checkpoints").glob(".writing*")):
        text += ", while a checkpoint was written"
    elif any(out.glob("reduced_*")) or any(out.glob("pruned_*")) or any(out.glob("trained_*")):
        text += ", after training" if any(out.glob("pruned_*")) else ", between training and fine-tuning or later"
    return text


def differences(out: Path, expected: Path) -> list[str]:
    """Names of the files that differ between two finished runs; what the metrics say of time and memory may differ."""
    names = {path.name for directory in (out, expected) for path in directory.iterdir()}
    return sorted(
        name
        for name in names
        if not ((out / name).is_file() and (expected / name).is_file())
        or _content(out / name) != _content(expected / name)
    )


def _content(path: Path) -> Any:
    if path.name != _METRICS:
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in _OF_THE_MACHINE} for line in lines]


def crash_test(kills: int, seed: int, size: Size, directory: Path) -> bool:
    """Runs the test in a directory, prints a line per kill, and says whether all files were the same."""
    generator = random.Random(seed)
    cache, expected = directory / "cache", directory / "undisturbed"
    begun = time.monotonic()
    wait(start(expected, size, cache), lambda: False)
    print(f"undisturbed run: {time.monotonic() - begun:.1f} s, compiled anew", flush=True)
    seconds, number, killed, same = (time.monotonic() - begun) / 2, 0, 0, True
    finished = attempts = 0
    while killed < kills or finished < number:
        if finished == number:
            number += 1
        out = directory / f"run{number}"
        process = start(out, size, cache)
        if killed < kills:
            choice = ("checkpoint", "shrink", "random")[attempts % 3]
            attempts += 1
            with_signal = signal.SIGTERM if generator.random() < 0.25 else signal.SIGKILL
            if wait(process, moments(process, generator, seconds)[choice]):
                killed += 1
                process.popen.send_signal(with_signal)
                process.popen.wait()
                moment = f"{time.monotonic() - process.start:.1f} s"
                print(
                    f"kill {killed}: {with_signal.name} after {moment} ({choice}), status {process.popen.returncode}; run {number}: {where(out)}",
                    flush=True,
                )
                if process.popen.returncode not in (-with_signal, 128 + with_signal):
                    raise UserError(f"A run failed:\n{process.log().decode(errors='replace')[-2000:]}")
                continue
        elif wait(process, lambda: False):
            continue
        finished += 1
        wrong = differences(out, expected)
        same = same and not wrong
        print(
            f"run {number} finished: {'differs in ' + ', '.join(wrong) if wrong else 'all files are the same'}",
            flush=True,
        )
        # A whole run with the programs in the cache: later kills come within it.
        seconds = min(seconds, time.monotonic() - process.start)
    print("PASS" if same else "FAIL", flush=True)
    return same


def main(arguments: list[str] | None = None) -> int:
    """Runs the test; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.crash_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals (default: 0)")
    parser.add_argument("--short", action="store_true", help="a run of fewer examples, epochs and seeds")
    parser.add_argument("--train", metavar="DIR", help="be the run that is killed, with its files there")
    args = parser.parse_args(arguments)
    size = SHORT if args.short else WHOLE
    try:
        if args.kills < 1:
            raise UserError(f"--kills is {args.kills}; it must be at least 1.")
        if args.train is not None:
            train(Path(args.train), size)
            return 0
        with tempfile.TemporaryDirectory() as directory:
            return 0 if crash_test(args.kills, args.seed, size, Path(directory)) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
