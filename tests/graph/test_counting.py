import jax
import jax.numpy as jnp
from jax import lax

from bcdl_jax.graph import multiply_adds, trace


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
