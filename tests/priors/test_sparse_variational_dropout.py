import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.codec import reference_decoder
from tests.conftest import run
from tests.priors.test_normal_jeffreys import exact_log_uniform_kl

FAMILY = bcdl_jax.SparseVariationalDropout()
CHAIN = ["Conv_0", "Conv_1", "Dense_0", "Dense_1"]


def posterior(key, shape=(4, 3), group_axis="input", feature_group_count=1):
    kernel_key, start_key, spread_key = jax.random.split(key, 3)
    kernel = jax.random.normal(kernel_key, shape)
    fresh = FAMILY.create(start_key, kernel, jnp.ones(shape[-1]), group_axis, feature_group_count)
    return fresh.replace(kernel_log_variance=jax.random.uniform(spread_key, shape, minval=-6, maxval=2))


class SmallNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        for features in (4, 6):
            x = bcdl_jax.Conv(features, (3, 3), padding="VALID", family=FAMILY)(x, deterministic=deterministic)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(bcdl_jax.Dense(8, family=FAMILY)(x, deterministic=deterministic))
        return bcdl_jax.Dense(3, family=FAMILY)(x, deterministic=deterministic)


@pytest.fixture(scope="module")
def small():
    model, images = SmallNet(), jax.random.normal(jax.random.key(3), (5, 8, 8, 2))
    params = model.init(jax.random.key(0), images)["params"]
    layers = iter(jax.random.split(jax.random.key(1), 4))
    params = {
        name: {"posterior": posterior(next(layers), layer["posterior"].kernel_shape, layer["posterior"].group_axis)}
        for name, layer in params.items()
    }
    return model, params, images


def test_kl_of_a_layer_against_quadrature(key):
    layer = posterior(key)
    pairs = zip(np.ravel(layer.kernel_mean), np.ravel(layer.kernel_log_variance), strict=True)
    exact = [exact_log_uniform_kl(log_variance - np.log(mean**2)) for mean, log_variance in pairs]
    assert float(layer.kl_divergence()) == pytest.approx(sum(exact) + float(layer.gaussian_bias_kl()), abs=0.01 * 12)
    # Pruned weights no longer count.
    keep = jnp.ones((4, 3)).at[1, 2].set(0).at[3].set(0)
    kept = [value for value, there in zip(exact, np.ravel(keep), strict=True) if there]
    pruned = layer.prune_units(keep > 0)
    assert float(pruned.kl_divergence()) == pytest.approx(sum(kept) + float(layer.gaussian_bias_kl()), abs=0.01 * 8)
    np.testing.assert_array_equal(pruned.input_mask, [1, 1, 1, 0])


def test_sampled_outputs_have_the_moments_of_sampled_weights(key):
    layer = posterior(key).prune_units(jnp.ones((4, 3), bool).at[1, 2].set(False))
    x, draws = jnp.array([0.5, -1.0, 2.0, 0.3]), 200_000
    model = bcdl_jax.Dense(3, family=FAMILY)
    outputs = np.asarray(run(model, {"posterior": layer}, jnp.broadcast_to(x, (draws, 4)), key=key), np.float64)
    mean, variance = map(np.asarray, layer.kernel_moments())
    assert mean[1, 2] == 0
    assert variance[1, 2] == 0
    np.testing.assert_allclose(outputs.mean(0), np.asarray(x) @ mean + layer.bias_mean, atol=0.03)
    spread = np.asarray(x) ** 2 @ variance + np.exp(layer.bias_log_variance)
    np.testing.assert_allclose(outputs.var(0), spread, rtol=0.02)


@pytest.mark.parametrize(
    ("shape", "group_axis", "feature_groups"),
    [((4, 3), "input", 1), ((2, 2, 3, 4), "output", 1), ((3, 2, 6), "output", 3)],
)
def test_inputs_read_by_agrees_with_brute_force(key, shape, group_axis, feature_groups):
    layer = posterior(key, shape, group_axis, feature_groups)
    keep = jax.random.bernoulli(key, 0.15, shape)
    outputs = np.arange(shape[-1]) % 3 != 1
    found = layer.prune_units(keep).inputs_read_by(jnp.asarray(outputs))
    expected = np.zeros(shape[-2] * feature_groups, bool)
    for *_, row, column in np.argwhere(np.asarray(keep)):
        group = column // (shape[-1] // feature_groups)
        expected[group * shape[-2] + row] |= outputs[column]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_pruned_weights_are_zero_in_the_outputs(small):
    model, params, images = small
    pruned = jax.jit(lambda params: bcdl_jax.prune(params, -2.0, CHAIN))(params)
    by_hand = {}
    for name, layer in bcdl_jax.variational_layers(params).items():
        keep = layer.log_dropout_rate() < -2.0
        assert 0 < np.mean(keep) < 1
        by_hand[name] = {"kernel": jnp.where(keep, layer.kernel_mean, 0), "bias": layer.bias_mean}
    outputs = run(model, pruned, images)

    def plain(x):
        for name in CHAIN[:2]:
            x = jax.lax.conv_general_dilated(
                x, by_hand[name]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = nn.relu(x + by_hand[name]["bias"])
        x = x.reshape(x.shape[0], -1)
        for name in CHAIN[2:]:
            x = x @ by_hand[name]["kernel"] + by_hand[name]["bias"]
            x = nn.relu(x) if name == CHAIN[2] else x
        return x

    np.testing.assert_allclose(outputs, plain(images), atol=1e-5)
    sampled = run(model, pruned, images, key=jax.random.key(2))
    assert np.isfinite(sampled).all()
    # A second call changes nothing, and a higher threshold restores no weight.
    again = bcdl_jax.prune(pruned, jnp.inf, CHAIN)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(pruned)))


@pytest.mark.slow
def test_pruned_weights_stay_pruned_in_training(small):
    model, params, images = small
    params = bcdl_jax.prune(params, -1.0, CHAIN)

    def loss(params, batch, key):
        images, labels = batch
        logits = model.apply({"params": params}, images, deterministic=False, rngs={"noise": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = optax.adamw(1e-2)
    step = jax.jit(bcdl_jax.train.make_train_step(loss, optimizer, num_examples=100))
    state = bcdl_jax.train.create_train_state(params, optimizer, jax.random.key(0))
    batch = (images, jnp.arange(5) % 3)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    for name, before in bcdl_jax.variational_layers(params).items():
        after = bcdl_jax.variational_layers(state.params)[name]
        np.testing.assert_array_equal(after.weight_mask, before.weight_mask)
        np.testing.assert_array_equal(after.kernel_moments()[0] != 0, before.kernel_mask)
        assert not np.array_equal(after.kernel_mean, before.kernel_mean)


def test_paper_rate_charges_an_index_for_every_kept_weight(small):
    """An index takes the same number of bits as the weight."""
    _, params, _ = small
    layers = bcdl_jax.variational_layers(params).values()
    total = sum(layer.kernel_mean.size for layer in layers)
    assert float(bcdl_jax.compression.rate_paper(params)) == 1
    pruned = bcdl_jax.prune(params, -3.0, CHAIN)
    kept = sum(int((layer.kernel_moments()[0] != 0).sum()) for layer in bcdl_jax.variational_layers(pruned).values())
    assert float(bcdl_jax.compression.rate_paper(pruned)) == pytest.approx(total / (2 * kept))
    reduced = bcdl_jax.reduce_precision(pruned, 1.0)
    bits = 0
    for layer in jax.tree.leaves(reduced, is_leaf=bcdl_jax.compression.is_layer):
        bits += int((np.asarray(layer.kernel) != 0).sum()) * 2 * int(layer.kernel_bits)
    assert float(bcdl_jax.compression.rate_paper(reduced)) == pytest.approx(32 * total / bits)


@pytest.mark.slow
def test_quantised_network_survives_a_file_and_shrinks(small):
    model, params, images = small
    reduced = bcdl_jax.reduce_precision(bcdl_jax.prune(params, -3.0, CHAIN), 0.5)
    data = bcdl_jax.codec.encode(reduced)
    again = bcdl_jax.codec.decode(data, params)
    assert jax.tree.structure(again) == jax.tree.structure(reduced)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(reduced)))
    _, entries = reference_decoder.decode(data)
    assert all(entry["prunes_weights"] for entry in entries)
    small_apply, small_params, report = bcdl_jax.shrink(
        lambda params, x: model.apply({"params": params}, x), again, images
    )
    np.testing.assert_allclose(small_apply(small_params, images), run(model, reduced, images), atol=1e-4)
    assert report.multiply_adds[1] < report.multiply_adds[0]


def test_choose_thresholds_with_very_many_weights(key):
    """The error counts the pruned weights with a score below 1.2, so 1.2 is the best threshold."""
    layer = FAMILY.create(key, jnp.ones((300, 200)), None, "input")
    rates = jax.random.normal(key, (300, 200))
    layer = layer.replace(kernel_log_variance=rates)
    params = {"Dense_0": {"posterior": layer}}

    @jax.jit
    def error(params):
        node = params["Dense_0"]["posterior"]
        return jnp.sum((node.weight_mask <= 0) & (node.log_dropout_rate() < 1.2))

    chosen = bcdl_jax.choose_thresholds(params, error, max_increase=0)["Dense_0"]
    kept = int((rates < chosen).sum())
    best = int((rates < 1.2).sum())
    assert best <= kept <= 1.01 * best


@pytest.mark.parametrize("family", [FAMILY, bcdl_jax.GroupNormalJeffreys()])
def test_from_trained_keeps_the_outputs(family, key):
    model = bcdl_jax.Conv(4, (3, 3), family=family)
    images = jax.random.normal(key, (2, 6, 6, 3))
    params = model.init(key, images)["params"]
    twin = nn.Conv(4, (3, 3))
    trained = twin.init(key, images)["params"]
    started = bcdl_jax.from_trained(params, trained)
    np.testing.assert_allclose(run(model, started, images), run(twin, trained, images), atol=1e-5)


def test_clip_var_must_be_positive():
    with pytest.raises(ValueError, match="clip_var is -1; it must be a positive finite variance"):
        bcdl_jax.SparseVariationalDropout(clip_var=-1)


def test_units_without_weights_are_not_left_out_in_training(small):
    """The biases of units without weights are still trained."""
    model, params, images = small

    def loss(params, batch, key):
        return jnp.mean(model.apply({"params": params}, batch, deterministic=False, rngs={"noise": key}) ** 2)

    optimizer = optax.adam(1e-3)
    make_step = functools.partial(bcdl_jax.train.make_train_step, optimizer=optimizer, num_examples=100)
    shrinking = bcdl_jax.train.ShrinkingConfig(loss, make_step, -3.0, CHAIN)
    state = bcdl_jax.train.create_train_state(bcdl_jax.prune(params, -3.0, CHAIN), optimizer, jax.random.key(0))
    assert any((layer.input_mask == 0).any() for layer in bcdl_jax.variational_layers(state.params).values())
    assert bcdl_jax.train.leave_out_pruned(shrinking, state, images) is None
    assert bcdl_jax.train.prune_and_shrink(shrinking, state, images) is None
