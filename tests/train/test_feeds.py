import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax import train
from bcdl_jax.train.feeds import make_feed, some_batches

X = np.arange(24.0, dtype=np.float32).reshape(12, 2)
Y = np.arange(12.0, dtype=np.float32)


def in_batches(epoch=0, size=5):
    """Batches of 5, 5 and 2 examples, in an order that depends on the epoch."""
    order = np.random.default_rng(epoch).permutation(12)
    return [(X[rows], Y[rows]) for rows in np.split(order, [size, 2 * size])]


def test_arrays_and_batches_hold_the_same_examples():
    for data in ((X, Y), in_batches, in_batches()):
        feed = make_feed("data", data, 5)
        found = np.sort(np.concatenate([batch[1] for batch in feed.batches()]))
        np.testing.assert_array_equal(found, Y)
        assert feed.steps == 2  # Training leaves out the smaller last batch.
        assert sum(len(batch[1]) for batch in some_batches(feed, 7)) == 7


def result_of(data, key, steps=7):
    model = bcdl_jax.variational(lambda params, x: (x @ params["kernel"])[:, 0], {"kernel": jnp.ones((2, 1))}, X)
    config = train.FitConfig(steps=steps, rounds=0, fine_tune_steps=2, batch_size=5, steps_per_report=3)
    options = {"key": key, "config": config, "progress": False}
    return train.fit(model, train.GaussianLoss(), data, (X, Y), **options)


def test_fit_trains_on_batches(key):
    seen = []

    def epoch(number):
        seen.append(number)
        return in_batches(number)

    result = result_of(epoch, key)
    assert [report.step for report in result.reports] == [3, 6, 7, 2]
    assert {0, 1, 2, 3} <= set(seen)
    again = result_of(in_batches, key)
    jax.tree.map(np.testing.assert_array_equal, result.params, again.params)
    # A list is iterated again in each epoch, in the same order.
    listed = result_of(in_batches(), key)
    assert not np.array_equal(listed.params["kernel"].kernel_mean, again.params["kernel"].kernel_mean)


def test_data_that_cannot_be_used_are_refused(key):
    with pytest.raises(ValueError, match="data ends at once; each epoch must have at least one batch"):
        make_feed("data", [], 5)
    same = (batch for batch in in_batches())
    with pytest.raises(ValueError, match="data returns the same iterator at two calls; it must return new batches"):
        make_feed("data", lambda number: same, 5)
    with pytest.raises(ValueError, match=r"data is a generator; .* An iterator ends after one epoch: pass a function"):
        make_feed("data", (batch for batch in in_batches()), 5)
    with pytest.raises(
        ValueError, match=r"a batch with arrays of shapes \[\(5, 3\), \(5,\)\]; the first one has \[\(5, 2\), \(5,\)\]"
    ):
        make_feed("data", [(X[:5], Y[:5]), (np.ones((5, 3)), Y[:5])], 5)
    with pytest.raises(ValueError, match="validation is or holds a ndarray; it must be a pair"):
        make_feed("validation", [X], 5)
    with pytest.raises(ValueError, match="data is a dict; it must be a pair of inputs and targets"):
        make_feed("data", {"x": X}, 5)
    shorter = lambda number: in_batches()[: 2 if number == 0 else 1]  # noqa: E731
    with pytest.raises(ValueError, match="data has fewer than 2 batches in epoch 1, unlike in its first one"):
        result_of(shorter, key)
