"""The order of examples: random batches of an epoch, drawn so that every device finds its part of them in its own memory.

With ``shards`` = D the examples count as D blocks of equal length, block d being rows [d n / D, (d + 1) n / D), and every batch
takes the same number of examples from each block. Arrays sharded over D devices along the examples lie just so, so that no
example ever moves between devices; and the same ``shards`` on one device gives the same batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bcdl_jax._tree import PyTree


def steps_per_epoch(examples: int, batch_size: int, shards: int = 1) -> int:
    """Batches of an epoch; examples that fill no whole batch are left out, other ones each time.

    Raises:
      ValueError: ``batch_size`` does not lie between 1 and ``examples``, or one of them is not a multiple of ``shards``.
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
    """The common length of arrays [examples, ...]. Raises ValueError if it differs, or there are no arrays."""
    lengths = sorted({array.shape[0] for array in jax.tree.leaves(data)})
    if len(lengths) != 1:
        raise ValueError(f"The arrays of data have {lengths or 'no'} examples; all must have the same number.")
    return lengths[0]


def epoch_rows(key: jax.Array, epoch: jax.Array | int, examples: int, batch_size: int, shards: int = 1) -> jax.Array:
    """The batches of one epoch.

    Args:
      key: of the run; with the epoch it decides on the order.
      epoch: counted from 0.
      examples: how many there are.
      batch_size: examples per batch.
      shards: number of blocks, see above.

    Returns:
      [steps, batch_size] of int32: for each place in a batch, the row within its block, for ``take_batch``. The first
      batch_size / shards places belong to the first block, and so on.

    Raises:
      ValueError: as for ``steps_per_epoch``.
    """
    steps = steps_per_epoch(examples, batch_size, shards)
    order_key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
    if shards == 1:
        return _shuffled(order_key, examples)[: steps * batch_size].reshape(steps, batch_size)

    def of_block(block: jax.Array) -> jax.Array:
        order = _shuffled(jax.random.fold_in(order_key, block), examples // shards)
        return order[: steps * batch_size // shards].reshape(steps, batch_size // shards)

    return jax.vmap(of_block, out_axes=1)(jnp.arange(shards)).reshape(steps, batch_size)


def _shuffled(key: jax.Array, count: int) -> jax.Array:
    """0 to count - 1 in random order, by sorting random numbers.

    ``jax.random.permutation`` sorts twice, since equal numbers keep their order: of 55,000 examples two, in every third epoch. In a training
    run that is not worth the time.
    """
    return jnp.argsort(jax.random.bits(key, (count,)))


def take_batch(data: PyTree, rows: jax.Array, shards: int = 1) -> PyTree:
    """One batch, [batch_size, ...] per array.

    Args:
      data: tree of arrays [examples, ...].
      rows: [batch_size], one entry of ``epoch_rows``.
      shards: as given to ``epoch_rows``.
    """
    if shards == 1:
        return jax.tree.map(lambda array: array[rows], data)
    in_blocks = rows.reshape(shards, -1)

    def take(array: jax.Array) -> jax.Array:
        blocks = array.reshape(shards, -1, *array.shape[1:])
        return jax.vmap(lambda block, chosen: block[chosen])(blocks, in_blocks).reshape(-1, *array.shape[1:])

    return jax.tree.map(take, data)
