import functools
import itertools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bcdl_jax
from bcdl_jax.graph.data_flow import analyze, wholly_unknown
from bcdl_jax.graph.program import trace
from tests.conftest import CHAIN, CONV_CHAIN, assert_trees_close
from tests.shrinking.random_networks import random_network


def numpy_tree(tree):
    return jax.tree.map(np.array, tree)


def shapes_after(report):
    return {leaf.path: leaf.after for leaf in report.leaves}


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


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_500_random_networks_compute_the_same(part):
    for seed in range(25 * part, 25 * (part + 1)):
        check_random_network(seed)


def dense_chain(params, x):
    layers = sorted(params)
    for name in layers[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params[layers[-1]]["kernel"] + params[layers[-1]]["bias"]


def random_chain(seed, widths=(7, 9, 8, 6, 3)):
    rng = np.random.default_rng(seed)
    params = {}
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        kernel, bias = rng.normal(size=(fan_in, fan_out)), rng.normal(size=fan_out)
        kernel[rng.random(fan_in) < 0.3] = 0
        if number < len(widths) - 2:
            kernel[:, rng.random(fan_out) < 0.3] = 0
            kernel[0, rng.integers(fan_out)] = 1  # something is left
        params[f"layer{number}"] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return params


def minimal_widths(params):
    """By the definition: a unit stays if it hears something that varies and is heard by something that matters."""
    kernels = [params[name]["kernel"] != 0 for name in sorted(params)]
    varies = [np.ones(len(kernels[0]), bool)]
    for kernel in kernels:
        varies.append((varies[-1][:, None] & kernel).any(0))
    heard = [varies[-1]]
    for kernel, varying in zip(kernels[::-1], varies[-2::-1]):
        heard.append((kernel & heard[-1]).any(1) & varying)
    return [int(flags.sum()) for flags in heard[::-1]]


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


def test_report_gives_the_kept_indices_and_cut_follows_them():
    params = random_chain(3)
    inputs = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    small_apply, small, report = bcdl_jax.shrink(dense_chain, params, inputs)
    for leaf, value, small_value in zip(report.leaves, jax.tree.leaves(params), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(value[np.ix_(*leaf.kept)], small_value)
        assert leaf.after == small_value.shape
        assert leaf.before == value.shape

    def loss(apply, params):
        return jnp.sum(apply(params, inputs)[:, 0] ** 2)

    whole = jax.grad(functools.partial(loss, dense_chain))(params)
    assert_trees_close(bcdl_jax.cut(whole, report), jax.grad(functools.partial(loss, small_apply))(small), atol=1e-5)
    optimizer = optax.adam(1e-3)
    state = optimizer.update(whole, optimizer.init(params), params)[1]
    small_state = bcdl_jax.cut(state, report)
    assert jax.tree.map(jnp.shape, small_state[0].mu) == jax.tree.map(jnp.shape, small)
    assert small_state[0].count == state[0].count
    with pytest.raises(ValueError, match=r"layer0/bias has shape \(1,\); it must be \(9,\)"):
        bcdl_jax.cut(jax.tree.map(lambda _: np.ones(1), params), report)


def test_expand_undoes_cut():
    params = random_chain(3)
    _, small, report = bcdl_jax.shrink(dense_chain, params, np.ones((5, 7), np.float32))
    optimizer = optax.adam(1e-3)
    whole = {"optimizer": optimizer.init(params), "key": jax.random.key(3), "steps": jnp.array(3)}
    assert_trees_close(bcdl_jax.expand(bcdl_jax.cut(whole, report), report, into=whole), whole)
    ones = jax.tree.map(jnp.ones_like, small)
    expanded = bcdl_jax.expand({"params": ones, "steps": 4}, report, into={"params": params, "steps": 3})
    assert expanded["steps"] == 4
    for leaf, value, original in zip(
        report.leaves, jax.tree.leaves(expanded["params"]), jax.tree.leaves(params), strict=True
    ):
        expected = np.array(original)
        for index in np.ndindex(*leaf.after):
            expected[tuple(int(kept[i]) for kept, i in zip(leaf.kept, index, strict=True))] = 1
        np.testing.assert_array_equal(value, expected)
    with pytest.raises(ValueError, match=r"layer0/bias has shape \(9,\); it must be"):
        bcdl_jax.expand(params, report, into=params)
    with pytest.raises(ValueError, match="nothing to cut or expand"):
        bcdl_jax.expand({"other": np.ones(3)}, report, into={"other": np.ones(3)})


def test_a_shrunk_net_trains_like_the_masked_one():
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


# Networks of well-known kinds, in plain Flax.


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for width, stride in ((8, 1), (12, 2)):
            y = nn.relu(norm()(nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)))
            y = norm()(nn.Conv(width, (3, 3), use_bias=False)(y))
            if stride > 1:
                x = norm()(nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(4)(x.mean((1, 2)))


def kill_channels(layer, norm, channels):
    layer["kernel"][..., channels] = 0
    norm["scale"][channels] = 0
    norm["bias"][channels] = 0


def test_a_resnet_with_batch_norm(key):
    model, inputs = ResNet(), jax.random.normal(key, (3, 8, 8, 3))
    variables = numpy_tree(model.init(key, inputs))
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    params = variables["params"]
    kill_channels(params["Conv_1"], params["BatchNorm_1"], [0, 5])  # inside the first block
    for number in (0, 2):  # the stream of the first block: its convolution and what is added to it
        kill_channels(params[f"Conv_{number}"], params[f"BatchNorm_{number}"], [1, 2, 6])
    kill_channels(params["Conv_4"], params["BatchNorm_4"], [7])  # one side of a sum alone: the other still needs it
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


def test_a_vision_transformer(key):
    model, inputs = Transformer(), jax.random.normal(key, (3, 8, 8, 3))
    params = numpy_tree(model.init(key, inputs)["params"])
    attention = params["MultiHeadDotProductAttention_0"]
    attention["out"]["kernel"][1] = 0  # nobody reads head 1
    attention["query"]["kernel"][:, 0, 2] = 0  # one direction of head 0
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

    # As a State, its arrays have the same names.
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

    x = jax.random.normal(key, (4, 2, 6, 5))  # Equinox has the channels first
    small_apply, small, report = bcdl_jax.shrink(apply, params, x)
    assert [leaf.after for leaf in report.leaves] == [(4, 2, 3, 3), (4, 1, 1), (3, 4), (3,)]
    np.testing.assert_allclose(small_apply(small, x[:1]), apply(params, x[:1]), rtol=1e-5, atol=1e-6)


def test_pruned_nets_of_this_library(net, conv_net, key):
    for (model, params, inputs), chain in ((net, CHAIN), (conv_net, CONV_CHAIN)):
        rates = np.concatenate([np.ravel(rate) for rate in bcdl_jax.compression.pruning_scores(params).values()])
        pruned = bcdl_jax.prune(params, float(np.median(rates)), chain)
        apply = lambda params, x, model=model: model.apply({"params": params}, x)  # noqa: E731
        small_apply, small, report = bcdl_jax.shrink(apply, pruned, inputs)
        assert report.bytes[1] < report.bytes[0]
        assert any(0 in leaf.after for leaf in report.leaves if "variance" in leaf.path)  # not read at the mean
        mine, expected = jax.jit(small_apply)(small, inputs), jax.jit(apply)(pruned, inputs)
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)
        if chain is CONV_CHAIN:
            continue
        # Noise hangs on key, example and position, so a sampling net shrinks without changing it.
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


# What is special about single primitives.


def simple(kernel_zero_rows=(), kernel_zero_columns=(), middle=lambda x: x):
    """inputs [n, 4] -> dense 6 -> middle -> dense 3."""
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
    if name != "batch first":  # there channels are mixed with the batch, and left alone
        assert shapes_after(report) == {"a": (4, 3), "b": (3,), "c": (3, 3)}
    slopes = jax.grad(lambda params: apply(params, inputs).sum())(params)
    small_slopes = jax.grad(lambda params: small_apply(params, inputs).sum())(small)
    assert_trees_close(bcdl_jax.cut(slopes, report), small_slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "middle"),
    [
        ("scan", lambda x: jax.lax.scan(lambda carry, row: (carry + row, carry * row), x[0], x)[1]),
        ("cond", lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)),
        ("while_loop", lambda x: jax.lax.while_loop(lambda s: s.sum() < 10, lambda s: s + 1, x)),
        ("fft", lambda x: jnp.fft.fft(x).real),
    ],
)
def test_what_is_not_understood_is_left_whole(name, middle):
    apply, params, inputs = simple((1,), (3,), middle)
    _, _, report = bcdl_jax.shrink(apply, params, inputs)
    after = shapes_after(report)
    # Channel 3 of its operand is constant and filled in; channel 1 of its result is not read. Nothing follows for the rest.
    assert after == {"a": (4, 5), "b": (5,), "c": (5, 3)}


def test_params_of_weak_type_are_taken_for_what_they_are():
    apply, params, inputs = simple((1,), (3, 4))
    weak = jax.tree.map(lambda leaf: jnp.where(leaf == 0, 0.0, 1.0), params)
    assert weak["a"].weak_type
    small_apply, small, report = bcdl_jax.shrink(lambda params, x: apply(params, 2 * x), weak, inputs)
    assert shapes_after(report) == {"a": (4, 3), "b": (3,), "c": (3, 3)}
    np.testing.assert_allclose(jax.jit(small_apply)(small, inputs[:2]), apply(weak, 2 * inputs[:2]), rtol=1e-5)


def test_what_is_not_evaluated_is_wholly_unknown(net, conv_net, key):
    """Against the analysis of a program all of whose values were evaluated."""
    cases = [random_network(seed) for seed in range(1000, 1006)]
    for (model, params, inputs), chain in ((net, CHAIN), (conv_net, CONV_CHAIN)):
        rates = np.concatenate([np.ravel(rate) for rate in bcdl_jax.compression.pruning_scores(params).values()])
        pruned = bcdl_jax.prune(params, float(np.median(rates)), chain)
        sampled = lambda params, x, key, model=model: model.apply(  # noqa: E731
            {"params": params}, x, deterministic=False, rngs={"noise": key}
        )
        cases.append((sampled, pruned, (inputs, key)))
    left_out = 0
    for apply, params, inputs in cases:
        program = trace(apply, params, *(inputs if isinstance(inputs, tuple) else (inputs,)))
        leaves = jax.tree.leaves((params, inputs))
        count = len(jax.tree.leaves(params))
        axes = [frozenset()] * len(program.shapes)
        facts = {}
        for without in (frozenset(), wholly_unknown(program, count)):
            values = program.evaluate(*leaves, without=without)
            facts[bool(without)] = analyze(program, values, count, axes, frozenset()).facts
        for number in without:
            assert facts[False][number].unknown.all()
        left_out += len(without)
        for whole, partial in zip(facts[False], facts[True], strict=True):
            for name in ("unknown", "value", "live"):
                np.testing.assert_array_equal(getattr(whole, name), getattr(partial, name))
    assert left_out > 1000


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
    params["d"][..., [0, 1, 5, 8]] = 0  # group 0 wholly, groups 2 and 4 in part
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


def test_widths_are_rounded_up():
    params = random_chain(1, (24, 40, 30, 5))
    inputs = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    small_apply, small, report = bcdl_jax.shrink(dense_chain, params, inputs, multiple_of=8)
    widths = [min(-(-width // 8) * 8, whole) for width, whole in zip(minimal_widths(params), (24, 40, 30, 5))]
    kernels = [leaf.after for leaf in report.leaves if leaf.path.endswith("kernel")]
    assert kernels == list(itertools.pairwise(widths))
    np.testing.assert_allclose(small_apply(small, inputs), dense_chain(params, inputs), rtol=1e-4, atol=1e-4)


def test_a_model_that_depends_on_the_batch_size_is_shrunk_for_that_size_alone():
    params = random_chain(1)
    inputs = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)

    def apply(params, x):
        return dense_chain(params, x if len(x) > 4 else 2 * x)

    small_apply, small, report = bcdl_jax.shrink(apply, params, inputs)
    assert [leaf.after for leaf in report.leaves] != [leaf.before for leaf in report.leaves]
    np.testing.assert_allclose(small_apply(small, inputs), apply(params, inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"The inputs are float32\[2, 7\]; this small function takes float32\[8, 7\]"):
        small_apply(small, inputs[:2])
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs[:3])
    with pytest.raises(
        ValueError, match=r"takes float32\[batch, 7\]. At this batch size the model computes something else"
    ):
        small_apply(small, inputs)


def test_constants_that_depend_on_the_batch_size_are_those_of_the_example():
    params = random_chain(1)
    inputs = np.random.default_rng(0).normal(size=(8, 7)).astype(np.float32)

    def apply(params, x):
        return dense_chain(params, x) * (3.0 if len(x) > 4 else 2.0)

    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs)
    np.testing.assert_allclose(small_apply(small, inputs), apply(params, inputs), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"this small function takes float32\[8, 7\]"):
        small_apply(small, inputs[:2])


def test_the_state_of_an_optimiser_of_params_alone_is_cut_by_the_report_of_all_variables(key):
    inputs = jax.random.normal(key, (2, 8, 8, 3))
    variables = jax.jit(ResNet().init)(key, inputs)
    kernel = variables["params"]["Conv_1"]["kernel"].at[..., ::2].set(0)
    variables["params"]["Conv_1"]["kernel"] = kernel
    variables["params"]["BatchNorm_1"]["scale"] = variables["params"]["BatchNorm_1"]["scale"].at[::2].set(0)
    _, small, report = bcdl_jax.shrink(ResNet().apply, variables, inputs)
    assert small["params"]["Conv_1"]["kernel"].shape != kernel.shape
    state = bcdl_jax.cut(optax.adam(0.1).init(variables["params"]), report)
    assert jax.tree.map(jnp.shape, state[0].mu) == jax.tree.map(jnp.shape, small["params"])


def test_widths_that_are_rounded_up_are_no_zeros_kept():
    params = random_chain(1, (24, 40, 30, 5))
    inputs = np.ones((2, 24), np.float32)
    report = bcdl_jax.shrink(dense_chain, params, inputs, multiple_of=8)[2]
    assert [leaf.after for leaf in report.leaves] != [
        leaf.after for leaf in bcdl_jax.shrink(dense_chain, params, inputs)[2].leaves
    ]
    assert not any(leaf.reason for leaf in report.leaves)


def test_a_layer_that_is_pruned_away_is_named():
    params = random_chain(0)
    params["layer1"]["kernel"][:] = 0
    inputs = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    with pytest.warns(UserWarning, match="Nothing is left of layers layer0, layer1"):
        small_apply, small, _ = bcdl_jax.shrink(dense_chain, params, inputs)
    np.testing.assert_allclose(small_apply(small, inputs[:2]), dense_chain(params, inputs[:2]), rtol=1e-6)
    jax.jit(small_apply)(small, inputs)


def test_batch_dependent_values_are_not_taken_for_constants():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)).astype(np.float32)}

    def apply(params, x):
        late = (jnp.arange(x.shape[0]) >= 3)[:, None]  # all zero in a small batch
        return jnp.where(late, x @ params["w"], 0.0) + x.sum(0) / x.shape[0] @ params["w"]

    inputs = rng.normal(size=(8, 4)).astype(np.float32)
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs[:2])
    np.testing.assert_allclose(small_apply(small, inputs), apply(params, inputs), rtol=1e-5)


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


def test_a_literal_may_be_reshaped():
    def apply(params, x):
        return x @ jnp.append(params["w"], 0)

    params, x = {"w": jnp.array([1.0, 0.0, 2.0])}, jnp.arange(8.0).reshape(2, 4)
    small_apply, small, _ = bcdl_jax.shrink(apply, params, x)
    np.testing.assert_allclose(small_apply(small, x), apply(params, x))
