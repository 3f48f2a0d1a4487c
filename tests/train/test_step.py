import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.conftest import SmallNet, assert_trees_close

EXAMPLES, BATCH = 40, 8


@pytest.fixture(scope="module")
def data(key):
    inputs = jax.random.normal(key, (EXAMPLES, 6))
    return inputs, jnp.argmax(inputs[:, :3], axis=-1)


def nll(params, batch, key):
    logits = SmallNet().apply({"params": params}, batch[0], deterministic=False, rngs={"noise": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def validation_error(params, held_out):
    return 100 * jnp.mean(jnp.argmax(SmallNet().apply({"params": params}, held_out[0]), -1) != held_out[1])


def setup(optimizer, seeds=(0, 1, 2), likelihood=nll, model=None, **options):
    model = model or SmallNet()
    step = bcdl_jax.train.make_train_step(likelihood, optimizer, num_examples=EXAMPLES, **options)
    epoch = bcdl_jax.train.make_train_epoch(step, batch_size=BATCH)

    @jax.jit
    @jax.vmap
    def create(seed):
        key = jax.random.key(seed)
        return bcdl_jax.train.create_train_state(
            model.init(key, jnp.ones((1, 6)))["params"], optimizer, jax.random.fold_in(key, 1)
        )

    return step, epoch, create(jnp.array(seeds))


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


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


def test_an_epoch_shows_each_example_once_in_an_order_of_its_own(data):
    """A step that counts the examples it is given: an incomplete last batch is left out, and nothing comes twice."""
    _, _, states = setup(optax.sgd(0.0), seeds=(0,))
    numbers = (data[0][:23], jnp.arange(23))

    def note(state, batch):
        seen = state.blamed.at[batch[1]].add(1)
        wrong = jnp.any(batch[0] != data[0][batch[1]])
        return state.replace(step=state.step + 1, blamed=seen, optimizer_state=batch[1]), {"wrong": wrong}

    epoch = jax.jit(bcdl_jax.train.make_train_epoch(note, batch_size=5))
    start = bcdl_jax.train.select_seed(states, 0).replace(
        blamed=jnp.zeros(23, jnp.int32), optimizer_state=jnp.zeros(5, jnp.int32), metric_sums={"wrong": jnp.zeros(())}
    )
    state, last_batches = start, set()
    for number in range(1, 4):
        before = state.blamed
        state, metrics = epoch(state, numbers)
        assert not metrics["wrong"]
        counts = np.asarray(state.blamed - before)
        assert (counts.max(), counts.sum()) == (1, 20)
        assert int(state.step) == 4 * number
        last_batches.add(tuple(np.asarray(state.optimizer_state)))
    assert len(last_batches) == 3
    np.testing.assert_array_equal(epoch(start, numbers)[0].blamed, epoch(start, numbers)[0].blamed)


def test_batch_size_must_fit(data):
    step, _, states = setup(optax.sgd(0.1))
    for batch_size in (0, -1, EXAMPLES + 1):
        with pytest.raises(
            ValueError,
            match=rf"batch_size is {batch_size}; it must be between 1 and the number of examples, {EXAMPLES}",
        ):
            bcdl_jax.train.make_train_epoch(step, batch_size=batch_size)(bcdl_jax.train.select_seed(states, 0), data)


def test_parameter_kinds_and_a_learning_rate_per_kind(data):
    _, _, states = setup(optax.sgd(1.0), seeds=(0,))
    params = bcdl_jax.train.select_seed(states, 0).params | {"other": jnp.ones(2)}
    kinds = bcdl_jax.train.parameter_kinds(params)
    assert kinds["other"] == "deterministic"
    assert kinds["Dense_0"]["posterior"].kernel_log_variance == "kernel_log_variance"
    ones = jax.tree.map(jnp.ones_like, params)
    factors = {"kernel_log_variance": 4.0, "scale_mean": 0.0}
    scaled, _ = bcdl_jax.train.scale_by_kind(factors).update(ones, optax.EmptyState())
    by_optax = optax.partition(
        {kind: optax.scale(factors.get(kind, 1.0)) for kind in set(jax.tree.leaves(kinds))},
        bcdl_jax.train.parameter_kinds,
    )
    expected, _ = by_optax.update(ones, by_optax.init(params))
    assert_trees_close(scaled, expected, rtol=0)
    assert float(scaled["Dense_1"]["posterior"].kernel_log_variance[0, 0]) == 4
    assert float(scaled["Dense_1"]["posterior"].scale_mean[0]) == 0
    scaled, _ = bcdl_jax.train.scale_by_kind({"log_variance": 3.0, "bias_log_variance": 0.0}).update(
        ones, optax.EmptyState()
    )
    layer = scaled["Dense_0"]["posterior"]
    found = [float(jnp.ravel(getattr(layer, name))[0]) for name in ("kernel_log_variance", "scale_log_variance")]
    assert found == [3, 3]
    assert (float(layer.bias_log_variance[0]), float(layer.kernel_mean[0, 0])) == (0, 1)


@pytest.mark.parametrize("family", [bcdl_jax.GroupNormalJeffreys(), bcdl_jax.GroupHorseshoe()])
def test_scale_stands_for_the_means_of_the_scales_of_a_family(family):
    ones = jax.tree.map(jnp.ones_like, family.create(jax.random.key(0), jnp.ones((3, 2)), jnp.ones(2), "input"))
    scaled, _ = bcdl_jax.train.scale_by_kind({"scale": 0.5, "log_variance": 3.0}).update(ones, optax.EmptyState())
    arrays = {name: leaf for name, leaf in vars(scaled).items() if isinstance(leaf, jax.Array)}
    factors = {name: set(leaf.ravel().tolist()) for name, leaf in arrays.items()}
    for name in ("kernel_mean", "bias_mean", "input_mask"):
        assert factors[name] == {1}
    scales = {name for name in factors if "scale" in name or name.startswith(("layer", "group"))}
    means, variances = ({name for name in scales if name.endswith(end)} for end in ("mean", "log_variance"))
    assert means
    assert means | variances == scales
    assert all(factors[name] == {0.5} for name in means)
    assert all(factors[name] == {3} for name in variances | {"kernel_log_variance", "bias_log_variance"})


def test_a_kind_that_does_not_exist_is_refused(data):
    _, _, states = setup(optax.sgd(1.0), seeds=(0,))
    with pytest.raises(
        ValueError,
        match=r"factors names kind kernel_logvar; the kinds are bias_log_variance, bias_mean, [^.]*\blog_variance, ",
    ):
        bcdl_jax.train.scale_by_kind({"kernel_logvar": 0.0}).update(
            bcdl_jax.train.select_seed(states, 0).params, optax.EmptyState()
        )


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
    assert after.blamed.tolist() == [False, True, False]
    assert_trees_close(after.params, params, rtol=0)


def test_training_goes_on_from_a_pruned_net(data):
    """Fine-tuning the means: frozen variances stay, pruned groups stay pruned, the likelihood falls."""
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


def test_masks_are_kept_in_a_loop_of_ones_own(data):
    """Weight decay moves them towards 0; noise moves them across it."""
    _, _, states = setup(optax.sgd(0.1), seeds=(0,))
    params = bcdl_jax.train.select_seed(states, 0).params
    moved = jax.tree.map(lambda leaf: leaf - 2, params)
    kept = bcdl_jax.keep_masks(moved, params)
    for name, layer in bcdl_jax.variational_layers(kept).items():
        before = bcdl_jax.variational_layers(params)[name]
        np.testing.assert_array_equal(layer.input_mask, before.input_mask)
        np.testing.assert_array_equal(layer.output_mask, before.output_mask)
        np.testing.assert_array_equal(layer.kernel_mean, before.kernel_mean - 2)


def test_bad_arguments(data):
    _, epoch, states = setup(optax.sgd(0.1), seeds=(0,))
    for bad, message in (((data[0], data[1][:-3]), r"data have \[\d+, \d+\] examples"), ((), "data have no examples")):
        with pytest.raises(ValueError, match=message):
            epoch(bcdl_jax.train.select_seed(states, 0), bad)
    with pytest.raises(ValueError, match="num_examples is 0"):
        bcdl_jax.train.make_train_step(nll, optax.sgd(0.1), num_examples=0)
    with pytest.raises(ValueError, match="params holds no variational layers"):
        bcdl_jax.train.create_train_state({"Dense_0": {"kernel": jnp.ones((2, 2))}}, optax.sgd(0.1), jax.random.key(0))
    params = bcdl_jax.train.select_seed(states, 0).params
    for key in (0, jnp.zeros(2), jnp.uint32(3), jnp.zeros(5, jnp.uint32)):
        with pytest.raises(ValueError, match=r"key is .*; it must be a PRNG key"):
            bcdl_jax.train.create_train_state(params, optax.sgd(0.1), key)
    assert bcdl_jax.train.create_train_state(params, optax.sgd(0.1), jax.random.PRNGKey(0)).key.shape == (2,)


def test_chunks_of_an_epoch_equal_the_epoch(data):
    """Bit by bit, with one program for all chunks, seeds by vmap."""
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
    # The plain loop over the same batches.
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


def test_metrics_the_state_has_no_place_for_are_refused(data):
    _, _, states = setup(optax.sgd(0.1), seeds=(0,))
    train_steps = bcdl_jax.train.make_train_loop(lambda state, batch: (state, {"accuracy": 0.0}), batch_size=BATCH)
    with pytest.raises(ValueError, match=r"The step's metrics are accuracy; state\.metric_sums has kl, loss, nll"):
        train_steps(bcdl_jax.train.select_seed(states, 0), data, 1)
