"""The measurements of the training benchmark: the speed of a step, of several seeds in one program, and the peak memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import bcdl_jax
from experiments.benchmarks.floor import Products, floor_seconds, products_of
from experiments.benchmarks.training_sides import Settings, fresh_state, jax_epoch, our_side, torch_side
from experiments.runtime import backend, machine
from experiments.runtime.errors import first_line

OURS, EAGER, COMPILED = "bcdl_jax", "torch eager", "torch.compile"
_MEMORY_STEPS = 10


@dataclasses.dataclass(frozen=True)
class _Floor:
    """The time of the matrix products of one step.

    Attributes:
      layers: The products of each layer.
      seconds: The time of each layer's products by library.
    """

    layers: list[Products]
    seconds: list[dict[str, float]]

    @property
    def total(self) -> float:
        """The time of all layers, each with its fastest library, in seconds."""
        return sum(min(seconds.values()) for seconds in self.seconds)

    @property
    def gigaflop(self) -> float:
        """The operations of all products, in 10^9."""
        return sum(layer.operations for layer in self.layers) / 1e9


def speed(settings: Settings, rounds: int, device: str) -> dict[str, Any]:
    """Measures the time of a step of each side, round by round, and the floor, and prints them.

    Args:
      settings: The settings of the training.
      rounds: The number of epochs of each side.
      device: The kind of device, "cpu" or "gpu".

    Returns:
      The measurement as entries of the result file.
    """
    floor = _measure_floor(settings, device)
    sides = {OURS: _warm_side(settings)} | _torch_sides(settings, device)
    times, losses = _train_in_turn(settings, sides, rounds)
    for name, values in times.items():
        rates = [settings.batch_size / value for value in values]
        print(
            f"  median {name}: {statistics.median(rates):.0f} images/s ({min(rates):.0f} to {max(rates):.0f}), "
            f"{1e3 * statistics.median(values):.2f} ms per step, {100 * floor.total / statistics.median(values):.0f} % of the floor's speed",
            flush=True,
        )
    ratios = {name: [theirs / mine for mine, theirs in zip(times[OURS], times[name])] for name in sides if name != OURS}
    for name, values in ratios.items():
        print(f"  median ratio {OURS} / {name}: {_spread(values)}", flush=True)
    return settings.description() | {
        "measure": "speed",
        "gigaflop": floor.gigaflop,
        "floor_seconds": floor.total,
        "layers": [
            dataclasses.asdict(layer) | {"seconds": seconds}
            for layer, seconds in zip(floor.layers, floor.seconds, strict=True)
        ],
        "seconds_per_step": times,
        "loss": losses,
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "fraction_of_floor_speed": floor.total / statistics.median(times[OURS]),
    }


def _measure_floor(settings: Settings, device: str) -> _Floor:
    images = jax.ShapeDtypeStruct((settings.batch_size, *settings.images.shape[1:]), np.uint8)
    layers = products_of(settings.model, images)
    floor = _Floor(layers, floor_seconds(layers, settings.dtype, device))
    print(
        f"{settings.title}, {settings.dtype}, batch {settings.batch_size}, {settings.steps} steps per epoch: "
        f"{floor.gigaflop:.2f} GFLOP of matrix products per step\n"
        f"  floor {1e3 * floor.total:.2f} ms, with the fastest library of each layer: "
        + ", ".join(min(seconds, key=seconds.__getitem__) for seconds in floor.seconds)
        + "; with one library: "
        + ", ".join(f"{name} {1e3 * sum(each[name] for each in floor.seconds):.2f} ms" for name in floor.seconds[0]),
        flush=True,
    )
    return floor


def _warm_side(settings: Settings) -> Callable[[], float]:
    """The side of this project after its first epoch."""
    run, seconds = our_side(settings)
    start = time.perf_counter()
    run()
    print(f"  {OURS}: compiled in {seconds:.1f} s, first epoch {time.perf_counter() - start:.1f} s", flush=True)
    return run


def _torch_sides(settings: Settings, device: str) -> dict[str, Callable[[], float]]:
    """The sides of PyTorch that work on this machine, each after its first epoch."""
    try:
        import torch
    except ImportError:
        print("  torch: not installed, so there is no comparison; pip install torch", flush=True)
        return {}
    if device == "gpu" and not torch.cuda.is_available():
        print(f"  torch: {torch.__version__} has no CUDA, so there is no comparison", flush=True)
        return {}
    sides = {}
    for name in (EAGER, COMPILED):
        start = time.perf_counter()
        try:
            run = torch_side(settings, device, name == COMPILED)
            run()
        except Exception as error:
            if name == EAGER:
                raise
            print(f"  {name}: does not work here ({first_line(error, 150)})", flush=True)
            continue
        sides[name] = run
        where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
        print(f"  {name}: {torch.__version__}, {where}, first epoch {time.perf_counter() - start:.1f} s", flush=True)
    return sides


def _train_in_turn(
    settings: Settings, sides: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds per step and the mean losses of each side, one of each per round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            losses[name].append(run())
            times[name].append((time.perf_counter() - start) / settings.steps)
        line = ", ".join(
            f"{name} {settings.batch_size / times[name][-1]:.0f} images/s (loss {losses[name][-1]:.3f})"
            for name in sides
        )
        print(f"  round {number}: {line}", flush=True)
    return times, losses


def ensemble(settings: Settings, rounds: int, seeds: int) -> dict[str, Any]:
    """Measures the time of several seeds in one program against the same runs in a row, and prints it.

    Args:
      settings: The settings of the training.
      rounds: The number of epochs of each side.
      seeds: The number of seeds.

    Returns:
      The measurement as entries of the result file.
    """
    states = [fresh_state(settings, seed) for seed in range(seeds)]
    stacked = bcdl_jax.train.stack_seeds(states)
    together, alone = jax_epoch(settings, stacked), jax_epoch(settings, states[0])

    def at_once() -> None:
        nonlocal stacked
        stacked, _ = jax.block_until_ready(together(stacked))

    def in_a_row() -> None:
        for index, state in enumerate(states):
            states[index], _ = jax.block_until_ready(alone(state))

    sides: dict[str, Callable[[], None]] = {"at once": at_once, "in a row": in_a_row}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if number:  # The first round warms the programs up.
                times[name].append((time.perf_counter() - start) / settings.steps)
    factors = [row / once for once, row in zip(times["at once"], times["in a row"])]
    print(
        f"{seeds} seeds of {settings.title}, {settings.dtype}, batch {settings.batch_size}: at once "
        f"{1e3 * statistics.median(times['at once']):.2f} ms per step of all seeds, in a row "
        f"{1e3 * statistics.median(times['in a row']):.2f} ms; at once is {_spread(factors)} as fast",
        flush=True,
    )
    return settings.description() | {
        "measure": "ensemble",
        "seeds": seeds,
        "seconds_per_step": times,
        "factor": statistics.median(factors),
    }


def memory(settings: Settings) -> dict[str, Any]:
    """Measures the peak memory of a new process that trains some steps, and prints it.

    Returns:
      The measurement as entries of the result file.
    """
    fewer = settings.batch_size * min(settings.steps, _MEMORY_STEPS)
    settings = dataclasses.replace(settings, images=settings.images[:fewer], labels=settings.labels[:fewer])
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        peaks = process.submit(_trained_peaks, settings, backend.on_cpu()).result()
    print(
        f"Peak memory of a process that trains {settings.title}, {settings.dtype}, batch {settings.batch_size}: "
        + ", ".join(f"{where} {size / 1e9:.2f} GB" for where, size in peaks.items()),
        flush=True,
    )
    return settings.description() | {"measure": "memory", "peak_bytes": peaks}


def _trained_peaks(settings: Settings, on_cpu: bool) -> dict[str, int]:
    """The peak memory of this process and of its device after training one epoch, in bytes."""
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
    else:  # Preallocated memory would count as used.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    run, _ = our_side(settings)
    run()
    peaks = {"host": machine.peak_process_bytes()}
    used = machine.peak_device_bytes()
    return peaks if used is None else peaks | {"device": used}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}x ({min(values):.2f} to {max(values):.2f})"
