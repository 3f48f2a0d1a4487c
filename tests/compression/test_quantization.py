import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.compression.quantization import integer_bits
from tests.conftest import CHAIN, assert_trees_close, make_posterior, run


@pytest.mark.parametrize(
    ("values", "bits"),
    [
        ([0, 0], 0),
        ([0, 1], 2),
        ([-1], 1),
        ([-1, 0], 1),
        ([1, -2], 2),
        ([3], 3),
        ([-4, 3], 3),
        ([-5, 3], 4),
        ([127, -128], 8),
        ([128], 9),
        ([32767], 16),
    ],
)
def test_integer_bits_counts_the_shortest_twos_complement(values, bits):
    assert int(integer_bits(jnp.array(values, jnp.int16))) == bits
    if bits:
        assert all(-(2 ** (bits - 1)) <= value < 2 ** (bits - 1) for value in values)
        assert bits == 1 or any(not -(2 ** (bits - 2)) <= value < 2 ** (bits - 2) for value in values)


def test_step_is_a_multiple_of_the_geometric_mean_deviation_of_the_kept_weights(key):
    posterior = make_posterior(key, (5, 4), "input").replace(
        input_mask=jnp.array([1.0, 1, 0, 1, 1]), output_mask=jnp.array([1.0, 0, 1, 1])
    )
    reduced = bcdl_jax.reduce_precision({"posterior": posterior}, 0.3)["posterior"]
    kept = np.ix_([0, 1, 3, 4], [0, 2, 3])
    means, variances = (np.asarray(moment, np.float64) for moment in posterior.kernel_moments())
    step = 0.3 * np.exp(np.mean(0.5 * np.log(variances[kept])))
    assert float(reduced.kernel_step) == pytest.approx(step, rel=1e-5)
    np.testing.assert_array_equal(
        reduced.kernel, np.where(np.asarray(posterior.kernel_mask), np.round(means / float(reduced.kernel_step)), 0)
    )
    bias_variances = np.asarray(posterior.bias_moments()[1], np.float64)[[0, 2, 3]]
    assert float(reduced.bias_step) == pytest.approx(0.3 * np.exp(np.mean(0.5 * np.log(bias_variances))), rel=1e-5)
    assert int(reduced.kernel_bits) == int(integer_bits(reduced.kernel))
    assert reduced.kernel.dtype == jnp.int16


@pytest.mark.parametrize("kind", ["net", "conv_net"])
def test_weights_are_rounded_to_the_nearest_multiple_of_the_step(kind, request):
    model, params, inputs = request.getfixturevalue(kind)
    means = bcdl_jax.mean_weights(params)
    reduced = bcdl_jax.reduce_precision(params, 0.01)
    for name, layer in means.items():
        node = reduced[name]["posterior"]
        kernel, bias = node.mean_weights()
        assert np.abs(kernel - layer["kernel"]).max() <= 0.51 * node.kernel_step
        assert np.abs(bias - layer["bias"]).max() <= 0.51 * node.bias_step
    np.testing.assert_allclose(run(model, reduced, inputs), run(model, params, inputs), rtol=0.05, atol=0.1)
    with pytest.raises(
        ValueError, match=r"_0 holds a QuantizedLayer, which has no noise to sample; use deterministic=True"
    ):
        model.apply({"params": reduced}, inputs, deterministic=False, rngs={"noise": jax.random.key(0)})


def test_reduce_precision_works_under_jit_and_vmap(net):
    _, params, _ = net
    expected = bcdl_jax.reduce_precision(params, 0.25)
    assert_trees_close(jax.jit(bcdl_jax.reduce_precision)(params, 0.25), expected)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    assert_trees_close(
        bcdl_jax.train.select_seed(jax.vmap(lambda p: bcdl_jax.reduce_precision(p, 0.25))(stacked), 1), expected
    )


def test_steps_never_overflow_the_integers(net):
    _, params, _ = net
    reduced = bcdl_jax.reduce_precision(params, 1e-12)
    for node, posterior in zip(
        (layer["posterior"] for layer in reduced.values()), bcdl_jax.variational_layers(params).values(), strict=True
    ):
        assert int(jnp.abs(node.kernel.astype(jnp.int32)).max()) == 2**15 - 1
        np.testing.assert_allclose(node.mean_weights()[0], posterior.mean_weights()[0], atol=float(node.kernel_step))


def test_round_off_rule_by_hand(key):
    """For variances of 0.01 and 0.001, 2 v < 2^-t holds up to t = 5 and t = 8. The mean is 6.5, so t is 7. The largest weight is 3."""
    posterior = make_posterior(key, (2, 1), "input", use_bias=False).replace(
        kernel_mean=jnp.array([[3.0], [0.3]]),
        kernel_log_variance=jnp.log(jnp.array([[0.01], [0.001]])),
        scale_mean=jnp.ones(2),
        scale_log_variance=jnp.full(2, -60.0),
    )
    reduced = bcdl_jax.compression.reduce_precision_by_round_off({"posterior": posterior})["posterior"]
    assert float(reduced.kernel_step) == 2.0**-7
    np.testing.assert_array_equal(reduced.kernel, [[384], [38]])
    assert int(reduced.kernel_bits) == 7 + 1 + np.ceil(np.log2(np.log2(3) + 1) + 1)


def test_round_off_rule_is_finite_for_small_weights(net):
    _, params, _ = net
    small = jax.tree.map(lambda leaf: leaf, params)
    small["Dense_0"]["posterior"] = params["Dense_0"]["posterior"].replace(
        kernel_mean=params["Dense_0"]["posterior"].kernel_mean * 1e-3
    )
    assert (
        int(bcdl_jax.compression.layer_bits(bcdl_jax.compression.reduce_precision_by_round_off(small))["Dense_0"]) > 0
    )
    assert np.isfinite(bcdl_jax.compression.rate_paper(bcdl_jax.compression.reduce_precision_by_round_off(small)))


def test_choose_relative_step_returns_the_largest_step_within_the_limit(net):
    _, params, _ = net

    def error(tree):
        layer = tree["Dense_0"]["posterior"]
        return 1.0 if isinstance(layer, bcdl_jax.Posterior) else 1.0 + float(layer.kernel_step)

    unit = float(bcdl_jax.reduce_precision(params, 1.0)["Dense_0"]["posterior"].kernel_step)
    assert bcdl_jax.choose_relative_step(params, error, max_increase=0.6 * unit, candidates=(0.25, 1.0, 0.5)) == 0.5
    assert bcdl_jax.choose_relative_step(params, error, max_increase=0.0, candidates=(0.25, 1.0, 0.5)) == 0.25

    def lucky(tree):
        """An error that is above the limit for half a unit, and within the limit for a whole unit."""
        layer = tree["Dense_0"]["posterior"]
        return 0.0 if isinstance(layer, bcdl_jax.Posterior) else float(abs(layer.kernel_step - 0.5 * unit) < 0.1 * unit)

    assert bcdl_jax.choose_relative_step(params, lucky, max_increase=0.0, candidates=(0.25, 1.0, 0.5)) == 0.25
    with pytest.raises(ValueError, match="max_increase is -1"):
        bcdl_jax.choose_relative_step(params, error, max_increase=-1)
    with pytest.raises(ValueError, match="candidates is empty"):
        bcdl_jax.choose_relative_step(params, error, max_increase=1, candidates=())


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_relative_step_must_be_positive(net, step):
    with pytest.raises(ValueError, match=r"relative_step of layer Dense_0 is .*; it must be a positive number"):
        bcdl_jax.reduce_precision(net[1], step)


def test_relative_step_by_layer(net):
    _, params, _ = net
    steps = {"Dense_0": 0.1, "Dense_1": 0.2, "Dense_2": 0.4}
    mixed = bcdl_jax.reduce_precision(params, steps)
    for name in CHAIN:
        assert_trees_close(mixed[name], bcdl_jax.reduce_precision(params, steps[name])[name])
    with pytest.raises(ValueError, match="relative_step has no value for layer Dense_1"):
        bcdl_jax.reduce_precision(params, {"Dense_0": 1.0})


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-2])
@pytest.mark.parametrize("by_round_off", [False, True])
def test_half_precision_is_rounded_like_float32(dtype, size, by_round_off, key):
    """Small deviations: their squares underflow in float16."""
    layer = make_posterior(key, (20, 10), "input")
    layer = layer.replace(
        kernel_mean=size * layer.kernel_mean, kernel_log_variance=jnp.full((20, 10), -2 * 8.5) + 2 * jnp.log(size)
    )
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), layer)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    reduce = (
        bcdl_jax.compression.reduce_precision_by_round_off
        if by_round_off
        else lambda tree: bcdl_jax.reduce_precision(tree, 1.0)
    )
    reduced, expected = reduce({"layer": half})["layer"], reduce({"layer": wide})["layer"]
    assert reduced.kernel_step.dtype == dtype
    weights = reduced.kernel.astype(jnp.float32) * reduced.kernel_step.astype(jnp.float32)
    tolerance = float(expected.kernel_step) * 0.51 + 0.005 * float(jnp.abs(weights).max())
    np.testing.assert_allclose(weights, wide.mean_weights()[0], atol=tolerance)
    assert int(reduced.kernel_bits) == pytest.approx(int(expected.kernel_bits), abs=1)
