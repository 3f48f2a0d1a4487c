import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.compression.pruning import prune_units
from tests.conftest import CHAIN, CONV_CHAIN, assert_trees_close, run


def rated(params, rates):
    """The params with the given log dropout rates by layer."""
    return {
        name: {
            "posterior": layer["posterior"].replace(
                scale_mean=jnp.ones(len(rates[name])), scale_log_variance=jnp.asarray(rates[name], jnp.float32)
            )
        }
        for name, layer in params.items()
    }


RATES = {"Dense_0": [-5, 1, -4, -1, 2, -3], "Dense_1": [-5, -4, 1, -2, 2], "Dense_2": [-5, 1, -1, -3]}


def weights_left(params):
    return sum(
        int(posterior.kernel_mask.sum()) * math.prod(posterior.kernel_shape[:-2])
        for posterior in bcdl_jax.variational_layers(params).values()
    )


def test_prune_masks_own_groups(net):
    _, params, _ = net
    pruned = bcdl_jax.prune(rated(params, RATES), -1.5)
    masks = {name: posterior.input_mask.tolist() for name, posterior in bcdl_jax.variational_layers(pruned).items()}
    assert masks == {"Dense_0": [1, 0, 1, 0, 0, 1], "Dense_1": [1, 1, 0, 1, 0], "Dense_2": [1, 0, 0, 1]}
    assert all(posterior.output_mask.all() for posterior in bcdl_jax.variational_layers(pruned).values())
    assert {name: int(count) for name, count in bcdl_jax.compression.kept_groups(pruned).items()} == {
        "Dense_0": 3,
        "Dense_1": 3,
        "Dense_2": 2,
    }
    by_layer = bcdl_jax.prune(rated(params, RATES), {"Dense_0": 10.0, "Dense_1": -1.5, "Dense_2": -4.0})
    assert [int(posterior.input_mask.sum()) for posterior in bcdl_jax.variational_layers(by_layer).values()] == [
        6,
        3,
        1,
    ]


def test_prune_is_pure_idempotent_and_works_under_jit_and_vmap(net):
    _, params, _ = net
    params = rated(params, RATES)
    before = jax.tree.map(jnp.copy, params)
    pruned = bcdl_jax.prune(params, -1.5, CHAIN)
    assert_trees_close(params, before, rtol=0)
    assert_trees_close(bcdl_jax.prune(pruned, -1.5, CHAIN), pruned, rtol=0)
    assert_trees_close(bcdl_jax.prune(pruned, math.inf, CHAIN), pruned, rtol=0)
    assert_trees_close(jax.jit(lambda p, t: bcdl_jax.prune(p, t, CHAIN))(params, -1.5), pruned, rtol=0)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    both = jax.vmap(lambda p: bcdl_jax.prune(p, -1.5, CHAIN))(stacked)
    assert_trees_close(bcdl_jax.train.select_seed(both, 1), pruned, rtol=0)


@pytest.mark.parametrize("noise", [False, True])
def test_a_chain_prunes_what_nobody_reads_without_changing_the_output(net, noise, key):
    model, params, inputs = net
    params = rated(params, RATES)
    alone, chained = bcdl_jax.prune(params, -1.5), bcdl_jax.prune(params, -1.5, CHAIN)
    layers = bcdl_jax.variational_layers(chained)
    np.testing.assert_array_equal(layers["Dense_0"].output_mask, layers["Dense_1"].input_mask)
    np.testing.assert_array_equal(layers["Dense_1"].output_mask, layers["Dense_2"].input_mask)
    assert weights_left(chained) == 3 * 3 + 3 * 2 + 2 * 3 < weights_left(alone)
    noise_key = key if noise else None
    np.testing.assert_allclose(
        run(model, chained, inputs, noise_key), run(model, alone, inputs, noise_key), rtol=1e-5, atol=1e-6
    )


def test_a_chain_of_convolutions_and_a_flatten(conv_net, key):
    model, params, inputs = conv_net
    masks = {
        "Conv_0": jnp.array([True, False, True, True]),
        "Conv_1": jnp.array([True, True, False, True, True, True]),
        # Four positions of six channels: channel 5 is not read at any of them, channel 0 at one only.
        "Dense_0": jnp.array(
            [[True, True, True, False, True, False]] + [[False, True, True, True, True, False]] * 3
        ).ravel(),
    }
    alone, chained = prune_units(params, masks), prune_units(params, masks, CONV_CHAIN)
    layers = bcdl_jax.variational_layers(chained)
    assert layers["Conv_1"].input_mask.tolist() == [1, 0, 1, 1]
    assert layers["Conv_1"].output_mask.tolist() == [1, 1, 0, 1, 1, 0]
    assert int(layers["Dense_0"].input_mask.sum()) == 1 + 4 + 3 + 4
    assert weights_left(chained) == 9 * 2 * 3 + 9 * 3 * 4 + 12 * 3
    np.testing.assert_allclose(run(model, chained, inputs), run(model, alone, inputs), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(model, chained, inputs, key), run(model, alone, inputs, key), rtol=1e-4, atol=1e-5)


def test_a_layer_with_no_group_left_and_one_with_all(net, key):
    model, params, inputs = net
    empty = bcdl_jax.prune(params, {"Dense_0": math.inf, "Dense_1": -math.inf, "Dense_2": math.inf}, CHAIN)
    layers = bcdl_jax.variational_layers(empty)
    assert not layers["Dense_0"].output_mask.any()
    assert_trees_close(bcdl_jax.prune(empty, math.inf, CHAIN), empty, rtol=0)
    constant = run(model, empty, inputs)
    assert np.isfinite(constant).all()
    np.testing.assert_array_equal(constant, jnp.broadcast_to(constant[0], constant.shape))
    gradient = jax.jit(jax.grad(lambda p: run(model, p, inputs, key).sum() + bcdl_jax.kl_divergence(p)))(empty)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    for function in (bcdl_jax.rate, bcdl_jax.compression.rate_paper):
        assert not math.isnan(float(function(empty)))
        assert not math.isnan(float(function(bcdl_jax.reduce_precision(empty, 0.25))))
    whole = bcdl_jax.prune(params, math.inf, CHAIN)
    assert_trees_close(whole, params, rtol=0)
    assert float(bcdl_jax.rate(whole)) == float(bcdl_jax.compression.rate_paper(whole)) == 1


def brute_force(params, error, max_increase):
    """The smallest network among all that prune by score, by trying every one of them."""
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
    """The error is the sum of penalties of the pruned groups, which rise with the score: greedy search must find the optimum or come close."""
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


def test_chosen_thresholds_leave_nothing_to_take(net):
    """No layer can lose one more group within the limit."""
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
    """Rises with the scores of the groups that are gone."""
    gone = [
        jnp.sum(jnp.where(p.group_mask > 0, 0, 3.0 - p.log_dropout_rate()))
        for p in bcdl_jax.variational_layers(tree).values()
    ]
    return sum(gone)


@pytest.mark.parametrize("max_increase", [0.0, 4.0, 1e9])
@pytest.mark.parametrize("kind", ["ties", "all equal", "neighbours", "emptied", "dead channel"])
def test_the_thresholds_reproduce_a_net_within_the_limit(kind, max_increase, net, conv_net):
    """Whatever the scores: pruning by the chosen thresholds costs what was allowed, and leaves a group in each layer."""
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
        scores[1::6] = np.linspace(2.1, 2.4, 4)  # the worst units all read channel 1 of the second convolution
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


def test_what_is_not_a_number_is_refused(net):
    _, params, _ = net
    nan = {**dict.fromkeys(CHAIN, 0.0), "Dense_1": jnp.float32("nan")}
    for thresholds, given in (
        (float("nan"), "nan"),
        (np.float32("nan"), "nan"),
        (nan, "nan"),
        (None, "None"),
        ("3", "'3'"),
    ):
        with pytest.raises(ValueError, match=f"thresholds holds .*{given}.*; it must be a number"):
            bcdl_jax.prune(params, thresholds)
    with pytest.raises(ValueError, match=r"error\(params\) is not a number"):
        bcdl_jax.choose_thresholds(params, lambda _: float("nan"), max_increase=1)


def test_wrong_names_are_named(net):
    _, params, _ = net
    with pytest.raises(ValueError, match="chain is 'Dense_0'; it must be a sequence of layer names"):
        bcdl_jax.prune(params, 0.0, "Dense_0")
    with pytest.raises(ValueError, match="no value for layer Dense_1; the layers are Dense_0, Dense_1, Dense_2"):
        bcdl_jax.prune(params, {"Dense_0": 0.0})
    with pytest.raises(ValueError, match="thresholds names layer Dense_7, which does not exist"):
        bcdl_jax.prune(params, dict.fromkeys([*CHAIN, "Dense_7"], 0.0))
    with pytest.raises(ValueError, match="chain names layer Dense_7, which does not exist"):
        bcdl_jax.prune(params, 0.0, ["Dense_7"])
    with pytest.raises(
        ValueError, match="Dense_0 before Dense_2, but Dense_2 has 4 inputs, not a multiple of Dense_0's 5 outputs"
    ):
        bcdl_jax.prune(params, 0.0, ["Dense_0", "Dense_2"])


def test_masks_that_do_not_fit_are_one_sentence(net):
    with pytest.raises(ValueError, match="masks names layer Dense_9, which does not exist"):
        prune_units(net[1], {"Dense_9": jnp.ones(6, bool)})
    with pytest.raises(ValueError, match=r"The mask of layer Dense_0 has shape \(5,\); it must have \(6,\)"):
        prune_units(net[1], {"Dense_0": jnp.ones(5, bool)})
