"""Channels within loops and branches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bcdl_jax
from tests.conftest import assert_trees_close
from tests.shrinking.networks import shapes_after


def assert_shrinks(apply, params, inputs, differentiable=True):
    """Shrinks a network, and compares outputs at several batch sizes and gradients. Returns the report."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    small_apply, small, report = bcdl_jax.shrink(apply, params, inputs)
    for size in (1, 5):
        batch = jax.tree.map(lambda leaf, size=size: jnp.resize(leaf, (size, *leaf.shape[1:])), inputs)
        assert_trees_close(jax.jit(small_apply)(small, *batch), apply(params, *batch), rtol=1e-4, atol=1e-5)
    if differentiable:
        total = lambda function: lambda params: sum(leaf.sum() for leaf in jax.tree.leaves(function(params, *inputs)))  # noqa: E731
        expected = bcdl_jax.cut(jax.grad(total(apply))(params), report)
        assert_trees_close(expected, jax.grad(total(small_apply))(small), rtol=1e-4, atol=1e-4)
    return report


@pytest.fixture
def params():
    """Two matrices with a hidden layer of 6 units between them, of which 3 are zero, and a matrix for the outputs."""
    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(4, 6)), "down": rng.normal(size=(6, 4)), "out": rng.normal(size=(4, 2))}
    params = {name: value.astype(np.float32) / 2 for name, value in params.items()}
    params["up"][:, ::2] = 0
    return params


@pytest.fixture
def inputs():
    return np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)


def stacked(params, count=3):
    """The two matrices, once for each iteration, with other values."""
    factors = np.arange(1, count + 1, dtype=np.float32).reshape(-1, 1, 1) / count
    return {name: factors * params[name] for name in ("up", "down")} | {"out": params["out"]}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.relu(nn.Dense(6, name="up")(x))
        return x + nn.Dense(4, name="down")(hidden), hidden.mean(-1)


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_stacked_layers_lose_units_that_are_dead_in_all_layers(remat, inputs, key):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block) if remat else Block
            layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)

    variables = jax.jit(Stack().init)(key, inputs)
    up = variables["params"]["layers"]["up"]
    up["kernel"] = up["kernel"].at[..., [0, 2, 5]].set(0)
    up["kernel"] = up["kernel"].at[1, :, 1].set(0)  # Dead in one layer.
    report = assert_shrinks(Stack().apply, variables, inputs)
    after = shapes_after(report)
    assert after["params/layers/up/kernel"] == (3, 4, 3)
    assert after["params/layers/up/bias"] == (3, 3)
    assert after["params/layers/down/kernel"] == (3, 3, 4)


@pytest.mark.slow
def test_stacked_layers_shrink_like_separate_layers(params, inputs):
    def by_scan(params, x):
        layer = lambda x, each: (x + jnp.tanh(x @ each["up"]) @ each["down"], None)  # noqa: E731
        return lax.scan(layer, x, {name: params[name] for name in ("up", "down")})[0] @ params["out"]

    def by_python(params, x):
        for place in range(3):
            x = x + jnp.tanh(x @ params["up"][place]) @ params["down"][place]
        return x @ params["out"]

    reports = [assert_shrinks(apply, stacked(params), inputs) for apply in (by_scan, by_python)]
    assert shapes_after(reports[0]) == {"up": (3, 4, 3), "down": (3, 3, 4), "out": (4, 2)}
    assert reports[0].multiply_adds == reports[1].multiply_adds


CELLS = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell, "simple": nn.SimpleCell}


@pytest.mark.parametrize("name", ["lstm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gru", "simple"))])
@pytest.mark.parametrize("side", ["incoming", pytest.param("outgoing", marks=pytest.mark.slow)])
def test_a_recurrent_cell_loses_dead_units(name, side, key):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(nn.RNN(CELLS[name](6, name="cell"))(x)[:, -1])

    sequences = jax.random.normal(key, (4, 5, 7))
    variables = jax.jit(Network().init)(key, sequences)

    def without_units(path, leaf):
        """Zeros all weights into the first two units, or all weights that read them."""
        is_out = "out" in jax.tree_util.keystr(path)
        if side == "incoming":
            return leaf if is_out else leaf.at[..., :2].set(0)
        return leaf.at[:2].set(0) if leaf.ndim == 2 and leaf.shape[0] == 6 else leaf

    variables = jax.tree_util.tree_map_with_path(without_units, variables)
    report = assert_shrinks(Network().apply, variables, sequences)
    for leaf in report.leaves:
        is_kernel = len(leaf.before) == 2
        expected = [4 if size == 6 and (axis or leaf.before[0] == 6) else size for axis, size in enumerate(leaf.before)]
        assert leaf.after == tuple(expected) or not is_kernel


def residual(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


LOOPS = {
    "fori_loop": lambda params, x: lax.fori_loop(0, 3, lambda _, x: residual(params, x), x) @ params["out"],
    "while_loop": lambda params, x: (
        lax.while_loop(lambda state: state[0] < 3, lambda state: (state[0] + 1, residual(params, state[1])), (0, x))[1]
        @ params["out"]
    ),
    "cond": lambda params, x: (
        lax.cond(
            x.sum() > 0, lambda x: residual(params, x), lambda x: jax.nn.relu(x @ params["up"]) @ params["down"], x
        )
        @ params["out"]
    ),
    "switch": lambda params, x: (
        lax.switch(
            jnp.argmax(x[0]),
            [lambda h: h @ params["down"], lambda h: 2 * h @ params["down"], lambda h: jnp.sin(h) @ params["down"]],
            jnp.tanh(x @ params["up"]),
        )
        @ params["out"]
    ),
    "map": lambda params, x: lax.map(lambda row: residual(params, row) @ params["out"], x),
    "associative_scan": lambda params, x: (
        lax.associative_scan(jnp.add, jnp.tanh(x[:, None] @ params["up"]), axis=1)[:, 0]
        @ params["down"]
        @ params["out"]
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("map", "associative_scan", "switch", "fori_loop")))
        for name in LOOPS
    ],
)
def test_bodies_shrink(name, params, inputs):
    report = assert_shrinks(LOOPS[name], params, inputs, differentiable=name != "while_loop")
    assert shapes_after(report) == {"up": (4, 3), "down": (3, 4), "out": (4, 2)}


def test_loops_within_loops(params, inputs):
    tree = {name: np.stack([value, 2 * value]) for name, value in stacked(params, 2).items() if name != "out"}

    def apply(params, x):
        def outer(x, layers):
            x, _ = lax.scan(lambda x, layer: (residual(layer, x), None), x, layers)
            return x, x.sum(-1)

        return lax.scan(outer, x, params)

    report = assert_shrinks(apply, tree, inputs)
    assert shapes_after(report) == {"up": (2, 2, 4, 3), "down": (2, 2, 3, 4)}


@pytest.mark.parametrize("make_key", [jax.random.key, pytest.param(jax.random.PRNGKey, marks=pytest.mark.slow)])
def test_a_loop_that_carries_a_key(make_key, params, inputs):
    def apply(params, x, key):
        def layer(state, each):
            x, key = state
            key, own = jax.random.split(key)
            hidden = jnp.tanh(x @ each["up"]) * jax.random.bernoulli(own, 0.5, (x.shape[0], 6))
            return (x + hidden @ each["down"], key), None

        return lax.scan(layer, (x, key), {name: params[name] for name in ("up", "down")})[0][0]

    tree = {name: value for name, value in stacked(params).items() if name != "out"}
    small_apply, small, report = bcdl_jax.shrink(apply, tree, (inputs, make_key(0)))
    assert shapes_after(report) == {"up": (3, 4, 3), "down": (3, 3, 4)}
    other = make_key(1)
    np.testing.assert_allclose(
        small_apply(small, inputs[:2], other), apply(tree, inputs[:2], other), rtol=1e-4, atol=1e-5
    )


def test_a_channel_that_changes_between_iterations_is_not_known(inputs):
    """The first iteration reads zeros, the later ones do not."""

    def apply(params, x):
        def layer(state, _):
            hidden = state * params["scale"] + params["shift"]
            return hidden, jnp.concatenate([x, hidden], 1)

        return lax.scan(layer, jnp.zeros((x.shape[0], 2)), None, length=3)[1] @ params["out"]

    rng = np.random.default_rng(0)
    params = {
        "scale": np.array([0.5, 0.5], np.float32),
        "shift": np.array([1.0, 0.0], np.float32),
        "out": rng.normal(size=(6, 3)).astype(np.float32),
    }
    report = assert_shrinks(apply, params, inputs)
    assert shapes_after(report)["out"] == (5, 3)  # The second state stays 0.


@pytest.mark.slow
def test_a_delay_line_ends():
    """A known element moves by one place in each iteration, so that the analysis must stop before it is everywhere."""

    def apply(params, x):
        line = jnp.concatenate([jnp.zeros((x.shape[0], 40)), x[:, :1]], 1)
        return lax.fori_loop(0, 30, lambda _, line: jnp.roll(line, -1, axis=1), line) @ params

    params = np.random.default_rng(0).normal(size=(41, 3)).astype(np.float32)
    params[:5] = 0
    report = assert_shrinks(apply, params, np.ones((4, 2), np.float32))
    assert report.difference == 0


@pytest.mark.slow
def test_a_loop_over_params_alone_is_computed_whole(inputs):
    def apply(params, x):
        return x @ lax.fori_loop(0, 3, lambda _, matrix: matrix @ params["power"], jnp.eye(4)) @ params["out"]

    rng = np.random.default_rng(0)
    params = {"power": rng.normal(size=(4, 4)).astype(np.float32), "out": rng.normal(size=(4, 3)).astype(np.float32)}
    params["power"][:, 1] = 0
    report = assert_shrinks(apply, params, inputs, differentiable=False)
    assert shapes_after(report)["power"] == (4, 4)
    assert shapes_after(report)["out"] == (3, 3)
