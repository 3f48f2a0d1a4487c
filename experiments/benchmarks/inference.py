"""Speed of dense, masked and shrunk networks: ``python -m experiments.benchmark_inference``.

The networks keep the numbers of units of the paper's results, at random places, and have random weights, on which the speed does not
depend. Masked networks multiply their weights by masks. Each side runs in XLA, on a CPU also in XLA after ``bcdl_jax.for_cpu``, and in
onnxruntime if it is installed; its fastest engine counts. All run in turn, in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.benchmarks import speed_bars
from experiments.benchmarks.contestants import CASES, SIDES, Contestant, contestants_of, has_onnx
from experiments.io.files import check_out, prepare_out, write_json
from experiments.runtime import backend
from experiments.runtime.command import command_line, reporting_errors
from experiments.runtime.errors import UserError
from experiments.runtime.machine import machine

RESULT, PICTURE = "result.json", "speed.png"


def benchmark(nets: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Times every network, batch size, side and engine, and prints the times.

    Args:
      nets: The names of the networks, from ``CASES``.
      rounds: The number of timings of each contestant, in turn.
      seconds: The least duration of a timing, in which the batch is repeated.

    Returns:
      The results of each network and batch size, for the result file.

    Raises:
      UserError: A network is unknown, or a number is out of its range.
    """
    for name in nets:
        if name not in CASES:
            raise UserError(f"--nets names {name}; allowed are {', '.join(CASES)}.")
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; it must be at least 1.")
    if not 0 < seconds < 3600:
        raise UserError(f"--seconds is {seconds}; it must be more than 0 and less than 3600.")
    print(f"{machine()}, jax {jax.__version__}, {rounds} rounds in turn: median (lowest to highest)")
    if backend.on_cpu() and not has_onnx():
        print("onnxruntime or onnx is not installed (pip install -e '.[onnx]'): only XLA is timed.")
    return [_compare(name, batch, rounds, seconds) for name in nets for batch in CASES[name].batches]


def _compare(name: str, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    case = CASES[name]
    print(f"{case.title}, batch {batch}", flush=True)
    contestants, (before, after) = contestants_of(case, batch)
    times = _times([contestant.run for contestant in contestants], rounds, seconds)
    for contestant, each in zip(contestants, times, strict=True):
        _print_times(contestant, each)
    medians = [statistics.median(each) for each in times]
    best = {
        side: min((i for i, each in enumerate(contestants) if each.side == side), key=medians.__getitem__)
        for side in SIDES
    }
    speed_up = {
        side: statistics.median(
            [dense / mine for dense, mine in zip(times[best["dense"]], times[best[side]], strict=True)]
        )
        for side in SIDES[1:]
    }
    print(
        f"  fastest against fastest: masked {speed_up['masked']:.2f}x, shrunk {speed_up['shrunk']:.2f}x as fast as dense; "
        f"{before / after:.2f}x fewer multiply-adds",
        flush=True,
    )
    return {
        "net": name,
        "title": case.title,
        "batch": batch,
        "multiply_adds": [before, after],
        "fastest": {side: contestants[index].engine for side, index in best.items()},
        "speed_up": speed_up,
        "times": [
            {"side": contestant.side, "engine": contestant.engine, "seconds": each, "bytes": contestant.bytes}
            for contestant, each in zip(contestants, times, strict=True)
        ],
    }


def _print_times(contestant: Contestant, times: Sequence[float]) -> None:
    memory = "" if contestant.bytes is None else f"{contestant.bytes / 2**20:10.1f} MiB"
    spread = f"({1e3 * min(times):.3f} to {1e3 * max(times):.3f})"
    median = 1e3 * statistics.median(times)
    print(f"  {contestant.side:<7} {contestant.engine:<13} {median:10.3f} ms {spread:<24}{memory}", flush=True)


def _times(runs: Sequence[Callable[[], Any]], rounds: int, seconds: float) -> list[list[float]]:
    """The seconds per call of each function, one value per round."""
    repeats = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        repeats.append(max(1, round(seconds / max(time.perf_counter() - start, 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, repeat, mine in zip(runs, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            mine.append((time.perf_counter() - start) / repeat)
    return times


@reporting_errors()
def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark_inference", description=__doc__)
    parser.add_argument(
        "--nets",
        nargs="+",
        default=list(CASES),
        metavar="NET",
        help=f"one or more of {', '.join(CASES)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each network, in turn (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="least duration of a timing in seconds (default: 0.5)"
    )
    parser.add_argument(
        "--out",
        default="runs/benchmark_inference",
        help="directory for result.json and speed.png (default: runs/benchmark_inference)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run's files")
    args = parser.parse_args(arguments)
    check_out(args.out, args.overwrite)
    results = benchmark(args.nets, args.rounds, args.seconds)
    out = prepare_out(args.out, args.overwrite, [RESULT, PICTURE])
    about = {"command": command_line("benchmark_inference", arguments), "machine": machine(), "jax": jax.__version__}
    write_json(out / RESULT, about | {"results": results})
    speed_bars.draw(out / PICTURE, results)
    print(f"{out / RESULT} and {out / PICTURE} written.")
    return 0
