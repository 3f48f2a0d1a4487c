import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.graph import trace
from bcdl_jax.shrinking import cpu_rules

NHWC = ("NHWC", "HWIO", "NHWC")
OPTIONS = {
    "plain": {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": NHWC},
    "same": {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC},
    "strides": {"window_strides": (2, 3), "padding": "VALID", "dimension_numbers": NHWC},
    "uneven padding": {"window_strides": (3, 2), "padding": ((2, 0), (1, 4)), "dimension_numbers": NHWC},
    "channels first": {"window_strides": (1, 2), "padding": "SAME", "dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    "mixed": {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": ("NCHW", "HWIO", "NWCH")},
    # XLA runs these without changes.
    "dilated": {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 1), "dimension_numbers": NHWC},
    "transposed": {
        "window_strides": (1, 1),
        "padding": ((1, 1), (2, 2)),
        "lhs_dilation": (2, 2),
        "dimension_numbers": NHWC,
    },
    "cut": {"window_strides": (1, 1), "padding": ((-1, 0), (0, 0)), "dimension_numbers": NHWC},
}


def shaped(spec, sizes, key):
    return jax.random.normal(key, [sizes[letter] for letter in spec])


@pytest.mark.parametrize("name", OPTIONS)
def test_convolutions_compute_the_same(name, key):
    options = OPTIONS[name]
    specs = options["dimension_numbers"]
    images = shaped(specs[0], {"N": 5, "H": 13, "W": 17, "C": 3}, key)
    kernel = shaped(specs[1], {"H": 3, "W": 5, "I": 3, "O": 60 if name == "same" else 5}, key)
    apply = lambda kernel, images: jax.lax.conv_general_dilated(images, kernel, **options)  # noqa: E731
    fast = bcdl_jax.for_cpu(apply, examples_at_a_time=5)
    names = [step.name for step in trace(fast, kernel, images).steps]
    assert ("conv_general_dilated" in names) == (name in ("dilated", "transposed", "cut"))
    np.testing.assert_allclose(jax.jit(fast)(kernel, images), apply(kernel, images), rtol=1e-5, atol=1e-5)
    loss = lambda function: jax.jit(jax.grad(lambda kernel: jnp.sum(jnp.sin(function(kernel, images)))))  # noqa: E731
    np.testing.assert_allclose(loss(fast)(kernel), loss(apply)(kernel), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("window", "strides", "padding", "rewritten"),
    [
        ((2, 2), (2, 2), "VALID", True),
        ((3, 2), (3, 2), "VALID", True),
        ((3, 3), (2, 2), "VALID", False),
        ((2, 2), (2, 2), "SAME", False),
        ((20, 20), (20, 20), "SAME", False),
    ],
)
def test_pooling_computes_the_same(window, strides, padding, rewritten, key):
    values = jax.random.normal(key, (4, 11, 9, 3))
    apply = lambda params, values: params * nn.max_pool(values, window, strides, padding)  # noqa: E731
    fast = bcdl_jax.for_cpu(apply)
    assert ("reduce_window_max" not in [step.name for step in trace(fast, 1.0, values).steps]) == rewritten
    np.testing.assert_array_equal(jax.jit(fast)(1.0, values), apply(1.0, values))


class Net(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.max_pool(nn.relu(nn.Conv(4, (5, 5), padding="VALID")(images)), (2, 2), (2, 2))
        hidden = nn.relu(nn.Conv(30, (3, 3))(hidden))
        hidden = nn.relu(nn.Conv(6, (3, 3))(hidden))
        return {"scores": nn.Dense(3)(hidden.reshape(len(images), -1)), "mean": hidden.mean((1, 2))}


@pytest.fixture(scope="module")
def net(key):
    images = jax.random.normal(key, (11, 12, 12, 1))
    return Net().apply, jax.jit(Net().init)(key, images), images


@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 100])
def test_networks_compute_the_same_in_chunks_of_any_size(net, chunk):
    apply, params, images = net
    fast = jax.jit(bcdl_jax.for_cpu(apply, examples_at_a_time=chunk))
    for batch in (1, 8, 11):
        jax.tree.map(
            lambda mine, theirs: np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5),
            fast(params, images[:batch]),
            jax.jit(apply)(params, images[:batch]),
        )


@pytest.mark.parametrize("name", ["plain", "same", "strides", "uneven padding", "channels first", "transposed"])
def test_convolutions_in_a_loop_compute_the_same(name, key, monkeypatch):
    """In chunks, convolutions of any number of channels are matrix products, whose patches are cut to fit, too."""
    options = OPTIONS[name]
    specs = options["dimension_numbers"]
    images = shaped(specs[0], {"N": 13, "H": 9, "W": 10, "C": 7}, key)
    kernel = shaped(specs[1], {"H": 3, "W": 5, "I": 7, "O": 4}, key)
    apply = lambda kernel, images: jax.lax.conv_general_dilated(images, kernel, **options)  # noqa: E731
    monkeypatch.setattr(cpu_rules, "_PATCH_BYTES", 100_000)
    fast = bcdl_jax.for_cpu(apply, examples_at_a_time=6)
    (loop,) = [step for step in trace(fast, kernel, images).steps if step.name == "scan"]
    assert ("conv_general_dilated" in str(loop.params["jaxpr"])) == (name == "transposed")
    np.testing.assert_allclose(jax.jit(fast)(kernel, images), apply(kernel, images), rtol=1e-5, atol=1e-5)


def test_empty_outputs_other_dtypes_and_large_windows_stay_unchanged(key):
    images, kernel = jax.random.normal(key, (5, 4, 4, 3)), jax.random.normal(key, (5, 4, 3, 2))
    shrinking = lambda kernel, x: jax.lax.conv_general_dilated(x, kernel, **OPTIONS["plain"])  # noqa: E731
    for chunk in (None, 2):
        assert bcdl_jax.for_cpu(shrinking, examples_at_a_time=chunk)(kernel, images).shape == (5, 0, 1, 2)
    half = lambda kernel, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, kernel, preferred_element_type=jnp.float32, **OPTIONS["plain"]
    )
    kernel = kernel[:3].astype(jnp.float16)
    mine = bcdl_jax.for_cpu(half, examples_at_a_time=2)(kernel, images.astype(jnp.float16))
    assert mine.dtype == jnp.float32
    np.testing.assert_allclose(mine, half(kernel, images.astype(jnp.float16)), rtol=1e-3, atol=1e-3)
    pool = lambda params, x: nn.max_pool(x, (5, 5), (5, 5))  # noqa: E731
    names = [step.name for step in trace(bcdl_jax.for_cpu(pool), None, jnp.ones((2, 10, 10, 1))).steps]
    assert "reduce_window_max" in names


def test_weights_do_not_count_for_the_size_of_a_chunk():
    apply = lambda params, x: x @ params.astype(jnp.float32)  # noqa: E731
    struct = jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)  # 32 MiB in float32
    names = [step.name for step in trace(bcdl_jax.for_cpu(apply), struct, jnp.ones((64, 2048))).steps]
    assert "scan" not in names


def test_a_large_batch_is_cut_to_chunks_that_fit_the_cache(net):
    apply, params, _ = net
    images = jax.ShapeDtypeStruct((65536, 12, 12, 1), jnp.float32)
    (loop,) = [step for step in trace(bcdl_jax.for_cpu(apply), params, images).steps if step.name == "scan"]
    assert loop.params["length"] == 65536 // 2048  # The largest value has 4 x 4 x 30 numbers; 2,048 of it fit 4 MiB.


@pytest.mark.slow
def test_shrunk_networks_under_vmap_and_grad(net):
    apply, params, images = net
    kernel = params["params"]["Conv_1"]["kernel"]
    pruned = {
        "params": params["params"] | {"Conv_1": params["params"]["Conv_1"] | {"kernel": kernel.at[..., ::2].set(0)}}
    }
    small_apply, small, _ = bcdl_jax.shrink(apply, pruned, images)
    fast = bcdl_jax.for_cpu(small_apply, examples_at_a_time=4)
    loss = lambda apply: lambda params, images: jnp.sum(apply(params, images)["scores"] ** 2)  # noqa: E731
    stacked = jnp.stack([images, 2 * images])
    for mine, theirs in (
        (jax.jit(jax.vmap(fast, (None, 0)))(small, stacked), jax.jit(jax.vmap(apply, (None, 0)))(pruned, stacked)),
        (jax.jit(jax.grad(loss(fast)))(small, images), jax.jit(jax.grad(loss(small_apply)))(small, images)),
    ):
        for left, right in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-3 * float(jnp.abs(right).max()))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="examples_at_a_time is 0; it must be at least 1"):
        bcdl_jax.for_cpu(jnp.add, examples_at_a_time=0)
    total = bcdl_jax.for_cpu(lambda params, x: jnp.sum(x) + params, examples_at_a_time=2)
    for size in (1, 5):
        with pytest.raises(ValueError, match="outputs have shapes"):
            total(1.0, jnp.ones(size))
    halves = bcdl_jax.for_cpu(lambda params, x: x[::2] + params, examples_at_a_time=2)
    with pytest.raises(ValueError, match="outputs have a leading axis of 1 for 2 examples"):
        halves(1.0, jnp.ones(5))
    with pytest.raises(ValueError, match="inputs have shapes"):
        halves(1.0, jnp.float32(1))
