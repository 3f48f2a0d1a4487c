import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax._tree import map_named_layers
from bcdl_jax.priors import Family, array_kinds
from bcdl_jax.priors.layer_node import kernel_mask
from tests.conftest import make_posterior

FAMILIES = [bcdl_jax.GroupNormalJeffreys(), bcdl_jax.GroupHorseshoe(), bcdl_jax.SparseVariationalDropout()]
CASES = [((4, 3), "input"), ((3, 2, 4), "output"), ((3, 3, 2, 4), "output"), ((2, 3, 3, 2, 4), "output")]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_moments_against_monte_carlo(key, shape, axis):
    posterior = make_posterior(key, shape, axis)
    draws = 100_000
    keys = jax.random.split(key, 3)
    weights = posterior.kernel_mean + jnp.exp(0.5 * posterior.kernel_log_variance) * jax.random.normal(
        keys[0], (draws, *shape)
    )
    biases = posterior.bias_mean + jnp.exp(0.5 * posterior.bias_log_variance) * jax.random.normal(
        keys[1], (draws, shape[-1])
    )
    scales = posterior.sample_scale(keys[2], draws)
    if axis == "input":
        weights = weights * scales[:, :, None]
    else:
        weights = weights * scales.reshape(draws, *(1,) * (len(shape) - 1), shape[-1])
        biases = biases * scales
    for sample, (mean, variance) in [(weights, posterior.kernel_moments()), (biases, posterior.bias_moments())]:
        error = 5 * np.sqrt(np.max(variance) / draws)
        np.testing.assert_allclose(sample.mean(0), mean, atol=error)
        np.testing.assert_allclose(sample.var(0), variance, rtol=0.06, atol=1e-4)


@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_pruned_moments_are_zero_and_have_no_kl(key, shape, axis):
    posterior = make_posterior(key, shape, axis)
    kept = np.arange(posterior.group_mask.size) != 1
    side = "input_mask" if axis == "input" else "output_mask"
    pruned = posterior.replace(**{side: jnp.asarray(kept, jnp.float32)})
    smaller = make_posterior(key, shape, axis)
    cut = (lambda a: a[kept]) if axis == "input" else (lambda a: a[..., kept])
    smaller = smaller.replace(
        **{name: cut(getattr(posterior, name)) for name in ("kernel_mean", "kernel_log_variance")},
        **{name: getattr(posterior, name)[kept] for name in ("scale_mean", "scale_log_variance")},
        **(
            {}
            if axis == "input"
            else {name: getattr(posterior, name)[kept] for name in ("bias_mean", "bias_log_variance")}
        ),
        **{side: jnp.ones(kept.sum())},
    )
    np.testing.assert_allclose(pruned.kl_divergence(), smaller.kl_divergence(), rtol=1e-5)
    for moment, expected in zip(pruned.kernel_moments(), smaller.kernel_moments(), strict=True):
        np.testing.assert_array_equal(cut(moment), expected)
        assert float(jnp.abs(moment).sum()) == pytest.approx(float(jnp.abs(expected).sum()), rel=1e-5)
    if axis == "output":
        assert float(pruned.bias_moments()[0][1]) == float(pruned.bias_moments()[1][1]) == 0


def test_masks_and_pruned_groups_have_no_gradient(key):
    posterior = make_posterior(key, (4, 3), "input").replace(input_mask=jnp.array([1.0, 0.0, 1.0, 1.0]))
    gradient = jax.grad(lambda p: p.kl_divergence() + p.kernel_moments()[0].sum())(posterior)
    np.testing.assert_array_equal(gradient.input_mask, 0)
    np.testing.assert_array_equal(gradient.output_mask, 0)
    np.testing.assert_array_equal(gradient.kernel_mean[1], 0)
    np.testing.assert_array_equal(gradient.scale_mean[1], 0)
    assert np.all(np.asarray(gradient.kernel_mean[0]) != 0)


@pytest.mark.parametrize("feature_groups", [1, 2, 3])
def test_kernel_mask_against_loops(feature_groups):
    inputs, features = 6, 12
    values = np.random.default_rng(1)
    input_mask, output_mask = (jnp.asarray(values.integers(0, 2, size), jnp.float32) for size in (inputs, features))
    (mask,) = kernel_mask((3, inputs // feature_groups, features), input_mask, output_mask)
    per_group_in, per_group_out = inputs // feature_groups, features // feature_groups
    for o in range(features):
        for i in range(per_group_in):
            assert bool(mask[i, o]) == bool(input_mask[o // per_group_out * per_group_in + i] and output_mask[o])


@pytest.mark.parametrize("length", [3, 4])  # the layer has 4 groups, so 4 stacked layers would broadcast
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_stacked_layers_raise_and_work_under_vmap(key, family, length):
    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            body = nn.scan(
                lambda layer, carry, _: (layer(carry), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "noise": True},
                length=length,
            )
            return body(bcdl_jax.Dense(4, family=family), inputs, None)[0]

    params = Repeated().init(key, jnp.ones((2, 4)))["params"]
    trained = jax.vmap(bcdl_jax.mean_weights)(params)
    for function in (
        bcdl_jax.kl_divergence,
        bcdl_jax.compression.pruning_scores,
        bcdl_jax.mean_weights,
        bcdl_jax.compression.weight_variances,
        bcdl_jax.rate,
        lambda params: bcdl_jax.prune(params, 3.0),
        bcdl_jax.balance_scales,
        lambda params: bcdl_jax.reduce_precision(params, 0.5),
        lambda params: bcdl_jax.from_trained(params, trained),
    ):
        with pytest.raises(
            ValueError, match=rf"Dense_0 of params is several.*\({length}, 4\), where one axis.*jax.vmap"
        ):
            function(params)
    each = jax.vmap(bcdl_jax.kl_divergence)(params)
    apart = [bcdl_jax.kl_divergence(bcdl_jax.train.select_seed(params, index)) for index in range(length)]
    np.testing.assert_allclose(each, jnp.stack(apart), rtol=1e-6)


def test_layers_are_found_by_type_in_any_tree(net, key):
    _, params, _ = net
    assert list(bcdl_jax.variational_layers(params)) == ["Dense_0", "Dense_1", "Dense_2"]
    tree = {
        "block": [{"a": params["Dense_0"]["posterior"]}, {"posterior": params["Dense_1"]["posterior"]}],
        "bias": jnp.ones(3),
    }
    assert list(bcdl_jax.variational_layers(tree)) == ["block/0/a", "block/1"]
    named = map_named_layers(lambda name, _: name, tree, bcdl_jax.Posterior)
    assert named["block"][0]["a"] == "block/0/a"
    np.testing.assert_array_equal(named["bias"], 1)


FAMILY_TYPES = [
    value for value in vars(bcdl_jax.priors).values() if isinstance(value, type) and issubclass(value, Family)
]


@pytest.mark.parametrize(
    "family", [value for value in FAMILY_TYPES if value is not Family], ids=lambda family: family.__name__
)
def test_every_array_field_of_a_family_has_a_kind(family, key):
    node = family().create(key, jnp.ones((3, 2)), jnp.ones(2), "input")
    kinds = array_kinds(node)
    arrays = {field.name for field in dataclasses.fields(node) if field.metadata.get("pytree_node", True)}
    assert kinds.keys() == arrays
    assert len(jax.tree.leaves(node)) == len(arrays)
    assert set(kinds.values()) <= {"mean", "log_variance", "scale", "mask"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "has no kind; .* one of mean, log_variance, scale, mask"),
        ({"kind": "variance"}, "has kind 'variance'; .* one of mean, log_variance, scale, mask"),
        ({"kind": "mean"}, "has no axis; .* one of "),
        ({"kind": "mean", "axis": "rows"}, "has axis 'rows'; .* one of "),
    ],
)
def test_a_field_without_a_known_kind_or_axis_raises(metadata, message):
    with pytest.raises(TypeError, match=f"Field extra of Incomplete {message}"):

        class Incomplete(bcdl_jax.Posterior):
            extra: jax.Array = flax.struct.field(metadata=metadata)


@pytest.mark.parametrize("tree", [{}, {"Dense_0": {"kernel": jnp.ones((2, 2))}}, jnp.ones(2)])
def test_a_tree_without_variational_layers_raises(tree):
    for function in (
        bcdl_jax.variational_layers,
        bcdl_jax.kl_divergence,
        bcdl_jax.compression.pruning_scores,
        bcdl_jax.compression.weight_variances,
    ):
        with pytest.raises(ValueError, match="params holds no variational layers"):
            function(tree)
    with pytest.raises(ValueError, match="params holds no variational layers"):
        bcdl_jax.prune(tree, 0.0)
    with pytest.raises(ValueError, match="params holds no variational layers"):
        bcdl_jax.reduce_precision(tree, 0.25)
    with pytest.raises(ValueError, match="params holds no variational layers"):
        bcdl_jax.rate(tree)


def test_error_for_a_quantised_tree_names_its_content(key):
    params = bcdl_jax.Dense(2).init(key, jnp.ones((1, 3)))["params"]
    reduced = {"first": bcdl_jax.reduce_precision(params, 0.25), "scale": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r"params holds no variational layers; it holds: first, scale \(first is a QuantizedLayer\)\. "
    ):
        bcdl_jax.prune(reduced, 0.0)
