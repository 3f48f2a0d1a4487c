"""Primitives between two layers, each with its own way to keep channels apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.conftest import assert_trees_close
from tests.shrinking.networks import shapes_after


def simple(kernel_zero_rows=(), kernel_zero_columns=(), middle=lambda x: x):
    """A network: inputs [n, 4] -> dense 6 -> middle -> dense 3."""
    rng = np.random.default_rng(1)
    params = {
        "a": rng.normal(size=(4, 6)).astype(np.float32),
        "b": rng.normal(size=(6,)).astype(np.float32),
        "c": rng.normal(size=(6, 3)).astype(np.float32),
    }
    params["a"][:, list(kernel_zero_columns)] = 0
    params["c"][list(kernel_zero_rows)] = 0
    inputs = rng.normal(size=(5, 4)).astype(np.float32)
    return (lambda params, x: middle(x @ params["a"] + params["b"]) @ params["c"]), params, inputs


@jax.custom_vjp
def odd_gradient(x):
    return 2 * x


odd_gradient.defvjp(lambda x: (odd_gradient(x), x), lambda x, slope: (7 * slope,))


MIDDLES = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "clip": lambda x: jnp.clip(x, -1, 1),
    "where": lambda x: jnp.where(x > 0, x, 0.1 * x),
    "custom_vjp": odd_gradient,
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(x) * 2),
    "jit": jax.jit(lambda x: x**2),
    "reverse twice": lambda x: x[:, ::-1][:, ::-1],
    "split and join": lambda x: jnp.concatenate(jnp.split(x, [2, 3], axis=1), axis=1),
    "pad and cut": lambda x: jnp.pad(x, ((0, 0), (2, 3)))[:, 2:-3],
    "tiled": lambda x: jnp.tile(x, (1, 2))[:, 6:],
    "repeated": lambda x: jnp.repeat(x, 2, axis=1)[:, ::2],
    "rolled": lambda x: jnp.roll(jnp.roll(x, 2, axis=1), -2, axis=1),
    "clamped sum": lambda x: jnp.minimum(x, 3.0) + jnp.maximum(x, -3.0),
    "transposed": lambda x: jnp.tanh(x.T).T,
    "reshaped": lambda x: (x.reshape(-1, 2, 3) * 2).reshape(-1, 6),
    "stacked": lambda x: jnp.stack([jnp.sin(x), x], axis=1).sum(1),
    "unstacked": lambda x: sum(jnp.unstack(jnp.stack([jnp.sin(x), x], axis=2), axis=2)),
    "batch first": lambda x: jnp.sin(x.reshape(-1)).reshape(-1, 6),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_channels_go_through(name):
    apply, params, inputs = simple((1,), (3, 4), MIDDLES[name])
    small_apply, small, report = bcdl_jax.shrink(apply, params, inputs)
    if name != "batch first":  # There, channels are mixed with the batch and stay.
        assert shapes_after(report) == {"a": (4, 3), "b": (3,), "c": (3, 3)}
    slopes = jax.grad(lambda params: apply(params, inputs).sum())(params)
    small_slopes = jax.grad(lambda params: small_apply(params, inputs).sum())(small)
    assert_trees_close(bcdl_jax.cut(slopes, report), small_slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "middle"),
    [
        ("cond", lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)),
        ("while_loop", lambda x: jax.lax.while_loop(lambda s: s.sum() < 10, lambda s: s + 1, x)),
        ("fft", lambda x: jnp.fft.fft(x).real),
    ],
)
def test_primitives_without_a_rule_stay_whole(name, middle):
    apply, params, inputs = simple((1,), (3,), middle)
    _, _, report = bcdl_jax.shrink(apply, params, inputs)
    after = shapes_after(report)
    # Channel 3 of the operand is constant and is filled in. Channel 1 of the result is not read. All other channels stay.
    assert after == {"a": (4, 5), "b": (5,), "c": (5, 3)}


def test_weakly_typed_params_keep_their_dtype():
    apply, params, inputs = simple((1,), (3, 4))
    weak = jax.tree.map(lambda leaf: jnp.where(leaf == 0, 0.0, 1.0), params)
    assert weak["a"].weak_type
    small_apply, small, report = bcdl_jax.shrink(lambda params, x: apply(params, 2 * x), weak, inputs)
    assert shapes_after(report) == {"a": (4, 3), "b": (3,), "c": (3, 3)}
    np.testing.assert_allclose(jax.jit(small_apply)(small, inputs[:2]), apply(weak, 2 * inputs[:2]), rtol=1e-5)


def test_the_gradient_of_relu_at_zero_stays_zero():
    apply, params, inputs = simple((1,), (), jax.nn.relu)
    params["b"][:] = 0
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs)
    zeros = np.zeros_like(inputs)
    slope = jax.grad(lambda x: small_apply(small, x).sum())(zeros)
    np.testing.assert_array_equal(slope, jax.grad(lambda x: apply(params, x).sum())(zeros))
    np.testing.assert_array_equal(slope, 0)


def test_embedding_gather_and_softmax(key):
    rng = np.random.default_rng(0)
    params = {
        "table": rng.normal(size=(11, 6)).astype(np.float32),
        "out": rng.normal(size=(6, 4)).astype(np.float32),
    }
    params["table"][:, [1, 2]] = 0
    params["out"][5] = 0
    apply = lambda params, ids: jax.nn.softmax(jnp.tanh(params["table"][ids]) @ params["out"])  # noqa: E731
    small_apply, small, report = bcdl_jax.shrink(apply, params, rng.integers(0, 11, (3, 5)))
    assert shapes_after(report) == {"table": (11, 3), "out": (3, 4)}
    ids = rng.integers(0, 11, (7, 5))
    np.testing.assert_allclose(small_apply(small, ids), apply(params, ids), rtol=1e-5)


def depthwise(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["d"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6
    )
    return jax.nn.relu(x).mean((1, 2)) @ params["out"]


def test_depthwise_convolution(key):
    rng = np.random.default_rng(0)
    params = {
        "d": rng.normal(size=(3, 3, 1, 12)).astype(np.float32),
        "out": rng.normal(size=(12, 2)).astype(np.float32),
    }
    params["d"][..., [0, 1, 5, 8]] = 0  # All of group 0, parts of groups 2 and 4.
    inputs = rng.normal(size=(2, 5, 5, 6)).astype(np.float32)
    _, _, report = bcdl_jax.shrink(depthwise, params, inputs)
    assert shapes_after(report) == {"d": (3, 3, 1, 8), "out": (8, 2)}


def test_constants_fold_into_the_next_layer_but_not_across_zero_padding():
    rng = np.random.default_rng(0)
    params = {
        "first": rng.normal(size=(3, 3, 2, 5)).astype(np.float32),
        "bias": np.abs(rng.normal(size=5)).astype(np.float32),
        "second": rng.normal(size=(3, 3, 5, 4)).astype(np.float32),
    }
    params["first"][..., 2] = 0
    inputs = rng.normal(size=(2, 7, 7, 2)).astype(np.float32)
    for padding, left in (("VALID", 4), ("SAME", 5)):

        def apply(params, x, padding=padding):
            conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(conv(x, params["first"], (1, 1), "SAME") + params["bias"])
            return conv(x, params["second"], (1, 1), padding)

        _, _, report = bcdl_jax.shrink(apply, params, inputs)
        assert shapes_after(report)["first"] == (3, 3, 2, 4)
        assert shapes_after(report)["second"] == (3, 3, left, 4)


def test_a_literal_may_be_reshaped():
    def apply(params, x):
        return x @ jnp.append(params["w"], 0)

    params, x = {"w": jnp.array([1.0, 0.0, 2.0])}, jnp.arange(8.0).reshape(2, 4)
    small_apply, small, _ = bcdl_jax.shrink(apply, params, x)
    np.testing.assert_allclose(small_apply(small, x), apply(params, x))


def test_a_number_for_indices_out_of_range_is_no_constant(key):
    """The channels 3 and 4 are 1, but 0 where an index is out of range."""
    params = {"first": jax.random.normal(key, (6, 5)).at[:, 3:].set(0), "bias": jnp.ones(5), "last": jnp.ones((5, 2))}
    inputs = jax.random.normal(key, (2, 3, 6))

    def apply(params, x, indices):
        hidden = jax.nn.relu(x @ params["first"] + params["bias"])
        read = lambda row, at: row.at[at].get(mode="fill", fill_value=0)  # noqa: E731
        return jax.vmap(read)(hidden, indices) @ params["last"]

    small_apply, small, _ = bcdl_jax.shrink(apply, params, (inputs, jnp.array([[0, 1], [2, 0]])))
    outside = jnp.array([[0, 3], [2, 0]])
    expected = apply(params, inputs, outside)
    np.testing.assert_allclose(small_apply(small, inputs, outside), expected, rtol=1e-5, atol=1e-5)
    assert small["first"].shape == (6, 3)


@pytest.mark.parametrize("choice", ["branch", "row", "expert", "mask"])
def test_params_that_data_choose_stay_params(choice, key):
    """They are equal, so that the result does not depend on the choice; they may differ after training."""
    matrix, x = jax.random.normal(key, (6, 6)), jax.random.normal(key, (4, 6))
    rows = jnp.array([0, 1, 2, 0])
    apply, chosen = {
        "branch": (
            lambda w, x, i: jax.vmap(lambda x: jax.lax.cond(x[0] > 0, lambda x: x @ w, lambda x: jnp.tanh(x @ w), x))(
                x
            ),
            matrix,
        ),
        "row": (lambda w, x, i: x * w[i], jnp.ones((3, 6))),
        "expert": (lambda w, x, i: jnp.einsum("bd,bdk->bk", x, w[i]), jnp.broadcast_to(matrix, (3, 6, 6))),
        "mask": (lambda w, x, i: jnp.where(jnp.arange(6) < 3, x, w), jnp.ones(6)),
    }[choice]
    params = {"chosen": chosen, "last": jnp.ones((6, 2))}
    whole = lambda params, x, i: apply(params["chosen"], x, i) @ params["last"]  # noqa: E731
    _, small, _ = bcdl_jax.shrink(whole, params, (x, rows))
    assert small["chosen"].shape == ((3,) if choice == "mask" else chosen.shape)
