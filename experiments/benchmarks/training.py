"""Speed of training beside PyTorch and beside the bare matrix products: ``python -m experiments.benchmark_training``.

All sides train the same variational network (local reparametrisation, KL of all layers in every step, Adam, variance
clipping) from the same start on the same images in memory, whole epochs, in turn. Compilation is timed apart. Without
PyTorch (``pip install torch``) only the speed of this project is printed.

What it measures (``--measure``):

* ``speed``: a training step, here, in eager PyTorch and with ``torch.compile``, and the floor, see ``matrix_products``.
* ``ensemble``: several seeds at once against the same runs in a row.
* ``memory``: the peak resident memory of a process that does nothing but train.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import platform
import re
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcdl_jax
from experiments.benchmarks.floor import floor_seconds, products_of
from experiments.io import data
from experiments.io.files import write_json
from experiments.networks.models import VGG, VGG_WIDTHS, LeNet5, LeNet300, vgg_widths
from experiments.pipeline.bayesian import machine, sampled_cross_entropy
from experiments.runtime.errors import UserError

NETWORKS = ("lenet300", "lenet5", "vgg")
MEASUREMENTS = ("speed", "ensemble", "memory")
DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "gpu")
OURS, EAGER, COMPILED = "bcdl_jax", "torch eager", "torch.compile"
_LEARNING_RATE = 1e-3
_SEEDS = {"lenet300": 8, "lenet5": 3, "vgg": 2}
# Images per epoch on a CPU, where an epoch should take about a second; an epoch is long enough on any GPU.
_CPU_EXAMPLES = {"lenet300": 12_800, "lenet5": 5_120, "vgg": 256}
_GPU_EXAMPLES = 25_600
_MEMORY_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and how PyTorch builds its twin.

    Attributes:
      title: for people.
      model: variational Flax module.
      cross_entropy: (model, params, batch, key) -> mean over the batch in nats, with sampled weights.
      torch_options: of ``torch_networks.network``.
    """

    title: str
    model: nn.Module
    cross_entropy: Callable[..., jax.Array]
    torch_options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of one comparison: a network, the images, and how it runs.

    Attributes:
      network: of ``NETWORKS``.
      images: [examples, height, width, channels] of uint8.
      labels: [examples].
      batch_size: images per step.
      dtype: of the computation, of ``DTYPES``.
      width: factor of the widths of VGG.
    """

    network: str
    images: np.ndarray
    labels: np.ndarray
    batch_size: int
    dtype: str
    width: float

    @property
    def steps(self) -> int:
        return len(self.labels) // self.batch_size

    @functools.cached_property
    def case(self) -> Case:
        dtype = None if self.dtype == "float32" else self.dtype
        if self.network == "lenet300":
            return Case("LeNet-300-100", LeNet300(dtype=dtype), sampled_cross_entropy, {})
        if self.network == "lenet5":
            return Case("LeNet-5-Caffe", LeNet5(dtype=dtype), sampled_cross_entropy, {"pool_after": (0, 1)})
        ends = np.cumsum([len(part) for part in VGG_WIDTHS]) - 1
        return Case(
            "VGG" if self.width == 1 else f"VGG, {self.width:g} times as wide",
            VGG(**vgg_widths(self.width), dtype=dtype),
            _batch_norm_cross_entropy,
            {"padding": 1, "pool_after": tuple(ends.tolist()), "batch_norm": True},
        )


def _batch_norm_cross_entropy(
    model: nn.Module, params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array
) -> jax.Array:
    """Like ``sampled_cross_entropy``, with the batch's own statistics. Their averages are dropped: training does not read them."""
    images, labels = batch
    logits: Any
    logits, _ = model.apply(
        {"params": params}, images, deterministic=False, train=True, rngs={"noise": key}, mutable=["batch_stats"]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def fresh_params(settings: Settings, seed: int = 0) -> Any:
    """The start values, the same for all sides."""
    return jax.jit(settings.case.model.init)(jax.random.key(seed), settings.images[:1])["params"]


def _fresh_state(settings: Settings, seed: int = 0) -> bcdl_jax.train.TrainState:
    optimizer = optax.adam(_LEARNING_RATE)
    return bcdl_jax.train.create_train_state(fresh_params(settings, seed), optimizer, jax.random.key(seed))


def _train_step(settings: Settings) -> Callable[..., Any]:
    likelihood = functools.partial(settings.case.cross_entropy, settings.case.model)
    return bcdl_jax.train.make_train_step(likelihood, optax.adam(_LEARNING_RATE), num_examples=len(settings.labels))


def jax_epoch(settings: Settings, state: Any) -> Callable[[Any], tuple[Any, jax.Array]]:
    """Compiles an epoch of this project: ``epoch(state) -> (state, mean loss)``, the state being donated.

    Args:
      settings: of the training.
      state: an example of a state, or of stacked states, which are trained all at once.
    """
    step = _train_step(settings)
    train = (jnp.asarray(settings.images), jnp.asarray(settings.labels))
    epoch: Any = bcdl_jax.train.make_train_epoch(step, batch_size=settings.batch_size)
    if state.step.ndim:
        epoch = bcdl_jax.train.each_seed(epoch)
    compiled = jax.jit(epoch, donate_argnums=0).lower(state, train).compile()

    def run(state: Any) -> tuple[Any, jax.Array]:
        state, metrics = compiled(state, train)
        return state, jnp.mean(metrics["loss"])

    return run


def our_side(settings: Settings) -> tuple[Callable[[], float], float]:
    """Returns a function that trains one epoch here and gives its mean loss, and the seconds that compiling it took."""
    state = _fresh_state(settings)
    start = time.perf_counter()
    epoch = jax_epoch(settings, state)
    seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        state, loss = jax.block_until_ready(epoch(state))
        return float(loss)

    return run, seconds


def torch_side(settings: Settings, device: str, compiled: bool) -> Callable[[], float]:
    """Returns a function that trains one epoch in PyTorch and gives its mean loss.

    Raises:
      ImportError: PyTorch is not installed.
    """
    from experiments.benchmarks import torch_twins as torch_networks

    variational_layers: Mapping[str, Any] = bcdl_jax.variational_layers(jax.device_get(fresh_params(settings)))
    return torch_networks.epoch(
        torch_networks.network(variational_layers, **settings.case.torch_options),
        settings.images,
        settings.labels,
        batch_size=settings.batch_size,
        learning_rate=_LEARNING_RATE,
        device="cuda" if device == "gpu" else "cpu",
        dtype=settings.dtype,
        compiled=compiled,
    )


def speed(settings: Settings, rounds: int, device: str) -> dict[str, Any]:
    """Prints and returns the speed of all sides, round by round, the floor, and the ratios."""
    layers = products_of(
        settings.case.model, jax.ShapeDtypeStruct((settings.batch_size, *settings.images.shape[1:]), np.uint8)
    )
    by_library = floor_seconds(layers, settings.dtype, device)
    floor = sum(min(seconds.values()) for seconds in by_library)
    gigaflop = sum(layer.operations for layer in layers) / 1e9
    print(
        f"{settings.case.title}, {settings.dtype}, batch {settings.batch_size}, {settings.steps} steps an epoch: "
        f"{gigaflop:.2f} GFLOP of matrix products a step\n"
        f"  floor {1e3 * floor:.2f} ms, by the fastest library of each layer: "
        + ", ".join(min(seconds, key=seconds.__getitem__) for seconds in by_library)
        + "; alone "
        + ", ".join(f"{name} {1e3 * sum(seconds[name] for seconds in by_library):.2f} ms" for name in by_library[0]),
        flush=True,
    )
    ours, seconds = our_side(settings)
    start = time.perf_counter()
    ours()
    print(
        f"  {OURS}: compiled in {seconds:.1f} s, first epoch {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    sides = {OURS: ours} | _torch_sides(settings, device)
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
    for name, values in times.items():
        rates = [settings.batch_size / value for value in values]
        print(
            f"  median {name}: {statistics.median(rates):.0f} images/s ({min(rates):.0f} to {max(rates):.0f}), "
            f"{1e3 * statistics.median(values):.2f} ms a step, {100 * floor / statistics.median(values):.0f} % of the floor's speed",
            flush=True,
        )
    ratios = {name: [theirs / mine for mine, theirs in zip(times[OURS], times[name])] for name in sides if name != OURS}
    for name, values in ratios.items():
        print(f"  median ratio {OURS} / {name}: {_spread(values)}", flush=True)
    return _described(settings) | {
        "measure": "speed",
        "gigaflop": gigaflop,
        "floor_seconds": floor,
        "layers": [
            dataclasses.asdict(layer) | {"seconds": seconds} for layer, seconds in zip(layers, by_library, strict=True)
        ],
        "seconds_per_step": times,
        "loss": losses,
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "fraction_of_floor_speed": floor / statistics.median(times[OURS]),
    }


def _torch_sides(settings: Settings, device: str) -> dict[str, Callable[[], float]]:
    """The PyTorch sides that work here, warm."""
    try:
        import torch
    except ImportError:
        print("  torch: not installed, so there is nothing to compare with; pip install torch", flush=True)
        return {}
    if device == "gpu" and not torch.cuda.is_available():
        print(f"  torch: {torch.__version__} has no CUDA, so there is nothing to compare with", flush=True)
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
            print(f"  {name}: does not work here ({_first_line(error)})", flush=True)
            continue
        sides[name] = run
        where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
        print(f"  {name}: {torch.__version__}, {where}, first epoch {time.perf_counter() - start:.1f} s", flush=True)
    return sides


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def ensemble(settings: Settings, rounds: int, seeds: int) -> dict[str, Any]:
    """Prints and returns the time of several seeds at once, against the same runs in a row."""
    states = [_fresh_state(settings, seed) for seed in range(seeds)]
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
            if number:  # the first round does not count
                times[name].append((time.perf_counter() - start) / settings.steps)
    factors = [row / once for once, row in zip(times["at once"], times["in a row"])]
    print(
        f"{seeds} seeds of {settings.case.title}, {settings.dtype}, batch {settings.batch_size}: at once "
        f"{1e3 * statistics.median(times['at once']):.2f} ms a step of all, in a row {1e3 * statistics.median(times['in a row']):.2f} ms; "
        f"at once is {_spread(factors)} as fast",
        flush=True,
    )
    return _described(settings) | {
        "measure": "ensemble",
        "seeds": seeds,
        "seconds_per_step": times,
        "factor": statistics.median(factors),
    }


def memory(settings: Settings) -> dict[str, Any]:
    """Prints and returns the peak memory of a fresh process that trains some steps."""
    fewer = settings.batch_size * min(settings.steps, _MEMORY_STEPS)
    settings = dataclasses.replace(settings, images=settings.images[:fewer], labels=settings.labels[:fewer])
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        peaks = process.submit(_trained_peaks, settings, jax.default_backend()).result()
    print(
        f"Peak memory of a process that trains {settings.case.title}, {settings.dtype}, batch {settings.batch_size}: "
        + ", ".join(f"{where} {size / 1e9:.2f} GB" for where, size in peaks.items()),
        flush=True,
    )
    return _described(settings) | {"measure": "memory", "peak_bytes": peaks}


def _trained_peaks(settings: Settings, backend: str) -> dict[str, int]:
    """Trains, and returns the most bytes of memory that this process has held, and of its device's memory."""
    if backend == "cpu":
        jax.config.update("jax_platforms", "cpu")
    else:  # what is asked for in advance is not what is needed
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    run, _ = our_side(settings)
    run()
    peaks = {"host": _peak_resident_bytes()}
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peaks if used is None else peaks | {"device": used}


def _peak_resident_bytes() -> int:
    """Of this process. On Linux from /proc, since getrusage's number there includes the process that started this one."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _described(settings: Settings) -> dict[str, Any]:
    return {
        "network": settings.network,
        "title": settings.case.title,
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "examples": len(settings.labels),
    }


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


def images_of(network: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """So many of the embedded digits, repeated as needed; VGG's with a margin to 32 x 32 and in three equal channels."""
    digits = data.load(data.EMBEDDED).train
    order = np.random.default_rng(0).permutation(len(digits))  # they are sorted by class
    rows = order[np.arange(examples) % len(digits)]
    images = digits.images[rows]
    if network == "vgg":
        images = np.repeat(np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)]), 3, axis=-1)
    return images, digits.labels[rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def several(name: str, allowed: Sequence[str], default: Sequence[str]) -> None:
        parser.add_argument(
            name,
            nargs="+",
            default=list(default),
            metavar=name.strip("-").upper(),
            help=f"of {', '.join(allowed)} (default: {' '.join(default)})",
        )

    several("--network", NETWORKS, NETWORKS[:2])
    several("--measure", MEASUREMENTS, MEASUREMENTS)
    several("--dtype", DTYPES, DTYPES[:1])
    parser.add_argument("--device", help="cpu or gpu (default: what jax chooses)")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each side, in turn (default: 7)")
    parser.add_argument(
        "--examples",
        type=int,
        help="images per epoch (default: {} on a GPU; on a CPU {})".format(
            _GPU_EXAMPLES, ", ".join(f"{name} {count}" for name, count in _CPU_EXAMPLES.items())
        ),
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument(
        "--width", type=float, default=1.0, help="factor of VGG's widths; 0.25 suits a CPU (default: 1)"
    )
    parser.add_argument("--out", help="file for the results, .json (default: none is written)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    return parser


def _check(args: argparse.Namespace) -> None:
    for option, values, allowed in (
        ("--network", args.network, NETWORKS),
        ("--measure", args.measure, MEASUREMENTS),
        ("--dtype", args.dtype, DTYPES),
        ("--device", [args.device], (*DEVICES, None)),
    ):
        for value in values:
            if value not in allowed:
                raise UserError(f"{option} is {value}; allowed are {', '.join(filter(None, allowed))}.")
    for option, number in (("--rounds", args.rounds), ("--examples", args.examples), ("--batch-size", args.batch_size)):
        if number is not None and number < 1:
            raise UserError(f"{option} is {number}; it must be at least 1.")
    if not 0 < args.width <= 4:
        raise UserError(f"--width is {args.width}; it must be more than 0 and at most 4.")
    if args.out is not None:
        out = Path(args.out)
        if out.suffix != ".json" or out.is_dir():
            raise UserError(f"--out is {out}; it must be a file that ends in .json.")
        if not out.parent.is_dir():
            raise UserError(f"--out is {out}; there is no directory {out.parent}.")
        if out.exists() and not args.overwrite:
            raise UserError(f"--out {out} exists; name another file or add --overwrite.")


def _device(asked: str | None) -> str:
    """ "cpu" or "gpu". Raises UserError where jax does not run on what was asked for."""
    if asked == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif asked == "gpu":  # so that PyTorch finds room beside jax
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = jax.default_backend()
    if asked is not None and found != asked:
        raise UserError(f"--device is {asked}, but jax finds no {asked} here: it runs on {found}.")
    return "cpu" if found == "cpu" else "gpu"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def benchmark(args: argparse.Namespace, command: str) -> None:
    """Runs what the arguments ask for, and writes the results after each part of it.

    Raises:
      UserError: an argument that is not allowed.
    """
    _check(args)
    device = _device(args.device)
    examples = {
        network: args.examples or (_CPU_EXAMPLES[network] if device == "cpu" else _GPU_EXAMPLES)
        for network in args.network
    }
    for count in examples.values():
        if count < args.batch_size:
            raise UserError(f"--examples is {count}; it must be at least --batch-size, {args.batch_size}.")
    versions = _versions()
    print(f"{machine()}, {', '.join(f'{name} {version}' for name, version in versions.items())}", flush=True)
    results: list[dict[str, Any]] = []

    def finished(result: dict[str, Any]) -> None:
        results.append(result)
        if args.out is not None:
            content = {
                "command": command,
                "machine": machine(),
                "device": jax.devices()[0].device_kind,
                "versions": versions,
                "results": results,
            }
            write_json(Path(args.out), content)

    for network in args.network:
        images, labels = images_of(network, examples[network])
        # A convolution within a scan is many times slower on a CPU.
        for dtype in args.dtype:
            settings = Settings(network, images, labels, args.batch_size, dtype, args.width)
            if "speed" in args.measure:
                finished(speed(settings, args.rounds, device))
            if "ensemble" in args.measure:
                finished(ensemble(settings, args.rounds, _SEEDS[network]))
            if "memory" in args.measure:
                finished(memory(settings))
            # A further measurement has its place here, a name in MEASUREMENTS and a function that prints and returns its result.


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    args = _parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        benchmark(args, shlex.join(["python", "-m", "experiments.benchmark_training", *given]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
