"""Time and memory of ``bcdl_jax.shrink`` at real sizes: ``python -m experiments.benchmark_shrinking``.

The models have random weights. A third of their hidden units, channels and heads is zero. Each runs in a process of its own, twice: the
second run shows the time without the compilation of small helpers, which JAX keeps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

import bcdl_jax
from experiments.benchmarks.large_models import LARGE_MODELS
from experiments.runtime.command import reporting_errors
from experiments.runtime.machine import machine

_STATUS = Path("/proc/self/statm")


def measure(name: str, tiny: bool) -> str:
    """Shrinks one model and runs the small one. Returns the measurements as text."""
    case = LARGE_MODELS[name]
    apply, variables, inputs = case.make(tiny)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(variables)))
    before = _memory()
    (small_apply, small, report), seconds, peak = _timed(lambda: bcdl_jax.shrink(apply, variables, inputs))
    shrunk = f"shrink {seconds:.1f} s, peak memory {_megabytes(peak - before)} above the process = {(peak - before) / size:.2f} times the params"
    _, again, _ = _timed(lambda: bcdl_jax.shrink(apply, variables, inputs))
    _, forward, end = _timed(lambda: jax.block_until_ready(jax.jit(small_apply)(small, inputs)))
    (old, new), (work, less) = report.bytes, report.multiply_adds
    return (
        f"{case.title}: params {_megabytes(size)}\n"
        f"  {shrunk}; again {again:.1f} s\n"
        f"  first forward pass of the small network {forward:.1f} s; whole process at most {_megabytes(max(peak, end))}\n"
        f"  bytes {old / new:.2f}x, multiply-adds {work / less:.2f}x, largest difference {report.difference:.2g}"
    )


def _timed(function: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result of a function, its time in seconds, and the peak memory of the process while it runs."""
    peak, done = [_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        result = function()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return result, seconds, max(peak[0], _memory())


def _memory() -> int:
    """The memory of this process in bytes; 0 on a system without /proc/self/statm."""
    if not _STATUS.exists():
        return 0
    import resource

    return int(_STATUS.read_text().split()[1]) * resource.getpagesize()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


@reporting_errors()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark_shrinking", description=__doc__)
    names = list(LARGE_MODELS)
    parser.add_argument(
        "--models", nargs="+", choices=names, default=names[:-1], help="models (default: all but decoder)"
    )
    parser.add_argument("--tiny", action="store_true", help="use tiny models, to try the command")
    options = parser.parse_args(arguments)
    if len(options.models) == 1:
        print(measure(options.models[0], options.tiny), flush=True)
        return 0
    print(f"{machine()}, jax {jax.__version__}", flush=True)
    status = 0
    for name in options.models:
        command = [sys.executable, "-m", "experiments.benchmark_shrinking", "--models", name]
        status = max(status, subprocess.run(command + ["--tiny"] * options.tiny, check=False).returncode)
    return status
