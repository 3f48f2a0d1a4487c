"""Networks of well-known kinds, in Linen, NNX, Equinox and this library."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bcdl_jax
from tests.conftest import CHAIN, CONV_CHAIN, prune_half
from tests.shrinking.networks import ResNet, numpy_tree, shapes_after


def kill_channels(layer, norm, channels):
    layer["kernel"][..., channels] = 0
    norm["scale"][channels] = 0
    norm["bias"][channels] = 0


def test_a_resnet_with_batch_norm(key):
    model, inputs = ResNet(), jax.random.normal(key, (3, 8, 8, 3))
    variables = numpy_tree(model.init(key, inputs))
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    params = variables["params"]
    kill_channels(params["Conv_1"], params["BatchNorm_1"], [0, 5])  # Inside the first block.
    for number in (0, 2):  # The residual stream of the first block: both terms of its sum.
        kill_channels(params[f"Conv_{number}"], params[f"BatchNorm_{number}"], [1, 2, 6])
    kill_channels(
        params["Conv_4"], params["BatchNorm_4"], [7]
    )  # One term of a sum: the other term still needs the channel.
    _, _, report = bcdl_jax.shrink(model.apply, variables, inputs)
    after = shapes_after(report)
    assert after["params/Conv_0/kernel"] == (3, 3, 3, 5)
    assert after["params/Conv_1/kernel"] == (3, 3, 5, 6)
    assert after["params/Conv_2/kernel"] == (3, 3, 6, 5)
    assert after["params/Conv_3/kernel"] == (3, 3, 5, 12)
    assert after["params/Conv_4/kernel"] == (3, 3, 12, 11)
    assert after["params/Conv_5/kernel"] == (1, 1, 5, 12)
    assert after["batch_stats/BatchNorm_0/mean"] == (5,)
    assert after["params/Dense_0/kernel"] == (12, 4)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), strides=(4, 4))(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("token", nn.initializers.normal(), (1, 1, 12))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 12))
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(3)(y, y)
            y = nn.Dense(20)(nn.LayerNorm()(x))
            x = x + nn.Dense(12)(nn.gelu(y))
        return nn.Dense(4)(nn.LayerNorm()(x)[:, 0])


@pytest.mark.slow
def test_a_vision_transformer(key):
    model, inputs = Transformer(), jax.random.normal(key, (3, 8, 8, 3))
    params = numpy_tree(model.init(key, inputs)["params"])
    attention = params["MultiHeadDotProductAttention_0"]
    attention["out"]["kernel"][1] = 0  # Nothing reads head 1.
    attention["query"]["kernel"][:, 0, 2] = 0  # One direction of head 0.
    params["Dense_0"]["kernel"][:, [1, 5]] = 0
    params["Dense_3"]["kernel"][[3, 7, 8]] = 0
    apply = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    _, _, report = bcdl_jax.shrink(apply, params, inputs)
    after = shapes_after(report)
    for part in ("query", "key", "value"):
        assert after[f"MultiHeadDotProductAttention_0/{part}/kernel"] == (12, 2, 4)
        assert after[f"MultiHeadDotProductAttention_1/{part}/kernel"] == (12, 3, 4)
    assert after["MultiHeadDotProductAttention_0/out/kernel"] == (2, 4, 12)
    assert after["Dense_0/kernel"] == (12, 18)
    assert after["Dense_1/kernel"] == (18, 12)
    assert after["Dense_2/kernel"] == (12, 17)
    assert after["Dense_3/kernel"] == (17, 12)


def test_an_nnx_model(key):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(2, 6, (3, 3), rngs=rngs)
            self.second = nnx.Linear(6 * 16, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)).reshape(x.shape[0], -1))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    pure = numpy_tree(nnx.to_pure_dict(state))
    pure["first"]["kernel"][..., [0, 4]] = 0
    inputs = jax.random.normal(key, (2, 4, 4, 2))

    def apply(params, x):
        state = nnx.state(nnx.eval_shape(lambda: nnx.merge(graph, state_like)))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    state_like = state
    _, _, report = bcdl_jax.shrink(apply, pure, inputs)
    assert shapes_after(report)["first/kernel"] == (3, 3, 2, 4)
    assert shapes_after(report)["second/kernel"] == (4 * 16, 3)

    # The arrays of a State have the same names.
    kept = jax.tree.map(jnp.asarray, state)
    nnx.replace_by_pure_dict(kept, pure)
    _, small, report = bcdl_jax.shrink(lambda params, x: nnx.merge(graph, params)(x), kept, inputs)
    assert shapes_after(report)["first/kernel"] == (3, 3, 2, 4)
    masks = bcdl_jax.baselines.magnitude_masks(kept, {"first": 0.5, "second": 0.25})
    assert {path: float(mask.mean()) for path, mask in bcdl_jax.baselines.kernels_by_layer(masks).items()} == {
        "first": 0.5,
        "second": 0.25,
    }
    torch = bcdl_jax.export.torch_state_dict(lambda params, x: nnx.merge(graph, params)(x), small, inputs)
    assert sorted(torch) == ["first.bias", "first.weight", "second.bias", "second.weight"]


@pytest.mark.slow
def test_an_equinox_model(key):
    equinox = pytest.importorskip("equinox")
    first, second = jax.random.split(key)
    layers = [equinox.nn.Conv2d(2, 6, 3, key=first), equinox.nn.Linear(6, 3, key=second)]
    layers[0] = equinox.tree_at(lambda layer: layer.weight, layers[0], layers[0].weight.at[jnp.array([1, 4])].set(0))
    layers[0] = equinox.tree_at(lambda layer: layer.bias, layers[0], layers[0].bias.at[jnp.array([1, 4])].set(-1))
    params, static = equinox.partition(layers, equinox.is_array)

    def apply(params, x):
        convolution, linear = equinox.combine(params, static)
        return jax.vmap(lambda image: linear(jax.nn.relu(convolution(image)).mean((1, 2))))(x)

    x = jax.random.normal(key, (4, 2, 6, 5))  # Equinox has channels first.
    small_apply, small, report = bcdl_jax.shrink(apply, params, x)
    assert [leaf.after for leaf in report.leaves] == [(4, 2, 3, 3), (4, 1, 1), (3, 4), (3,)]
    np.testing.assert_allclose(small_apply(small, x[:1]), apply(params, x[:1]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_pruned_nets_of_this_library(net, conv_net, key):
    for (model, params, inputs), chain in ((net, CHAIN), (conv_net, CONV_CHAIN)):
        pruned = prune_half(params, chain)
        apply = lambda params, x, model=model: model.apply({"params": params}, x)  # noqa: E731
        small_apply, small, report = bcdl_jax.shrink(apply, pruned, inputs)
        assert report.bytes[1] < report.bytes[0]
        # The mean network does not read variances. They keep the same inputs and outputs as the means.
        for layer in bcdl_jax.variational_layers(small).values():
            assert layer.kernel_log_variance.shape == layer.kernel_shape
        mine, expected = jax.jit(small_apply)(small, inputs), jax.jit(apply)(pruned, inputs)
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)
        if chain is CONV_CHAIN:
            continue
        # Noise depends on key, example and position alone, so shrinking does not change it.
        sampled = lambda params, x, key, model=model: model.apply(  # noqa: E731
            {"params": params}, x, deterministic=False, rngs={"noise": key}
        )
        small_apply, small, report = bcdl_jax.shrink(sampled, pruned, (inputs, key))
        assert report.bytes[1] < report.bytes[0]
        mine, expected = jax.jit(small_apply)(small, inputs[:2], key), jax.jit(sampled)(pruned, inputs[:2], key)
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)
        quantized = bcdl_jax.reduce_precision(pruned, 0.25)
        small_apply, small, report = bcdl_jax.shrink(apply, quantized, inputs)
        assert report.bytes[1] < report.bytes[0]
        assert jax.tree.structure(small) == jax.tree.structure(quantized)
