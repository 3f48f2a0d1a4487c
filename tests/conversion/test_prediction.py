import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.conversion import Prediction, predict


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["last"] + 100


@pytest.fixture(scope="module")
def model(key):
    params = {"first": jax.random.normal(key, (4, 6)), "last": jax.random.normal(key, (6, 3))}
    model = bcdl_jax.variational(network, params, jnp.ones((2, 4)))
    noisy = jax.tree.map(lambda layer: layer.replace(kernel_log_variance=layer.kernel_log_variance + 5), model.params,
                         is_leaf=lambda layer: isinstance(layer, bcdl_jax.Posterior))  # fmt: skip
    return model, noisy


def test_moments_are_those_of_the_samples(model, key):
    model, params = model
    x = jax.random.normal(key, (5, 4))
    found = jax.jit(lambda params, x, key: predict(model.sample, params, x, key, samples=200))(params, x, key)
    assert isinstance(found, Prediction)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(200))
    values = np.asarray(jax.vmap(lambda key: model.apply(params, x, key=key))(keys), np.float64)
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.deviation, values.std(0, ddof=1), rtol=1e-3)
    assert (found.deviation > 0.05).all()


def test_it_runs_on_the_shrunk_network(model, key):
    model, params = model
    x = jax.random.normal(key, (5, 4))
    pruned = bcdl_jax.compression.prune_units(params, {"last": jnp.arange(6) < 4})
    small_sample, small, report = bcdl_jax.shrink(model.sample, pruned, (x, key))
    assert report.multiply_adds[1] < report.multiply_adds[0]
    large, found = (predict(*each, (x,), key) for each in ((model.sample, pruned), (small_sample, small)))
    np.testing.assert_allclose(found.mean, large.mean, rtol=1e-5)
    np.testing.assert_allclose(found.deviation, large.deviation, rtol=1e-2)


def test_a_transform_comes_before_the_mean(model, key):
    model, params = model
    x = jnp.ones((2, 4))
    found = predict(model.sample, params, x, key, transform=jax.nn.softmax)
    np.testing.assert_allclose(found.mean.sum(-1), 1, rtol=1e-5)
    assert float(predict(model.sample, params, x, key, samples=1).deviation.max()) == 0
    with pytest.raises(ValueError, match="samples is 0; it must be at least 1"):
        predict(model.sample, params, x, key, samples=0)
