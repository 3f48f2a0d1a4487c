import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.codec import reference_decoder
from tests.conftest import run


def pruned_net(net):
    model, params, *_ = net
    pruned = bcdl_jax.prune(params, float(np.median(next(iter(bcdl_jax.compression.pruning_scores(params).values())))))
    return model, pruned


def test_k_means_finds_what_brute_force_finds():
    """The best division of the sorted values into four runs has the smallest sum of squares."""
    values = jnp.array([0.0, 0.1, 0.15, 3.0, 3.3, 5.9, 6.0, 9.0, -50.0])
    keep = values > -10

    def cost(parts):
        return sum(np.sum((part - part.mean()) ** 2) for part in parts)

    kept = np.sort(np.asarray(values)[np.asarray(keep)])
    best = min(
        (
            [kept[a:b] for a, b in itertools.pairwise((0, *cuts, len(kept)))]
            for cuts in itertools.combinations(range(1, len(kept)), 3)
        ),
        key=cost,
    )
    found = bcdl_jax.baselines.cluster_values(values, keep, 4)
    np.testing.assert_allclose(found, [part.mean() for part in best], rtol=1e-6)


def test_a_centre_without_values_stays_and_nothing_kept_is_no_nan():
    found = bcdl_jax.baselines.cluster_values(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.ones(4, bool), 5)
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.75, 1])
    assert np.isfinite(bcdl_jax.baselines.cluster_values(jnp.ones(3), jnp.zeros(3, bool), 2)).all()


@pytest.mark.slow
def test_every_weight_goes_to_its_nearest_level(net):
    _, pruned = pruned_net(net)
    places, levels = bcdl_jax.baselines.share_weights(pruned, 6)
    for name, layer in bcdl_jax.variational_layers(pruned).items():
        kernel, mask = map(
            np.asarray, (layer.kernel_moments()[0], jnp.broadcast_to(layer.kernel_mask, layer.kernel_shape))
        )
        distances = np.abs(kernel[..., None] - np.asarray(levels[name]))
        chosen = np.take_along_axis(distances, np.maximum(places[name], 0)[..., None], -1)[..., 0]
        np.testing.assert_array_equal(np.asarray(places[name]) < 0, ~mask)
        np.testing.assert_allclose(chosen[mask], distances.min(-1)[mask], atol=1e-6)


def test_the_gradient_of_a_level_is_the_sum_over_its_weights(net):
    _, pruned = pruned_net(net)
    places, levels = bcdl_jax.baselines.share_weights(pruned, 5)
    factors = {name: jax.random.normal(jax.random.key(1), place.shape) for name, place in places.items()}

    def loss(levels):
        kernels = bcdl_jax.baselines.kernels_from_levels(places, levels)
        return sum(jnp.vdot(kernels[name], factors[name]) for name in kernels)

    gradients = jax.jit(jax.grad(loss))(levels)
    for name, place in places.items():
        expected = [np.asarray(factors[name])[np.asarray(place) == number].sum() for number in range(5)]
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layers_of_levels_compute_with_them_and_come_back_from_a_file(net):
    model, pruned = pruned_net(net)
    inputs = net[2]
    places, levels = bcdl_jax.baselines.share_weights(pruned, 7)
    reduced = bcdl_jax.baselines.reduce_to_levels(pruned, places, levels)
    kernels = bcdl_jax.baselines.kernels_from_levels(places, levels)
    nodes = jax.tree.leaves(reduced, is_leaf=bcdl_jax.compression.is_layer)
    layers = dict(zip(bcdl_jax.variational_layers(pruned), nodes, strict=True))
    for name, layer in layers.items():
        kernel, bias = layer.mean_weights()
        np.testing.assert_array_equal(kernel, kernels[name])
        expected = bcdl_jax.variational_layers(pruned)[name].bias_moments()[0]
        np.testing.assert_allclose(bias, expected, atol=0.51 * float(layer.bias_step))
        assert int(layer.kernel_bits) == 3
    data = bcdl_jax.codec.encode(reduced)
    again = bcdl_jax.codec.decode(data, pruned)
    assert jax.tree.structure(again) == jax.tree.structure(reduced)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(reduced)))
    np.testing.assert_array_equal(run(model, again, inputs), run(model, reduced, inputs))
    _, entries = reference_decoder.decode(data)
    for entry, layer in zip(entries, layers.values(), strict=True):
        np.testing.assert_array_equal(entry["kernel_levels"], layer.kernel_levels)
        np.testing.assert_array_equal(entry["kernel"], layer.kernel)


@pytest.mark.parametrize("levels", [[-1.0, 0.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, np.inf], [0.5]])
def test_levels_that_do_not_fit_are_refused(net, levels):
    _, pruned = pruned_net(net)
    reduced = bcdl_jax.baselines.reduce_to_levels(pruned, *bcdl_jax.baselines.share_weights(pruned, 7))
    broken = jax.tree.map(
        lambda layer: layer.replace(kernel_levels=jnp.array(levels)),
        reduced,
        is_leaf=bcdl_jax.compression.is_layer,
    )
    with pytest.raises(ValueError, match=r"levels of layer .* are not ascending finite numbers without 0"):
        bcdl_jax.codec.encode(broken)


def test_the_twin_of_levels_can_be_shrunk(net):
    model, pruned = pruned_net(net)
    reduced = bcdl_jax.baselines.reduce_to_levels(pruned, *bcdl_jax.baselines.share_weights(pruned, 7))
    weights = bcdl_jax.mean_weights(reduced)

    def twin(weights, x):
        for number, name in enumerate(weights):
            x = x @ weights[name]["kernel"] + weights[name]["bias"]
            x = jax.nn.relu(x) if number < len(weights) - 1 else x
        return x

    small_apply, small, report = bcdl_jax.shrink(twin, weights, net[2])
    np.testing.assert_allclose(small_apply(small, net[2]), run(model, reduced, net[2]), atol=1e-5)
    assert report.bytes[1] < report.bytes[0]


@pytest.mark.slow
def test_the_network_of_levels_itself_is_shrunk_right(net):
    """``shrink`` has no rule for the gather of the levels, and leaves these layers whole."""
    model, pruned = pruned_net(net)
    reduced = bcdl_jax.baselines.reduce_to_levels(pruned, *bcdl_jax.baselines.share_weights(pruned, 7))
    small_apply, small, _ = bcdl_jax.shrink(lambda params, x: model.apply({"params": params}, x), reduced, net[2])
    np.testing.assert_allclose(small_apply(small, net[2]), run(model, reduced, net[2]), atol=1e-5)


def test_an_empty_layer_is_zero_and_survives_the_file(net):
    model, params, inputs = net
    empty = bcdl_jax.prune(params, -np.inf)
    reduced = bcdl_jax.baselines.reduce_to_levels(empty, *bcdl_jax.baselines.share_weights(empty, 7))
    again = bcdl_jax.codec.decode(bcdl_jax.codec.encode(reduced), params)
    for tree in (reduced, again):
        for layer in jax.tree.leaves(tree, is_leaf=bcdl_jax.compression.is_layer):
            assert layer.kernel_levels.size == 0
            np.testing.assert_array_equal(layer.mean_weights()[0], 0)
        assert np.isfinite(run(model, tree, inputs)).all()


def test_masks_of_the_params_override_the_assignments(net):
    _, pruned = pruned_net(net)
    _, params, _ = net
    reduced = bcdl_jax.baselines.reduce_to_levels(pruned, *bcdl_jax.baselines.share_weights(params, 7))
    bcdl_jax.codec.encode(reduced)  # It refuses a weight other than 0 that the masks prune.
    layer = jax.tree.leaves(reduced, is_leaf=bcdl_jax.compression.is_layer)[0]
    assert np.all(np.asarray(layer.kernel)[~np.broadcast_to(layer.kernel_mask, layer.kernel_shape)] == 0)


def test_the_summary_counts_the_levels(net):
    _, pruned = pruned_net(net)
    data = bcdl_jax.codec.encode(
        bcdl_jax.baselines.reduce_to_levels(pruned, *bcdl_jax.baselines.share_weights(pruned, 7))
    )
    summaries = bcdl_jax.codec.summarize(data)
    assert len(data) - 80 < sum(summary.bytes for summary in summaries) < len(data)
    assert all(summary.bytes > 7 * 4 for summary in summaries)


def test_errors_are_one_sentence(net):
    places, levels = bcdl_jax.baselines.share_weights(net[1], 3)
    with pytest.raises(ValueError, match="bias_bits is 17; it must be from 2 to 16"):
        bcdl_jax.baselines.reduce_to_levels(net[1], places, levels, bias_bits=17)
    with pytest.raises(ValueError, match="levels lacks layer Dense_0; it has no layer"):
        bcdl_jax.baselines.reduce_to_levels(net[1], places, {})
    with pytest.raises(ValueError, match="counts holds 0 for layer"):
        bcdl_jax.baselines.share_weights(net[1], 0)
    with pytest.raises(ValueError, match="counts names layer nowhere, which does not exist; the layers are"):
        bcdl_jax.baselines.share_weights(net[1], {"nowhere": 4})
