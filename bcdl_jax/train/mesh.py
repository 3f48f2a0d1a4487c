"""Training on many devices, of one process or many: where states and data lie decides how a program runs.

The plain training step, made for one device, is compiled by ``jax.jit`` for all of them: with the examples of a batch spread over a mesh
and the parameters on every device, XLA itself sums the gradients. The noise of an example depends on its place in the batch alone
(see ``noise``), so that one device and many compute the same up to the order of sums.

    mesh = bcdl_jax.train.make_mesh()
    step = bcdl_jax.train.make_train_step(negative_log_likelihood, optimizer, num_examples=num_examples)
    epoch = bcdl_jax.train.make_train_epoch(step, batch_size=128, shards=mesh.shape["data"])
    state = bcdl_jax.train.place_state(state, mesh)
    data = bcdl_jax.train.place_data(data, mesh)
    train_epoch = bcdl_jax.train.jit_step(epoch, state)
    state, metrics = train_epoch(state, data)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bcdl_jax._tree import PyTree, is_key
from bcdl_jax.train.batches import count_examples

SEED, DATA = "seed", "data"


def make_mesh(*, seed: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A grid of devices with the axes "seed" and "data".

    Args:
      seed: over how many parts the seeds of an ensemble are spread; within each, the examples are spread over the rest.
      devices: all devices of all processes if None.

    Raises:
      ValueError: the number of devices is not a multiple of ``seed``.
    """
    devices = jax.devices() if devices is None else devices
    if seed < 1 or len(devices) % seed:
        raise ValueError(f"seed is {seed}; it must divide the number of devices, {len(devices)}.")
    shape = (seed, len(devices) // seed)
    return jax.make_mesh(shape, (SEED, DATA), axis_types=(AxisType.Auto,) * 2, devices=devices)


def place_state(state: PyTree, mesh: Mesh, *, stacked: bool = False, shard_params: bool = False) -> PyTree:
    """Puts a state (or any tree of arrays that all processes hold alike) on the devices of a mesh.

    Args:
      state: tree of arrays.
      mesh: from ``make_mesh``.
      stacked: the leading axis of every array counts seeds, and is spread over "seed".
      shard_params: spread every array over "data" too, along its longest axis that divides, so that a network and its optimiser take
        1/devices of the memory each. By default every device has all of it.

    Returns:
      A copy of the tree, to be given to a function from ``jit_step``.

    Raises:
      ValueError: the number of stacked seeds is not a multiple of the axis "seed".
    """

    def place(array: Any) -> jax.Array:
        shape = jnp.shape(array)
        spec: list[str | None] = [None] * len(shape)
        if stacked:
            if not shape or shape[0] % mesh.shape[SEED]:
                raise ValueError(
                    f"The state has an array of shape {shape}; its leading axis must count the seeds, a multiple of {mesh.shape[SEED]}."
                )
            spec[0] = SEED
        if shard_params:
            dividing = [
                axis for axis in range(int(stacked), len(shape)) if shape[axis] and shape[axis] % mesh.shape[DATA] == 0
            ]
            if dividing:
                spec[max(dividing, key=lambda axis: shape[axis])] = DATA
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        if is_key(array):
            return jax.random.wrap_key_data(
                _spread(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array)
            )
        return _spread(array, sharding)

    return jax.tree.map(place, state)


def process_rows(mesh: Mesh, examples: int) -> slice:
    """The rows of the whole data that this process has to hold: all of them if there is one process.

    Args:
      mesh: from ``make_mesh``.
      examples: of all processes together.

    Raises:
      ValueError: ``examples`` is not a multiple of the axis "data".
    """
    if examples % mesh.shape[DATA]:
        raise ValueError(
            f"data has {examples} examples; it must be a multiple of the {mesh.shape[DATA]} devices that it is spread over."
        )
    indices = NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map((examples,)).values()
    bounds = [index[0].indices(examples) for index in indices if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def place_data(data: PyTree, mesh: Mesh, *, examples: int | None = None) -> PyTree:
    """Spreads examples over the axis "data" of a mesh, keeping their types (images stay uint8).

    Args:
      data: tree of arrays [rows, ...] on the host, those of ``process_rows``.
      mesh: from ``make_mesh``.
      examples: of all processes together; those of ``data`` if None, which is right for one process.

    Returns:
      A tree of arrays [examples, ...].

    Raises:
      ValueError: ``examples`` is not a multiple of the axis "data", or ``data`` does not hold the rows of this process.
    """
    given = count_examples(data)
    examples = given if examples is None else examples
    rows = process_rows(mesh, examples)
    if given != rows.stop - rows.start:
        raise ValueError(
            f"data has {given} examples; it must hold rows {rows.start} to {rows.stop - 1} of this process."
        )
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array), (examples, *array.shape[1:])),
        data,
    )


def replicated(state: PyTree) -> NamedSharding | None:
    """On every device of the mesh that a state lies on, for ``jax.jit(..., out_shardings=...)``; None if it lies on no mesh."""
    sharding = jax.tree.leaves(state)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def jit_step(function: Callable[..., tuple[PyTree, PyTree]], state: PyTree) -> Callable[..., tuple[PyTree, PyTree]]:
    """Compiles ``function(state, ...) -> (state, metrics)`` for where the state lies, one device or a mesh.

    Args:
      function: a step or an epoch, also under ``jax.vmap`` over seeds.
      state: as it will be given, from ``place_state`` for a mesh.

    Returns:
      The compiled function. The new state takes over the buffers of the old one and lies where it lay; metrics are on every device.
    """
    if replicated(state) is None:
        return jax.jit(function, donate_argnums=0)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, replicated(state)))


def fetch(tree: PyTree) -> PyTree:
    """Copies whole arrays to this process's host from a tree that may be spread over the devices of many processes.

    Every process must call it. Keys come back as keys on the default device.
    """
    everywhere = replicated(tree)
    whole = tree if everywhere is None else jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)

    def copy(array: jax.Array) -> Any:
        if is_key(array):
            return jax.random.wrap_key_data(
                jnp.array(np.array(jax.random.key_data(array))), impl=jax.random.key_impl(array)
            )
        return np.array(array)

    return jax.tree.map(copy, whole)


def _spread(array: Any, sharding: NamedSharding) -> jax.Array:
    """Each process puts its part on its devices; a copy, so that giving the result away leaves the original alone."""
    host = np.array(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
