import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import bcdl_jax


def plain(key, shape=(30, 20)):
    return {"Dense_0": {"kernel": 0.1 * jax.random.normal(key, shape), "bias": jnp.zeros(shape[-1])}}


def test_the_prior_against_scipy(key):
    params = plain(key)
    mixture = bcdl_jax.baselines.create_mixture(params, components=3, zero_proportion=0.9)
    mixture = mixture.replace(
        logits=jnp.array([0.3, -0.2, 1.0]),
        log_precisions=jnp.array([6.0, 4.0, 5.0, 4.5]),
        means=jnp.array([-0.2, 0.1, 0.3]),
    )
    proportions = np.concatenate([[0.9], 0.1 * np.exp(mixture.logits) / np.exp(mixture.logits).sum()])
    deviations = np.exp(-0.5 * np.asarray(mixture.log_precisions, np.float64))
    weights = np.asarray(params["Dense_0"]["kernel"], np.float64)[..., None]
    density = (proportions * stats.norm([0, -0.2, 0.1, 0.3], deviations).pdf(weights)).sum(-1)
    precisions = deviations**-2

    def expected(weights_part, a, b):
        return -np.log(weights_part).sum() - sum(
            stats.gamma(shape, scale=1 / rate).logpdf(precision)
            for precision, (shape, rate) in zip(precisions, [a, b, b, b], strict=True)
        )

    found = float(jax.jit(bcdl_jax.baselines.mixture_nll)(params, mixture))
    other = float(bcdl_jax.baselines.mixture_nll(jax.tree.map(lambda leaf: leaf[:1], params), mixture))
    gammas = ((5e3, 2.0), (2.5e2, 0.1))
    # The difference of two values removes the unknown constant.
    assert found - other == pytest.approx(expected(density, *gammas) - expected(density[:1], *gammas), rel=1e-4)
    moved = mixture.replace(log_precisions=mixture.log_precisions + 0.1)
    assert np.isfinite(float(bcdl_jax.baselines.mixture_nll(params, moved)))


def test_retraining_under_the_prior_makes_clusters(key):
    """The weights lie around -1, 0 and 1. Without any data, they move closer together and collapse to these three values."""
    centres = jnp.repeat(jnp.array([-1.0, 0.0, 1.0]), 200).reshape(30, 20)
    params = {"Dense_0": {"kernel": centres + 0.05 * jax.random.normal(key, (30, 20)), "bias": jnp.zeros(20)}}
    mixture = bcdl_jax.baselines.create_mixture(params, components=2, zero_proportion=0.4)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(both, state):
        gradients = jax.grad(lambda both: bcdl_jax.baselines.mixture_nll(*both))(both)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(both, updates), state

    both, state = (params, mixture), optimizer.init((params, mixture))
    for _ in range(200):
        both, state = step(both, state)
    places, levels = bcdl_jax.baselines.collapse(*both)
    np.testing.assert_allclose(levels["Dense_0"], [-1, 1], atol=0.1)  # The means start at the extremes of the weights.
    np.testing.assert_array_equal(
        places["Dense_0"],
        np.asarray(centres).astype(int)
        + np.where(np.asarray(centres) > 0, 0, np.where(np.asarray(centres) < 0, 1, -1)),
    )
    kernel = np.asarray(both[0]["Dense_0"]["kernel"])
    assert np.abs(kernel - np.asarray(centres)).std() < np.abs(np.asarray(params["Dense_0"]["kernel"] - centres)).std()


def test_components_that_are_alike_are_merged(key):
    params = plain(key)
    mixture = bcdl_jax.baselines.create_mixture(params, components=3, zero_proportion=0.5).replace(
        means=jnp.array([0.0, 0.2, 0.2]), log_precisions=jnp.array([8.0, 8.0, 7.0, 7.0])
    )
    places, levels = bcdl_jax.baselines.collapse(params, mixture)
    np.testing.assert_allclose(levels["Dense_0"], [0.2])  # The first component is merged with the one at zero.
    kernel = np.asarray(params["Dense_0"]["kernel"])
    assert set(np.unique(places["Dense_0"])) == {-1, 0}
    assert (np.asarray(places["Dense_0"])[np.abs(kernel) < 0.05] == -1).all()
    assert (np.asarray(places["Dense_0"])[kernel > 0.19] == 0).all()


def test_errors_are_one_sentence(key):
    with pytest.raises(ValueError, match="components is 1; it must be at least 2"):
        bcdl_jax.baselines.create_mixture(plain(key), components=1)
    with pytest.raises(ValueError, match="zero_proportion is 1; it must be above 0 and below 1"):
        bcdl_jax.baselines.create_mixture(plain(key), zero_proportion=1)
    with pytest.raises(ValueError, match="it must be above 0 and below 1, in float32"):
        bcdl_jax.baselines.create_mixture(plain(key), zero_proportion=1 - 1e-9)
    with pytest.raises(ValueError, match="deviation is -1; it must be above 0 and finite"):
        bcdl_jax.baselines.create_mixture(plain(key), deviation=-1)


def test_wide_components_set_more_weights_to_zero(key):
    params = plain(key)
    weights = np.asarray(params["Dense_0"]["kernel"])
    pruned = []
    for deviation in (0.01, 0.02, None):
        mixture = bcdl_jax.baselines.create_mixture(params, components=4, zero_proportion=0.999, deviation=deviation)
        expected = deviation or (weights.max() - weights.min()) / 16
        np.testing.assert_allclose(np.exp(-0.5 * np.asarray(mixture.log_precisions)), expected, rtol=1e-5)
        pruned.append((bcdl_jax.baselines.collapse(params, mixture)[0]["Dense_0"] < 0).sum())
    assert 0 < pruned[0] < pruned[1] < pruned[2] < weights.size
