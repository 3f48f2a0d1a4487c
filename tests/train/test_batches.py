import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcdl_jax.train.batches import count_examples, epoch_rows, steps_per_epoch, take_batch


def test_without_shards_the_rows_are_a_permutation_cut_into_batches(key):
    rows = epoch_rows(key, 3, 23, 5)
    order_key = jax.random.fold_in(jax.random.fold_in(key, 1), 3)
    order = np.argsort(np.asarray(jax.random.bits(order_key, (23,))))
    np.testing.assert_array_equal(rows, order[:20].reshape(4, 5))
    data = {"images": np.random.default_rng(0).integers(0, 256, (23, 2, 2), np.uint8), "labels": np.arange(23)}
    batch = take_batch(jax.tree.map(jnp.asarray, data), rows[1])
    assert batch["images"].dtype == np.uint8
    for name, array in data.items():
        np.testing.assert_array_equal(batch[name], array[np.asarray(rows[1])])


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_each_batch_takes_the_same_number_from_each_block_and_no_example_twice(key, shards):
    examples, batch_size, steps = 28, 8, 3
    numbers = jnp.arange(examples)
    take = jax.jit(
        jax.vmap(
            lambda epoch: jax.lax.map(
                lambda rows: take_batch(numbers, rows, shards), epoch_rows(key, epoch, examples, batch_size, shards)
            )
        )
    )
    epochs = np.asarray(take(jnp.arange(2)))
    assert epochs.shape == (2, steps, batch_size)
    for batches in epochs:
        assert len(np.unique(batches)) == steps * batch_size
        block = batches // (examples // shards)
        np.testing.assert_array_equal(
            block, np.broadcast_to(np.arange(batch_size) // (batch_size // shards), block.shape)
        )
    assert (epochs[0] != epochs[1]).any()
    within = epochs[0].reshape(steps, shards, -1) % (examples // shards)
    assert all((within[:, 0] != within[:, other]).any() for other in range(1, shards))  # Each block has its own order.


def test_every_example_comes_first_equally_often(key):
    rows = jax.jit(jax.vmap(lambda epoch: epoch_rows(key, epoch, 8, 4, 2)[0]))(jnp.arange(4000))
    for place in range(4):
        counts = np.bincount(np.asarray(rows[:, place]), minlength=4)
        assert np.abs(counts - 1000).max() < 5 * np.sqrt(750)  # Five standard deviations of a binomial of 4000 and 1/4.


@pytest.mark.parametrize(
    ("examples", "batch_size", "shards", "message"),
    [
        (10, 0, 1, "batch_size is 0; it must be between 1 and the number of examples, 10"),
        (10, 11, 1, "batch_size is 11; it must be between 1 and the number of examples, 10"),
        (12, 6, 4, "batch_size is 6; it must be a multiple of shards, 4"),
        (10, 4, 4, "The number of examples is 10; it must be a multiple of shards, 4"),
        (10, 4, 0, "shards is 0; it must be at least 1"),
    ],
)
def test_bad_sizes_are_refused(examples, batch_size, shards, message):
    with pytest.raises(ValueError, match=message):
        steps_per_epoch(examples, batch_size, shards)


def test_arrays_of_different_lengths_are_refused():
    assert count_examples((np.zeros((3, 2)), np.zeros(3))) == 3
    with pytest.raises(ValueError, match=r"data have \[3, 4\] examples; all must have the same number"):
        count_examples((np.zeros((3, 2)), np.zeros(4)))
    with pytest.raises(ValueError, match="data have no examples"):
        count_examples(())
