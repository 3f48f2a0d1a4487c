"""The reasons for dead channels that are left, and how many elements their full removal would save."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import bcdl_jax


def leaves_of(apply, params, inputs):
    _, _, report = bcdl_jax.shrink(apply, params, inputs)
    return {leaf.path: leaf for leaf in report.leaves}, report


def random(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def test_zeros_in_one_term_of_a_sum_go():
    """The channel stays, since the other term needs it, but the weights that make the zeros do not."""
    params = {"up": random(4, 4), "bias": random(4), "out": random(4, 3)}
    params["up"][:, [1, 2]] = 0
    leaves, _ = leaves_of(
        lambda params, x: (x + x @ params["up"] + params["bias"]) @ params["out"], params, random(5, 4)
    )
    assert leaves["up"].after == (4, 2)
    assert leaves["out"].after == (4, 3)
    assert not any(leaf.reason for leaf in leaves.values())


def test_a_bias_of_zeros_is_no_dead_channel():
    params = {"query": random(4, 2, 3), "bias": np.zeros((2, 3), np.float32)}
    leaves, _ = leaves_of(
        lambda params, x: jnp.einsum("nd,dhk->nhk", x, params["query"]) + params["bias"], params, random(5, 4)
    )
    assert leaves["bias"].reason is None


def test_constant_channels_in_front_of_padding():
    params = {"first": random(3, 3, 2, 5), "bias": np.abs(random(5)), "second": random(3, 3, 5, 4)}
    params["first"][..., 2] = 0

    def apply(params, x):
        conv = lambda x, kernel: lax.conv_general_dilated(  # noqa: E731
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return conv(jax.nn.relu(conv(x, params["first"]) + params["bias"]), params["second"])

    leaves, _ = leaves_of(apply, params, random(2, 7, 7, 2))
    assert leaves["second"].reason == "constant channels kept: they cannot become a bias of the outputs"
    assert leaves["second"].removable == 3 * 3 * 4
    assert leaves["first"].reason is None


def test_primitives_without_a_rule():
    params = {"a": random(4, 6), "b": random(6, 3)}
    params["a"][:, 1] = 0
    params["b"][3] = 0
    leaves, _ = leaves_of(lambda params, x: jnp.fft.fft(x @ params["a"]).real @ params["b"], params, random(5, 4))
    assert leaves["a"].removable == 0  # The constant channel is filled in.

    def in_loop(params, x):
        return lax.scan(lambda x, _: (x @ jnp.fft.fft(params["c"]).real, None), x, None, length=2)[0]

    leaves, report = leaves_of(in_loop, {"c": random(4, 4) * np.float32([[1], [0], [1], [1]])}, random(4, 4))
    assert leaves["c"].reason == "zeros kept: read whole by fft"
    assert leaves["c"].removable == 4
    assert "elements of dead channels that are kept: 4" in str(report)


def test_nothing_is_left():
    params = {"a": random(4, 6), "b": random(6, 3)}
    params["a"][:, 1] = 0
    leaves, report = leaves_of(lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"], params, random(5, 4))
    assert not any(leaf.reason or leaf.removable for leaf in leaves.values())
    assert "dead channels" not in str(report)
