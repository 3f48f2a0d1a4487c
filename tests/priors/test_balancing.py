"""Tests of ``balance_scales``: it keeps the distribution of the weights and lowers the KL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.nn import linear_maps
from bcdl_jax.nn.sampling import apply_sampled

FAMILIES = [bcdl_jax.GroupNormalJeffreys(), bcdl_jax.GroupHorseshoe()]


def layer(family, group_axis, key=0):
    """A layer with groups of very different magnitude, one of them pruned."""
    keys = jax.random.split(jax.random.key(key), 4)
    shape = (3, 3, 4, 6) if group_axis == "output" else (6, 4)
    groups = jnp.exp(jax.random.normal(keys[0], (6,)) - 3)
    kernel = jax.random.normal(keys[1], shape) * (groups if group_axis == "output" else groups[:, None])
    bias = 0.1 * jax.random.normal(keys[2], shape[-1:])
    node = family.create(keys[3], kernel, bias, group_axis)
    return node.prune_units(jnp.arange(6) != 2)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize("group_axis", ["input", "output"])
def test_weights_in_use_keep_their_distribution(family, group_axis):
    before = layer(family, group_axis)
    after = bcdl_jax.balance_scales({"posterior": before})["posterior"]
    for moments in ("kernel_moments", "bias_moments"):
        for old, new in zip(getattr(before, moments)(), getattr(after, moments)(), strict=True):
            np.testing.assert_allclose(new, old, rtol=2e-4, atol=1e-12)
    for old, new in zip(before.scale_moments(), after.scale_moments(), strict=True):
        assert not np.allclose(old, new, rtol=0.1)
    if (
        group_axis == "input"
    ):  # the same key draws the same outputs, since noise and means are scaled by the same factor
        inputs = jax.random.normal(jax.random.key(7), (5, 6))
        sampled = [apply_sampled(node, inputs, jax.random.key(8), linear_maps.DenseMap()) for node in (before, after)]
        np.testing.assert_allclose(sampled[1], sampled[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("group_axis", ["input", "output"])
def test_other_scales_have_a_higher_kl_under_normal_jeffreys(group_axis):
    before = layer(bcdl_jax.GroupNormalJeffreys(), group_axis)
    after = bcdl_jax.balance_scales({"posterior": before})["posterior"]
    lowest = float(after.kl_divergence())
    assert lowest < 0.6 * float(before.kl_divergence())
    for group in (0, 3, 5):
        for factor in (0.9, 1.1):
            moved = after.with_scales_times(jnp.ones(6).at[group].set(factor))
            assert float(moved.kl_divergence()) > lowest
    slope = jax.grad(lambda log_factor: after.with_scales_times(jnp.exp(log_factor)).kl_divergence())(jnp.zeros(6))
    np.testing.assert_allclose(slope, 0, atol=2e-3)


@pytest.mark.parametrize("group_axis", ["input", "output"])
def test_balancing_lowers_the_kl_of_the_horseshoe(group_axis):
    before = layer(bcdl_jax.GroupHorseshoe(), group_axis)
    after = bcdl_jax.balance_scales({"posterior": before})["posterior"]
    assert float(after.kl_divergence()) < 0.7 * float(before.kl_divergence())


def test_pruned_groups_and_layers_without_scales_do_not_change():
    before = layer(bcdl_jax.GroupNormalJeffreys(), "output")
    after = bcdl_jax.balance_scales({"posterior": before})["posterior"]
    np.testing.assert_array_equal(after.output_mask, before.output_mask)
    np.testing.assert_array_equal(after.scale_mean[2], before.scale_mean[2])
    np.testing.assert_array_equal(after.kernel_mean[..., 2], before.kernel_mean[..., 2])
    single = bcdl_jax.SparseVariationalDropout().create(jax.random.key(0), jnp.ones((3, 2)), None, "input")
    same = bcdl_jax.balance_scales({"posterior": single, "other": jnp.ones(2)})
    jax.tree.map(np.testing.assert_array_equal, same, {"posterior": single, "other": jnp.ones(2)})


def test_kept_groups_without_kept_outputs_do_not_change():
    node = layer(bcdl_jax.GroupNormalJeffreys(), "input")
    alone = node.with_masks(node.input_mask > 0, jnp.zeros(4, bool))
    jax.tree.map(np.testing.assert_array_equal, bcdl_jax.balance_scales({"posterior": alone}), {"posterior": alone})


def test_vmap_gives_the_same_result():
    nets = [{"posterior": layer(bcdl_jax.GroupNormalJeffreys(), "output", key)} for key in (1, 2)]
    together = jax.vmap(bcdl_jax.balance_scales)(bcdl_jax.train.stack_seeds(nets))
    for index, net in enumerate(nets):
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
            bcdl_jax.train.select_seed(together, index),
            bcdl_jax.balance_scales(net),
        )


def test_a_tree_without_variational_layers_raises():
    with pytest.raises(ValueError, match="params holds no variational layers"):
        bcdl_jax.balance_scales({"Dense_0": {"kernel": jnp.ones((2, 2))}})
