import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.conftest import assert_trees_close, run


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["net", "conv_net"])
def test_from_trained_keeps_the_outputs_and_variances(kind, request, key):
    model, params, inputs = request.getfixturevalue(kind)
    trained = bcdl_jax.mean_weights(params)
    fresh = jax.jit(model.init)(key, inputs)["params"]
    started = bcdl_jax.from_trained(fresh, trained)
    np.testing.assert_allclose(run(model, started, inputs), run(model, params, inputs), rtol=1e-4, atol=1e-5)
    for name, posterior in bcdl_jax.variational_layers(started).items():
        before = bcdl_jax.variational_layers(fresh)[name]
        np.testing.assert_array_equal(posterior.kernel_log_variance, before.kernel_log_variance)
        np.testing.assert_array_equal(posterior.scale_mean, before.scale_mean)


def test_from_trained_takes_flat_paths_and_copies_other_parameters(net):
    _, params, _ = net
    extra = params | {"norm": {"scale": jnp.ones(2)}}
    trained = bcdl_jax.mean_weights(extra)
    flat = {f"{layer}/{name}": np.asarray(array) for layer, arrays in trained.items() for name, array in arrays.items()}
    flat["norm/scale"] = np.full(2, 7.0)
    started = bcdl_jax.from_trained(extra, flat)
    np.testing.assert_array_equal(started["norm"]["scale"], 7)
    assert started["norm"]["scale"].dtype == jnp.float32
    assert_trees_close(bcdl_jax.mean_weights(started)["Dense_1"], trained["Dense_1"], rtol=1e-5)


def test_errors_name_arrays_that_do_not_fit(net):
    _, params, _ = net
    trained = bcdl_jax.mean_weights(params)
    with pytest.raises(ValueError, match=r"lacks Dense_1/bias, which must have shape \(4,\)"):
        bcdl_jax.from_trained(params, trained | {"Dense_1": {"kernel": trained["Dense_1"]["kernel"]}})
    with pytest.raises(ValueError, match=r"Dense_1/kernel of trained has shape \(4, 5\); it must have \(5, 4\)"):
        bcdl_jax.from_trained(params, trained | {"Dense_1": trained["Dense_1"] | {"kernel": jnp.ones((4, 5))}})
    with pytest.raises(ValueError, match=r"holds Dense_9/kernel, which params does not have"):
        bcdl_jax.from_trained(params, trained | {"Dense_9": {"kernel": jnp.ones(1)}})
    with pytest.raises(ValueError, match=r'trained holds params/Dense_0/kernel, .* pass its entry "params"'):
        bcdl_jax.from_trained(params, {"params": trained})
    with pytest.raises(ValueError, match="trained holds variational layers; it must be the params of a plain network"):
        bcdl_jax.from_trained(params, params)
    with pytest.raises(ValueError, match="params holds no variational layers; it holds: Dense_0, Dense_1, Dense_2"):
        bcdl_jax.from_trained(trained, params)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_named(net, bad):
    """The largest float32 is 3e38."""
    _, params, _ = net
    trained = jax.tree.map(lambda leaf: np.array(leaf, np.float64), bcdl_jax.mean_weights(params))
    trained["Dense_1"]["kernel"][2, 1] = bad
    with pytest.raises(ValueError, match="Dense_1/kernel of trained holds 1 values that are not finite in float32"):
        bcdl_jax.from_trained(params, trained)
    with pytest.raises(ValueError, match="Dense_1/kernel"):
        jax.jit(lambda params: bcdl_jax.from_trained(params, trained))(params)


def test_traced_values_are_not_checked(net):
    _, params, _ = net
    trained = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), bcdl_jax.mean_weights(params))
    start = jax.jit(bcdl_jax.from_trained)(params, trained)
    assert np.isnan(start["Dense_1"]["posterior"].kernel_mean).all()


def test_half_precision_cannot_hold_every_weight(net):
    _, params, _ = net
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    trained = bcdl_jax.mean_weights(params)
    assert bcdl_jax.from_trained(half, trained)["Dense_0"]["posterior"].kernel_mean.dtype == jnp.float16
    trained["Dense_0"]["bias"] = trained["Dense_0"]["bias"].at[0].set(1e5)
    with pytest.raises(ValueError, match="Dense_0/bias of trained holds 1 values that are not finite in float16"):
        bcdl_jax.from_trained(half, trained)


@pytest.mark.parametrize("reduced", [False, True])
def test_mean_weights_run_the_plain_twin(reduced, conv_net):
    model, params, inputs = conv_net
    pruned = bcdl_jax.prune(params, 0.0, ["Conv_0", "Conv_1", "Dense_0"])
    compressed = bcdl_jax.reduce_precision(pruned, 0.5) if reduced else pruned

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            x = nn.relu(nn.Conv(6, (3, 3), padding="VALID")(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    weights = bcdl_jax.mean_weights(compressed | {"other": jnp.ones(2)})
    np.testing.assert_array_equal(weights.pop("other"), jnp.ones(2))
    outputs = Twin().apply({"params": weights}, inputs)
    np.testing.assert_allclose(outputs, model.apply({"params": compressed}, inputs), rtol=1e-5, atol=1e-6)
