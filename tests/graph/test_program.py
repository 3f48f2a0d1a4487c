import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bcdl_jax.graph.program import multiply_adds, trace


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture
def batch():
    return jax.export.symbolic_shape("batch")[0]


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, gradient: (gradient,))

FUNCTIONS = {
    "indexing": lambda x: jnp.concatenate([x[:, ::-1], x[:, :2]], 1),
    "flatten": lambda x: jax.nn.relu(x).reshape(x.shape[0] * 2, -1).sum(1),
    "several": lambda x: jnp.concatenate([x, x, x[:1]]),
    "between axes": lambda x: x.T @ x,
    # Sizes that do not grow evenly, and values that depend on the size: traced by JAX as they are.
    "squared": lambda x: (x @ x.T).reshape(-1),
    "capped": lambda x: x[:4].sum(0),
    "custom": lambda x: rounded(x)[:, 0],
    "mean": lambda x: x.mean(0),
    "positions": lambda x: x + jnp.arange(x.shape[0])[:, None],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_of_any_batch_size_computes_the_same(name, batch):
    function = FUNCTIONS[name]

    def run(x):
        return trace(function, struct(*x.shape)).run([x], {})

    exported = jax.export.export(jax.jit(run))(struct(batch, 4))
    for size in (1, 2, 3, 6):
        x = np.random.default_rng(size).normal(size=(size, 4)).astype(np.float32)
        np.testing.assert_allclose(exported.call(x), function(x), rtol=1e-5, atol=1e-6)


def test_indexing_keeps_its_steps_at_any_batch_size(batch):
    """JAX itself traces it differently when a size is symbolic."""
    function = FUNCTIONS["indexing"]
    assert trace(function, struct(batch, 4)).signature() == trace(function, struct(5, 4)).signature()


def test_what_depends_on_the_batch_size_fails(batch):
    with pytest.raises(Exception, match="inconclusive"):
        trace(lambda x: x if x.shape[0] > 4 else 2 * x, struct(batch, 4))


def test_multiply_adds_within_loops_and_branches_are_counted():
    def recurrent(weights, inputs):
        hidden, _ = lax.scan(
            lambda state, x: (jnp.tanh(state @ weights["state"] + x @ weights["input"]), None),
            jnp.zeros((4, 5)),
            inputs,
        )
        once = lambda x: jax.jit(jnp.matmul)(x, weights["state"])  # noqa: E731
        twice = lax.cond(hidden[0, 0] > 0, lambda x: once(once(x)), once, hidden)
        return lax.fori_loop(0, jnp.argmax(hidden[0]), lambda _, x: x @ weights["state"], twice)

    weights = {"state": jnp.ones((5, 5)), "input": jnp.ones((3, 5))}
    program = trace(recurrent, weights, jnp.ones((7, 4, 3)))
    assert multiply_adds(program) == 7 * (4 * 5 * 5 + 4 * 3 * 5) + 2 * 4 * 5 * 5 + 4 * 5 * 5


def test_rules_replace_steps():
    function = lambda x: jnp.sin(x) + jnp.cos(x)  # noqa: E731
    rules = {"sin": lambda step, x: 2 * x, "cos": lambda step, x: None}
    x = jnp.arange(3.0)
    np.testing.assert_allclose(trace(function, x).run([x], rules), 2 * x + jnp.cos(x), rtol=1e-6)
