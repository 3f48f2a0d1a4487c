import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcdl_jax.graph import trace


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
    # JAX traces these with a symbolic size: sizes do not grow linearly, or values depend on the size.
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
    """JAX alone traces indexing differently with a symbolic size."""
    function = FUNCTIONS["indexing"]
    assert trace(function, struct(batch, 4)).signature() == trace(function, struct(5, 4)).signature()


def test_a_function_that_depends_on_the_batch_size_is_refused(batch):
    with pytest.raises(Exception, match="inconclusive"):
        trace(lambda x: x if x.shape[0] > 4 else 2 * x, struct(batch, 4))
