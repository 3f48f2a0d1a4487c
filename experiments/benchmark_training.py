"""Speed of the training step beside PyTorch: ``python -m experiments.benchmark_training``.

Both sides train the same variational LeNet-300-100 (local reparametrisation, KL in every step, Adam, variance clipping)
on the same images in memory, in float32, whole epochs, in turn. Compilation is timed apart. Without PyTorch
(``pip install torch``) only the speed of this project is printed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcdl_jax
from experiments import data
from experiments.compress import sampled_cross_entropy
from experiments.errors import UserError
from experiments.models import FIRST_LAYER_CLIP_VAR, LeNet300

_WIDTHS = (784, 300, 100, 10)
_LEARNING_RATE = 1e-3


def jax_epoch(images: np.ndarray, labels: np.ndarray, batch_size: int) -> tuple[Callable[[], float], float]:
    """Returns a function that trains one epoch and gives its loss, and the seconds that compiling it took."""
    model, key = LeNet300(), jax.random.key(0)
    optimizer = optax.adam(_LEARNING_RATE)
    likelihood = functools.partial(sampled_cross_entropy, model)
    step = bcdl_jax.make_train_step(likelihood, optimizer, num_examples=len(labels))
    epoch = jax.jit(bcdl_jax.make_train_epoch(step, batch_size=batch_size), donate_argnums=0)
    train = (jnp.asarray(images), jnp.asarray(labels))
    params = jax.jit(model.init)(key, train[0][:1])["params"]
    state = bcdl_jax.create_train_state(params, optimizer, key)
    start = time.perf_counter()
    compiled = epoch.lower(state, train).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, train)
        return float(metrics["loss"])

    return run, seconds


def torch_epoch(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Callable[[], float]:
    """Returns a function that trains one epoch of the same network in eager PyTorch and gives its loss.

    Raises:
      ImportError: PyTorch is not installed.
    """
    import torch

    torch.manual_seed(0)
    inputs, targets = torch.from_numpy(images.reshape(len(images), -1)), torch.from_numpy(labels.astype(np.int64))
    layers = []
    for fan_in, fan_out in itertools.pairwise(_WIDTHS):
        start_values = {
            "kernel_mean": torch.randn(fan_in, fan_out) / math.sqrt(fan_in),
            "kernel_log_variance": -9 + 0.01 * torch.randn(fan_in, fan_out),
            "bias_mean": torch.zeros(fan_out),
            "bias_log_variance": -9 + 0.01 * torch.randn(fan_out),
            "scale_mean": 1 + 0.01 * torch.randn(fan_in),
            "scale_log_variance": -9 + 0.01 * torch.randn(fan_in),
        }
        layers.append({name: value.requires_grad_() for name, value in start_values.items()})
    optimizer = torch.optim.Adam([value for layer in layers for value in layer.values()], lr=_LEARNING_RATE)

    def forward(hidden: Any) -> Any:
        for number, layer in enumerate(layers):
            noise = torch.randn_like(hidden)
            hidden = hidden * (layer["scale_mean"] + torch.exp(0.5 * layer["scale_log_variance"]) * noise)
            mean = torch.addmm(layer["bias_mean"], hidden, layer["kernel_mean"])
            variance = torch.addmm(
                torch.exp(layer["bias_log_variance"]), hidden * hidden, torch.exp(layer["kernel_log_variance"])
            )
            hidden = mean + torch.sqrt(variance + 1e-8) * torch.randn_like(mean)
            hidden = torch.relu(hidden) if number < len(layers) - 1 else hidden
        return hidden

    def gaussian_kl(mean: Any, log_variance: Any) -> Any:
        return 0.5 * (torch.exp(log_variance) + mean**2 - 1 - log_variance).sum()

    def kl_divergence() -> Any:
        total: Any = 0.0
        for layer in layers:
            log_alpha = layer["scale_log_variance"] - torch.log(layer["scale_mean"] ** 2 + 1e-8)
            scale_kl = 0.63576 - 0.63576 * torch.sigmoid(1.87320 + 1.48695 * log_alpha)
            total = total + (scale_kl + 0.5 * torch.nn.functional.softplus(-log_alpha)).sum()
            total = total + gaussian_kl(layer["kernel_mean"], layer["kernel_log_variance"])
            total = total + gaussian_kl(layer["bias_mean"], layer["bias_log_variance"])
        return total

    def run() -> float:
        order = torch.randperm(len(targets))
        steps, total = len(targets) // batch_size, 0.0
        for index in range(steps):
            rows = order[index * batch_size : (index + 1) * batch_size]
            optimizer.zero_grad()
            logits = forward(inputs[rows].float() / 127.5 - 1)
            loss = torch.nn.functional.cross_entropy(logits, targets[rows]) + kl_divergence() / len(targets)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for name in ("kernel_log_variance", "bias_log_variance"):
                    layers[0][name].clamp_(max=math.log(FIRST_LAYER_CLIP_VAR))
            total += float(loss.detach())
        return total / steps

    return run


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark_training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each side, in turn (default: 7)")
    parser.add_argument("--examples", type=int, default=25_600, help="images per epoch (default: 25600)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: 128)")
    args = parser.parse_args(arguments)
    try:
        benchmark(args.rounds, args.examples, args.batch_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def benchmark(rounds: int, examples: int, batch_size: int) -> None:
    """Prints images per second of both sides, round by round, and the median of the ratios.

    Raises:
      UserError: a number that is not positive, or fewer images than one batch.
    """
    for name, value in (("--rounds", rounds), ("--examples", examples), ("--batch-size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if examples < batch_size:
        raise UserError(f"--examples is {examples}; it must be at least --batch-size, {batch_size}.")
    digits = data.load(data.EMBEDDED).train
    rows = np.arange(examples) % len(digits)
    images, labels = digits.images[rows], digits.labels[rows]
    trained = examples // batch_size * batch_size

    ours, compile_seconds = jax_epoch(images, labels, batch_size)
    device = jax.devices()[0].device_kind
    print(f"bcdl_jax: jax {jax.__version__} on {device}, compiled in {compile_seconds:.1f} s", flush=True)
    sides: dict[str, Callable[[], float]] = {"bcdl_jax": ours}
    try:
        sides["torch"] = torch_epoch(images, labels, batch_size)
        import torch

        print(f"torch: {torch.__version__} eager, {torch.get_num_threads()} threads", flush=True)
    except ImportError:
        print("torch: not installed, so there is nothing to compare with; pip install torch", flush=True)
    print(
        f"LeNet-300-100 training, {trained} images an epoch, batch {batch_size}, {os.cpu_count()} CPU cores", flush=True
    )

    for run in sides.values():  # one epoch each that does not count
        run()
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        losses = {}
        for name, run in sides.items():
            start = time.perf_counter()
            losses[name] = run()
            speeds[name].append(trained / (time.perf_counter() - start))
        line = ", ".join(f"{name} {speeds[name][-1]:8.0f} images/s (loss {losses[name]:.3f})" for name in sides)
        print(f"round {number}: {line}", flush=True)
    for name, values in speeds.items():
        print(f"median {name}: {statistics.median(values):.0f} images/s ({min(values):.0f} to {max(values):.0f})")
    if "torch" in speeds:
        ratios = [mine / theirs for mine, theirs in zip(speeds["bcdl_jax"], speeds["torch"], strict=True)]
        print(
            f"median ratio bcdl_jax / torch eager: {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    sys.exit(main())
