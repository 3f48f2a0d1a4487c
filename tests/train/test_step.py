import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.conftest import SmallNet, assert_trees_close
from tests.train.helpers import EXAMPLES, nll, setup


def test_step_is_the_gradient_step_on_the_negative_elbo(data):
    optimizer = optax.sgd(0.01)
    step, _, states = setup(optimizer, kl_weight=bcdl_jax.kl_warmup(4))
    state = bcdl_jax.train.select_seed(states, 0).replace(step=jnp.int32(2))
    after, metrics = jax.jit(step)(state, data)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 2)

    def loss(params):
        return bcdl_jax.negative_elbo(nll(params, data, key), params, num_examples=EXAMPLES, kl_weight=0.5)

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    expected = jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, state.params, gradient)
    assert_trees_close(after.params, expected, rtol=1e-4, atol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(metrics["nll"] + 0.5 * metrics["kl"]), rel=1e-5)
    assert int(after.step) == 3
    assert not after.halted


@pytest.mark.slow
def test_variances_are_clipped_and_masks_kept_whatever_the_optimiser(data):
    optimizer = optax.adamw(0.5, weight_decay=0.5)
    step, _, states = setup(optimizer, seeds=(0,), model=SmallNet(clip_var=2e-4))
    state = bcdl_jax.train.select_seed(states, 0)
    state = state.replace(params=bcdl_jax.prune(state.params, {"Dense_0": -9.0, "Dense_1": 0.0, "Dense_2": 0.0}))
    step = jax.jit(step)
    for _ in range(3):
        after, _ = step(state, data)
        for name, posterior in bcdl_jax.variational_layers(after.params).items():
            before = bcdl_jax.variational_layers(state.params)[name]
            np.testing.assert_array_equal(posterior.input_mask, before.input_mask)
            np.testing.assert_array_equal(posterior.output_mask, before.output_mask)
        state = after
    assert float(jnp.exp(state.params["Dense_0"]["posterior"].kernel_log_variance).max()) == pytest.approx(
        2e-4, rel=1e-5
    )
    assert float(jnp.exp(state.params["Dense_1"]["posterior"].kernel_log_variance).max()) > 3e-4


@pytest.mark.slow
def test_the_layer_that_overflows_is_named(data):
    step, _, states = setup(optax.sgd(0.1), seeds=(0,))
    state = bcdl_jax.train.select_seed(states, 0)
    broken = state.params["Dense_1"]["posterior"]
    params = state.params | {
        "Dense_1": {"posterior": broken.replace(kernel_log_variance=broken.kernel_log_variance.at[0, 0].set(200.0))}
    }
    after, metrics = jax.jit(step)(state.replace(params=params), data)
    assert not np.isfinite(metrics["loss"])
    assert after.halted
    assert int(after.step) == 0
    assert after.failed_parts.tolist() == [False, True, False]
    assert_trees_close(after.params, params, rtol=0)


@pytest.mark.slow
def test_training_goes_on_from_a_pruned_net(data):
    """The means are fine-tuned: frozen variances and masks stay the same, and the loss falls."""
    frozen = {"kernel_log_variance": 0.0, "bias_log_variance": 0.0, "scale_log_variance": 0.0}
    optimizer = optax.chain(optax.adam(0.03), bcdl_jax.train.scale_by_kind(frozen))
    _, epoch, states = setup(optimizer, seeds=(0,), kl_weight=0.001)
    params = bcdl_jax.prune(
        bcdl_jax.train.select_seed(states, 0).params,
        {"Dense_0": 0.0, "Dense_1": -9.0, "Dense_2": 0.0},
        ["Dense_0", "Dense_1", "Dense_2"],
    )
    state = bcdl_jax.train.create_train_state(params, optimizer, jax.random.key(0))
    run = jax.jit(epoch)
    losses = []
    for _ in range(20):
        state, metrics = run(state, data)
        losses.append(float(metrics["nll"]))
    assert losses[-1] < 0.7 * losses[0]
    after, before = state.params["Dense_1"]["posterior"], params["Dense_1"]["posterior"]
    np.testing.assert_array_equal(after.kernel_log_variance, before.kernel_log_variance)
    np.testing.assert_array_equal(after.scale_log_variance, before.scale_log_variance)
    np.testing.assert_array_equal(after.input_mask, before.input_mask)
    assert float(jnp.abs(after.kernel_mean - before.kernel_mean).max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
        optax.polyak_sgd(0.3),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    ],
    ids=["plateau", "polyak", "line search"],
)
def test_optimisers_that_need_the_loss(optimizer, key):
    model, inputs = bcdl_jax.Dense(3), jax.random.normal(key, (32, 5))
    labels = jnp.argmax(inputs[:, :3], -1)

    def nll(params, batch, key):
        logits = model.apply({"params": params}, batch[0], deterministic=False, rngs={"noise": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    step = jax.jit(bcdl_jax.train.make_train_step(nll, optimizer, num_examples=32, kl_weight=0.0))
    state = bcdl_jax.train.create_train_state(model.init(key, inputs)["params"], optimizer, key)
    losses = []
    for _ in range(5):
        state, metrics = step(state, (inputs, labels))
        losses.append(float(metrics["loss"]))
    assert not state.halted
    assert losses[-1] < losses[0]


def test_updates_of_masks_that_are_not_finite_do_not_halt(key):
    model, inputs = bcdl_jax.Dense(3), jax.random.normal(key, (8, 5))
    params = model.init(key, inputs)["params"]
    # Divides each gradient by its own norm, which is zero for a mask.
    normalize = optax.stateless(lambda updates, _: jax.tree.map(lambda g: -1e-3 * g / jnp.linalg.norm(g), updates))

    def nll(params, batch, key):
        return jnp.mean(model.apply({"params": params}, batch, deterministic=False, rngs={"noise": key}) ** 2)

    step = jax.jit(bcdl_jax.train.make_train_step(nll, normalize, num_examples=8))
    state, _ = step(bcdl_jax.train.create_train_state(params, normalize, key), inputs)
    assert not state.halted
    assert all(bool(jnp.all(leaf == leaf)) for leaf in jax.tree.leaves(state.params))


def test_masks_are_kept_in_a_loop_of_ones_own(data):
    """Weight decay would move masks towards 0, and noise would move them below 0."""
    _, _, states = setup(optax.sgd(0.1), seeds=(0,))
    params = bcdl_jax.train.select_seed(states, 0).params
    moved = jax.tree.map(lambda leaf: leaf - 2, params)
    kept = bcdl_jax.keep_masks(moved, params)
    for name, layer in bcdl_jax.variational_layers(kept).items():
        before = bcdl_jax.variational_layers(params)[name]
        np.testing.assert_array_equal(layer.input_mask, before.input_mask)
        np.testing.assert_array_equal(layer.output_mask, before.output_mask)
        np.testing.assert_array_equal(layer.kernel_mean, before.kernel_mean - 2)


def test_num_examples_must_be_positive():
    with pytest.raises(ValueError, match="num_examples is 0"):
        bcdl_jax.train.make_train_step(nll, optax.sgd(0.1), num_examples=0)
