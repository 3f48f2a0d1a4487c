"""Tests of the linear maps: values and gradients of patch products against XLA's convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcdl_jax.nn.linear_maps import ConvolutionMap, DenseMap

# Shape of the inputs, shape of the kernel, settings.
CASES = {
    "1d": ((4, 9, 3), (4, 3, 5), {"strides": (2,), "padding": [(1, 2)]}),
    "2d valid": ((4, 8, 7, 3), (3, 2, 3, 5), {"padding": [(0, 0), (0, 0)]}),
    "2d same strides": ((4, 8, 7, 3), (3, 2, 3, 5), {"strides": (2, 3), "padding": "SAME"}),
    "2d same dilated": ((4, 9, 9, 2), (3, 3, 2, 5), {"padding": "SAME", "kernel_dilation": (2, 3)}),
    "2d transposed": ((4, 5, 5, 2), (3, 3, 2, 5), {"padding": [(1, 2), (0, 1)], "input_dilation": (2, 3)}),
    "2d cropped": ((4, 8, 8, 2), (3, 3, 2, 5), {"padding": [(-1, 0), (0, -2)]}),
    "2d reflected": ((4, 6, 6, 2), (3, 3, 2, 5), {"padding": [(1, 1), (2, 0)], "pad_mode": "reflect"}),
    "2d grouped": ((4, 6, 6, 4), (3, 3, 2, 6), {"padding": "SAME", "feature_group_count": 2}),
    "2d with a further leading axis": ((2, 3, 6, 6, 2), (3, 3, 2, 5), {"padding": "SAME"}),
    "3d": ((4, 4, 5, 4, 2), (2, 3, 2, 2, 5), {"padding": "SAME"}),
    "1 x 1": ((4, 3, 3, 2), (1, 1, 2, 5), {"padding": "SAME"}),
}


def case(name, key):
    shape, kernel_shape, settings = CASES[name]
    rank = len(kernel_shape) - 2
    ones = dict.fromkeys(("strides", "input_dilation", "kernel_dilation"), (1,) * rank)
    keys = jax.random.split(key, 3)
    arrays = (jax.random.normal(keys[0], shape), jax.random.normal(keys[1], kernel_shape))
    return ConvolutionMap(**(ones | settings)), (*arrays, jax.random.uniform(keys[2], kernel_shape))


def in_usual_order(linear_map, inputs, mean, variance):
    moments = linear_map.moments(inputs, mean, variance)
    return tuple(array.transpose(np.argsort(moments.order)) for array in moments[:2])


def two_convolutions(linear_map, inputs, mean, variance):
    return linear_map(inputs, mean), linear_map(inputs**2, variance)


@pytest.mark.parametrize("name", CASES)
def test_moments_agree_with_two_convolutions(name, key):
    linear_map, arrays = case(name, key)

    def results(function):
        def loss(*arrays):
            first, second = function(linear_map, *arrays)
            return jnp.sum(jnp.sin(first)) + jnp.sum(jnp.sqrt(second + 1)), (first, second)

        (_, outputs), slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return outputs, slopes

    ours, theirs = results(in_usual_order), results(two_convolutions)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_in_training_has_the_values_and_gradients_of_a_call(name, key):
    linear_map, (inputs, kernel, _) = case(name, key)

    def results(function):
        return jax.jit(jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), argnums=(0, 1)))(
            inputs, kernel
        )

    for one, other in zip(
        jax.tree.leaves(results(linear_map.in_training)), jax.tree.leaves(results(linear_map)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_other_devices_use_xla_convolutions(key, monkeypatch):
    linear_map, arrays = case("2d same strides", key)
    patches = jax.make_jaxpr(linear_map.moments)(*arrays)
    assert "conv_general_dilated" not in str(patches)
    expected = in_usual_order(linear_map, *arrays)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert str(jax.make_jaxpr(linear_map.moments)(*arrays)).count("conv_general_dilated") == 2
    assert str(jax.make_jaxpr(linear_map.in_training)(*arrays[:2])).count("conv_general_dilated") == 1
    for one, other in zip(in_usual_order(linear_map, *arrays), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_works_under_vmap_of_kernels(key):
    linear_map, (inputs, mean, variance) = case("2d valid", key)
    means, variances = jnp.stack([mean, 2 * mean]), jnp.stack([variance, variance + 1])
    together = jax.vmap(lambda m, v: in_usual_order(linear_map, inputs, m, v))(means, variances)
    alone = in_usual_order(linear_map, inputs, means[1], variances[1])
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one[1], other, rtol=1e-5, atol=1e-5)


def test_dense_moments_agree_with_einsum(key):
    inputs, kernel = jax.random.normal(key, (3, 4, 5)), jax.random.normal(key, (5, 6))
    moments = DenseMap().moments(inputs, kernel, kernel**2)
    np.testing.assert_allclose(moments.mean, np.einsum("abi,io->abo", inputs, kernel), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.variance, np.einsum("abi,io->abo", inputs**2, kernel**2), rtol=1e-4, atol=1e-5)
    assert moments.order == (0, 1, 2)
