import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import bcdl_jax
from bcdl_jax.priors.horseshoe import log_normal_kl_from_gamma, log_normal_kl_from_inverse_gamma
from tests.conftest import prune_half, run

DRAWS = 400_000
FACTORS = [f"{part}_{factor}" for part in ("layer", "group") for factor in ("gamma", "inverse")]


def posterior(key, group_axis="input", spread=1.0, tau0=0.3):
    """A posterior of four groups with different scales."""
    shape = (4, 3) if group_axis == "input" else (2, 2, 3, 4)
    kernel_key, start_key, *keys = jax.random.split(key, 10)
    kernel = jax.random.normal(kernel_key, shape)
    fresh = bcdl_jax.GroupHorseshoe(tau0=tau0).create(start_key, kernel, jnp.ones(shape[-1]), group_axis)
    changes = {}
    for place, factor in enumerate(FACTORS):
        mean, variance = f"{factor}_log_mean", f"{factor}_log_variance"
        noise = jax.random.normal(keys[2 * place], jnp.shape(getattr(fresh, mean)))
        changes[mean] = 0.3 * noise
        changes[variance] = jnp.log(0.1 * spread) + 0.3 * jax.random.normal(keys[2 * place + 1], noise.shape)
    return fresh.replace(kernel_log_variance=jnp.full(shape, -2.0), **changes)


@pytest.mark.parametrize("log_mean", [-3.0, 0.0, 1.5])
@pytest.mark.parametrize("log_variance", [-4.0, -1.0, 0.5])
def test_kl_of_log_normals_against_monte_carlo(log_mean, log_variance):
    q = stats.lognorm(s=np.exp(log_variance / 2), scale=np.exp(log_mean))
    draws = np.random.default_rng(0).standard_normal(DRAWS)
    draws = np.exp(log_mean + np.exp(log_variance / 2) * np.concatenate([draws, -draws]))  # antithetic
    for scale in (1.0, 0.09):
        terms = q.logpdf(draws) - stats.gamma(0.5, scale=scale).logpdf(draws)
        error = terms.std() / np.sqrt(DRAWS)
        found = float(log_normal_kl_from_gamma(jnp.float32(log_mean), jnp.float32(log_variance), scale))
        assert found == pytest.approx(terms.mean(), rel=0.01, abs=5 * error)
    terms = q.logpdf(draws) - stats.invgamma(0.5).logpdf(draws)
    found = float(log_normal_kl_from_inverse_gamma(jnp.float32(log_mean), jnp.float32(log_variance)))
    assert found == pytest.approx(terms.mean(), rel=0.01, abs=5 * terms.std() / np.sqrt(DRAWS))


def test_root_of_the_product_of_the_prior_factors_is_half_cauchy():
    """A gamma variable of scale tau0^2 times an inverse gamma variable is the square of a half-Cauchy variable of scale tau0."""
    rng, tau0 = np.random.default_rng(0), 0.2
    product = stats.gamma(0.5, scale=tau0**2).rvs(DRAWS, random_state=rng) * stats.invgamma(0.5).rvs(
        DRAWS, random_state=rng
    )
    assert stats.kstest(np.sqrt(product), stats.halfcauchy(scale=tau0).cdf).pvalue > 0.01


def test_kl_of_a_layer_is_the_sum_over_its_parts(key):
    whole = posterior(key)
    by_hand = float(whole.gaussian_kl())
    for factor in FACTORS:
        mean, log_variance = (np.ravel(getattr(whole, f"{factor}_log_{moment}")) for moment in ("mean", "variance"))
        scale = whole.tau0**2 if factor == "layer_gamma" else 1.0
        for m, log_v in zip(mean, log_variance, strict=True):
            m = m if factor.endswith("gamma") else -m
            ratio = np.exp(m + np.exp(log_v) / 2) / scale
            by_hand += np.log(scale) / 2 + ratio - (m + log_v + 1 + np.log(2)) / 2
    assert float(whole.kl_divergence()) == pytest.approx(by_hand, rel=1e-5)
    # Pruned groups do not count, and the layer's scale does not count if all groups are pruned.
    nothing = whole.replace(input_mask=jnp.zeros(4))
    assert float(nothing.kl_divergence()) == pytest.approx(float(nothing.gaussian_kl()))


@pytest.mark.parametrize("group_axis", ["input", "output"])
def test_sampled_scales_have_the_predicted_moments_and_share_the_layer_scale(key, group_axis):
    layer = posterior(key, group_axis)
    draws = np.asarray(jax.jit(functools.partial(layer.sample_scale, num_examples=DRAWS))(key), np.float64)
    mean, variance = map(np.asarray, layer.scale_moments())
    np.testing.assert_allclose(draws.mean(0), mean, rtol=0.01)
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.05)
    # Two groups share log s, whose variance is their covariance. The variance of one group adds the variance of log z~.
    v = {factor: np.exp(np.asarray(getattr(layer, f"{factor}_log_variance"))) for factor in FACTORS}
    shared = (v["layer_gamma"] + v["layer_inverse"]) / 4
    expected = shared + np.diag((v["group_gamma"] + v["group_inverse"]) / 4)
    np.testing.assert_allclose(np.cov(np.log(draws).T), expected, rtol=0.03)


def test_log_dropout_rate_is_minus_the_log_of_the_mode(key):
    layer = posterior(key)
    draws = np.log(np.asarray(layer.sample_scale(key, DRAWS), np.float64))
    expected = [np.log(np.exp(m - v)) for m, v in zip(draws.mean(0), draws.var(0), strict=True)]
    np.testing.assert_allclose(-np.asarray(layer.log_dropout_rate()), expected, atol=0.01)


def test_sampled_outputs_have_the_moments_of_sampled_weights(key):
    """The inputs of one example share one draw of s, which makes the outputs dependent."""
    layer = posterior(key, spread=0.3)
    model, x = bcdl_jax.Dense(3, family=bcdl_jax.GroupHorseshoe()), jnp.array([0.5, -1.0, 2.0, 0.3])
    many = jnp.broadcast_to(x, (DRAWS, 4))
    outputs = np.asarray(run(model, {"posterior": layer}, many, key=key), np.float64)
    rng = np.random.default_rng(0)
    z = np.asarray(layer.sample_scale(jax.random.key(9), DRAWS), np.float64)
    w = np.asarray(layer.kernel_mean) + np.exp(-1) * rng.standard_normal((DRAWS, 4, 3))
    b = np.asarray(layer.bias_mean) + np.exp(np.asarray(layer.bias_log_variance) / 2) * rng.standard_normal((DRAWS, 3))
    expected = np.einsum("ni,nio->no", z * np.asarray(x), w) + b
    np.testing.assert_allclose(outputs.mean(0), expected.mean(0), atol=0.02)
    np.testing.assert_allclose(np.cov(outputs.T), np.cov(expected.T), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("group_axis", ["input", "output"])
def test_scales_start_at_one_with_a_finite_kl_and_gradient(key, group_axis):
    shape = (6, 5) if group_axis == "input" else (3, 3, 5, 6)
    layer = bcdl_jax.GroupHorseshoe().create(key, jnp.ones(shape), jnp.zeros(shape[-1]), group_axis)
    np.testing.assert_allclose(layer.scale_moments()[0], 1, atol=0.06)
    np.testing.assert_allclose(layer.scale_moments()[1], 0, atol=1e-3)
    kl, gradient = jax.jit(jax.value_and_grad(lambda node: node.kl_divergence()))(layer)
    assert kl < 1e4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_settings_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match=r"tau0 is .*; it must be a positive finite number"):
        bcdl_jax.GroupHorseshoe(tau0=value)
    with pytest.raises(ValueError, match=r"clip_var is .*; it must be a positive finite variance"):
        bcdl_jax.GroupHorseshoe(clip_var=value)


class Net(nn.Module):
    """A convolution, a flatten and two dense layers."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        family = bcdl_jax.GroupHorseshoe(tau0=0.1)
        x = nn.relu(bcdl_jax.Conv(4, (3, 3), family=family)(x, deterministic=deterministic))
        x = nn.relu(bcdl_jax.Dense(6, family=family)(x.reshape(x.shape[0], -1), deterministic=deterministic))
        return bcdl_jax.Dense(3, family=family)(x, deterministic=deterministic)


CHAIN = ["Conv_0", "Dense_0", "Dense_1"]


@pytest.fixture(scope="module")
def trained(key):
    """(params, inputs), with groups of very different scales."""
    inputs = jax.random.normal(key, (5, 6, 6, 2))
    params = jax.jit(Net().init)(key, inputs)["params"]

    def vary(layer):
        noise = jax.random.normal(jax.random.fold_in(key, layer.kernel_mean.size), layer.group_mask.shape)
        return layer.replace(group_gamma_log_mean=layer.group_gamma_log_mean + 2 * noise)

    return {name: {"posterior": vary(layer)} for name, layer in bcdl_jax.variational_layers(params).items()}, inputs


@pytest.mark.slow
def test_training_lowers_the_loss(trained, key):
    params, inputs = trained
    labels = jnp.arange(5) % 3

    def likelihood(params, batch, key):
        logits = Net().apply({"params": params}, batch[0], deterministic=False, rngs={"noise": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    optimizer = optax.chain(optax.adam(1e-2), bcdl_jax.train.scale_by_kind({"log_variance": 2.0}))
    step = bcdl_jax.train.make_train_step(likelihood, optimizer, num_examples=100)
    epoch = jax.jit(bcdl_jax.train.make_train_epoch(step, batch_size=5))
    state, first = bcdl_jax.train.create_train_state(params, optimizer, key), None
    for _ in range(60):
        state, metrics = epoch(state, (inputs, labels))
        first = first or metrics
    assert metrics["loss"] < 0.8 * first["loss"]
    assert metrics["nll"] < 0.8 * first["nll"]


@pytest.mark.slow
def test_pruned_network_has_zeros_shrinks_and_survives_a_file(trained, key, tmp_path):
    params, inputs = trained
    model = Net()
    pruned = prune_half(params, CHAIN)
    kept = {name: int((layer.group_mask > 0).sum()) for name, layer in bcdl_jax.variational_layers(pruned).items()}
    assert all(0 < kept[name] < layer.group_mask.size for name, layer in bcdl_jax.variational_layers(pruned).items())

    mean_twin = bcdl_jax.mean_weights(pruned)
    np.testing.assert_array_equal(
        np.asarray(mean_twin["Dense_0"]["kernel"])[pruned["Dense_0"]["posterior"].input_mask == 0], 0
    )

    apply = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    expected = run(model, pruned, inputs)
    small_apply, small, report = bcdl_jax.shrink(apply, pruned, inputs)
    assert report.bytes[1] < 0.5 * report.bytes[0]
    np.testing.assert_allclose(jax.jit(small_apply)(small, inputs), expected, rtol=1e-4, atol=1e-5)

    # The small network draws the same noise for the kept units.
    sampled = lambda params, x, key: model.apply({"params": params}, x, deterministic=False, rngs={"noise": key})  # noqa: E731
    small_apply, small, report = bcdl_jax.shrink(sampled, pruned, (inputs, key))
    np.testing.assert_allclose(
        jax.jit(small_apply)(small, inputs, key), jax.jit(sampled)(pruned, inputs, key), rtol=1e-4, atol=1e-4
    )

    reduced = bcdl_jax.reduce_precision(pruned, 0.25)
    path = tmp_path / "net.bcdl"
    bcdl_jax.save(path, reduced)
    np.testing.assert_array_equal(run(model, bcdl_jax.load(path, like=params), inputs), run(model, reduced, inputs))


def test_from_trained_keeps_the_outputs(key):
    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.relu(nn.Dense(6)(x.reshape(x.shape[0], -1)))
            return nn.Dense(3)(x)

    inputs = jax.random.normal(key, (5, 6, 6, 2))
    trained = jax.jit(Twin().init)(jax.random.fold_in(key, 1), inputs)["params"]
    params = bcdl_jax.from_trained(jax.jit(Net().init)(key, inputs)["params"], trained)
    np.testing.assert_allclose(
        run(Net(), params, inputs), Twin().apply({"params": trained}, inputs), rtol=1e-4, atol=1e-5
    )
