import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from experiments.networks.lenet import LeNet300
from experiments.pipeline import uncertainty


def test_quality_by_brute_force(key):
    probabilities = np.asarray(jax.nn.softmax(3 * jax.random.normal(key, (400, 10))), np.float64)
    labels = np.asarray(jax.random.randint(key, (400,), 0, 10))
    found = uncertainty.quality(jnp.asarray(probabilities), jnp.asarray(labels))
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    ece = 0.0
    for place in range(15):
        inside = (confidence > place / 15) & (confidence <= (place + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert float(found["error"]) == pytest.approx(100 * (1 - right.mean()), abs=1e-4)
    assert float(found["nll"]) == pytest.approx(-np.log(probabilities[np.arange(400), labels]).mean(), rel=1e-5)
    assert float(found["ece"]) == pytest.approx(100 * ece, rel=1e-3)


def test_certain_predictions_are_finite():
    found = uncertainty.quality(jnp.eye(3), jnp.array([0, 1, 0]))
    assert np.isfinite(float(found["nll"]))
    assert float(found["ece"]) == pytest.approx(100 / 3, rel=1e-5)


@pytest.mark.slow
def test_sampled_probabilities_are_the_mean_over_samples(key):
    """The network is pruned. The expected value comes from full-size passes with other keys."""
    model = LeNet300()
    images = np.asarray(jax.random.randint(key, (6, 28, 28, 1), 0, 256), np.uint8)
    params = model.init(key, images)["params"]
    rates = bcdl_jax.compression.pruning_scores(params)
    params = bcdl_jax.prune(params, {name: float(jnp.quantile(rate, 0.3)) for name, rate in rates.items()})
    wide = {
        name: {
            "posterior": layer.replace(
                kernel_mean=3 * layer.kernel_mean, scale_log_variance=layer.scale_log_variance + 9
            )
        }
        for name, layer in bcdl_jax.variational_layers(params).items()
    }
    found = uncertainty.sampled_probabilities(model, wide, jnp.asarray(images), key, samples=2000)

    @jax.jit
    def once(key):
        return jax.nn.softmax(model.apply({"params": wide}, images, deterministic=False, rngs={"noise": key}))

    expected = jax.lax.map(once, jax.random.split(jax.random.key(5), 2000)).mean(0)
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert np.abs(np.asarray(expected) - uncertainty.mean_probabilities(model)(wide, images)).max() > 0.03
