import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import bcdl_jax
from bcdl_jax.compression import prune_units
from tests.conftest import CHAIN, CONV_CHAIN, make_posterior

MASKS = {
    "Dense_0": jnp.array([True, False, True, True, False, True]),
    "Dense_1": jnp.array([True, False, True, True, False]),
    "Dense_2": jnp.array([True, True, True, True]),
}
WEIGHTS, BIASES = 6 * 5 + 5 * 4 + 4 * 3, 5 + 4 + 3


def test_rates_after_pruning_by_hand(net):
    pruned = prune_units(net[1], MASKS, CHAIN)
    kept_weights = 4 * 3 + 3 * 4 + 4 * 3
    assert float(bcdl_jax.compression.rate_paper(pruned)) == pytest.approx(WEIGHTS / kept_weights)
    kept_biases, index_bits = 3 + 4 + 3, 6 + 5 + 0
    assert float(bcdl_jax.rate(pruned)) == pytest.approx(
        32 * (WEIGHTS + BIASES) / (32 * (kept_weights + kept_biases) + index_bits)
    )
    assert {name: int(bits) for name, bits in bcdl_jax.compression.layer_bits(pruned).items()} == dict.fromkeys(
        CHAIN, 32
    )


def test_rates_after_precision_reduction_by_hand(net):
    reduced = bcdl_jax.reduce_precision(prune_units(net[1], MASKS, CHAIN), 0.25)
    bits = [int(reduced[name]["posterior"].kernel_bits) for name in CHAIN]
    bias_bits = [int(reduced[name]["posterior"].bias_bits) for name in CHAIN]
    kept = 12 * bits[0] + 12 * bits[1] + 12 * bits[2]
    assert float(bcdl_jax.compression.rate_paper(reduced)) == pytest.approx(32 * WEIGHTS / kept)
    everything = kept + 3 * bias_bits[0] + 4 * bias_bits[1] + 3 * bias_bits[2] + 11 + 6 * 32
    assert float(bcdl_jax.rate(reduced)) == pytest.approx(32 * (WEIGHTS + BIASES) / everything)
    assert [int(value) for value in bcdl_jax.compression.layer_bits(reduced).values()] == bits


def test_rates_of_convolutions_by_hand(conv_net):
    masks = {"Conv_0": jnp.array([True, False, True, True]), "Conv_1": jnp.ones(6, bool), "Dense_0": jnp.ones(24, bool)}
    pruned = prune_units(conv_net[1], masks, CONV_CHAIN)
    total = 9 * 2 * 4 + 9 * 4 * 6 + 24 * 3
    kept = 9 * 2 * 3 + 9 * 3 * 6 + 24 * 3
    assert float(bcdl_jax.compression.rate_paper(pruned)) == pytest.approx(total / kept)


def test_a_layer_without_weights_takes_no_bits(net):
    """A superfluous layer after ``shrink`` has no weights and biases, so no steps either."""
    pruned = prune_units(net[1], MASKS, CHAIN)
    gone = {"gone": make_posterior(jax.random.key(0), (0, 0), "input")}
    for tree, nothing in (
        (pruned, gone),
        (bcdl_jax.reduce_precision(pruned, 0.25), bcdl_jax.reduce_precision(gone, 0.25)),
    ):
        for rate in (bcdl_jax.rate, bcdl_jax.compression.rate_paper):
            assert float(rate(tree | nothing)) == float(rate(tree))
            assert float(rate(nothing)) == math.inf
        assert "gone" in bcdl_jax.compression.layer_bits(tree | nothing)
    assert float(bcdl_jax.compression.rate_paper_maximum(nothing)) == math.inf
    levels = bcdl_jax.baselines.reduce_to_levels(gone, *bcdl_jax.baselines.share_weights(gone, 4))
    assert levels["gone"].step_bits == 0


def test_parameters_without_a_posterior_count_32_bits(net):
    pruned = prune_units(net[1], MASKS, CHAIN)
    with_norm = pruned | {"norm": {"scale": jnp.ones(100)}}
    before, after = WEIGHTS + BIASES, (WEIGHTS + BIASES) / float(bcdl_jax.rate(pruned))
    assert float(bcdl_jax.rate(with_norm)) == pytest.approx((before + 100) / (after + 100), rel=1e-5)
    assert float(bcdl_jax.compression.rate_paper(with_norm)) == float(bcdl_jax.compression.rate_paper(pruned))


def test_rates_of_networks_with_more_bits_than_int32_holds(key):
    node = jax.eval_shape(
        lambda: bcdl_jax.GroupNormalJeffreys().create(key, jnp.zeros((20_000, 10_000)), jnp.zeros(10_000), "input")
    )
    for function in (bcdl_jax.rate, bcdl_jax.compression.rate_paper):
        assert jax.eval_shape(function, {"posterior": node}).shape == ()


def test_rates_are_never_nan_and_work_under_jit_and_vmap(net):
    empty = bcdl_jax.prune(net[1], -math.inf, CHAIN)
    assert float(bcdl_jax.compression.rate_paper(empty)) == math.inf
    assert math.isfinite(float(bcdl_jax.rate(empty)))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), prune_units(net[1], MASKS, CHAIN))
    assert jax.vmap(bcdl_jax.compression.rate_paper)(stacked)[1] == bcdl_jax.compression.rate_paper(
        bcdl_jax.train.select_seed(stacked, 1)
    )


def test_maximum_rate_agrees_with_the_entropy_of_scipy(net):
    """For integers, for levels, and for pruned single weights."""
    pruned = prune_units(net[1], MASKS, CHAIN)
    reduced = bcdl_jax.reduce_precision(pruned, 2.0)
    shared = bcdl_jax.baselines.reduce_to_levels(pruned, *bcdl_jax.baselines.share_weights(pruned, 4))
    singly = jax.tree.map(
        lambda layer: layer.replace(prunes_weights=True),
        reduced,
        is_leaf=bcdl_jax.compression.is_layer,
    )
    for tree in (reduced, shared, singly):
        bits = 0.0
        for name in CHAIN:
            layer = tree[name]["posterior"]
            kernel = np.asarray(layer.kernel)
            kept = kernel[np.broadcast_to(layer.kernel_mask, kernel.shape)]
            if layer.prunes_weights:
                kept = kernel[kernel != 0]
                bits += kernel.size * scipy.stats.entropy([kept.size, kernel.size - kept.size], base=2)
            if kept.size:
                bits += kept.size * scipy.stats.entropy(np.unique(kept, return_counts=True)[1], base=2)
        assert float(bcdl_jax.compression.rate_paper_maximum(tree)) == pytest.approx(32 * WEIGHTS / bits, rel=1e-4)
    empty = bcdl_jax.reduce_precision(bcdl_jax.prune(net[1], -math.inf, CHAIN), 0.25)
    assert float(bcdl_jax.compression.rate_paper_maximum(empty)) == math.inf


def test_errors_say_which_layers_are_needed_and_where_they_come_from(net):
    with pytest.raises(
        ValueError, match=r"no quantised layers; .*Dense_0 is a GroupNormalJeffreysPosterior.*reduce_precision"
    ):
        bcdl_jax.compression.rate_paper_maximum(net[1])
    with pytest.raises(
        ValueError, match=r"no variational layers or quantised layers; it holds: Dense_0.*bcdl_jax\.Dense"
    ):
        bcdl_jax.rate(bcdl_jax.mean_weights(net[1]))


def test_rate_counts_the_levels(net):
    pruned = prune_units(net[1], MASKS, CHAIN)
    reduced = bcdl_jax.baselines.reduce_to_levels(pruned, *bcdl_jax.baselines.share_weights(pruned, 4))
    layers = [reduced[name]["posterior"] for name in CHAIN]
    kept, biases = 12 * sum(int(layer.kernel_bits) for layer in layers), (3, 4, 3)
    biases = sum(count * int(layer.bias_bits) for count, layer in zip(biases, layers, strict=True))
    numbers = sum(layer.kernel_levels.size + 1 for layer in layers)
    everything = kept + biases + 11 + 32 * numbers
    assert float(bcdl_jax.rate(reduced)) == pytest.approx(32 * (WEIGHTS + BIASES) / everything)
