"""Posteriors in half precision have the KL divergence, the scores and the variances of the same numbers in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax import compression, priors

FAMILIES = [bcdl_jax.GroupNormalJeffreys(), bcdl_jax.GroupHorseshoe(), bcdl_jax.SparseVariationalDropout()]


@pytest.fixture(params=[jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(params=FAMILIES, ids=lambda family: type(family).__name__)
def half_and_wide(request, dtype, key):
    """A tree in half precision, and the same numbers in float32. The sums over its wide layer exceed the largest float16."""
    shapes = {"dense": ((300, 90), "input"), "conv": ((3, 3, 4, 8), "output")}
    half = {}
    for name, (shape, group_axis) in shapes.items():
        kernel = 0.05 * jax.random.normal(key, shape)
        node = request.param.create(key, kernel.astype(dtype), jnp.full(shape[-1:], 0.3, dtype), group_axis)
        leaves, structure = jax.tree.flatten(node)
        keys = jax.random.split(key, len(leaves))
        moved = [leaf + jax.random.normal(k, leaf.shape).astype(dtype) for leaf, k in zip(leaves, keys, strict=True)]
        node = jax.tree.unflatten(structure, moved).with_masks(node.input_mask > 0, node.output_mask > 0)
        half[name] = node.replace(kernel_mean=kernel.astype(dtype), kernel_log_variance=node.kernel_log_variance - 8)
    return half, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)


@pytest.mark.parametrize(
    "statistic",
    [
        bcdl_jax.kl_divergence,
        priors.kl_divergence_per_layer,
        compression.pruning_scores,
        lambda params: compression.pruning_scores(params, compression.log_noise_to_signal),
        compression.weight_variances,
        lambda params: {name: node.kl_divergence() for name, node in bcdl_jax.variational_layers(params).items()},
        lambda params: {name: node.log_dropout_rate() for name, node in bcdl_jax.variational_layers(params).items()},
    ],
    ids=["kl", "kl_per_layer", "scores", "noise_to_signal", "variances", "kl_of_nodes", "rates_of_nodes"],
)
def test_statistics_are_those_of_float32(half_and_wide, statistic):
    half, wide = half_and_wide
    for ours, expected in zip(jax.tree.leaves(statistic(half)), jax.tree.leaves(statistic(wide)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("function", [bcdl_jax.mean_weights, bcdl_jax.balance_scales])
def test_params_keep_their_dtype_and_are_rounded_once(half_and_wide, function, dtype):
    half, wide = half_and_wide
    for ours, expected in zip(jax.tree.leaves(function(half)), jax.tree.leaves(function(wide)), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, expected.astype(dtype))


@pytest.mark.slow
def test_samples_have_the_spread_of_float32(half_and_wide, key):
    half, wide = ({"params": {"posterior": tree["dense"]}} for tree in half_and_wide)
    layer, inputs = bcdl_jax.Dense(90), jnp.ones((4, 300))
    ours, expected = (layer.apply(params, inputs, False, rngs={"noise": key}) for params in (half, wide))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
