import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.shrinking.networks import dense_chain, random_chain, shapes_after
from tests.shrinking.random_networks import random_network


def check_random_network(seed):
    apply, params, inputs = random_network(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Nothing is left")
        small_apply, small, report = bcdl_jax.shrink(apply, params, inputs)
    expected = np.asarray(jax.jit(apply)(params, inputs[:1]))
    scale = np.abs(expected).max() + 1e-30
    mine = jax.jit(small_apply)(small, inputs[:1])
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4 * scale, err_msg=str(seed))
    assert report.bytes[1] == sum(leaf.nbytes for leaf in jax.tree.leaves(small))


@pytest.mark.parametrize("part", range(2))
def test_random_networks_compute_the_same(part):
    for seed in range(1000 + 3 * part, 1003 + 3 * part):
        check_random_network(seed)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_500_random_networks_compute_the_same(part):
    for seed in range(25 * part, 25 * (part + 1)):
        check_random_network(seed)


def minimal_widths(params):
    """The widths by the definition: a unit stays if it depends on the inputs and an output depends on it."""
    kernels = [params[name]["kernel"] != 0 for name in sorted(params)]
    varies = [np.ones(len(kernels[0]), bool)]
    for kernel in kernels:
        varies.append((varies[-1][:, None] & kernel).any(0))
    read = [varies[-1]]
    for kernel, varying in zip(kernels[::-1], varies[-2::-1]):
        read.append((kernel & read[-1]).any(1) & varying)
    return [int(flags.sum()) for flags in read[::-1]]


@pytest.mark.parametrize("seed", range(8))
def test_a_dense_chain_becomes_as_small_as_it_can_be(seed):
    params = random_chain(seed)
    inputs = np.random.default_rng(seed).normal(size=(5, 7)).astype(np.float32)
    _, _, report = bcdl_jax.shrink(dense_chain, params, inputs)
    widths = minimal_widths(params)
    kernels = [leaf.after for leaf in report.leaves if leaf.path.endswith("kernel")]
    assert kernels == list(itertools.pairwise(widths))
    assert [leaf.after for leaf in report.leaves if leaf.path.endswith("bias")] == [(width,) for width in widths[1:]]
    assert report.multiply_adds[1] == 5 * sum(a * b for a, b in itertools.pairwise(widths))


def test_a_shrunk_network_can_be_trained():
    params = random_chain(5)
    inputs = np.random.default_rng(0).normal(size=(16, 7)).astype(np.float32)
    targets = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    small_apply, small, _ = bcdl_jax.shrink(dense_chain, params, inputs)

    @jax.jit
    def step(small):
        return jax.tree.map(
            lambda value, slope: value - 0.05 * slope,
            small,
            jax.grad(lambda small: jnp.mean((small_apply(small, inputs) - targets) ** 2))(small),
        )

    before = jnp.mean((small_apply(small, inputs) - targets) ** 2)
    for _ in range(20):
        small = step(small)
    assert jnp.mean((small_apply(small, inputs) - targets) ** 2) < 0.9 * before


def test_any_batch_size_under_jit_and_vmap():
    params = random_chain(2)
    inputs = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    small_apply, small, _ = bcdl_jax.shrink(dense_chain, params, inputs[:4])
    expected = dense_chain(params, inputs)
    for count in (1, 2, 6):
        np.testing.assert_allclose(jax.jit(small_apply)(small, inputs[:count]), expected[:count], atol=1e-5)
    by_one = jax.vmap(small_apply, (None, 0))(small, inputs[:, None])
    np.testing.assert_allclose(by_one[:, 0], expected, atol=1e-5)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small)
    np.testing.assert_allclose(jax.vmap(small_apply, (0, None))(twice, inputs)[0], expected, atol=1e-5)


def class_token_and_mask(params, x):
    """Broadcasts a token and a causal mask over the batch, as a vision transformer and GPT-2 do."""
    token = jnp.broadcast_to(params["token"], (x.shape[0], 1, 8))
    x = jnp.concatenate([token, x], 1) + jnp.broadcast_to(params["positions"], (x.shape[0], 6, 8))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (x.shape[0], 6, 6))
    scores = jnp.where(mask, jnp.einsum("btd,bsd->bts", x, x @ params["key"]), -1e9)
    hidden = jax.nn.relu(jax.nn.softmax(scores) @ x @ params["up"])
    shifts = jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]
    return hidden.mean(1) @ params["down"] + shifts


@pytest.mark.parametrize("examples", [1, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 4))])
def test_an_array_that_is_broadcast_over_the_batch(examples, key):
    shapes = {"token": (1, 1, 8), "positions": (1, 6, 8), "key": (8, 8), "up": (8, 12), "down": (12, 3)}
    keys = jax.random.split(key, len(shapes))
    params = {name: jax.random.normal(each, shape) for each, (name, shape) in zip(keys, shapes.items())}
    params["up"] = params["up"].at[:, ::2].set(0)
    inputs = jax.random.normal(key, (4, 5, 8))
    small_apply, small, report = bcdl_jax.shrink(class_token_and_mask, params, inputs[:examples])
    assert small["up"].shape == (8, 6)
    assert report.remark is None
    for size in (1, 2, 3, 4):
        expected = class_token_and_mask(params, inputs[:size])
        np.testing.assert_allclose(jax.jit(small_apply)(small, inputs[:size]), expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_computes_something_else_for_a_batch_of_one_is_reported():
    params = random_chain(1)
    inputs = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)

    def apply(params, x):
        return dense_chain(params, 2 * x if len(x) == 1 else x)

    with pytest.warns(UserWarning, match="The small function does not take a batch of one"):
        small_apply, small, report = bcdl_jax.shrink(apply, params, inputs)
    assert "does not take a batch of one" in str(report)
    np.testing.assert_allclose(small_apply(small, inputs[:3]), apply(params, inputs[:3]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="At this batch size the model runs other operations"):
        small_apply(small, inputs[:1])


def test_widths_are_rounded_up():
    params = random_chain(1, (24, 40, 30, 5))
    inputs = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    small_apply, small, report = bcdl_jax.shrink(dense_chain, params, inputs, multiple_of=8)
    widths = [min(-(-width // 8) * 8, whole) for width, whole in zip(minimal_widths(params), (24, 40, 30, 5))]
    kernels = [leaf.after for leaf in report.leaves if leaf.path.endswith("kernel")]
    assert kernels == list(itertools.pairwise(widths))
    np.testing.assert_allclose(small_apply(small, inputs), dense_chain(params, inputs), rtol=1e-4, atol=1e-4)


def test_rounded_widths_are_not_reported_as_kept_zeros():
    params = random_chain(1, (24, 40, 30, 5))
    inputs = np.ones((2, 24), np.float32)
    report = bcdl_jax.shrink(dense_chain, params, inputs, multiple_of=8)[2]
    assert [leaf.after for leaf in report.leaves] != [
        leaf.after for leaf in bcdl_jax.shrink(dense_chain, params, inputs)[2].leaves
    ]
    assert not any(leaf.reason for leaf in report.leaves)


def test_a_model_that_depends_on_the_batch_size_is_shrunk_for_one_size():
    params = random_chain(1)
    inputs = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)

    def apply(params, x):
        return dense_chain(params, x if len(x) > 4 else 2 * x)

    with pytest.warns(UserWarning, match="The small function takes batches of 8 alone"):
        small_apply, small, report = bcdl_jax.shrink(apply, params, inputs)
    assert str(report).endswith(report.remark)
    assert [leaf.after for leaf in report.leaves] != [leaf.before for leaf in report.leaves]
    np.testing.assert_allclose(small_apply(small, inputs), apply(params, inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"The inputs are float32\[2, 7\]; this small function takes float32\[8, 7\]"):
        small_apply(small, inputs[:2])
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs[:3])
    with pytest.raises(
        ValueError, match=r"takes float32\[batch, 7\]. At this batch size the model runs other operations"
    ):
        small_apply(small, inputs)


def test_a_constant_that_depends_on_the_batch_size_keeps_the_value_of_the_example():
    params = random_chain(1)
    inputs = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)

    def apply(params, x):
        return dense_chain(params, x) * (3.0 if len(x) > 4 else 2.0)

    with pytest.warns(UserWarning, match="The small function takes batches of 8 alone"):
        small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs)
    np.testing.assert_allclose(small_apply(small, inputs), apply(params, inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"this small function takes float32\[8, 7\]"):
        small_apply(small, inputs[:2])


def test_values_that_depend_on_the_batch_are_not_constants():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)).astype(np.float32)}

    def apply(params, x):
        late = (jnp.arange(x.shape[0]) >= 3)[:, None]  # All zero in a small batch.
        return jnp.where(late, x @ params["w"], 0.0) + x.sum(0) / x.shape[0] @ params["w"]

    inputs = rng.normal(size=(8, 4)).astype(np.float32)
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs[:2])
    np.testing.assert_allclose(small_apply(small, inputs), apply(params, inputs), rtol=1e-5)


def test_a_layer_that_is_pruned_away_is_named():
    params = random_chain(0)
    params["layer1"]["kernel"][:] = 0
    inputs = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    with pytest.warns(UserWarning, match="Nothing is left of layers layer0, layer1"):
        small_apply, small, _ = bcdl_jax.shrink(dense_chain, params, inputs)
    np.testing.assert_allclose(small_apply(small, inputs[:2]), dense_chain(params, inputs[:2]), rtol=1e-6)
    jax.jit(small_apply)(small, inputs)


def test_bad_input_is_refused():
    params = random_chain(1)
    inputs = np.ones((4, 7), np.float32)
    with pytest.raises(ValueError, match="multiple_of is 0"):
        bcdl_jax.shrink(dense_chain, params, inputs, multiple_of=0)
    with pytest.raises(ValueError, match="it must be an int of at least 1"):
        bcdl_jax.shrink(dense_chain, params, inputs, multiple_of=1.5)
    with pytest.raises(ValueError, match="tolerance is -1"):
        bcdl_jax.shrink(dense_chain, params, inputs, tolerance=-1)
    small_apply, small, report = bcdl_jax.shrink(dense_chain, params, inputs)
    takes = r"this small function takes float32\[batch, 7\]\.$"
    with pytest.raises(ValueError, match=r"The inputs are int32\[4, 7\]; " + takes):
        small_apply(small, inputs.astype(np.int32))
    with pytest.raises(ValueError, match=r"The inputs are float32\[7\]; " + takes):
        small_apply(small, inputs[0])
    with pytest.raises(ValueError, match="tree has no part with the structure of the params"):
        bcdl_jax.cut({"other": inputs}, report)
    with pytest.raises(ValueError, match="small_params has layer0/bias of shape"):
        small_apply(params, inputs)
    params["layer0"]["kernel"][0, 0] = np.nan
    with pytest.raises(ValueError, match="The shrunk network differs"):
        bcdl_jax.shrink(dense_chain, params, inputs)
    assert "layer0/kernel" in str(report)
    assert "multiply-adds" in str(report)


def test_a_table_that_is_read_at_fixed_positions_loses_columns(key):
    """Positions are broadcast over the batch, as in BERT and GPT-2."""
    table, tokens, out = (jax.random.normal(each, (6, 8)) for each in jax.random.split(key, 3))
    params = {"table": table.at[:, :3].set(0), "tokens": tokens.at[:, :3].set(0), "out": out[:, :4].T @ out}

    def apply(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
        x = params["table"][positions] + params["tokens"][ids]
        return jnp.tanh(x) @ params["out"].T

    ids = np.random.default_rng(0).integers(0, 6, (4, 5))
    small_apply, small, report = bcdl_jax.shrink(apply, params, ids)
    assert shapes_after(report) == {"table": (6, 5), "tokens": (6, 5), "out": (4, 5)}
    for size in (1, 3):
        np.testing.assert_allclose(small_apply(small, ids[:size]), apply(params, ids[:size]), rtol=1e-5, atol=1e-5)


def test_the_tolerance_follows_the_least_precise_type(key):
    """Layers in bfloat16 in front of outputs in float32: constants that are added in another order change the third digit."""
    params = {f"layer{place}": random_chain(place, (64, 64, 64))["layer0"] for place in range(3)}
    for layer in params.values():
        layer["kernel"][:, ::3] = 0

    def apply(params, x):
        x = x.astype(jnp.bfloat16)
        for layer in params.values():
            x = jax.nn.relu(x @ layer["kernel"].astype(jnp.bfloat16) + layer["bias"].astype(jnp.bfloat16))
        return x.astype(jnp.float32)

    inputs = jax.random.normal(key, (8, 64))
    _, small, _ = bcdl_jax.shrink(apply, params, inputs)
    assert small["layer0"]["kernel"].shape[1] < 43
    with pytest.raises(ValueError, match="differs from the given network"):
        bcdl_jax.shrink(apply, params, inputs, tolerance=1e-6)
