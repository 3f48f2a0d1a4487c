import jax
import jax.numpy as jnp
import numpy as np

from experiments.networks import layers


def test_pooling_in_training_gives_the_same_values_and_one_gradient_for_each_window():
    images = jax.random.permutation(jax.random.key(0), 2 * 7 * 6 * 3).reshape(2, 7, 6, 3).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(1), (2, 3, 3, 3))

    def pooled(values, deterministic):
        out = layers.pool(values, deterministic)
        return jnp.sum(out * weights), out

    (usual, usual_gradient), (fast, gradient) = (
        (value[1], slope)
        for value, slope in (jax.value_and_grad(pooled, has_aux=True)(images, kind) for kind in (True, False))
    )
    np.testing.assert_array_equal(usual, fast)
    np.testing.assert_array_equal(usual_gradient, gradient)  # No two values are equal.
    slopes = jax.grad(lambda values: layers.pool(values, False).sum())(jnp.zeros((1, 4, 4, 1)))
    np.testing.assert_allclose(slopes.reshape(2, 2, 2, 2).sum((1, 3)), 1, rtol=1e-6)  # Equal values share the gradient.
