import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax


def plain(key):
    keys = jax.random.split(key, 4)
    return {
        "Conv_0": {"kernel": jax.random.normal(keys[0], (3, 3, 2, 5)), "bias": jax.random.normal(keys[1], (5,))},
        "Dense_0": {"kernel": jax.random.normal(keys[2], (20, 4)), "bias": jax.random.normal(keys[3], (4,))},
        "BatchNorm_0": {"scale": jnp.ones(5)},
    }


def test_the_largest_weights_of_each_layer_are_kept(key):
    params = plain(key)
    masks = jax.jit(lambda params: bcdl_jax.baselines.magnitude_masks(params, {"Conv_0": 0.1, "Dense_0": 0.5}))(params)
    for name, share in (("Conv_0", 0.1), ("Dense_0", 0.5)):
        magnitudes = np.abs(np.ravel(params[name]["kernel"]))
        largest = np.argsort(magnitudes)[-round(share * magnitudes.size) :]
        assert sorted(np.flatnonzero(np.ravel(masks[name]["kernel"]))) == sorted(largest)
        assert np.all(masks[name]["bias"])
    pruned = bcdl_jax.baselines.apply_masks(params, masks)
    for name in ("Conv_0", "Dense_0"):
        expected = np.where(masks[name]["kernel"], params[name]["kernel"], 0)
        np.testing.assert_array_equal(pruned[name]["kernel"], expected)
    np.testing.assert_array_equal(pruned["BatchNorm_0"]["scale"], 1)


def test_masks_by_layer_name_become_a_tree(key):
    params = plain(key)
    by_name = {name: np.asarray(kernel) > 0 for name, kernel in bcdl_jax.baselines.kernels_by_layer(params).items()}
    masks = bcdl_jax.baselines.expand_masks(params, by_name)
    pruned = jax.jit(bcdl_jax.baselines.apply_masks)(params, masks)
    for name in by_name:
        np.testing.assert_array_equal(pruned[name]["kernel"], np.maximum(params[name]["kernel"], 0))
        np.testing.assert_array_equal(pruned[name]["bias"], params[name]["bias"])
    for function in (
        bcdl_jax.baselines.apply_masks,
        lambda params, masks: bcdl_jax.baselines.prune_and_splice(params, masks, params),
    ):
        with pytest.raises(ValueError, match="masks must be a tree like params"):
            function(params, by_name)
    with pytest.raises(ValueError, match="masks has no value for layer Dense_0; the layers are Conv_0, Dense_0"):
        bcdl_jax.baselines.expand_masks(params, {"Conv_0": by_name["Conv_0"]})
    with pytest.raises(ValueError, match=r"masks holds bool\[5\] for layer Conv_0; it must be bool\[3, 3, 2, 5\]"):
        bcdl_jax.baselines.expand_masks(params, by_name | {"Conv_0": np.ones(5, bool)})
    with pytest.raises(ValueError, match=r"masks holds int32\[3, 3, 2, 5\] for layer Conv_0"):
        bcdl_jax.baselines.expand_masks(params, by_name | {"Conv_0": np.ones((3, 3, 2, 5), np.int32)})


@pytest.mark.parametrize("splicing", [False, True])
def test_only_splicing_gives_pruned_weights_a_gradient(key, splicing):
    params = plain(key)
    masks = bcdl_jax.baselines.magnitude_masks(params, 0.3)
    factors = plain(jax.random.key(7))

    def loss(params):
        used = bcdl_jax.baselines.apply_masks(params, masks, splicing=splicing)
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(used), jax.tree.leaves(factors), strict=True))

    gradients = jax.grad(loss)(params)["Dense_0"]["kernel"]
    mask = masks["Dense_0"]["kernel"]
    np.testing.assert_array_equal(gradients, np.where(mask | splicing, factors["Dense_0"]["kernel"], 0))


def test_surgery_prunes_splices_and_leaves_alone():
    params = {"Dense_0": {"kernel": jnp.array([[0.1, 0.95, 1.2], [0.5, 1.05, 3.0]]), "bias": jnp.zeros(3)}}
    thresholds = {"Dense_0": {"kernel": jnp.float32(1.0), "bias": jnp.float32(0.0)}}
    for before in (True, False):
        masks = jax.tree.map(lambda leaf, before=before: jnp.full(leaf.shape, before), params)
        after = jax.jit(bcdl_jax.baselines.prune_and_splice)(params, masks, thresholds)
        np.testing.assert_array_equal(after["Dense_0"]["kernel"], [[False, before, True], [False, before, True]])
        np.testing.assert_array_equal(after["Dense_0"]["bias"], True)  # All arrays that are not kernels are kept.


def test_surgery_thresholds_by_hand(key):
    params = plain(key)
    found = bcdl_jax.baselines.surgery_thresholds(params, {"Conv_0": 0.5, "Dense_0": 2.0})
    for name, spread in (("Conv_0", 0.5), ("Dense_0", 2.0)):
        magnitudes = np.abs(np.asarray(params[name]["kernel"], np.float64))
        assert float(found[name]["kernel"]) == pytest.approx(magnitudes.mean() + spread * magnitudes.std(), rel=1e-5)
        assert float(found[name]["bias"]) == 0


def test_errors_are_one_sentence(key):
    for function in (
        lambda params: bcdl_jax.baselines.magnitude_masks(params, 0.5),
        bcdl_jax.baselines.create_mixture,
        bcdl_jax.baselines.kernels_by_layer,
    ):
        with pytest.raises(
            ValueError, match=r"no array called kernel with two axes or more, .*; it holds: a/kernel, b/w\."
        ):
            function({"a": {"kernel": jnp.ones(3)}, "b": {"w": jnp.ones((3, 4))}})
    with pytest.raises(ValueError, match="kept holds 0; it must be above 0 and at most 1"):
        bcdl_jax.baselines.magnitude_masks(plain(key), 0)
    with pytest.raises(ValueError, match="spread has no value for layer Conv_0; the layers are Conv_0, Dense_0"):
        bcdl_jax.baselines.surgery_thresholds(plain(key), {"Dense_0": 1.0})
