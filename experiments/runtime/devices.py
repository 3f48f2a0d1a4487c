"""The devices and processes of an experiment: command-line options, connecting processes, and values that all processes share."""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.runtime.errors import UserError

if TYPE_CHECKING:  # Importing JAX takes seconds, and --help should appear at once.
    import jax
    from jax.sharding import Mesh

_CONNECT_SECONDS = 120


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this module: --devices, --coordinator, --num-processes, --process-id."""
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="number of devices per process; each batch is divided among them (default: 1)",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="train in several processes: the address at which process 0 listens; start the same command once per process, each with its --process-id",
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    parser.add_argument(
        "--process-id", type=int, metavar="I", help="index of this process, from 0; process 0 writes the files"
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options of this module that have a value that is not allowed or that lack another option."""
    if args.devices < 1:
        raise UserError(f"--devices is {args.devices}; it must be at least 1.")
    together = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    missing = [name for name, value in together.items() if value is None]
    if len(missing) == len(together):
        return
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given too; {', '.join(together)} must be given together.")
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {args.coordinator}; it must be HOST:PORT, such as 10.0.0.1:8476.")
    if args.num_processes < 1:
        raise UserError(f"--num-processes is {args.num_processes}; it must be at least 1.")
    if not 0 <= args.process_id < args.num_processes:
        raise UserError(f"--process-id is {args.process_id}; it must be between 0 and {args.num_processes - 1}.")


def join(args: argparse.Namespace) -> None:
    """Connects this process with the others, if there are any. It must be called before JAX is used.

    Raises:
      UserError: Process 0 did not answer in time.
    """
    if args.coordinator is None:
        return
    host, _, port = args.coordinator.rpartition(":")
    # JAX would end the process with a stack dump if process 0 did not answer.
    if args.process_id:
        _wait_for(host, int(port))
    else:
        print(
            f"Waiting up to {_CONNECT_SECONDS} s for {args.num_processes} processes at {args.coordinator} ...",
            file=sys.stderr,
        )
    import jax

    jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        # Process 0 listens at this address alone.
        coordinator_bind_address=None if args.process_id else args.coordinator,
        initialization_timeout=_CONNECT_SECONDS,
    )


def _wait_for(host: str, port: int) -> None:
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator is {host}:{port}, but no process answers there within {_CONNECT_SECONDS} s ({error}); start process 0 first."
                ) from None
            time.sleep(0.1)


def choose(number: int) -> list[jax.Device]:
    """The first ``number`` devices of every process.

    Raises:
      UserError: A process has fewer devices.
    """
    import jax

    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    for process, devices in sorted(by_process.items()):
        if len(devices) < number:
            where = f" in process {process}" if len(by_process) > 1 else ""
            hint = (
                f"; XLA_FLAGS=--xla_force_host_platform_device_count={number} in the environment splits a CPU into {number}"
                if devices[0].platform == "cpu"
                else ""
            )
            raise UserError(
                f"--devices is {number}, but there {'is' if len(devices) == 1 else 'are'} {len(devices)} {devices[0].device_kind} "
                f"device{'s' * (len(devices) > 1)}{where}{hint}."
            )
    return [device for devices in by_process.values() for device in devices[:number]]


def check_batch_size(batch_size: int, devices: int) -> None:
    """Raises UserError unless a batch can be divided evenly among ``devices`` devices, those of all processes together."""
    if batch_size % devices:
        raise UserError(f"--batch-size is {batch_size}; it must be a multiple of the number of devices, {devices}.")


def mesh_of(chosen: Sequence[jax.Device]) -> Mesh | None:
    """The mesh to train on; None for a single device, which needs none."""
    import bcdl_jax

    return bcdl_jax.train.make_mesh(devices=chosen) if len(chosen) > 1 else None


def same_everywhere(tree: Any) -> Any:
    """The tree of arrays of process 0, in every process. Every process must call it with arrays of the same shapes.

    Without it, start values could differ in the last bit between machines.
    """
    import jax
    from jax.experimental import multihost_utils

    import bcdl_jax

    if jax.process_count() == 1:
        return tree

    def broadcast(leaf: Any) -> Any:
        if bcdl_jax.train.is_key(leaf):
            data = multihost_utils.broadcast_one_to_all(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return multihost_utils.broadcast_one_to_all(leaf)

    return jax.tree.map(broadcast, tree)


def same_facts(facts: Any) -> Any:
    """The JSON value of process 0, in every process. Every process must call it; the values of the others are not used."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return facts
    content = np.frombuffer(json.dumps(facts).encode(), np.uint8) if is_writer() else np.zeros(0, np.uint8)
    length = int(same_everywhere(np.int32(len(content))))
    padded = np.zeros(length, np.uint8)
    padded[: len(content)] = content
    return json.loads(bytes(np.asarray(same_everywhere(padded), np.uint8)))


def is_writer() -> bool:
    """Whether this is process 0, which writes files and prints."""
    import jax

    return jax.process_index() == 0
