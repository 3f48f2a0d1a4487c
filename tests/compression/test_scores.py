"""Tests of the pruning scores, and of pruning by another score than the default one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.conftest import CHAIN

FAMILIES = [bcdl_jax.GroupNormalJeffreys(), bcdl_jax.GroupHorseshoe()]


def layer(family, group_axis):
    """A layer of six groups. The log-variance of their weights rises by 1 from group to group."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (3, 3, 4, 6) if group_axis == "output" else (6, 4)
    kernel = jax.random.normal(keys[0], shape)
    node = family.create(keys[1], kernel, jnp.zeros(shape[-1]), group_axis)
    noise = jnp.arange(6.0) - 3
    return node.replace(
        kernel_log_variance=jnp.broadcast_to(noise if group_axis == "output" else noise[:, None], shape)
        + 0.2 * jax.random.normal(keys[2], shape)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize("group_axis", ["input", "output"])
def test_log_noise_to_signal_agrees_with_sampled_weights(family, group_axis):
    node = layer(family, group_axis)
    key, draws = jax.random.key(1), 40_000
    scales = node.sample_scale(jax.random.fold_in(key, 0), draws)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (draws, *node.kernel_shape))
    spread = scales[:, :, None] if group_axis == "input" else scales.reshape(draws, 1, 1, 1, 6)
    weights = np.asarray((node.kernel_mean + jnp.exp(node.kernel_log_variance / 2) * noise) * spread)
    others = 1 if group_axis == "input" else (0, 1, 2)
    found = np.log(weights.var(0).sum(others) / (weights.mean(0) ** 2).sum(others))
    np.testing.assert_allclose(bcdl_jax.compression.log_noise_to_signal(node), found, atol=0.03)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize("group_axis", ["input", "output"])
def test_log_noise_to_signal_does_not_change_under_balancing(family, group_axis):
    node = layer(family, group_axis)
    balanced = bcdl_jax.balance_scales({"posterior": node})["posterior"]
    np.testing.assert_allclose(
        bcdl_jax.compression.log_noise_to_signal(balanced),
        bcdl_jax.compression.log_noise_to_signal(node),
        rtol=1e-4,
        atol=1e-4,
    )


def test_group_without_signal_is_pruned_first():
    node = layer(bcdl_jax.GroupNormalJeffreys(), "input")
    silent = node.replace(kernel_mean=node.kernel_mean.at[1].set(0))
    assert int(jnp.argmax(bcdl_jax.compression.log_noise_to_signal(silent))) == 1
    kept = bcdl_jax.prune({"posterior": silent}, 1e6, score=bcdl_jax.compression.log_noise_to_signal)
    assert kept["posterior"].input_mask.tolist() == [1, 0, 1, 1, 1, 1]


def test_log_noise_to_signal_of_single_weights_is_the_log_dropout_rate():
    node = layer(bcdl_jax.SparseVariationalDropout(), "output")
    np.testing.assert_array_equal(
        bcdl_jax.compression.log_noise_to_signal(node), bcdl_jax.compression.log_dropout_rate(node)
    )


def test_pruning_functions_use_the_given_score():
    node = layer(bcdl_jax.GroupNormalJeffreys(), "input")
    # The noise of the scales falls from group to group, and the noise of the weights rises.
    params = {"posterior": node.replace(scale_log_variance=-9 - jnp.arange(6.0))}
    by_scales = bcdl_jax.prune(params, -11.5)["posterior"]
    assert by_scales.input_mask.tolist() == [0, 0, 0, 1, 1, 1]
    by_weights = bcdl_jax.prune(params, -0.5, score=bcdl_jax.compression.log_noise_to_signal)["posterior"]
    assert by_weights.input_mask.tolist() == [1, 1, 1, 0, 0, 0]

    (count,) = bcdl_jax.compression.kept_groups(params, -0.5, bcdl_jax.compression.log_noise_to_signal).values()
    assert int(count) == 3
    state = bcdl_jax.train.create_train_state(params, optax.sgd(0.1), jax.random.key(3))
    masked = bcdl_jax.train.prune_state(state, -0.5, score=bcdl_jax.compression.log_noise_to_signal)
    assert masked.params["posterior"].input_mask.tolist() == [1, 1, 1, 0, 0, 0]

    def error(params):
        return jnp.sum(params["posterior"].input_mask < 1)

    for score, expected in (
        (bcdl_jax.compression.log_dropout_rate, [0, 0, 1, 1, 1, 1]),
        (bcdl_jax.compression.log_noise_to_signal, [1, 1, 1, 1, 0, 0]),
    ):
        thresholds = bcdl_jax.choose_thresholds(params, error, max_increase=2, score=score)
        assert bcdl_jax.prune(params, thresholds, score=score)["posterior"].input_mask.tolist() == expected


@pytest.mark.slow
def test_scores_under_jit_vmap_and_grad(net):
    _, params, _ = net
    for node in bcdl_jax.variational_layers(params).values():
        scores = bcdl_jax.compression.log_noise_to_signal(node)
        np.testing.assert_allclose(jax.jit(bcdl_jax.compression.log_noise_to_signal)(node), scores, rtol=1e-5)
        two = jax.vmap(bcdl_jax.compression.log_noise_to_signal)(
            jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), node)
        )
        np.testing.assert_allclose(two, jnp.stack([scores, scores]), rtol=1e-5)
        # The gradient must be finite even if everything is pruned.
        masked = node.with_masks(node.input_mask > 1, node.output_mask > 1)
        slope = jax.grad(lambda node: jnp.sum(bcdl_jax.compression.log_noise_to_signal(node)), allow_int=True)(masked)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))
    pruned = jax.jit(lambda params: bcdl_jax.prune(params, 0.0, CHAIN, bcdl_jax.compression.log_noise_to_signal))(
        params
    )
    assert list(bcdl_jax.variational_layers(pruned)) == list(bcdl_jax.variational_layers(params))
