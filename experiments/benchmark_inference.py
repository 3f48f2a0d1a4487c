"""Speed of dense, masked and shrunk networks: ``python -m experiments.benchmark_inference``.

The networks have the kept units of the paper's results, at random places, and random weights: speed does not depend on
them. Masked networks multiply by their masks, as the tutorial does. All sides run in turn, in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bcdl_jax
from experiments.errors import UserError
from experiments.models import VGG, LeNet5

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


class _PlainLeNet300(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = images.reshape(images.shape[0], -1).astype(jnp.float32) / 127.5 - 1
        for width in (300, 100):
            hidden = nn.relu(nn.Dense(width)(hidden))
        return nn.Dense(10)(hidden)


CASES = {
    "lenet300": Case("LeNet-300-100, GNJ", _PlainLeNet300(), (28, 28, 1), (), (278, 98, 13), (1, 256, 8192)),
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
class Side:
    """A compiled network, and the bytes it needs while it runs (arguments, results and what lies between)."""

    run: Callable[[], Any]
    bytes: int


def sides_of(case: Case, batch: int, seed: int = 0) -> tuple[dict[str, Side], bcdl_jax.ShrinkReport]:
    """The three sides of a network at one batch size, compiled."""
    images = jax.random.randint(jax.random.key(seed), (batch, *case.image), 0, 256).astype(jnp.uint8)
    variables = jax.jit(case.model.init)(jax.random.key(seed + 1), images[:1])
    masks = masks_of(case, variables, seed)
    pruned = jax.tree.map(jnp.multiply, variables, masks)
    small_apply, small, report = bcdl_jax.shrink(case.model.apply, pruned, images[:2])

    def masked(arguments: Any, images: jax.Array) -> Any:
        return case.model.apply(jax.tree.map(jnp.multiply, *arguments), images)

    functions: dict[str, tuple[Callable[..., Any], Any]] = {
        "dense": (case.model.apply, variables),
        "masked": (masked, (variables, jax.tree.map(jnp.asarray, masks))),
        "shrunk": (small_apply, small),
    }
    sides = {}
    for name, (function, params) in functions.items():
        compiled = jax.jit(function).lower(params, images).compile()
        memory: Any = compiled.memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        sides[name] = Side(functools.partial(_run, compiled, params, images), size)
    return sides, report


def _run(function: Callable[..., Any], params: Any, images: jax.Array) -> None:
    jax.block_until_ready(function(params, images))


def benchmark(nets: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Prints and returns medians per network, batch size and side.

    Args:
      nets: names of ``CASES``.
      rounds: how often each side is timed, in turn.
      seconds: how long each timing lasts at least, by repetition.

    Raises:
      UserError: an unknown network, or a number that is not positive.
    """
    for name in nets:
        if name not in CASES:
            raise UserError(f"--nets names {name}; allowed are {', '.join(CASES)}.")
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}; it must be at least 1.")
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, {rounds} rounds in turn"
    )
    results = []
    for name in nets:
        case = CASES[name]
        for batch in case.batches:
            sides, report = sides_of(case, batch)
            before, after = report.multiply_adds
            print(f"{case.title}, batch {batch}: multiply-adds / {before / after:.2f}", flush=True)
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            repeats = {}
            for side in SIDES:
                sides[side].run()
                start = time.perf_counter()
                sides[side].run()
                repeats[side] = max(1, round(seconds / max(time.perf_counter() - start, 1e-9)))
            for _ in range(rounds):
                for side in SIDES:
                    start = time.perf_counter()
                    for _ in range(repeats[side]):
                        sides[side].run()
                    times[side].append((time.perf_counter() - start) / repeats[side])
            for side in SIDES:
                median = statistics.median(times[side])
                ratio = statistics.median(
                    [dense / mine for dense, mine in zip(times["dense"], times[side], strict=True)]
                )
                low, high = min(times[side]), max(times[side])
                print(
                    f"  {side:<7} {1e3 * median:10.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})  {ratio:6.2f}x dense  "
                    f"{sides[side].bytes / 2**20:8.1f} MiB",
                    flush=True,
                )
                results.append(
                    {
                        "net": name,
                        "batch": batch,
                        "side": side,
                        "seconds": median,
                        "speed_up": ratio,
                        "bytes": sides[side].bytes,
                    }
                )
    return results


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark_inference", description=__doc__)
    parser.add_argument(
        "--nets", nargs="+", default=list(CASES), metavar="NET", help=f"of {', '.join(CASES)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each side, in turn (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a timing (default: 0.5)")
    args = parser.parse_args(arguments)
    try:
        benchmark(args.nets, args.rounds, args.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
