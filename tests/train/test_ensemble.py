import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from bcdl_jax.train import trainer
from bcdl_jax.train.messages import end_warnings
from tests.conftest import assert_trees_close
from tests.train.helpers import BATCH, EXAMPLES, copy, nll, setup, validation_error


def test_training_reports_every_epoch_and_learns(data):
    step, _, states = setup(optax.adam(0.03), seeds=(3, 4), kl_weight=0.001)
    history = [
        report
        for _, report in bcdl_jax.train.train_ensemble(
            states,
            data,
            step=step,
            batch_size=BATCH,
            epochs=30,
            validation_error=validation_error,
            validation_data=data,
            seeds=(3, 4),
        )
    ]
    assert [report.reports[0].epoch for report in history] == list(range(1, 31))
    for index, seed in enumerate((3, 4)):
        first, last = history[0].reports[index], history[-1].reports[index]
        assert last.seed == seed
        assert last.nll < 0.5 * first.nll
        assert last.validation_error < first.validation_error
        assert set(last.kept) == {"Dense_0", "Dense_1", "Dense_2"}
        assert last.failure is None


@pytest.mark.slow
@pytest.mark.parametrize("in_turn", [False, True])
def test_a_program_compiled_ahead_from_shapes_is_the_one_that_is_run(data, in_turn):
    step, _, states = setup(optax.adam(0.03), seeds=(3, 4))
    traced = []

    def counted(state, batch):
        traced.append(state.step.shape)
        return step(state, batch)

    def train(**more):
        runs = bcdl_jax.train.train_ensemble(
            copy(states),
            data,
            step=counted,
            batch_size=BATCH,
            epochs=2,
            validation_error=validation_error,
            validation_data=data,
            seeds=(3, 4),
            in_turn=in_turn,
            **more,
        )
        return [jax.device_get(state.params) for state, _ in runs][-1]

    expected = train()
    shapes = jax.eval_shape(lambda: copy(states))
    program = bcdl_jax.train.compile_ensemble(shapes, data, step=counted, batch_size=BATCH, in_turn=in_turn)
    before = len(traced)
    jax.tree.map(np.testing.assert_array_equal, train(program=program), expected)
    assert len(traced) == before


@pytest.mark.slow
def test_a_value_that_is_not_finite_stops_its_seed_alone(data):
    """The likelihood of seed 1 explodes through layer Dense_1 at step 7, which is the second step of the second epoch."""
    optimizer = optax.adam(1e-3)

    def likelihood(params, batch, key):
        poison = params["Dense_1"]["posterior"].bias_mean[0] * jax.lax.stop_gradient(params["bomb"]["fuse"])
        return nll({name: layer for name, layer in params.items() if name != "bomb"}, batch, key) + poison

    _, _, states = setup(optax.sgd(0.0))
    params = states.params | {"bomb": {"fuse": jnp.zeros(3)}}
    keys = states.key
    states = jax.vmap(lambda p, k: bcdl_jax.train.create_train_state(p, optimizer, k))(params, keys)
    step = bcdl_jax.train.make_train_step(likelihood, optimizer, num_examples=EXAMPLES)

    def armed(state, batch):
        is_one = jnp.all(jax.random.key_data(state.key) == jax.random.key_data(keys[1]))
        fuse = jnp.where(is_one & (state.step == 6), jnp.nan, 0.0)
        after, metrics = step(state.replace(params=state.params | {"bomb": {"fuse": fuse}}), batch)
        return after.replace(params=after.params | {"bomb": {"fuse": jnp.zeros(())}}), metrics

    plain = copy(states)
    arguments = {"validation_error": lambda p, d: jnp.float32(0), "validation_data": data, "seeds": (7, 8, 9)}
    history = list(bcdl_jax.train.train_ensemble(states, data, step=armed, batch_size=BATCH, epochs=3, **arguments))
    final, report = history[-1]
    assert [seed.failure is not None for seed in report.reports] == [False, True, False]
    sentence = report.reports[1].failure
    assert sentence.startswith(
        "Seed 8 was stopped in epoch 2, step 7: the loss or an update was not finite in layer Dense_1."
    )
    assert [each.messages for _, each in history[:2]] == [(), (sentence,)]
    assert final.step.tolist() == [15, 6, 15]
    # The other seeds are not disturbed, and the stopped seed keeps its state from after step 6.
    one = jax.jit(lambda state: bcdl_jax.train.make_train_epoch(step, batch_size=BATCH)(state, data)[0])
    alone = one(one(one(bcdl_jax.train.select_seed(plain, 2))))
    assert_trees_close(bcdl_jax.train.select_seed(final, 2).params, alone.params, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bcdl_jax.train.select_seed(final, 1).params))


@pytest.mark.slow
def test_inputs_that_are_not_finite_blame_no_single_layer(data):
    step, _, states = setup(optax.sgd(0.1), seeds=(5,))
    bad = (data[0].at[:, 0].set(jnp.nan), data[1])
    arguments = {"validation_error": validation_error, "validation_data": data, "seeds": (5,)}
    ((_, report),) = bcdl_jax.train.train_ensemble(states, bad, step=step, batch_size=BATCH, epochs=1, **arguments)
    assert "Seed 5 was stopped in epoch 1, step 1" in report.messages[0]
    assert "in all layers (inputs that are not finite" in report.messages[0]


@pytest.mark.slow
def test_warnings_of_everything_pruned_and_of_nothing_pruned_come_once(data):
    step, _, states = setup(optax.sgd(0.0), seeds=(0, 1))
    first = states.params["Dense_1"]["posterior"]
    lost = first.replace(scale_log_variance=first.scale_log_variance.at[1].set(5.0))
    states = states.replace(params=states.params | {"Dense_1": {"posterior": lost}})
    arguments = {"validation_error": validation_error, "validation_data": data, "seeds": (0, 1)}
    messages = [
        message
        for _, report in bcdl_jax.train.train_ensemble(
            states, data, step=step, batch_size=BATCH, epochs=12, **arguments
        )
        for message in report.messages
    ]
    assert len(messages) == 2
    assert messages[0].startswith("Seed 1, epoch 1: everything would be pruned in layer Dense_1 (none of its 5 groups")
    assert messages[1].startswith("Seed 0, epoch 10: nothing is pruned yet (all 15 groups are kept)")


@pytest.mark.slow
def test_the_last_epoch_warns_of_whole_layers_and_of_a_high_kl(data):
    """The KL of a fresh network is about 3 nats for each of its 62 weights; the likelihood is about 1 nat."""
    step, _, states = setup(optax.sgd(0.0), seeds=(0,), likelihood=lambda *args: 0.001 * nll(*args))
    first = states.params["Dense_0"]["posterior"]
    lost = first.replace(scale_log_variance=first.scale_log_variance.at[0, 1].set(5.0))
    states = states.replace(params=states.params | {"Dense_0": {"posterior": lost}})
    required = {"validation_error": validation_error, "validation_data": data, "seeds": (0,)}

    def messages(**options):
        runs = bcdl_jax.train.train_ensemble(copy(states), data, step=step, batch_size=BATCH, **required, **options)
        return [report.messages for _, report in runs]

    before, (whole, high) = messages(epochs=2)
    assert before == ()
    assert whole.startswith(
        "Seed 0, epoch 2: training ends and nothing is pruned in layers Dense_1 (all 5), Dense_2 (all 4), while other layers lose groups"
    )
    assert re.match(
        r"Seed 0, epoch 2: training ends with a KL of \d\.\d+ nats per example beside a negative log-likelihood of 0\.001",
        high,
    )
    # Fine-tuning has no thresholds: what is pruned is known.
    assert messages(epochs=1, thresholds=float("inf")) == [()]


@pytest.mark.parametrize(
    ("nll", "kl", "warns"),
    [(0.5, 49.0, False), (0.5, 51.0, True), (-3.0, 250.0, False), (0.0, 0.9, False), (0.0, 1.1, True)],
)
def test_a_high_kl_is_a_hundred_times_the_likelihood(nll, kl, warns):
    found = end_warnings(0, 9, {"a": 3}, {"a": 3}, "groups", nll, kl)
    assert ("KL" in found) == warns
    assert "whole layers" not in found  # A network that prunes nothing has a warning of its own.


def test_bad_arguments(data):
    step, _, states = setup(optax.sgd(0.1), seeds=(0,))
    for seeds in ((0, 1), ()):
        with pytest.raises(ValueError, match=r"seeds is .*; it must name each of the 1 stacked states"):
            bcdl_jax.train.train_ensemble(
                states,
                data,
                step=step,
                batch_size=BATCH,
                epochs=1,
                validation_error=validation_error,
                validation_data=data,
                seeds=seeds,
            )
    with pytest.raises(ValueError, match=r"states.step has shape \(\); states must be stacked"):
        train(bcdl_jax.train.select_seed(states, 0), data, step, seeds=(0,))
    with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
        next(
            bcdl_jax.train.train_ensemble(
                states,
                data,
                step=step,
                batch_size=BATCH,
                epochs=0,
                validation_error=validation_error,
                validation_data=data,
                seeds=(0,),
            )
        )


OPTIMIZER = optax.chain(optax.adam(optax.cosine_decay_schedule(0.01, 20)), bcdl_jax.train.params_ema(0.9))


def train(states, data, step, seeds, epochs=4, **options):
    """The last states, the reports of all epochs, and True if the training was stopped within an epoch."""
    history = [
        (copy(state), report)
        for state, report in bcdl_jax.train.train_ensemble(
            states,
            data,
            step=step,
            batch_size=BATCH,
            epochs=epochs,
            validation_error=validation_error,
            validation_data=data,
            seeds=seeds,
            **options,
        )
    ]
    return history[-1][0], [report for _, report in history if report is not None], history[-1][1] is None


@pytest.mark.slow
@pytest.mark.parametrize("in_turn", [False, True])
def test_a_run_ended_anywhere_goes_on_bit_by_bit(data, in_turn, monkeypatch):
    """A run that stops after every three chunks of one step gives the same states and reports as a run of whole epochs."""
    step, _, states = setup(OPTIMIZER, seeds=(3, 4), kl_weight=bcdl_jax.kl_warmup(10))
    expected, expected_reports, _ = train(copy(states), data, step, (3, 4), epochs=2, in_turn=in_turn)
    monkeypatch.setattr(trainer, "_CHUNK_SECONDS", 0.0)
    reports, ends, ended = [], 0, True
    while ended:
        stop = functools.partial(next, iter([False] * 3), True)
        states, new, ended = train(states, data, step, (3, 4), epochs=2, in_turn=in_turn, stop=stop)
        reports += new
        ends += ended
    assert ends >= 2
    assert_trees_close(states, expected, rtol=0)
    assert reports == expected_reports


@pytest.mark.slow
def test_in_turn_equals_vmap(data):
    step, _, states = setup(OPTIMIZER, seeds=(3, 4))
    together, reports, _ = train(copy(states), data, step, (3, 4), epochs=2)
    alone, reports_alone, _ = train(states, data, step, (3, 4), epochs=2, in_turn=True)
    assert_trees_close(together, alone, rtol=1e-4, atol=1e-6)
    assert [report.reports[1].loss for report in reports] == pytest.approx(
        [report.reports[1].loss for report in reports_alone], rel=1e-5
    )


@pytest.mark.slow
def test_completed_epochs_and_halted_seeds_are_not_trained_again(data):
    step, _, states = setup(OPTIMIZER, seeds=(3, 4))
    states, _, _ = train(states, data, step, (3, 4), epochs=2)
    arguments = {"validation_error": validation_error, "validation_data": data, "seeds": (3, 4)}
    assert not list(bcdl_jax.train.train_ensemble(states, data, step=step, batch_size=BATCH, epochs=2, **arguments))
    halted = states.replace(halted=jnp.ones(2, bool))
    assert not list(bcdl_jax.train.train_ensemble(halted, data, step=step, batch_size=BATCH, epochs=9, **arguments))
