import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.compression import prune_units
from tests.compression.test_pruning import RATES, rated, weights_left
from tests.conftest import CHAIN, CONV_CHAIN, run


def brute_force(params, error, max_increase):
    """The size of the smallest network within the limit, among all networks that prune groups in the order of their scores."""
    order = {name: np.argsort(np.asarray(rates)) for name, rates in bcdl_jax.compression.pruning_scores(params).items()}
    limit = float(error(params)) + max_increase
    best = None
    for counts in itertools.product(*(range(1, len(ranked) + 1) for ranked in order.values())):
        masks = {
            name: jnp.zeros(len(ranked), bool).at[ranked[:count]].set(True)
            for (name, ranked), count in zip(order.items(), counts, strict=True)
        }
        pruned = prune_units(params, masks, CHAIN)
        if float(error(pruned)) <= limit and (best is None or weights_left(pruned) < best):
            best = weights_left(pruned)
    return best


@pytest.mark.parametrize("max_increase", [0.0, 3.0, 8.0, 1e9])
def test_chosen_thresholds_against_brute_force(net, max_increase):
    """The error is the sum of penalties of the pruned groups. The greedy result must be within a tenth of the optimum."""
    _, params, _ = net
    params = rated(params, RATES)

    @jax.jit
    def error(tree):
        penalties = [
            jnp.sum(jnp.where(posterior.input_mask > 0, 0, 2.0 - posterior.log_dropout_rate()))
            for posterior in bcdl_jax.variational_layers(tree).values()
        ]
        return sum(penalties)

    chosen = bcdl_jax.choose_thresholds(params, error, max_increase=max_increase, chain=CHAIN)
    pruned = bcdl_jax.prune(params, chosen, CHAIN)
    assert float(error(pruned)) <= max_increase
    optimum = brute_force(params, error, max_increase)
    assert optimum <= weights_left(pruned) <= 1.1 * optimum
    assert min(int(count) for count in bcdl_jax.compression.kept_groups(pruned, math.inf).values()) >= 1


def test_no_layer_can_lose_another_group_within_the_limit(net):
    """Each layer is pruned by one further group."""
    model, params, inputs = net
    target = run(model, params, inputs)

    def error(tree):
        return jnp.abs(run(model, tree, inputs) - target).mean()

    limit = 0.3
    chosen = bcdl_jax.choose_thresholds(params, error, max_increase=limit, chain=CHAIN)
    pruned = bcdl_jax.prune(params, chosen, CHAIN)
    assert float(error(pruned)) <= limit
    for name, rates in bcdl_jax.compression.pruning_scores(params).items():
        kept = np.sort(np.asarray(rates)[np.asarray(rates) < chosen[name]])
        if len(kept) > 1:
            assert float(error(bcdl_jax.prune(params, chosen | {name: float(kept[-1])}, CHAIN))) > limit


def scored_error(tree):
    """An error with a penalty for each pruned group, which falls with its score."""
    gone = [
        jnp.sum(jnp.where(p.group_mask > 0, 0, 3.0 - p.log_dropout_rate()))
        for p in bcdl_jax.variational_layers(tree).values()
    ]
    return sum(gone)


@pytest.mark.parametrize("max_increase", [0.0, 4.0, 1e9])
@pytest.mark.parametrize("kind", ["ties", "all equal", "neighbours", "emptied", "dead channel"])
def test_pruning_by_the_chosen_thresholds_stays_within_the_limit(kind, max_increase, net, conv_net):
    """For difficult sets of scores, each layer also keeps a group."""
    chain = CHAIN
    if kind == "ties":
        params = rated(net[1], {"Dense_0": [-5, 1, 1, 1, 2, 2], "Dense_1": [0, 0, 1, 1, 1], "Dense_2": [-1, -1, 0, 0]})
    elif kind == "all equal":
        params = rated(net[1], {"Dense_0": [1] * 6, "Dense_1": [1] * 5, "Dense_2": [1] * 4})
    elif kind == "neighbours":
        near = np.float32(1.7) + np.arange(6, dtype=np.float32) * np.spacing(np.float32(1.7))
        params = rated(net[1], {"Dense_0": near, "Dense_1": near[:5], "Dense_2": near[:4]})
    elif kind == "emptied":
        params = bcdl_jax.prune(rated(net[1], RATES), {"Dense_0": 9.0, "Dense_1": 9.0, "Dense_2": -math.inf}, CHAIN)
    else:
        chain = CONV_CHAIN
        scores = np.linspace(-4, 2, 24)
        scores[1::6] = np.linspace(
            2.1, 2.4, 4
        )  # the units with the highest scores read channel 1 of the second convolution
        params = rated(conv_net[1], {"Conv_0": [-3, -2, -1, 0], "Conv_1": [-4, 2.5, -3, -2, -1, 0], "Dense_0": scores})
    before = float(scored_error(params))
    chosen = bcdl_jax.choose_thresholds(params, jax.jit(scored_error), max_increase=max_increase, chain=chain)
    pruned = bcdl_jax.prune(params, chosen, chain)
    assert float(scored_error(pruned)) <= before + max_increase + 1e-3
    left = bcdl_jax.compression.kept_groups(pruned, math.inf)
    if kind == "emptied":
        assert int(left["Dense_2"]) == 0
    else:
        assert min(map(int, left.values())) >= 1
    if max_increase == 1e9:
        expected = {"ties": 1 * 2 + 2 * 2 + 2 * 3, "all equal": 6 * 5 + 5 * 4 + 4 * 3, "neighbours": 1 + 1 + 3}
        # One channel each, and the best unit that reads it.
        expected |= {"dead channel": 9 * 2 + 9 + 3, "emptied": 0}
        assert weights_left(pruned) == expected[kind]


@pytest.mark.parametrize("max_increase", [-0.1, float("nan")])
def test_max_increase_must_not_be_negative(net, max_increase):
    with pytest.raises(ValueError, match=r"max_increase is .*; it must be 0 or more"):
        bcdl_jax.choose_thresholds(net[1], lambda _: 0.0, max_increase=max_increase)


def test_error_must_be_a_number(net):
    with pytest.raises(ValueError, match=r"error\(params\) is not a number"):
        bcdl_jax.choose_thresholds(net[1], lambda _: float("nan"), max_increase=1)
