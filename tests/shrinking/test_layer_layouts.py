import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.priors.posterior import Posterior
from bcdl_jax.shrinking.layer_layouts import layer_layouts
from bcdl_jax.shrinking.layouts import kept_indices
from tests.conftest import make_posterior


def kept_by_field(layer, read):
    """The kept indices of each field, if the function reads the fields ``read`` in the given layouts."""
    fields = [field.name for field in dataclasses.fields(layer) if field.metadata.get("pytree_node", True)]
    fields = [name for name in fields if getattr(layer, name) is not None]
    layouts = layer_layouts({"a": jnp.ones(2), "b": layer}, [(np.array([1]),), *(read.get(name) for name in fields)])
    np.testing.assert_array_equal(layouts[0][0], [1])  # Outside the layers nothing changes.
    shapes = [np.shape(getattr(layer, name)) for name in fields]
    kept = map(kept_indices, layouts[1:], shapes)
    return {name: [list(map(int, axis)) for axis in axes] for name, axes in zip(fields, kept, strict=True)}


def test_all_fields_keep_what_one_field_keeps():
    layer = make_posterior(jax.random.key(0), (5, 4), "input")
    kept = kept_by_field(
        layer,
        {
            "kernel_mean": (np.array([1, 3]), np.array([0])),
            "input_mask": (np.array([4]),),
            "bias_mean": (np.array([2]),),
        },
    )
    inputs, outputs = [1, 3, 4], [0, 2]
    assert kept["kernel_mean"] == kept["kernel_log_variance"] == [inputs, outputs]
    assert kept["input_mask"] == kept["scale_mean"] == kept["scale_log_variance"] == [inputs]
    assert kept["output_mask"] == kept["bias_mean"] == kept["bias_log_variance"] == [outputs]


def test_a_square_layer_follows_the_declared_axes():
    layer = make_posterior(jax.random.key(0), (3, 3), "output")
    kept = kept_by_field(layer, {"kernel_mean": (np.array([0, 1]), np.array([2]))})
    assert kept["input_mask"] == [[0, 1]]
    assert kept["output_mask"] == kept["scale_mean"] == kept["bias_mean"] == [[2]]


def test_feature_groups_stay_of_equal_size():
    layer = make_posterior(jax.random.key(0), (3, 1, 2, 6), "output", feature_group_count=3)
    whole = None
    kept = kept_by_field(layer, {"kernel_mean": (whole, whole, np.array([0]), np.array([0, 2, 3]))})
    # The group of outputs 4 and 5 is gone. The first group keeps one more output, as many as the second one.
    assert kept["kernel_mean"] == [[0, 1, 2], [0], [0], [0, 1, 2, 3]]
    assert kept["input_mask"] == [[0, 2]]
    assert kept["output_mask"] == kept["scale_mean"] == [[0, 1, 2, 3]]
    # An input that is read keeps its place in all groups that are left.
    kept = kept_by_field(
        layer, {"kernel_mean": (whole, whole, np.array([0]), np.array([1])), "input_mask": (np.array([5]),)}
    )
    assert kept["kernel_mean"] == [[0, 1, 2], [0], [0, 1], [1, 4]]
    assert kept["input_mask"] == [[0, 1, 4, 5]]


def test_a_layer_that_is_not_read_keeps_scalars_and_windows_alone():
    layer = make_posterior(jax.random.key(0), (3, 1, 2, 6), "output")
    kept = kept_by_field(layer, {})
    assert kept["kernel_mean"] == [[0, 1, 2], [0], [], []]
    assert kept["bias_mean"] == kept["input_mask"] == kept["scale_mean"] == [[]]
    params = {"dense": make_posterior(jax.random.key(0), (4, 2), "input")}
    levels = bcdl_jax.baselines.reduce_to_levels(params, *bcdl_jax.baselines.share_weights(params, 2))["dense"]
    assert levels.kernel_levels.size == 2  # As many as there are outputs, but they are no outputs.
    assert kept_by_field(levels, {})["kernel_levels"] == [[]]
    kept = kept_by_field(levels, {"kernel": (np.array([0]), np.array([1])), "kernel_levels": (None,)})
    assert kept["kernel_levels"] == [[0, 1]]
    assert kept["bias"] == [[1]]
    assert kept["kernel_step"] == []


@pytest.mark.parametrize("family", [bcdl_jax.GroupNormalJeffreys(), bcdl_jax.GroupHorseshoe()], ids=["nj", "horseshoe"])
def test_stacked_layers_keep_all_layers(family):
    one = family.create(jax.random.key(0), jnp.ones((4, 3)), jnp.ones(3), "input")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    layouts = layer_layouts(stacked, [(None, np.array([1]), np.array([2])), *[None] * (len(jax.tree.leaves(one)) - 1)])
    cut = jax.tree.unflatten(
        jax.tree.structure(one),
        [leaf[np.ix_(*kept_indices(layout, leaf.shape))] for leaf, layout in zip(jax.tree.leaves(stacked), layouts)],
    )
    assert isinstance(cut, Posterior)
    expected = family.create(jax.random.key(0), jnp.ones((1, 1)), jnp.ones(1), "input")
    assert jax.tree.map(np.shape, cut) == jax.tree.map(lambda leaf: (2, *leaf.shape), expected)
