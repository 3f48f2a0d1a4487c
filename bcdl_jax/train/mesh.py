"""Training on many devices of one process or of many. The placement of states and data determines how a program runs.

``jax.jit`` compiles the plain training step of one device for all devices of a mesh. The examples of a batch are spread over the mesh, the
params lie on every device, and XLA sums the gradients. The noise of an example depends only on its place in the batch (see
``priors.noise``), so that one device and many compute the same up to the order of sums.

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
      seed: The length of the axis "seed", over which the seeds of an ensemble are spread. The axis "data" spreads the examples of each
        seed over the other devices.
      devices: The devices of the mesh; all devices of all processes if None.

    Raises:
      ValueError: The number of devices is not a multiple of ``seed``.
    """
    devices = jax.devices() if devices is None else devices
    if seed < 1 or len(devices) % seed:
        raise ValueError(f"seed is {seed}; it must divide the number of devices, {len(devices)}.")
    shape = (seed, len(devices) // seed)
    return jax.make_mesh(shape, (SEED, DATA), axis_types=(AxisType.Auto,) * 2, devices=devices)


def place_state(state: PyTree, mesh: Mesh, *, stacked: bool = False, shard_params: bool = False) -> PyTree:
    """Copies a state to the devices of a mesh.

    Args:
      state: A tree of arrays that is the same in all processes.
      mesh: The mesh, from ``make_mesh``.
      stacked: True if the leading axis of every array counts seeds. It is then spread over the axis "seed".
      shard_params: True to spread every array over the axis "data" too, along the longest axis of the array whose length is a multiple
        of the length of the axis "data". The network and its optimiser then take 1 / devices of the memory on each device. False to put all of it on every device.

    Returns:
      A copy of the tree, for a function from ``jit_step``.

    Raises:
      ValueError: The number of stacked seeds is not a multiple of the axis "seed".
    """

    def place(array: Any) -> jax.Array:
        sharding = NamedSharding(mesh, _partition(jnp.shape(array), mesh, stacked, shard_params))
        if is_key(array):
            return _map_key_data(lambda numbers: _spread(numbers, sharding), array)
        return _spread(array, sharding)

    return jax.tree.map(place, state)


def _partition(shape: tuple[int, ...], mesh: Mesh, stacked: bool, shard_params: bool) -> PartitionSpec:
    """The axis of the mesh that each axis of an array of a state is spread over, see ``place_state``."""
    spec: list[str | None] = [None] * len(shape)
    if stacked:
        if not shape or shape[0] % mesh.shape[SEED]:
            raise ValueError(
                f"state has an array of shape {shape}; its leading axis must count the seeds, a multiple of {mesh.shape[SEED]}."
            )
        spec[0] = SEED
    if shard_params:
        dividing = [
            axis for axis in range(int(stacked), len(shape)) if shape[axis] and shape[axis] % mesh.shape[DATA] == 0
        ]
        if dividing:
            spec[max(dividing, key=lambda axis: shape[axis])] = DATA
    return PartitionSpec(*spec)


def process_rows(mesh: Mesh, examples: int) -> slice:
    """The rows of the whole data that this process must hold. A single process holds all rows.

    Args:
      mesh: The mesh, from ``make_mesh``.
      examples: The number of examples of all processes together.

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
    """Spreads examples over the axis "data" of a mesh. The arrays keep their types, so that images stay uint8.

    Args:
      data: A tree of arrays [rows, ...] on the host: the rows from ``process_rows``.
      mesh: The mesh, from ``make_mesh``.
      examples: The number of examples of all processes together. If None, the number of examples of ``data``, which suits a single process.

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
    """The sharding that puts a whole array on every device of the mesh of a state, for ``jax.jit(..., out_shardings=...)``.

    Args:
      state: A tree of arrays, all on the same mesh or all on no mesh.

    Returns:
      The sharding, or None if the state lies on no mesh.
    """
    sharding = jax.tree.leaves(state)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def jit_step(function: Callable[..., tuple[PyTree, PyTree]], state: PyTree) -> Callable[..., tuple[PyTree, PyTree]]:
    """Compiles ``function(state, ...) -> (state, metrics)`` for the placement of a state, on one device or on a mesh.

    Args:
      function: A step or an epoch, possibly under ``jax.vmap`` over seeds.
      state: A state with the placement of the later ones; for a mesh, from ``place_state``.

    Returns:
      The compiled function. The new state takes over the buffers and the placement of the old one. The metrics are on every device.
    """
    if replicated(state) is None:
        return jax.jit(function, donate_argnums=0)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    return jax.jit(function, donate_argnums=0, out_shardings=(shardings, replicated(state)))


def fetch(tree: PyTree) -> PyTree:
    """Copies whole arrays to the host of this process. Every process must call this function.

    Args:
      tree: A tree of arrays, possibly spread over the devices of many processes.

    Returns:
      A tree of NumPy arrays. Typed PRNG keys stay keys, on the default device.
    """
    everywhere = replicated(tree)
    whole = tree if everywhere is None else jax.jit(lambda arrays: arrays, out_shardings=everywhere)(tree)

    def copy(array: jax.Array) -> Any:
        if is_key(array):
            return _map_key_data(lambda numbers: jnp.array(np.array(numbers)), array)
        return np.array(array)

    return jax.tree.map(copy, whole)


def _map_key_data(function: Callable[[jax.Array], jax.Array], keys: jax.Array) -> jax.Array:
    """Applies a function to the numbers of typed PRNG keys. The result is keys of the same kind."""
    return jax.random.wrap_key_data(function(jax.random.key_data(keys)), impl=jax.random.key_impl(keys))


def _spread(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array with the given sharding. Each process puts its part on its devices."""
    # A copy, so that the array survives the donation of the result.
    host = np.array(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
