"""Speed of training, compared with PyTorch and with the bare matrix products: ``python -m experiments.benchmark_training``.

All sides train the same variational network (local reparametrisation, KL of all layers in every step, Adam, variance
clipping) from the same start, on the same images in memory, for whole epochs, in turn. Compilation is timed separately.
Without PyTorch (``pip install torch``) only the speed of this project is printed.

The measurements (``--measure``):

* ``speed``: a training step of this project, of eager PyTorch and of ``torch.compile``, and the floor, the time of the
  bare matrix products of a step.
* ``ensemble``: several seeds at once, against the same runs in a row.
* ``memory``: the peak resident memory of a process that only trains.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import training_measures as measures
from experiments.benchmarks.training_sides import CASES, Settings, images_of
from experiments.io.files import write_json
from experiments.runtime import backend
from experiments.runtime.command import command_line, reporting_errors
from experiments.runtime.errors import UserError
from experiments.runtime.machine import machine, versions

MEASUREMENTS = ("speed", "ensemble", "memory")
DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "gpu")
_DEFAULT_NETWORKS = ("lenet300", "lenet5")
# Images per epoch.
_GPU_EXAMPLES = 25_600


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add_choices(name: str, allowed: Sequence[str], default: Sequence[str]) -> None:
        parser.add_argument(
            name,
            nargs="+",
            default=list(default),
            metavar=name.strip("-").upper(),
            help=f"one or more of {', '.join(allowed)} (default: {' '.join(default)})",
        )

    add_choices("--network", tuple(CASES), _DEFAULT_NETWORKS)
    add_choices("--measure", MEASUREMENTS, MEASUREMENTS)
    add_choices("--dtype", DTYPES, DTYPES[:1])
    parser.add_argument("--device", help="cpu or gpu (default: the device that jax chooses)")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each side, in turn (default: 7)")
    parser.add_argument(
        "--examples",
        type=int,
        help="images per epoch (default: {} on a GPU; on a CPU {})".format(
            _GPU_EXAMPLES, ", ".join(f"{name} {case.cpu_examples}" for name, case in CASES.items())
        ),
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument(
        "--width", type=float, default=1.0, help="factor of VGG's widths; 0.25 suits a CPU (default: 1)"
    )
    parser.add_argument("--out", help="file for the results, .json (default: no file is written)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    return parser


def _check(args: argparse.Namespace) -> None:
    for option, values, allowed in (
        ("--network", args.network, tuple(CASES)),
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


def _device(requested: str | None) -> str:
    """The device that JAX runs on, "cpu" or "gpu". Raises UserError if it is not the requested one."""
    if requested == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif requested == "gpu":  # JAX leaves memory for PyTorch.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = backend.name()
    if requested is not None and found != requested:
        raise UserError(f"--device is {requested}, but jax finds no {requested} here: it runs on {found}.")
    return "cpu" if backend.on_cpu() else "gpu"


def _examples(args: argparse.Namespace, device: str) -> dict[str, int]:
    """The number of images per epoch for each network. Raises UserError if it is smaller than a batch."""
    examples = {
        network: args.examples or (CASES[network].cpu_examples if device == "cpu" else _GPU_EXAMPLES)
        for network in args.network
    }
    for count in examples.values():
        if count < args.batch_size:
            raise UserError(f"--examples is {count}; it must be at least --batch-size, {args.batch_size}.")
    return examples


def benchmark(args: argparse.Namespace, command: str) -> None:
    """Runs the requested measurements. Writes the results after each of them.

    Args:
      args: The parsed arguments.
      command: The command line, for the result file.

    Raises:
      UserError: An argument is not allowed.
    """
    _check(args)
    device = _device(args.device)
    examples = _examples(args, device)
    found_versions = versions("torch")
    print(f"{machine()}, {', '.join(f'{name} {version}' for name, version in found_versions.items())}", flush=True)
    results: list[dict[str, Any]] = []

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        if args.out is not None:
            content = {
                "command": command,
                "machine": machine(),
                "device": jax.devices()[0].device_kind,
                "versions": found_versions,
                "results": results,
            }
            write_json(Path(args.out), content)

    for network in args.network:
        images, labels = images_of(network, examples[network])
        for dtype in args.dtype:
            settings = Settings(network, images, labels, args.batch_size, dtype, args.width)
            # A new measurement needs a name in MEASUREMENTS and a function that prints and returns its result.
            if "speed" in args.measure:
                add(measures.speed(settings, args.rounds, device))
            if "ensemble" in args.measure:
                add(measures.ensemble(settings, args.rounds, CASES[network].seeds))
            if "memory" in args.measure:
                add(measures.memory(settings))


@reporting_errors()
def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    benchmark(_parser().parse_args(arguments), command_line("benchmark_training", arguments))
    return 0
