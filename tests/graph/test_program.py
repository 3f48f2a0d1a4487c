import jax.numpy as jnp
import numpy as np

from bcdl_jax.graph import rewrite, trace


def test_rules_replace_steps():
    function = lambda x: jnp.sin(x) + jnp.cos(x)  # noqa: E731
    rules = {"sin": lambda step, x: 2 * x, "cos": lambda step, x: None}
    x = jnp.arange(3.0)
    for result in (trace(function, x).run([x], rules), rewrite(function, rules)(x)):
        np.testing.assert_allclose(result, 2 * x + jnp.cos(x), rtol=1e-6)
