import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.compression import prune_units
from experiments.networks.lenet import LeNet5, LeNet300
from experiments.networks.vgg import VGG


def weights(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def weights_and_biases(params):
    layers = bcdl_jax.variational_layers(params).values()
    return sum(layer.kernel_mean.size + (0 if layer.bias_mean is None else layer.bias_mean.size) for layer in layers)


@pytest.mark.parametrize(("model", "side", "channels", "count"), [(LeNet5, 28, 1, 431_080), (VGG, 32, 3, 14_982_474)])
def test_the_networks_have_the_weights_of_the_paper(model, side, channels, count):
    images = np.zeros((2, side, side, channels), np.uint8)
    variables = jax.eval_shape(model().init, jax.random.key(0), images)
    assert weights_and_biases(variables["params"]) == count
    plain = jax.eval_shape(model(family=None).init, jax.random.key(0), images)
    norms = sum(weights(value) for name, value in plain["params"].items() if name.startswith("BatchNorm"))
    assert weights(plain["params"]) - norms == count


@pytest.mark.slow
def test_plain_and_variational_twins_compute_the_same_at_the_mean():
    images = jax.random.randint(jax.random.key(0), (2, 28, 28, 1), 0, 256).astype(jnp.uint8)
    variational, plain = LeNet5(widths=(3, 4, 7)), LeNet5(family=None, widths=(3, 4, 7))
    params = jax.jit(variational.init)(jax.random.key(1), images)["params"]
    means = bcdl_jax.mean_weights(params)
    np.testing.assert_allclose(
        plain.apply({"params": means}, images), variational.apply({"params": params}, images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_pruned_lenet5_in_training_can_be_shrunk():
    """``shrink`` follows its channels through the pooling of training and the flatten."""
    model = LeNet5(widths=(4, 6, 8))
    images = jax.random.randint(jax.random.key(0), (3, 28, 28, 1), 0, 256).astype(jnp.uint8)
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    masks = {"Conv_0": jnp.arange(4) < 2, "Conv_1": jnp.arange(6) < 5}
    pruned = prune_units(params, masks, ["Conv_0", "Conv_1", "Dense_0", "Dense_1"])

    def sampled(params, images, key):
        return model.apply({"params": params}, images, deterministic=False, rngs={"noise": key})

    _, small, report = bcdl_jax.shrink(sampled, pruned, (images, jax.random.key(2)))
    shapes = {name: layer.kernel_mean.shape for name, layer in bcdl_jax.variational_layers(small).items()}
    assert shapes == {"Conv_0": (5, 5, 1, 2), "Conv_1": (5, 5, 2, 5), "Dense_0": (80, 8), "Dense_1": (8, 10)}
    assert report.multiply_adds[1] < report.multiply_adds[0]


@pytest.mark.slow
@pytest.mark.parametrize("model", [LeNet300, LeNet5])
def test_plain_layers_drop_hidden_units_in_training_alone(model):
    images = jax.random.randint(jax.random.key(0), (2, 28, 28, 1), 0, 256).astype(jnp.uint8)
    plain, dropping = model(family=None), model(family=None, dropout=0.5)
    params = jax.jit(plain.init)(jax.random.key(1), images)["params"]
    np.testing.assert_array_equal(dropping.apply({"params": params}, images), plain.apply({"params": params}, images))

    def in_training(key):
        return dropping.apply({"params": params}, images, deterministic=False, rngs={"dropout": jax.random.key(key)})

    many = jnp.stack([in_training(key) for key in range(3)])
    assert float(jnp.abs(many[0] - many[1]).max()) > 1e-3
    np.testing.assert_array_equal(many[2], in_training(2))
