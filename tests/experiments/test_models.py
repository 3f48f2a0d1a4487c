import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from experiments.models import VGG, LeNet5


def weights(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def weights_and_biases(params):
    layers = bcdl_jax.posteriors(params).values()
    return sum(layer.kernel_mean.size + (0 if layer.bias_mean is None else layer.bias_mean.size) for layer in layers)


@pytest.mark.parametrize(("model", "side", "channels", "count"), [(LeNet5, 28, 1, 431_080), (VGG, 32, 3, 14_982_474)])
def test_the_networks_have_the_weights_of_the_paper(model, side, channels, count):
    images = np.zeros((2, side, side, channels), np.uint8)
    variables = jax.eval_shape(model().init, jax.random.key(0), images)
    assert weights_and_biases(variables["params"]) == count
    plain = jax.eval_shape(model(family=None).init, jax.random.key(0), images)
    norms = sum(weights(value) for name, value in plain["params"].items() if name.startswith("BatchNorm"))
    assert weights(plain["params"]) - norms == count


def test_plain_and_variational_twins_compute_the_same_at_the_mean():
    images = jax.random.randint(jax.random.key(0), (2, 28, 28, 1), 0, 256).astype(jnp.uint8)
    variational, plain = LeNet5(widths=(3, 4, 7)), LeNet5(family=None, widths=(3, 4, 7))
    params = jax.jit(variational.init)(jax.random.key(1), images)["params"]
    means, _ = bcdl_jax.posterior_moments(params)
    np.testing.assert_allclose(
        plain.apply({"params": means}, images), variational.apply({"params": params}, images), rtol=1e-4, atol=1e-4
    )
