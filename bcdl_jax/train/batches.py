"""The order of the examples: the random batches of an epoch, drawn such that each device finds its part of every batch in its own memory.

With ``shards`` = D the examples form D blocks of equal length. Block d consists of the rows [d n / D, (d + 1) n / D), and every batch
takes the same number of examples from each block. Arrays that are sharded over D devices along the examples have this layout, so that no
example moves between devices. The same ``shards`` on one device gives the same batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree


def steps_per_epoch(examples: int, batch_size: int, shards: int = 1) -> int:
    """The number of batches of an epoch.

    Each epoch leaves out the examples that fill no whole batch. The order is random, so epochs leave out different examples.

    Raises:
      ValueError: ``batch_size`` is not between 1 and ``examples``, or one of them is not a multiple of ``shards``.
    """
    if not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size is {batch_size}; it must be between 1 and the number of examples, {examples}.")
    if shards < 1:
        raise ValueError(f"shards is {shards}; it must be at least 1.")
    for name, number in (("batch_size", batch_size), ("The number of examples", examples)):
        if number % shards:
            raise ValueError(f"{name} is {number}; it must be a multiple of shards, {shards}.")
    return examples // batch_size


def count_examples(data: PyTree) -> int:
    """The common length of arrays [examples, ...].

    Raises:
      ValueError: The arrays have different lengths, or there are no arrays.
    """
    lengths = sorted({array.shape[0] for array in jax.tree.leaves(data)})
    if len(lengths) != 1:
        raise ValueError(f"The arrays of data have {lengths or 'no'} examples; all must have the same number.")
    return lengths[0]


def epoch_rows(key: jax.Array, epoch: jax.Array | int, examples: int, batch_size: int, shards: int = 1) -> jax.Array:
    """Draws the batches of one epoch.

    Args:
      key: The PRNG key of the run. The key and the epoch determine the order.
      epoch: The number of the epoch, from 0.
      examples: The number of examples.
      batch_size: The number of examples per batch.
      shards: The number of blocks that the examples form: the number of devices that they are spread over. Every batch takes the same
        number of examples from each block.

    Returns:
      The rows of each batch for ``take_batch``, [steps, batch_size] of int32. Each row is counted within its block. The first
      batch_size / shards places of a batch belong to the first block, the next ones to the second block, and so on.

    Raises:
      ValueError: ``batch_size`` is not between 1 and ``examples``, or one of them is not a multiple of ``shards``.
    """
    steps = steps_per_epoch(examples, batch_size, shards)
    order_key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
    if shards == 1:
        return _shuffled(order_key, examples)[: steps * batch_size].reshape(steps, batch_size)

    def rows_of_block(block: jax.Array) -> jax.Array:
        order = _shuffled(jax.random.fold_in(order_key, block), examples // shards)
        return order[: steps * batch_size // shards].reshape(steps, batch_size // shards)

    return jax.vmap(rows_of_block, out_axes=1)(jnp.arange(shards)).reshape(steps, batch_size)


def _shuffled(key: jax.Array, count: int) -> jax.Array:
    """The numbers from 0 to count - 1 in random order: the order of random numbers."""
    # jax.random.permutation sorts twice, since equal random numbers keep their order. With 55,000 examples, two have equal random numbers
    # in every third epoch. The second sort would cost more than this defect.
    return jnp.argsort(jax.random.bits(key, (count,)))


def take_batch(data: PyTree, rows: jax.Array, shards: int = 1) -> PyTree:
    """Takes one batch from the data.

    Args:
      data: A tree of arrays [examples, ...].
      rows: The rows of the batch, [batch_size]: one entry of ``epoch_rows``.
      shards: The number of blocks, the same as for ``epoch_rows``.

    Returns:
      A tree of arrays [batch_size, ...].
    """
    if shards == 1:
        return jax.tree.map(lambda array: array[rows], data)
    in_blocks = rows.reshape(shards, -1)

    def take(array: jax.Array) -> jax.Array:
        blocks = array.reshape(shards, -1, *array.shape[1:])
        return jax.vmap(lambda block, chosen: block[chosen])(blocks, in_blocks).reshape(-1, *array.shape[1:])

    return jax.tree.map(take, data)
