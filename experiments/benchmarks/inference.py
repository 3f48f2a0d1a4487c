"""Speed of dense, masked and shrunk networks: ``python -m experiments.benchmark_inference``.

The networks have the kept units of the paper's results, at random places, and random weights: speed does not depend on
them. Masked networks multiply by their masks, as the tutorial does. Each side runs in XLA, in XLA in the form that suits a CPU
(``bcdl_jax.for_cpu``) and, where it is installed, in onnxruntime; its fastest way counts. All run in turn, in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bcdl_jax
from experiments.io.files import check_out, prepare_out, write_json
from experiments.networks.models import VGG, LeNet5, LeNet300
from experiments.pipeline.bayesian import machine
from experiments.report.figures import speed_bars
from experiments.runtime.errors import UserError

RESULT, PICTURE = "result.json", "speed.png"
SIDES = ("dense", "masked", "shrunk")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and how much of it is kept.

    Attributes:
      title: with the source of the kept sizes [L17 table 1].
      model: plain Flax.
      image: shape of one image.
      outputs: kept output channels of the convolutions, in order.
      inputs: kept inputs of the dense layers, in order.
      batches: batch sizes to time.
    """

    title: str
    model: nn.Module
    image: tuple[int, int, int]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    batches: tuple[int, ...]


CASES = {
    "lenet300": Case("LeNet-300-100, GNJ", LeNet300(family=None), (28, 28, 1), (), (278, 98, 13), (1, 256, 8192)),
    "lenet5": Case("LeNet-5-Caffe, GHS", LeNet5(family=None), (28, 28, 1), (5, 10), (76, 16), (1, 256, 8192)),
    "vgg": Case(
        "VGG, GHS",
        VGG(family=None),
        (32, 32, 3),
        (51, 62, 125, 128, 228, 129, 38, 13, 9, 6, 5, 6, 6),
        (6, 20),
        (1, 256),
    ),
}


def masks_of(case: Case, variables: dict[str, Any], seed: int) -> dict[str, Any]:
    """A tree like the variables, 1 where something is kept and 0 elsewhere."""
    rng = np.random.default_rng(seed)
    params = variables["params"]
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)

    def chosen(size: int, count: int, allowed: np.ndarray | None = None) -> np.ndarray:
        places = np.arange(size) if allowed is None else np.flatnonzero(allowed)
        flags = np.zeros(size, bool)
        flags[rng.choice(places, count, replace=False)] = True
        return flags

    last = None
    for number, count in enumerate(case.outputs):
        name = f"Conv_{number}"
        last = chosen(params[name]["kernel"].shape[-1], count)
        masks["params"][name]["kernel"] *= last
        masks["params"][name]["bias"] *= last
        norm = masks["params"].get(f"BatchNorm_{number}")
        if norm is not None:
            norm["scale"] *= last
            norm["bias"] *= last
    for number, count in enumerate(case.inputs):
        kernel = masks["params"][f"Dense_{number}"]["kernel"]
        allowed = None if last is None else np.tile(last, kernel.shape[0] // last.size)
        inputs = chosen(kernel.shape[0], count, allowed)
        kernel *= inputs[:, None]
        if number:  # the layer before makes them
            before = masks["params"][f"Dense_{number - 1}"]
            before["kernel"] *= inputs
            before["bias"] *= inputs
        last = None
    return masks


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A network in one of the ways to run it.

    Attributes:
      side: "dense", "masked" or "shrunk".
      engine: "XLA", "XLA, for_cpu" or "onnxruntime".
      run: one batch.
      bytes: what it needs while it runs (arguments, results and what lies between); None where nobody tells.
    """

    side: str
    engine: str
    run: Callable[[], Any]
    bytes: int | None


def contestants_of(case: Case, batch: int, seed: int = 0) -> tuple[list[Contestant], tuple[int, int]]:
    """The three sides of a network at one batch size, compiled in every way, and multiply-adds before and after."""
    images = jax.random.randint(jax.random.key(seed), (batch, *case.image), 0, 256).astype(jnp.uint8)
    variables = jax.jit(case.model.init)(jax.random.key(seed + 1), images[:1])
    masks = jax.tree.map(jnp.asarray, masks_of(case, variables, seed))
    small_apply, small, report = bcdl_jax.shrink(
        case.model.apply, jax.tree.map(jnp.multiply, variables, masks), images[:2]
    )

    def masked(arguments: Any, images: jax.Array) -> Any:
        return case.model.apply(jax.tree.map(jnp.multiply, *arguments), images)

    sides: dict[str, tuple[Callable[..., Any], Any]] = {
        "dense": (case.model.apply, variables),
        "masked": (masked, (variables, masks)),
        "shrunk": (small_apply, small),
    }
    on_cpu = jax.default_backend() == "cpu"
    contestants = []
    for side, (apply, params) in sides.items():
        engines = {"XLA": apply} | ({"XLA, for_cpu": bcdl_jax.for_cpu(apply)} if on_cpu else {})
        for engine, function in engines.items():
            compiled = jax.jit(function).lower(params, images).compile()
            memory: Any = compiled.memory_analysis()
            size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            contestants.append(Contestant(side, engine, functools.partial(_run, compiled, params, images), size))
        if on_cpu and (run := _onnxruntime(apply, params, images)) is not None:
            contestants.append(Contestant(side, "onnxruntime", run, None))
    return contestants, report.multiply_adds


def _run(function: Callable[..., Any], params: Any, images: jax.Array) -> None:
    jax.block_until_ready(function(params, images))


def _onnxruntime(apply: Callable[..., Any], params: Any, images: jax.Array) -> Callable[[], Any] | None:
    """Runs the network in onnxruntime; None where that or jax2onnx is not installed. Masks are multiplied into the weights there."""
    if not _has_onnx():
        return None
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "net.onnx"
        bcdl_jax.export_onnx(path, apply, params, images[:2])
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.asarray(images)}
    return lambda: session.run(None, feed)


def _has_onnx() -> bool:
    return all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime")))


def benchmark(nets: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Prints and returns the times of every network, batch size, side and engine.

    Args:
      nets: names of ``CASES``.
      rounds: how often each is timed, in turn.
      seconds: how long each timing lasts at least, by repetition.

    Raises:
      UserError: an unknown network, or a number that is not positive.
    """
    for name in nets:
        if name not in CASES:
            raise UserError(f"--nets names {name}; allowed are {', '.join(CASES)}.")
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; it must be at least 1.")
    if not 0 < seconds < 3600:
        raise UserError(f"--seconds is {seconds}; it must be more than 0 and less than 3600.")
    print(f"{machine()}, jax {jax.__version__}, {rounds} rounds in turn: median (lowest to highest)")
    if jax.default_backend() == "cpu" and not _has_onnx():
        print("onnxruntime or jax2onnx is not installed (pip install -e '.[onnx]'): XLA alone.")
    return [_compare(name, batch, rounds, seconds) for name in nets for batch in CASES[name].batches]


def _compare(name: str, batch: int, rounds: int, seconds: float) -> dict[str, Any]:
    case = CASES[name]
    print(f"{case.title}, batch {batch}", flush=True)
    contestants, (before, after) = contestants_of(case, batch)
    times = _times([contestant.run for contestant in contestants], rounds, seconds)
    medians = [statistics.median(each) for each in times]
    best = {
        side: min((i for i, each in enumerate(contestants) if each.side == side), key=medians.__getitem__)
        for side in SIDES
    }
    entries = []
    for contestant, each, median in zip(contestants, times, medians, strict=True):
        memory = "" if contestant.bytes is None else f"{contestant.bytes / 2**20:10.1f} MiB"
        spread = f"({1e3 * min(each):.3f} to {1e3 * max(each):.3f})"
        print(
            f"  {contestant.side:<7} {contestant.engine:<13} {1e3 * median:10.3f} ms {spread:<24}{memory}", flush=True
        )
        entries.append(
            {
                "side": contestant.side,
                "engine": contestant.engine,
                "seconds": each,
                "bytes": contestant.bytes,
            }
        )
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
        "times": entries,
    }


def _times(runs: Sequence[Callable[[], Any]], rounds: int, seconds: float) -> list[list[float]]:
    """Seconds per call, for each of the functions and each round."""
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


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark_inference", description=__doc__)
    parser.add_argument(
        "--nets", nargs="+", default=list(CASES), metavar="NET", help=f"of {', '.join(CASES)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, in turn (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a timing (default: 0.5)")
    parser.add_argument(
        "--out",
        default="runs/benchmark_inference",
        help="directory for result.json and speed.png (default: runs/benchmark_inference)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run's files")
    args = parser.parse_args(arguments)
    try:
        check_out(args.out, args.overwrite)
        results = benchmark(args.nets, args.rounds, args.seconds)
        out = prepare_out(args.out, args.overwrite, [RESULT, PICTURE])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(
        ["python", "-m", "experiments.benchmark_inference", *(sys.argv[1:] if arguments is None else arguments)]
    )
    write_json(out / RESULT, {"command": command, "machine": machine(), "jax": jax.__version__, "results": results})
    speed_bars(out / PICTURE, results)
    print(f"{out / RESULT} and {out / PICTURE} written.")
    return 0
