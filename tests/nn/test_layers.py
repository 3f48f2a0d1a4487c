import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.conftest import make_posterior, run

# Shape of the inputs without the batch, arguments of Conv.
CONV_CASES = {
    "1d": ((9, 3), {"kernel_size": 3}),
    "1d strides": ((9, 3), {"kernel_size": (4,), "strides": 2}),
    "1d causal dilated": ((9, 3), {"kernel_size": (3,), "padding": "CAUSAL", "kernel_dilation": 2}),
    "2d": ((6, 7, 3), {"kernel_size": (3, 3)}),
    "2d valid strides": ((8, 7, 3), {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID"}),
    "2d dilation": ((9, 9, 2), {"kernel_size": (3, 3), "kernel_dilation": 2}),
    "2d input dilation": ((5, 5, 2), {"kernel_size": (3, 3), "input_dilation": (2, 1), "padding": 1}),
    "2d grouped": ((6, 6, 4), {"kernel_size": (3, 3), "feature_group_count": 2}),
    "2d depthwise": ((6, 6, 4), {"kernel_size": (3, 3), "feature_group_count": 4}),
    "2d circular": ((6, 6, 2), {"kernel_size": (4, 3), "padding": "CIRCULAR"}),
    "2d reflect": ((6, 6, 2), {"kernel_size": (4, 3), "padding": "REFLECT", "kernel_dilation": (1, 2)}),
    "2d int padding": ((6, 6, 2), {"kernel_size": (3, 3), "padding": 2}),
    "2d mixed padding": ((6, 6, 2), {"kernel_size": (3, 3), "padding": (1, (0, 2))}),
    "2d no bias": ((6, 6, 2), {"kernel_size": (3, 3), "use_bias": False}),
    "3d": ((4, 5, 4, 2), {"kernel_size": (2, 3, 2)}),
    "3d strides grouped": ((5, 5, 5, 4), {"kernel_size": (3, 3, 3), "strides": 2, "feature_group_count": 2}),
}
# Every case has its mean compared with Flax in the fast tests, and its samples in the slow ones.
FAST_CASES = ("1d", "2d", "2d grouped", "2d circular")


def conv_case(name, key, examples):
    shape, arguments = CONV_CASES[name]
    layer = bcdl_jax.Conv(features=8, **arguments)
    inputs = jax.random.normal(jax.random.fold_in(key, 5), (examples, *shape))
    fresh = jax.eval_shape(layer.init, key, inputs)["params"]["posterior"]
    groups = arguments.get("feature_group_count", 1)
    posterior = make_posterior(
        key, fresh.kernel_mean.shape, "output", use_bias=arguments.get("use_bias", True), feature_group_count=groups
    )
    return layer, nn.Conv(features=8, **arguments), {"posterior": posterior}, inputs


@pytest.mark.parametrize("name", CONV_CASES)
def test_mean_convolution_agrees_with_flax(name, key):
    layer, twin, params, inputs = conv_case(name, key, 2)
    means = bcdl_jax.mean_weights(params)
    np.testing.assert_allclose(run(layer, params, inputs), twin.apply({"params": means}, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST_CASES else pytest.mark.slow) for name in CONV_CASES]
)
def test_sampled_convolution_has_the_predicted_moments_at_every_position(name, key):
    """Outputs are z (M + e sqrt(V)): the mean is E[z] M, the variance E[z^2] (M^2 + V) - E[z]^2 M^2. M and V come from Flax."""
    draws = 20_000
    layer, twin, params, inputs = conv_case(name, key, 1)
    posterior = params["posterior"]
    scale_mean, scale_variance = posterior.scale_moments()

    def flax_conv(values, kernel, bias):
        return twin.apply({"params": {"kernel": kernel} | ({} if bias is None else {"bias": bias})}, values)[0]

    mean = flax_conv(inputs, posterior.kernel_mean, posterior.bias_mean)
    bias_variance = None if posterior.bias_mean is None else jnp.exp(posterior.bias_log_variance)
    variance = flax_conv(inputs**2, jnp.exp(posterior.kernel_log_variance), bias_variance)
    expected_variance = (scale_variance + scale_mean**2) * (mean**2 + variance) - scale_mean**2 * mean**2

    many = jnp.broadcast_to(inputs, (draws, *inputs.shape[1:]))
    outputs = run(layer, params, many, key)
    assert outputs.shape[1:] == mean.shape
    # The bounds in standard errors are wide, since they hold for some hundred positions and channels at once.
    assert np.max(np.abs(outputs.mean(0) - scale_mean * mean) / np.sqrt(expected_variance / draws)) < 5.5
    kurtosis_bound = 12 * expected_variance * np.sqrt(1 / draws)
    assert np.max(np.abs(outputs.var(0) - expected_variance) / kurtosis_bound) < 1


def test_mean_dense_agrees_with_flax(key):
    inputs = jax.random.normal(key, (2, 3, 5))
    for use_bias in (True, False):
        params = {"posterior": make_posterior(key, (5, 4), "input", use_bias=use_bias)}
        means = bcdl_jax.mean_weights(params)
        outputs = bcdl_jax.Dense(4, use_bias=use_bias).apply({"params": params}, inputs)
        np.testing.assert_allclose(
            outputs, nn.Dense(4, use_bias=use_bias).apply({"params": means}, inputs), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("use_bias", [True, False])
def test_sampled_dense_has_the_predicted_moments(key, use_bias):
    draws = 100_000
    posterior = make_posterior(key, (5, 4), "input", use_bias=use_bias)
    example = jax.random.normal(key, (5,))
    means, variances = (
        bcdl_jax.mean_weights({"posterior": posterior}),
        bcdl_jax.compression.weight_variances({"posterior": posterior}),
    )
    expected_mean = example @ means["kernel"] + means.get("bias", 0)
    expected_variance = example**2 @ variances["kernel"] + variances.get("bias", 0)
    outputs = bcdl_jax.Dense(4, use_bias=use_bias).apply(
        {"params": {"posterior": posterior}},
        jnp.broadcast_to(example, (draws, 5)),
        deterministic=False,
        rngs={"noise": key},
    )
    assert np.max(np.abs(outputs.mean(0) - expected_mean) / np.sqrt(expected_variance / draws)) < 5
    np.testing.assert_allclose(outputs.var(0), expected_variance, rtol=0.05)


@pytest.mark.parametrize("layer", [bcdl_jax.Dense(4), bcdl_jax.Conv(4, (1,))])
def test_positions_of_an_example_share_its_scales(layer, key):
    """Without variance of the weights only z is random: equal positions of one example agree, different examples do not."""
    inputs = jnp.ones((6, 7, 5))
    params = jax.jit(layer.init)(key, inputs)["params"]
    posterior = params["posterior"]
    certain = posterior.replace(
        kernel_log_variance=jnp.full(posterior.kernel_mean.shape, -40.0),
        bias_log_variance=jnp.full(posterior.bias_mean.shape, -40.0),
        scale_log_variance=jnp.zeros_like(posterior.scale_mean),
    )
    outputs = run(layer, {"posterior": certain}, inputs, key)
    assert float(outputs.std(1).max()) < 1e-3
    assert float(outputs.std(0).min()) > 0.1


@pytest.mark.parametrize("kind", ["net", "conv_net"])
def test_noise_of_an_example_depends_on_key_and_index_alone(kind, request, key):
    model, params, inputs = request.getfixturevalue(kind)
    many = jnp.concatenate([inputs] * 3)
    few, more = run(model, params, inputs, key), run(model, params, many, key)
    np.testing.assert_allclose(more[: len(few)], few, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(more[len(few) : 2 * len(few)] - few).min()) > 0
    np.testing.assert_array_equal(run(model, params, inputs, key), few)
    assert float(jnp.abs(run(model, params, inputs, jax.random.key(1)) - few).min()) > 0


@pytest.mark.parametrize("kind", ["net", pytest.param("conv_net", marks=pytest.mark.slow)])
def test_layers_work_under_jit_vmap_and_grad(kind, request, key):
    model, params, inputs = request.getfixturevalue(kind)

    def sampled(p, x, k):
        return model.apply({"params": p}, x, deterministic=False, rngs={"noise": k})

    keys = jax.random.split(key, 3)
    alone = jax.jit(sampled)(params, inputs, keys[1])
    if kind == "net":  # without jit, convolutions take long
        np.testing.assert_allclose(sampled(params, inputs, keys[1]), alone, rtol=2e-4, atol=1e-5)
    batched = jax.jit(jax.vmap(sampled, in_axes=(None, None, 0)))(params, inputs, keys)
    np.testing.assert_allclose(batched[1], alone, rtol=2e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: sampled(p, inputs, key).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_gradients_are_finite_for_zero_scales_and_variances(key):
    layer, inputs = bcdl_jax.Dense(3), jnp.zeros((2, 4))
    params = jax.jit(layer.init)(key, inputs)["params"]["posterior"]
    params = {
        "posterior": params.replace(
            scale_mean=jnp.zeros(4), kernel_log_variance=jnp.full((4, 3), -200.0), bias_log_variance=jnp.full(3, -200.0)
        )
    }
    gradient = jax.grad(lambda p: layer.apply({"params": p}, inputs, deterministic=False, rngs={"noise": key}).sum())(
        params
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_outputs_are_zero_without_bias_and_kept_groups(key):
    posterior = make_posterior(key, (3, 4), "input", use_bias=False).replace(input_mask=jnp.zeros(3))
    for noise_key in (None, key):
        layer = bcdl_jax.Dense(4, use_bias=False)
        np.testing.assert_array_equal(run(layer, {"posterior": posterior}, jnp.full((2, 3), jnp.inf), noise_key), 0)


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import bcdl_jax
layer, key = bcdl_jax.Dense(5), jax.random.key(3)
inputs = jax.random.normal(key, (8, 6))
params = layer.init(key, inputs)["params"]
sample = jax.jit(lambda p, x: layer.apply({"params": p}, x, deterministic=False, rngs={"noise": key}))
mesh = jax.make_mesh((4,), ("data",))
spread = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
many = sample(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), spread)
assert len(many.sharding.device_set) == 4
np.testing.assert_allclose(many, sample(params, inputs), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_noise_does_not_depend_on_the_division_of_the_batch_among_devices():
    subprocess.run([sys.executable, "-c", SHARDED], check=True, cwd=Path(__file__).parents[2], timeout=120)


def test_pruned_groups_are_exactly_zero_sampled_or_not(key):
    conv = bcdl_jax.Conv(4, (3, 3))
    inputs = jax.random.normal(key, (2, 5, 5, 3))
    posterior = make_posterior(key, (3, 3, 3, 4), "output").replace(output_mask=jnp.array([1.0, 0.0, 1.0, 0.0]))
    for noise_key in (None, key):
        outputs = run(conv, {"posterior": posterior}, inputs, noise_key)
        np.testing.assert_array_equal(outputs[..., [1, 3]], 0)
        assert np.all(np.asarray(outputs[..., [0, 2]]) != 0)
    dense = bcdl_jax.Dense(4)
    posterior = make_posterior(key, (3, 4), "input").replace(input_mask=jnp.array([1.0, 0.0, 1.0]))
    rows = jax.random.normal(key, (2, 3))
    for noise_key in (None, key):
        outputs = run(dense, {"posterior": posterior}, rows, noise_key)
        np.testing.assert_array_equal(outputs, run(dense, {"posterior": posterior}, rows.at[:, 1].set(1e6), noise_key))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [bcdl_jax.Dense(4, dtype=jnp.bfloat16), bcdl_jax.Conv(4, (3,), dtype=jnp.bfloat16)])
def test_dtypes(layer, key):
    inputs = jnp.ones((2, 6, 3))
    params = jax.jit(layer.init)(key, inputs)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert run(layer, params, inputs).dtype == run(layer, params, inputs, key).dtype == jnp.bfloat16
    half = layer.clone(dtype=None, param_dtype=jnp.float16)
    params = jax.jit(half.init)(key, inputs)["params"]
    narrow = inputs.astype(jnp.float16)
    gradient = jax.jit(jax.grad(lambda p: run(half, p, 0 * narrow, key).sum() + bcdl_jax.kl_divergence(p)))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    assert run(half, params, inputs.astype(jnp.float16), key).dtype == jnp.float16
    assert run(half, params, inputs).dtype == jnp.float32


def test_integer_inputs_are_promoted(key):
    layer = bcdl_jax.Dense(2)
    params = layer.init(key, jnp.ones((1, 3)))["params"]
    assert layer.apply({"params": params}, jnp.ones((1, 3), jnp.uint8)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (bcdl_jax.Dense(2), (), r"a scalar as inputs; it needs \[examples, ..., in\] or \[in\]"),
        (bcdl_jax.Conv(2, (3, 3)), (5, 1), r"inputs of shape \(5, 1\); with kernel_size \(3, 3\) it needs"),
        (
            bcdl_jax.Conv(2, (3, 3), strides=(1, 1, 1)),
            (1, 5, 5, 1),
            r"has strides \(1, 1, 1\); it must be a positive int or 2 positive ints",
        ),
        (bcdl_jax.Conv(2, (3, 3), kernel_dilation=0), (1, 5, 5, 1), r"has kernel_dilation 0"),
        (
            bcdl_jax.Conv(2, (3, 3), padding="CAUSAL"),
            (1, 5, 5, 1),
            r"padding 'CAUSAL'; allowed are SAME, VALID, CIRCULAR, REFLECT",
        ),
        (
            bcdl_jax.Conv(2, (3, 3), input_dilation=2),
            (1, 5, 5, 1),
            r"padding 'SAME' with input_dilation \(2, 2\); give \(low, high\) pairs",
        ),
        (
            bcdl_jax.Conv(2, (3, 3), padding=((1, 1),)),
            (1, 5, 5, 1),
            r"needs one int or \(low, high\) pair for each of 2 axes",
        ),
        (
            bcdl_jax.Conv(2, (3, 3), feature_group_count=2),
            (1, 5, 5, 3),
            r"3 input channels, which feature_group_count 2 does not divide",
        ),
        (
            bcdl_jax.Conv(3, (3, 3), feature_group_count=2),
            (1, 5, 5, 2),
            r"3 output channels, which feature_group_count 2 does not divide",
        ),
        (bcdl_jax.Dense(0), (2, 3), "has features 0; it must be an int of at least 1"),
        (bcdl_jax.Conv(2.5, (3,)), (2, 3, 1), "has features 2.5; it must be an int of at least 1"),
    ],
)
def test_invalid_inputs_and_settings_raise(layer, shape, message, key):
    with pytest.raises(ValueError, match=message):
        layer.init(key, jnp.ones(shape))


def test_missing_noise_key_and_wrong_kernel_shape_raise(net):
    model, params, inputs = net
    with pytest.raises(ValueError, match=r"Layer Dense_0 samples its weights and needs a key: pass rngs="):
        model.apply({"params": params}, inputs, deterministic=False)
    with pytest.raises(
        ValueError, match=r"Layer Dense_0 was given a posterior with kernel shape \(6, 5\); .* need \(4, 5\)"
    ):
        model.apply({"params": params}, inputs[:, :4])
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    with pytest.raises(ValueError, match=r"Layer Dense_0 was given the posteriors of 2 layers, stacked; .*select_seed"):
        model.apply({"params": stacked}, inputs)


SETTINGS = {"dense": (bcdl_jax.Dense, (4,), (6, 3)), "conv": (bcdl_jax.Conv, (4, (3, 2)), (6, 5, 3))}


def with_noise(params):
    """Fresh params whose samples differ visibly from their means."""
    return jax.tree.map(
        lambda node: node.replace(scale_log_variance=node.scale_log_variance + 8),
        params,
        is_leaf=lambda node: hasattr(node, "replace"),
    )


@pytest.mark.parametrize(
    "kind", ["dense", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SETTINGS if kind != "dense")]
)
def test_a_single_example_has_the_noise_of_the_first_one_of_a_batch(kind, key):
    layer_type, arguments, shape = SETTINGS[kind]
    layer = layer_type(*arguments)
    shape = shape[1:] if kind == "dense" else shape
    batch = jax.random.normal(key, (3, *shape))
    params = with_noise(layer.init(key, batch[0])["params"])
    twin = (nn.Dense if kind == "dense" else nn.Conv)(*arguments)
    means = bcdl_jax.mean_weights(params)
    np.testing.assert_allclose(
        run(layer, params, batch[0]), twin.apply({"params": means}, batch[0]), rtol=1e-5, atol=1e-5
    )
    alone, together = run(layer, params, batch[0], key), run(layer, params, batch, key)
    np.testing.assert_allclose(alone, together[0], rtol=1e-5, atol=1e-5)
    # vmap with a key for each example is a batch of independent examples.
    keys = jax.random.split(key, 3)
    each = jax.vmap(lambda x, k: layer.apply({"params": params}, x, deterministic=False, rngs={"noise": k}))(
        batch, keys
    )
    np.testing.assert_allclose(each[0], run(layer, params, batch[0], keys[0]), rtol=1e-4, atol=1e-5)
    assert each.shape == together.shape


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        x = bcdl_jax.Dense(3)(x, deterministic)
        return bcdl_jax.Conv(3, (2,))(x, deterministic=deterministic)


@pytest.mark.parametrize(
    ("plain", "rematted", "flag"),
    [
        (bcdl_jax.Dense(3), nn.remat(bcdl_jax.Dense, static_argnums=(2,))(3), (False,)),
        (bcdl_jax.Conv(3, (2,)), nn.remat(bcdl_jax.Conv, static_argnums=(2,))(3, (2,)), (False,)),
        (bcdl_jax.Dense(3, deterministic=False), nn.remat(bcdl_jax.Dense)(3, deterministic=False), ()),
        (Block(), nn.remat(Block, static_argnums=(2,))(), (False,)),
    ],
    ids=["dense", "conv", "attribute", "block"],
)
def test_remat_changes_neither_samples_nor_gradients(plain, rematted, flag, key):
    inputs = jax.random.normal(key, (2, 5, 3))
    params = with_noise(
        plain.clone(deterministic=True).init(key, inputs)["params"] if not flag else plain.init(key, inputs)["params"]
    )

    def loss(model):
        def of(params):
            return jnp.sum(model.apply({"params": params}, inputs, *flag, rngs={"noise": key}) ** 2)

        return jax.jit(jax.value_and_grad(of))(params)

    value, gradient = loss(rematted)
    expected, slopes = loss(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4), gradient, slopes)


def test_deterministic_is_an_attribute_or_an_argument(key):
    inputs = jnp.ones((2, 3))
    params = with_noise(bcdl_jax.Dense(3).init(key, inputs)["params"])
    call = lambda layer, *flag, **flags: layer.apply({"params": params}, inputs, *flag, rngs={"noise": key}, **flags)  # noqa: E731
    mean, sample = call(bcdl_jax.Dense(3)), call(bcdl_jax.Dense(3), deterministic=False)
    assert not np.allclose(mean, sample)
    np.testing.assert_array_equal(call(bcdl_jax.Dense(3, deterministic=True)), mean)
    np.testing.assert_array_equal(call(bcdl_jax.Dense(3, deterministic=False)), sample)
    np.testing.assert_array_equal(call(bcdl_jax.Dense(3), False), sample)
    np.testing.assert_array_equal(call(bcdl_jax.Dense(3), np.bool_(False)), sample)
    with pytest.raises(
        ValueError, match=r"Layer Dense has deterministic=False as an attribute and was called with .*True"
    ):
        call(bcdl_jax.Dense(3, deterministic=False), deterministic=True)
    for traced in (
        lambda: call(nn.remat(bcdl_jax.Dense)(3), deterministic=False),
        lambda: jax.jit(lambda flag: call(bcdl_jax.Dense(3), flag))(True),
    ):
        with pytest.raises(
            ValueError, match=r"traced value as deterministic; .* by position with static_argnums=\(2,\)"
        ):
            traced()


class Cell(nn.RNNCellBase):
    @nn.compact
    def __call__(self, carry, inputs):
        state = jnp.tanh(bcdl_jax.Dense(4, deterministic=False)(jnp.concatenate([carry, inputs], -1)))
        return state, state

    def initialize_carry(self, rng, shape):
        return jnp.zeros((*shape[:-1], 4))

    @property
    def num_feature_axes(self):
        return 1


@pytest.mark.slow
def test_a_key_that_does_not_reach_a_loop_is_named(key):
    inputs, rngs = jnp.ones((2, 3, 4)), {"params": key, "noise": key}
    with pytest.raises(
        ValueError, match=r'does not reach the loop of nn.RNN, nn.scan or nn.vmap unless split_rngs holds "noise": True'
    ):
        nn.RNN(Cell()).init(rngs, inputs)
    layer = nn.RNN(Cell(), split_rngs={"params": False, "noise": True})
    params = layer.init(rngs, inputs)["params"]
    states = layer.apply({"params": params}, inputs, rngs={"noise": key})
    assert states.shape == (2, 3, 4)
    with pytest.raises(ValueError, match="does not reach the loop"):
        nn.RNN(Cell()).apply({"params": params}, inputs, rngs={"noise": key})
