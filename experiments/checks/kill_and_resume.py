"""Kills a run at random moments, resumes it each time, and compares all its files with those of an undisturbed run:
``python -m experiments.crash_test``.

The run is small but complete: LeNet-300-100 on some of the embedded digits, with two seeds, which shrinks while it is trained, is pruned,
fine-tuned and rounded. With ``--fit``, it is a call of ``bcdl_jax.train.fit``. Most kills are SIGKILL, some SIGTERM. One third of them
waits until a checkpoint is being written, one third until a network has just shrunk; the others come after a random time.
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

import bcdl_jax
from experiments.checks import fit_run
from experiments.io import checkpoints, data, files, logs, run_settings
from experiments.pipeline.bayesian import compress
from experiments.pipeline.context import STAGES, RunContext, params_file
from experiments.pipeline.progress import SHRUNK
from experiments.pipeline.recipe import Recipe
from experiments.registry import NETWORKS
from experiments.runtime.command import reporting_errors
from experiments.runtime.errors import UserError

_LOG, _FRAMES = "log.txt", "frames.npz"
_LIMIT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a run.

    Attributes:
      examples: The number of training images.
      epochs: The number of epochs before pruning.
      fine_tune_epochs: The number of epochs of the fine-tuning.
      seeds: The seeds of the run.
    """

    examples: int
    epochs: int
    fine_tune_epochs: int
    seeds: tuple[int, ...]


WHOLE = Size(examples=1400, epochs=6, fine_tune_epochs=2, seeds=(0, 1))
SHORT = Size(examples=1400, epochs=4, fine_tune_epochs=1, seeds=(0,))


def train(out: Path, size: Size) -> None:
    """The run that is killed: starts it, or resumes the unfinished run in ``out``. Its files stay in ``out``."""
    digits = data.load(data.EMBEDDED)
    # At even distances, since the images are sorted by class.
    rows = slice(None, None, len(digits.train) // size.examples)
    dataset = dataclasses.replace(digits, train=data.Split(digits.train.images[rows], digits.train.labels[rows]))
    recipe = Recipe(
        epochs=size.epochs,
        fine_tune_epochs=size.fine_tune_epochs,
        batch_size=50,
        # Groups are pruned within some epochs.
        learning_rate=5e-3,
        log_variance_factor=30.0,
        max_pruning_change=0.1,
        max_rounding_change=0.1,
        in_turn=True,
        max_shrinking_change=0.1,
        first_shrinking=2,
    )
    seeds = list(size.seeds)
    settings = run_settings.settings("crash_test", recipe, dataset, seeds)
    written = ["*.npz", "*.bcdl", logs.METRICS]
    out, kept = checkpoints.begin(str(out), settings, written, logs.METRICS, every=1, resume=True, overwrite=True)
    network = NETWORKS["lenet300"]
    model = network.build(bcdl_jax.GroupNormalJeffreys(), 1)
    with logs.Logs(out) as log:
        run = compress(RunContext(model, dataset, recipe, network.chain, seeds, out, log, kept), None)
    files.write_arrays(out / _FRAMES, {str(frame.epoch): frame.to_arrays() for frame in run.snapshots})
    kept.remove()


@dataclasses.dataclass(frozen=True)
class KilledRun:
    """A run that is killed.

    Attributes:
      flags: The flags of the command that select it.
      train: A function from the output directory that starts the run, or resumes the unfinished one.
      being_written: A function from the output directory to the checkpoints that are being written.
      shrunk: The text that the run prints when its network has shrunk.
      progress: A function from the output directory of a killed run to its progress in words.
    """

    flags: tuple[str, ...]
    train: Callable[[Path], None]
    being_written: Callable[[Path], list[Path]]
    shrunk: str
    progress: Callable[[Path], str]


@dataclasses.dataclass(frozen=True)
class Process:
    """A run in a process of its own.

    Attributes:
      popen: The process.
      run: The run.
      out: The output directory of the run.
      log_start: The length of the log at the start of the process, in bytes.
      start: The time of the start, in seconds of ``time.monotonic``.
    """

    popen: subprocess.Popen[bytes]
    run: KilledRun
    out: Path
    log_start: int
    start: float

    def log(self) -> bytes:
        """The output of this process so far."""
        return self.out.with_suffix(f".{_LOG}").read_bytes()[self.log_start :]


def start(run: KilledRun, out: Path, cache: Path) -> Process:
    """Starts or resumes a run.

    Args:
      run: The run.
      out: Its output directory.
      cache: The directory of compiled programs.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "experiments.crash_test", "--train", str(out), *run.flags]
    with out.with_suffix(f".{_LOG}").open("ab") as log:
        log_start = log.tell()
        popen = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=Path(__file__).parents[2])
    return Process(popen, run, out, log_start, time.monotonic())


def wait(process: Process, until: Callable[[], bool]) -> bool:
    """Waits for a condition or the end of the process.

    Args:
      process: The process.
      until: The condition, which is tested again and again.

    Returns:
      True once the condition holds, False if the process ended before.

    Raises:
      UserError: The process failed, or took too long.
    """
    while process.popen.poll() is None:
        if until():
            return True
        if time.monotonic() - process.start > _LIMIT_SECONDS:
            process.popen.kill()
            raise UserError(f"A run did not end within {_LIMIT_SECONDS} s; see {process.out}.")
        time.sleep(0.002)
    if process.popen.returncode:
        raise _failure(process)
    return False


def moments(process: Process, generator: random.Random, seconds: float) -> dict[str, Callable[[], bool]]:
    """The moments to kill at, by name: conditions for ``wait``.

    Args:
      process: The process to kill.
      generator: The source of random numbers.
      seconds: The latest moment of a random kill, counted from the start of the process.
    """
    random_moment = generator.uniform(0.1, seconds)
    number, delay = generator.randint(1, 2), generator.uniform(0, 0.2)
    writes: dict[str, float] = {}
    shrunk: list[float] = []

    def is_being_written() -> bool:
        for path in process.run.being_written(process.out):
            writes.setdefault(path.name, time.monotonic())
        return len(writes) == number and time.monotonic() > max(writes.values()) + delay

    def has_shrunk() -> bool:
        if not shrunk and process.run.shrunk.encode() in process.log():
            shrunk.append(time.monotonic())
        return bool(shrunk) and time.monotonic() > shrunk[0] + delay

    return {
        "random": lambda: time.monotonic() > process.start + random_moment,
        "checkpoint": is_being_written,
        "shrink": has_shrunk,
    }


def progress(out: Path) -> str:
    """The progress of a killed run according to its files."""
    metrics = out / logs.METRICS
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    epoch = json.loads(lines[-1])["epoch"] if lines and lines[-1].endswith("}") else 0
    text = f"last reported epoch {epoch}"
    if (newest := checkpoints.describe_newest(out)) is not None:
        text += f", {newest}"
    trained, pruned, reduced = (any(out.glob(params_file(stage, "*"))) for stage in STAGES)
    if checkpoints.being_written(out):
        text += ", while a checkpoint was written"
    elif trained or pruned or reduced:
        text += ", after training" if pruned else ", between training and fine-tuning or later"
    return text


def _run_of_experiment(short: bool) -> KilledRun:
    size = SHORT if short else WHOLE
    flags = ("--short",) if short else ()
    return KilledRun(flags, lambda out: train(out, size), checkpoints.being_written, SHRUNK, progress)


def _run_of_fit(short: bool) -> KilledRun:
    flags = ("--fit", "--short") if short else ("--fit",)
    examples = 500 if short else 1400
    return KilledRun(
        flags, lambda out: fit_run.train(out, examples), fit_run.being_written, fit_run.SHRUNK, fit_run.progress
    )


def differences(out: Path, expected: Path) -> list[str]:
    """The names of the files that differ between two finished runs. The speed and the memory in the metrics may differ."""
    names = {path.name for directory in (out, expected) for path in directory.iterdir()}
    return sorted(
        name
        for name in names
        if not ((out / name).is_file() and (expected / name).is_file())
        or _content(out / name) != _content(expected / name)
    )


def _content(path: Path) -> Any:
    if path.name != logs.METRICS:
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in logs.MACHINE_ENTRIES} for line in lines]


def crash_test(kills: int, seed: int, run: KilledRun, directory: Path) -> bool:
    """Kills and resumes runs, and prints a line for each kill and each finished run.

    Args:
      kills: The number of kills.
      seed: The seed of the moments and the signals.
      run: The run.
      directory: An empty directory for the files of the runs.

    Returns:
      True if the files of every finished run are those of the undisturbed run.
    """
    generator = random.Random(seed)
    cache, expected = directory / "cache", directory / "undisturbed"
    begun = time.monotonic()
    wait(start(run, expected, cache), lambda: False)
    print(f"undisturbed run: {time.monotonic() - begun:.1f} s, with compilation", flush=True)
    # The latest moment of a random kill.
    seconds = (time.monotonic() - begun) / 2
    number = killed = finished = attempts = 0
    same = True
    while killed < kills or finished < number:
        if finished == number:
            number += 1
        out = directory / f"run{number}"
        process = start(run, out, cache)
        if killed < kills:
            moment = ("checkpoint", "shrink", "random")[attempts % 3]
            attempts += 1
            chosen = signal.SIGTERM if generator.random() < 0.25 else signal.SIGKILL
            if wait(process, moments(process, generator, seconds)[moment]):
                killed += 1
                status, after = _kill(process, chosen)
                print(
                    f"kill {killed}: {chosen.name} after {after:.1f} s ({moment}), status {status}; run {number}: {run.progress(out)}",
                    flush=True,
                )
                continue
        elif wait(process, lambda: False):
            continue
        finished += 1
        differing = differences(out, expected)
        same = same and not differing
        outcome = f"differs in {', '.join(differing)}" if differing else "all files are the same"
        print(f"run {number} finished: {outcome}", flush=True)
        # Once the programs are in the cache, a run takes less time, and later kills come within it.
        seconds = min(seconds, time.monotonic() - process.start)
    print("PASS" if same else "FAIL", flush=True)
    return same


def _kill(process: Process, chosen: signal.Signals) -> tuple[int, float]:
    """Sends a signal and waits for the end of the process.

    Returns:
      The exit status, and the seconds from the start of the process to its end.

    Raises:
      UserError: The process ended with a status that is not the signal's.
    """
    process.popen.send_signal(chosen)
    status = process.popen.wait()
    seconds = time.monotonic() - process.start
    if status not in (-chosen, 128 + chosen):
        raise _failure(process)
    return status, seconds


def _failure(process: Process) -> UserError:
    return UserError(f"A run failed:\n{process.log().decode(errors='replace')[-2000:]}")


@reporting_errors()
def main(arguments: list[str] | None = None) -> int:
    """Runs the test and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.crash_test", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and signals (default: 0)")
    parser.add_argument("--short", action="store_true", help="use a run of fewer epochs and seeds")
    parser.add_argument("--train", metavar="DIR", help="train as the run that is killed, with its files in DIR")
    parser.add_argument("--fit", action="store_true", help="kill a call of bcdl_jax.train.fit")
    args = parser.parse_args(arguments)
    if args.kills < 1:
        raise UserError(f"--kills is {args.kills}; it must be at least 1.")
    run = _run_of_fit(args.short) if args.fit else _run_of_experiment(args.short)
    if args.train is not None:
        run.train(Path(args.train))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        return 0 if crash_test(args.kills, args.seed, run, Path(directory)) else 1
