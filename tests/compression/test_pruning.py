import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.compression import prune_units
from tests.conftest import CHAIN, CONV_CHAIN, assert_trees_close, make_posterior, run


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


def test_prune_masks_groups_below_the_thresholds(net):
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
def test_chain_prunes_unread_units_without_changing_the_output(net, noise, key):
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


def test_chain_of_convolutions_and_a_flatten(conv_net, key):
    model, params, inputs = conv_net
    masks = {
        "Conv_0": jnp.array([True, False, True, True]),
        "Conv_1": jnp.array([True, True, False, True, True, True]),
        # Four positions of six channels. Channel 5 is read at none of them, channel 0 at one.
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


def test_networks_without_kept_groups_and_with_all_groups(net, key):
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


@pytest.mark.parametrize("shapes", [[(0, 0), (0, 5), (5, 2)], [(3, 0), (0, 0), (0, 2)], [(3, 4), (4, 0), (0, 0)]])
def test_a_chain_with_a_layer_of_which_shrink_left_nothing(shapes):
    layers = {str(number): make_posterior(jax.random.key(0), shape, "input") for number, shape in enumerate(shapes)}
    thresholds = {name: math.inf for name, layer in layers.items() if layer.unit_mask.size}
    pruned = bcdl_jax.prune(layers, thresholds, ["0", "1", "2"])
    assert jax.tree.map(jnp.shape, pruned) == jax.tree.map(jnp.shape, layers)
    assert not any(pruned[str(number)].kernel_mask.any() for number in range(3) if shapes[number] != (5, 2))
    wrong = {"a": layers["0"].replace(output_mask=jnp.ones(0)), "b": make_posterior(jax.random.key(0), (3, 1), "input")}
    with pytest.raises(ValueError, match="but b has 3 inputs, not a multiple of a's 0 outputs"):
        bcdl_jax.prune(wrong, 0.0, ["a", "b"])


def test_thresholds_must_be_numbers(net):
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


def test_invalid_names_and_chains_raise(net):
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


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (["hidden", "out", "hidden"], "chain names layer hidden twice"),
        (
            [["conv", "hidden"], ["hidden", "out"]],
            r"chain holds \['conv', 'hidden'\]; it must be one sequence of layer names",
        ),
        (("conv", ("hidden", "out")), r"chain holds \('hidden', 'out'\); it must be one sequence"),
        # out has 4 outputs, and hidden has 12 inputs: three positions of a flatten would fit.
        (
            ["out", "hidden"],
            "hidden has 12 inputs and out has 4 outputs; the widths are equal in the other order, hidden before out",
        ),
        (["conv", "wide"], "wide has 8 inputs and conv has 4 outputs; a convolution reads as many channels"),
    ],
)
def test_a_chain_that_contradicts_the_shapes_is_refused(chain, message):
    shapes = {"conv": (3, 3, 2, 4), "wide": (3, 3, 8, 4), "hidden": (12, 8), "out": (8, 4)}
    layers = {
        name: make_posterior(jax.random.key(0), shape, "input" if len(shape) == 2 else "output")
        for name, shape in shapes.items()
    }
    functions = (
        lambda: bcdl_jax.prune(layers, 0.0, chain),
        lambda: prune_units(layers, {}, chain),
        lambda: bcdl_jax.choose_thresholds(layers, lambda _: 0.0, max_increase=0, chain=chain),
    )
    for function in functions:
        with pytest.raises(ValueError, match=message):
            function()


def test_invalid_masks_raise(net):
    with pytest.raises(ValueError, match="masks names layer Dense_9, which does not exist"):
        prune_units(net[1], {"Dense_9": jnp.ones(6, bool)})
    with pytest.raises(ValueError, match=r"The mask of layer Dense_0 has shape \(5,\); it must have \(6,\)"):
        prune_units(net[1], {"Dense_0": jnp.ones(5, bool)})
    with pytest.raises(ValueError, match="The mask of layer Dense_0 is a dict; it must be an array of bool"):
        prune_units(net[1], {"Dense_0": {"kernel": jnp.ones((6, 5))}})
