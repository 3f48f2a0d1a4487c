import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((3, 8, 8, 4), (2, 2)),
        ((3, 9, 7, 4), (2, 3)),
        ((2, 11, 3), (3,)),
        ((2, 4, 5, 6, 2), (2, 1, 3)),
        ((0, 4, 4, 2), (2, 2)),
        ((9, 7, 4), (2, 3)),  # a single example
    ],
)
def test_values_and_gradients_agree_with_flax(key, shape, window):
    inputs = jax.random.normal(key, shape)  # all values differ, so that the gradient is unique

    def loss(pool, inputs):
        outputs = pool(inputs)
        return jnp.sum(jnp.sin(outputs)), outputs

    results = [
        jax.jit(jax.value_and_grad(lambda x, pool=pool: loss(pool, x), has_aux=True))(inputs)
        for pool in (lambda x: bcdl_jax.max_pool(x, window), lambda x: nn.max_pool(x, window, window))
    ]
    (_, ours), our_slope = results[0]
    (_, theirs), their_slope = results[1]
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(our_slope, their_slope)


def test_equal_maxima_share_the_gradient():
    slope = jax.grad(lambda x: bcdl_jax.max_pool(x, (2, 2)).sum())(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(slope, np.full((1, 2, 2, 1), 0.25))


def test_works_under_vmap(key):
    inputs = jax.random.normal(key, (2, 3, 4, 4, 5))
    together = jax.vmap(lambda x: bcdl_jax.max_pool(x, (2, 2)))(inputs)
    np.testing.assert_array_equal(together[1], bcdl_jax.max_pool(inputs[1], (2, 2)))


@pytest.mark.parametrize("window", [2, (2,), (2, 2, 2), (0, 2), (9, 2)])
def test_invalid_window_raises(window):
    with pytest.raises(ValueError, match="it must have 2 entries, each between 1 and the length of its axis"):
        bcdl_jax.max_pool(jnp.ones((1, 8, 8, 1)), window)
