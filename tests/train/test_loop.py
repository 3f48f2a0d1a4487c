import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.conftest import assert_trees_close
from tests.train.helpers import BATCH, EXAMPLES, copy, setup


@pytest.mark.slow
def test_each_seed_of_an_ensemble_equals_training_it_alone(data):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(1e-2), bcdl_jax.train.scale_by_kind({"kernel_log_variance": 2.0})
    )
    _, epoch, states = setup(optimizer)
    together, alone = jax.jit(jax.vmap(epoch, in_axes=(0, None))), jax.jit(epoch)
    ensemble = states
    for _ in range(4):  # 20 steps
        ensemble, _ = together(ensemble, data)
    for index in range(3):
        state = bcdl_jax.train.select_seed(states, index)
        for _ in range(4):
            state, _ = alone(state, data)
        assert int(state.step) == 20
        for left, right in zip(
            jax.tree.leaves(bcdl_jax.train.select_seed(ensemble, index).params),
            jax.tree.leaves(state.params),
            strict=True,
        ):
            assert float(jnp.abs(left - right).max()) <= 1e-5 * float(jnp.abs(right).max())
    first, second = (
        bcdl_jax.train.select_seed(ensemble, index).params["Dense_0"]["posterior"].kernel_mean for index in (0, 1)
    )
    assert float(jnp.abs(first - second).max()) > 1e-2


def test_each_epoch_shows_each_example_once_in_a_new_order(data):
    """The step counts its examples. The incomplete last batch is left out, and no example comes twice."""
    _, _, states = setup(optax.sgd(0.0), seeds=(0,))
    numbers = (data[0][:23], jnp.arange(23))

    def note(state, batch):
        seen = state.failed_parts.at[batch[1]].add(1)
        wrong = jnp.any(batch[0] != data[0][batch[1]])
        return state.replace(step=state.step + 1, failed_parts=seen, optimizer_state=batch[1]), {"wrong": wrong}

    epoch = jax.jit(bcdl_jax.train.make_train_epoch(note, batch_size=5))
    start = bcdl_jax.train.select_seed(states, 0).replace(
        failed_parts=jnp.zeros(23, jnp.int32),
        optimizer_state=jnp.zeros(5, jnp.int32),
        metric_sums={"wrong": jnp.zeros(())},
    )
    state, last_batches = start, set()
    for number in range(1, 4):
        before = state.failed_parts
        state, metrics = epoch(state, numbers)
        assert not metrics["wrong"]
        counts = np.asarray(state.failed_parts - before)
        assert (counts.max(), counts.sum()) == (1, 20)
        assert int(state.step) == 4 * number
        last_batches.add(tuple(np.asarray(state.optimizer_state)))
    assert len(last_batches) == 3
    np.testing.assert_array_equal(epoch(start, numbers)[0].failed_parts, epoch(start, numbers)[0].failed_parts)


def test_batch_size_must_fit(data):
    step, _, states = setup(optax.sgd(0.1))
    for batch_size in (0, -1, EXAMPLES + 1):
        with pytest.raises(
            ValueError,
            match=rf"batch_size is {batch_size}; it must be between 1 and the number of examples, {EXAMPLES}",
        ):
            bcdl_jax.train.make_train_epoch(step, batch_size=batch_size)(bcdl_jax.train.select_seed(states, 0), data)


@pytest.mark.slow
def test_chunks_of_an_epoch_equal_the_epoch(data):
    """Equal bit by bit, with one program for all chunks and the seeds under vmap."""
    step, epoch, states = setup(optax.adam(1e-2), kl_weight=bcdl_jax.kl_warmup(8))
    train_steps = jax.jit(
        jax.vmap(bcdl_jax.train.make_train_loop(step, batch_size=BATCH), in_axes=(0, None, None)), donate_argnums=0
    )
    whole, whole_metrics = copy(states), []
    chunked, chunked_metrics = copy(states), []
    for _ in range(2):
        whole, metrics = train_steps(whole, data, 5)
        whole_metrics.append(metrics)
        for count in (1, 3, 1):
            chunked, metrics = train_steps(chunked, data, count)
        chunked_metrics.append(metrics)
    assert train_steps._cache_size() == 1
    assert_trees_close(chunked, whole, rtol=0)
    assert_trees_close(chunked_metrics, whole_metrics, rtol=0)
    # A plain loop over the same batches is the reference.
    state, losses = bcdl_jax.train.select_seed(states, 1), []
    for number in range(10):
        rows = bcdl_jax.train.epoch_rows(state.key, number // 5, EXAMPLES, BATCH)[number % 5]
        state, metrics = jax.jit(step)(state, jax.tree.map(lambda array, rows=rows: array[rows], data))
        losses.append(float(metrics["loss"]))
    assert_trees_close(bcdl_jax.train.select_seed(whole, 1).params, state.params, rtol=1e-4, atol=1e-6)
    assert [float(metrics["loss"][1]) for metrics in whole_metrics] == pytest.approx(
        [np.mean(losses[:5]), np.mean(losses[5:])], rel=1e-5
    )
    once, metrics = jax.jit(epoch)(bcdl_jax.train.select_seed(states, 1), data)
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(losses[:5])), rel=1e-5)
    assert int(once.step) == 5


def test_metrics_that_the_state_lacks_are_refused(data):
    _, _, states = setup(optax.sgd(0.1), seeds=(0,))
    train_steps = bcdl_jax.train.make_train_loop(lambda state, batch: (state, {"accuracy": 0.0}), batch_size=BATCH)
    with pytest.raises(
        ValueError, match=r"The metrics of the step are accuracy; they must be kl, loss, nll, as in state\.metric_sums"
    ):
        train_steps(bcdl_jax.train.select_seed(states, 0), data, 1)


def test_arrays_of_data_must_have_one_length(data):
    _, epoch, states = setup(optax.sgd(0.1), seeds=(0,))
    for bad, message in (((data[0], data[1][:-3]), r"data have \[\d+, \d+\] examples"), ((), "data have no examples")):
        with pytest.raises(ValueError, match=message):
            epoch(bcdl_jax.train.select_seed(states, 0), bad)
