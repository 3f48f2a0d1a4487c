"""Tests that need eight devices. ``test_mesh.py`` runs them in a process with eight simulated ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.conftest import SmallNet
from tests.train.helpers import nll

EXAMPLES, BATCH = 48, 16


@pytest.fixture(scope="module")
def data():
    inputs = np.random.default_rng(0).integers(0, 4, (EXAMPLES, 6), np.uint8)
    return inputs, inputs[:, :3].argmax(-1)


STEP = bcdl_jax.train.make_train_step(nll, optax.sgd(0.1), num_examples=EXAMPLES)


@jax.jit
@jax.vmap
def create(seed):
    params = SmallNet().init(jax.random.key(seed), jnp.ones((1, 6)))["params"]
    return bcdl_jax.train.create_train_state(params, optax.sgd(0.1), jax.random.key(seed))


def assert_near(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def collectives(program, name):
    return re.findall(rf"= .* {name}(?:-start)?\(", program)


@pytest.mark.parametrize("shard_params", [False, True])
def test_an_epoch_on_a_mesh_is_the_epoch_on_one_device(data, shard_params):
    mesh = bcdl_jax.train.make_mesh()
    epoch = bcdl_jax.train.make_train_epoch(STEP, batch_size=BATCH, shards=8)
    start = bcdl_jax.train.select_seed(create(jnp.arange(1)), 0)
    state = bcdl_jax.train.place_state(start, mesh, shard_params=shard_params)
    placed = bcdl_jax.train.place_data(data, mesh)
    assert placed[0].dtype == np.uint8
    assert placed[0].addressable_shards[3].data.shape == (EXAMPLES // 8, 6)
    train = bcdl_jax.train.jit_step(epoch, state).lower(state, placed).compile()
    before = jax.tree.map(lambda array: array.sharding, state.params)
    if not shard_params:
        program = train.as_text()
        assert collectives(program, "all-reduce")
        assert not any(collectives(program, name) for name in ("all-gather", "all-to-all", "collective-permute"))
    after, metrics = train(state, placed)
    assert jax.tree.map(lambda array: array.sharding, after.params) == before
    one, expected = jax.jit(epoch)(start, jax.tree.map(jnp.asarray, data))
    assert_near(bcdl_jax.train.fetch(after.params), one.params)
    assert float(metrics["nll"]) == pytest.approx(float(expected["nll"]), rel=1e-5)
    assert jax.random.key_data(bcdl_jax.train.fetch(after).key).tolist() == jax.random.key_data(start.key).tolist()


def test_params_are_sharded_along_their_longest_axis_that_divides():
    tree = {"kernel": np.zeros((16, 24)), "bias": np.zeros(10), "step": np.int32(3)}
    mesh = bcdl_jax.train.make_mesh()
    placed = bcdl_jax.train.place_state(tree, mesh, shard_params=True)
    shapes = {name: array.addressable_shards[0].data.shape for name, array in placed.items()}
    assert shapes == {"kernel": (16, 3), "bias": (10,), "step": ()}
    whole = bcdl_jax.train.place_state(tree, mesh)
    assert whole["kernel"].addressable_shards[0].data.shape == (16, 24)


def test_seeds_over_devices_are_the_seeds_on_one_device(data):
    seed_axis = 4  # The examples of each seed are spread over two devices.
    mesh = bcdl_jax.train.make_mesh(seed=seed_axis)
    epoch = jax.vmap(
        bcdl_jax.train.make_train_epoch(STEP, batch_size=BATCH, shards=mesh.shape["data"]), in_axes=(0, None)
    )
    start = create(jnp.arange(8))
    states = bcdl_jax.train.place_state(start, mesh, stacked=True)
    kernel = states.params["Dense_0"]["posterior"].kernel_mean
    assert kernel.addressable_shards[0].data.shape == (8 // seed_axis, 6, 5)
    after, metrics = bcdl_jax.train.jit_step(epoch, states)(states, bcdl_jax.train.place_data(data, mesh))
    one, _ = jax.jit(epoch)(start, jax.tree.map(jnp.asarray, data))
    assert_near(bcdl_jax.train.fetch(after.params), one.params)
    assert metrics["loss"].shape == (8,)
    assert metrics["loss"].is_fully_replicated


def test_arrays_that_do_not_fit_a_mesh_are_refused(data):
    with pytest.raises(ValueError, match="seed is 3; it must divide the number of devices, 8"):
        bcdl_jax.train.make_mesh(seed=3)
    mesh = bcdl_jax.train.make_mesh(seed=4)
    with pytest.raises(ValueError, match=r"shape \(6,\); its leading axis must count the seeds, a multiple of 4"):
        bcdl_jax.train.place_state({"a": np.zeros(6)}, mesh, stacked=True)
    with pytest.raises(ValueError, match="data has 3 examples; it must be a multiple of the 2 devices"):
        bcdl_jax.train.place_data(np.zeros(3), mesh)
    with pytest.raises(ValueError, match="data has 4 examples; it must hold rows 0 to 7 of this process"):
        bcdl_jax.train.place_data(np.zeros(4), mesh, examples=8)


def test_the_noise_of_a_pmap_step_has_the_right_mean_and_variance():
    """All examples are equal. If the devices shared noise, the variance of the mean would be eight times as large."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, *_: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )
    start = bcdl_jax.train.select_seed(create(jnp.arange(1)), 0)
    params = jax.tree.map(lambda leaf: leaf + 0.3, start.params)
    state = bcdl_jax.train.create_train_state(params, keep, jax.random.key(5))
    batch = (jnp.ones((BATCH, 6)), jnp.zeros(BATCH, jnp.int32))
    options = {"num_examples": EXAMPLES, "kl_weight": 0.5}
    by_pmap = bcdl_jax.train.make_pmap_train_step(nll, keep, **options)
    plain = jax.jit(bcdl_jax.train.make_train_step(nll, keep, **options))

    def draws(step, state):
        found = []
        for _ in range(300):
            state, metrics = step(state, batch)
            gradient = state.optimizer_state["Dense_2"]["posterior"]
            found.append(
                [float(metrics["nll"]), float(gradient.bias_mean[0]), float(gradient.kernel_log_variance[0, 0])]
            )
        return np.array(found), float(metrics["kl"])

    (many, kl), (one, expected_kl) = draws(by_pmap, state), draws(plain, state.replace(key=jax.random.key(6)))
    assert kl == pytest.approx(expected_kl, rel=1e-6)
    error = np.sqrt((many.var(0) + one.var(0)) / 300)
    assert (one.std(0) > 0).all()
    assert (np.abs(many.mean(0) - one.mean(0)) < 4.5 * error).all()
    assert (np.abs(np.log(many.var(0) / one.var(0))) < np.log(2.2)).all()


def test_pmap_refuses_a_batch_that_cannot_be_spread():
    step = bcdl_jax.train.make_pmap_train_step(nll, optax.sgd(0.1), num_examples=EXAMPLES)
    with pytest.raises(ValueError, match="batch has 12 examples; it must be a multiple of the 8 devices"):
        step(None, (np.zeros((12, 6)), np.zeros(12)))


def converted():
    """A converted network with a skip, an embedding and a norm, its inputs and its targets."""

    def network(params, numbers, words):
        x = jnp.tanh(numbers @ params["first"] + params["bias"])
        x = x + params["words"][words]
        x = (x - x.mean(-1, keepdims=True)) * params["gain"]
        return x @ params["last"]

    key = jax.random.key(0)
    shapes = {"first": (6, 8), "bias": (8,), "words": (5, 8), "gain": (8,), "last": (8, 3)}
    params = {
        name: jax.random.normal(jax.random.fold_in(key, place), shape)
        for place, (name, shape) in enumerate(shapes.items())
    }
    numbers, words = jax.random.normal(key, (EXAMPLES, 6)), jnp.arange(EXAMPLES) % 5
    model = bcdl_jax.variational(network, params, (numbers[:2], words[:2]))
    return model, (numbers, words), jnp.arange(EXAMPLES) % 3


def test_gradients_of_a_converted_network_are_those_of_one_device():
    model, inputs, targets = converted()

    def loss(params, batch, key):
        logits = model.apply(params, *batch[0], key=key)
        return (
            optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
            + bcdl_jax.kl_divergence(params) / 1e3
        )

    gradient = jax.jit(jax.grad(loss))
    one = gradient(model.params, (inputs, targets), jax.random.key(1))
    mesh = bcdl_jax.train.make_mesh()
    params = bcdl_jax.train.place_state(model.params, mesh)
    batch = bcdl_jax.train.place_data((inputs, targets), mesh)
    many = gradient(params, batch, jax.random.key(1))
    assert_near(bcdl_jax.train.fetch(many), one)


def test_fit_trains_on_a_mesh(tmp_path):
    model, inputs, targets = converted()
    config = bcdl_jax.train.FitConfig(
        steps=20, rounds=1, round_steps=5, fine_tune_steps=5, batch_size=20, steps_per_report=4
    )
    validation = jax.tree.map(lambda array: array[:8], (inputs, targets))
    options = {"config": config, "progress": False, "mesh": bcdl_jax.train.make_mesh()}
    result = bcdl_jax.train.fit(
        model, bcdl_jax.train.SoftmaxLoss(), (inputs, targets), validation, checkpoints=tmp_path, **options
    )
    assert result.losses["trained"] < result.losses["plain"]
    batches = [jax.tree.map(lambda array: array[:16], (inputs, targets))]
    in_batches = bcdl_jax.train.fit(model, bcdl_jax.train.SoftmaxLoss(), batches, validation, **options)
    assert in_batches.losses["trained"] < result.losses["plain"]
    odd = [jax.tree.map(lambda array: array[:15], (inputs, targets))]
    with pytest.raises(ValueError, match="data has 15 examples; it must be a multiple of the 8 devices"):
        bcdl_jax.train.fit(model, bcdl_jax.train.SoftmaxLoss(), odd, validation, **options)
