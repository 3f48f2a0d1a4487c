import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.conftest import assert_trees_close, run


def test_kl_is_the_sum_over_layers(net):
    _, params, _ = net
    per_layer = bcdl_jax.priors.kl_divergence_per_layer(params)
    by_hand = {name: posterior.kl_divergence() for name, posterior in bcdl_jax.variational_layers(params).items()}
    assert per_layer.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert float(per_layer[name]) == pytest.approx(float(value), rel=1e-5)
    assert float(bcdl_jax.kl_divergence(params)) == pytest.approx(float(sum(by_hand.values())), rel=1e-5)


def test_kl_under_vmap_and_grad(net):
    _, params, _ = net
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), params)
    batched = jax.vmap(bcdl_jax.kl_divergence)(stacked)
    assert float(batched[0]) == pytest.approx(float(bcdl_jax.kl_divergence(params)), rel=1e-5)
    gradient = jax.grad(bcdl_jax.kl_divergence)(params)["Dense_1"]["posterior"]
    posterior = params["Dense_1"]["posterior"]
    np.testing.assert_allclose(gradient.kernel_mean, posterior.kernel_mean, rtol=1e-5)
    np.testing.assert_allclose(
        gradient.kernel_log_variance, 0.5 * (np.exp(posterior.kernel_log_variance) - 1), rtol=1e-5, atol=1e-6
    )


def test_parameters_without_a_posterior_have_no_kl(net):
    _, params, _ = net
    assert float(bcdl_jax.kl_divergence(params | {"BatchNorm_0": {"scale": jnp.ones(3)}})) == float(
        bcdl_jax.kl_divergence(params)
    )


def test_pruning_scores_have_one_entry_per_group(net):
    _, params, _ = net
    rates = bcdl_jax.compression.pruning_scores(params)
    assert {name: values.shape for name, values in rates.items()} == {"Dense_0": (6,), "Dense_1": (5,), "Dense_2": (4,)}


def test_mean_weights_run_on_plain_flax_layers(conv_net):
    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Conv(6, (3, 3), padding="VALID")(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    model, params, inputs = conv_net
    means, variances = bcdl_jax.mean_weights(params), bcdl_jax.compression.weight_variances(params)
    assert jax.tree.structure(means) == jax.tree.structure(
        jax.eval_shape(Twin().init, jax.random.key(0), inputs)["params"]
    )
    assert jax.tree.map(jnp.shape, means) == jax.tree.map(jnp.shape, variances)
    np.testing.assert_allclose(
        Twin().apply({"params": means}, inputs), run(model, params, inputs), rtol=1e-4, atol=1e-5
    )


def test_mean_weights_and_variances_of_parameters_without_a_posterior(net):
    _, params, _ = net
    tree = {"block": {"inner": params["Dense_0"], "scale": jnp.full(2, 3.0)}}
    means, variances = bcdl_jax.mean_weights(tree), bcdl_jax.compression.weight_variances(tree)
    np.testing.assert_array_equal(means["block"]["scale"], 3)
    np.testing.assert_array_equal(variances["block"]["scale"], 0)
    assert set(means["block"]["inner"]) == {"kernel", "bias"}


def test_clip_variances_raises_for_a_tree_without_variational_layers():
    with pytest.raises(ValueError, match="params holds no variational layers"):
        bcdl_jax.clip_variances({"Dense_0": {"kernel": jnp.ones((2, 2))}})


def test_clip_variances_changes_only_layers_with_a_limit(net):
    _, params, _ = net
    limited = params | {"Dense_0": {"posterior": params["Dense_0"]["posterior"].replace(clip_var=0.01)}}
    clipped = bcdl_jax.clip_variances(limited)
    assert float(clipped["Dense_0"]["posterior"].kernel_log_variance.max()) == pytest.approx(np.log(0.01))
    assert_trees_close(clipped["Dense_1"], params["Dense_1"], rtol=0)
