import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

import bcdl_jax
from bcdl_jax.priors import log_uniform_kl
from tests.conftest import make_posterior


def exact_log_uniform_kl(log_alpha: float) -> float:
    """KL(N(1, alpha) || 1/|z|) by quadrature, with the constant for which it tends to 0 for large alpha."""
    deviation = np.exp(log_alpha / 2)

    def integrand(z):
        return np.exp(-0.5 * ((z - 1) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi)) * np.log(np.abs(z))

    edges = (
        [1 - 12 * deviation, 0.0, 1.0, 1 + 12 * deviation]
        if deviation > 1 / 12
        else [1 - 12 * deviation, 1.0, 1 + 12 * deviation]
    )
    mean_log = sum(integrate.quad(integrand, low, high, limit=200)[0] for low, high in itertools.pairwise(edges))
    return mean_log - 0.5 * log_alpha + (np.euler_gamma + np.log(2)) / 2


@pytest.mark.parametrize(("log_alpha", "value"), [(-9, 5.135), (-3, 2.116), (0, 0.431), (3, 0.0254)])
def test_scale_kl_has_known_values(log_alpha, value):
    assert float(log_uniform_kl(jnp.float32(log_alpha))) == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("log_alpha", np.linspace(-9, 6, 31))
def test_scale_kl_against_quadrature(log_alpha):
    assert float(log_uniform_kl(jnp.float32(log_alpha))) == pytest.approx(exact_log_uniform_kl(log_alpha), abs=0.01)


def test_weight_kl_against_quadrature(key):
    posterior = make_posterior(key, (3, 2), "input")
    total = 0.0
    for mean, log_variance in [
        (posterior.kernel_mean, posterior.kernel_log_variance),
        (posterior.bias_mean, posterior.bias_log_variance),
    ]:
        for m, v in zip(np.ravel(mean), np.ravel(log_variance), strict=True):
            s = np.exp(v / 2)
            w = np.linspace(m - 12 * s, m + 12 * s, 20_001)
            log_q = -0.5 * ((w - m) / s) ** 2 - np.log(s)
            total += integrate.trapezoid(np.exp(log_q) / np.sqrt(2 * np.pi) * (log_q + 0.5 * w**2), w)
    assert float(posterior.gaussian_kl()) == pytest.approx(total, rel=1e-5)
    scale_part = sum(exact_log_uniform_kl(float(rate)) for rate in posterior.log_dropout_rate())
    assert float(posterior.kl_divergence()) == pytest.approx(total + scale_part, abs=0.01 * 3)


def test_log_dropout_rate_by_hand(key):
    posterior = make_posterior(key, (2, 2), "input").replace(
        scale_mean=jnp.array([2.0, 0.5]), scale_log_variance=jnp.array([-1.0, -3.0])
    )
    np.testing.assert_allclose(posterior.log_dropout_rate(), [-1 - np.log(4), -3 - np.log(0.25)], rtol=1e-6)


def test_log_dropout_rate_is_finite_where_the_scale_vanishes(key):
    posterior = make_posterior(key, (2, 2), "input").replace(scale_mean=jnp.zeros(2))
    rates, gradient = jax.value_and_grad(lambda p: p.kl_divergence())(posterior)
    assert np.isfinite(rates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("shape", "axis", "groups"), [((4, 3), "input", 4), ((3, 4, 5), "output", 5), ((3, 3, 4, 5), "output", 5)]
)
def test_start_values(key, shape, axis, groups):
    kernel = jnp.ones(shape)
    posterior = bcdl_jax.GroupNormalJeffreys().create(key, kernel, None, axis)
    assert posterior.scale_mean.shape == posterior.log_dropout_rate().shape == (groups,)
    np.testing.assert_array_equal(posterior.kernel_mean, kernel)
    np.testing.assert_allclose(posterior.kernel_log_variance, -9, atol=0.06)
    np.testing.assert_allclose(posterior.scale_mean, 1, atol=0.06)
    np.testing.assert_allclose(posterior.scale_log_variance, -9, atol=0.06)
    assert np.std(posterior.kernel_log_variance) > 0


def test_sampled_scales_have_their_mean_and_variance(key):
    posterior = make_posterior(key, (4, 3), "input")
    draws = posterior.sample_scale(key, 200_000)
    mean, variance = posterior.scale_moments()
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * float(jnp.sqrt(variance.max() / 200_000)))
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.03)


def test_clip_variances(key):
    posterior = make_posterior(key, (4, 3), "input").replace(clip_var=0.04)
    clipped = posterior.clip_variances()
    assert float(jnp.exp(clipped.kernel_log_variance).max()) == pytest.approx(0.04)
    np.testing.assert_array_equal(
        clipped.kernel_log_variance, np.minimum(posterior.kernel_log_variance, np.log(0.04).astype(np.float32))
    )
    np.testing.assert_array_equal(
        clipped.bias_log_variance, np.minimum(posterior.bias_log_variance, np.log(0.04).astype(np.float32))
    )
    np.testing.assert_array_equal(clipped.scale_log_variance, posterior.scale_log_variance)


@pytest.mark.parametrize("clip_var", [-1.0, 0.0, float("nan"), float("inf")])
def test_clip_var_must_be_positive(clip_var):
    with pytest.raises(ValueError, match=r"clip_var is .*; it must be a positive finite variance"):
        bcdl_jax.GroupNormalJeffreys(clip_var=clip_var)
