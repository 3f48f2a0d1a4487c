"""Compares training on many devices with training on one: ``python -m experiments.parallel_check``.

Dense and convolutional networks are trained for 20 steps of plain gradient descent: on one device, on 8 fake devices of one CPU (with
``jax.jit`` and a mesh, and with ``jax.pmap``), and in two processes that are connected over loopback. Training with ``jax.pmap`` has no
noise here, since each device would draw its own. The largest difference of parameters and of gradients is printed, each relative to the
largest value of its array. A difference of more than 1e-5 is a failure.

Two of the networks have smooth activations. At the kink of a ReLU, a difference in the last bit can change a whole gradient, and a run
passes a million units. The third network, LeNet-300-100 with ReLU, is therefore computed in float64.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcdl_jax
from bcdl_jax.train import epoch_rows, take_batch
from experiments.checks.differences import relative_difference
from experiments.io.data import EMBEDDED, load
from experiments.pipeline.measures import mean_cross_entropy, sampled_cross_entropy
from experiments.runtime import devices
from experiments.runtime.command import reporting_errors
from experiments.runtime.errors import UserError

STEPS, BATCH, EXAMPLES = 20, 64, 320
LARGEST_DIFFERENCE = 1e-5
NETS = ("dense", "convolutional", "relu")
WAYS = ("mesh", "pmap", "processes")
FAKE_DEVICES, PROCESSES = 8, 2
_SECONDS = 300


class Dense(nn.Module):
    """A network with the sizes of LeNet-300-100."""

    activation: Callable[[jax.Array], jax.Array] = nn.tanh
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        hidden = (images.astype(self.dtype) / 127.5 - 1).reshape(images.shape[0], -1)
        for width in (300, 100):
            hidden = self.activation(bcdl_jax.Dense(width)(hidden, deterministic=deterministic))
        return bcdl_jax.Dense(10)(hidden, deterministic=deterministic)


class Convolutional(nn.Module):
    """A network of two convolutions with mean pooling, and two dense layers."""

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        hidden = images.astype(jnp.float32) / 127.5 - 1
        for width in (8, 16):
            hidden = nn.tanh(bcdl_jax.Conv(width, (5, 5), padding="VALID")(hidden, deterministic=deterministic))
            hidden = nn.avg_pool(hidden, (2, 2), (2, 2))
        hidden = nn.tanh(bcdl_jax.Dense(64)(hidden.reshape(images.shape[0], -1), deterministic=deterministic))
        return bcdl_jax.Dense(10)(hidden, deterministic=deterministic)


class Training:
    """Plain gradient descent of one network. The gradients of the last step stay in the state of the optimiser."""

    def __init__(self, name: str, noise: bool, shards: int):
        """Initialises the network.

        Args:
          name: The network, one of ``NETS``.
          noise: True for sampled weights, False for their means.
          shards: The number of devices that share a batch.
        """
        model = {"dense": Dense(), "convolutional": Convolutional(), "relu": Dense(nn.relu, jnp.float64)}[name]
        train = load(EMBEDDED).train
        rows = np.random.default_rng(0).permutation(len(train))[:EXAMPLES]
        self.data = train.images[rows], train.labels[rows]
        self.shards = shards

        def cross_entropy(params: Any, batch: Any, key: jax.Array) -> jax.Array:
            logits: Any = model.apply({"params": params}, batch[0])
            return mean_cross_entropy(logits, batch[1])

        record = optax.GradientTransformation(
            lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradients, *_: (gradients, gradients)
        )
        self.optimizer = optax.chain(record, optax.sgd(0.05))
        self.likelihood = functools.partial(sampled_cross_entropy, model) if noise else cross_entropy
        self.options: dict[str, Any] = {"num_examples": EXAMPLES, "kl_weight": 0.1}
        self.step = bcdl_jax.train.make_train_step(self.likelihood, self.optimizer, **self.options)
        params = jax.jit(model.init)(jax.random.key(0), self.data[0][:1])["params"]
        self._start = bcdl_jax.train.fetch(bcdl_jax.train.create_train_state(params, self.optimizer, jax.random.key(1)))

    def start(self) -> Any:
        """The state before the first step, in buffers of its own."""
        return jax.tree.map(jnp.array, self._start)

    def batch(self, state: Any, data: Any) -> Any:
        """The batch of the state's next step."""
        epoch, position = divmod(state.step, EXAMPLES // BATCH)
        return take_batch(data, epoch_rows(state.key, epoch, EXAMPLES, BATCH, self.shards)[position], self.shards)

    def take_step(self, state: Any, data: Any) -> Any:
        """The state after one step, and its metrics."""
        return self.step(state, self.batch(state, data))

    def run(self, step: Callable[[Any, Any], Any], state: Any, data: Any) -> dict[str, Any]:
        """The parameters and gradients after the first and after the last step."""
        found = {}
        for number in range(STEPS):
            state, _ = step(state, data)
            if number in (0, STEPS - 1):
                found[f"step {number + 1}"] = bcdl_jax.train.fetch((state.params, state.optimizer_state[0]))
        return {
            "params": [params for params, _ in found.values()],
            "gradients": [slopes for _, slopes in found.values()],
        }

    def on_one_device(self) -> dict[str, Any]:
        """Trains on one device."""
        state = self.start()
        return self.run(bcdl_jax.train.jit_step(self.take_step, state), state, jax.tree.map(jnp.asarray, self.data))

    def on_mesh(self) -> dict[str, Any]:
        """Trains on all devices of all processes. Each process holds its share of the data."""
        mesh = bcdl_jax.train.make_mesh()
        rows = bcdl_jax.train.process_rows(mesh, EXAMPLES)
        data = bcdl_jax.train.place_data(jax.tree.map(lambda array: array[rows], self.data), mesh, examples=EXAMPLES)
        state = bcdl_jax.train.place_state(self.start(), mesh)
        return self.run(bcdl_jax.train.jit_step(self.take_step, state), state, data)

    def with_pmap(self) -> dict[str, Any]:
        """Trains with ``jax.pmap`` on all devices of this process."""
        step = bcdl_jax.train.make_pmap_train_step(self.likelihood, self.optimizer, **self.options)
        batch = jax.jit(self.batch)
        return self.run(
            lambda state, data: step(state, batch(state, data)), self.start(), jax.tree.map(jnp.asarray, self.data)
        )


def measure(net: str, way: str) -> dict[str, Any]:
    """Trains on many devices and on one, in this process.

    Args:
      net: The network, one of ``NETS``.
      way: The way to use many devices, one of ``WAYS``.

    Returns:
      The largest differences, with the numbers of devices and processes.
    """
    training = Training(net, noise=way != "pmap", shards=len(jax.devices()))
    found = training.with_pmap() if way == "pmap" else training.on_mesh()
    expected = training.on_one_device()
    return {
        "net": net,
        "way": way,
        "devices": len(jax.devices()),
        "processes": jax.process_count(),
        "params": relative_difference(found["params"], expected["params"]),
        "gradients": relative_difference(found["gradients"], expected["gradients"]),
    }


def in_child_processes(net: str, way: str) -> dict[str, Any]:
    """``measure`` in new processes, since the number of fake devices is set before JAX starts.

    Raises:
      UserError: A process failed or took too long.
    """
    command = [sys.executable, "-m", "experiments.parallel_check", "--worker", "--nets", net, "--ways", way]
    count = PROCESSES if way == "processes" else 1
    flags = f"--xla_force_host_platform_device_count={1 if way == 'processes' else FAKE_DEVICES}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["JAX_ENABLE_X64"] = str(int(net == "relu"))
    address = f"127.0.0.1:{free_port()}"
    children: list[subprocess.Popen] = []
    with tempfile.TemporaryFile("w+") as errors:
        try:
            for index in range(count):
                together = ["--coordinator", address, "--num-processes", str(count), "--process-id", str(index)]
                children.append(
                    subprocess.Popen(
                        command + (together if count > 1 else []),
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )
            deadline = time.monotonic() + _SECONDS
            outputs = [child.communicate(timeout=deadline - time.monotonic())[0] for child in children]
        except subprocess.TimeoutExpired:
            raise UserError(f"{net}, {way}: no result within {_SECONDS} s.") from None
        finally:
            for child in children:
                child.kill()
                child.wait()
        if any(child.returncode for child in children):
            errors.seek(0)
            raise UserError(f"{net}, {way}: a process failed.\n{errors.read()[-2000:]}")
    return json.loads(outputs[0].splitlines()[-1])


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.parallel_check",
        description="Trains on one device and on many, and prints the largest relative differences of parameters and gradients.",
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS, help="networks to train (default: all)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="ways to use many devices or processes (default: all)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    devices.add_options(parser)
    return parser.parse_args(arguments)


@reporting_errors()
def main(arguments: list[str] | None = None) -> int:
    """Runs the check and returns the exit status: 0, 1 for a difference that is too large, 2 for an error."""
    args = parse(arguments)
    devices.check(args)
    if args.worker:
        devices.join(args)
        print(json.dumps(measure(args.nets[0], args.ways[0])))
        return 0
    passed = True
    print(f"{'net':<15}{'way':<11}{'devices':>8}{'processes':>11}{'params':>10}{'gradients':>11}")
    for net in args.nets:
        for way in args.ways:
            found = in_child_processes(net, way)
            passed &= max(found["params"], found["gradients"]) <= LARGEST_DIFFERENCE
            print(
                f"{net:<15}{way:<11}{found['devices']:>8}{found['processes']:>11}{found['params']:>10.1e}{found['gradients']:>11.1e}",
                flush=True,
            )
    return 0 if passed else 1
