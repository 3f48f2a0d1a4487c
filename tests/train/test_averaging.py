import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_average_against_a_plain_loop(decay):
    optimizer = optax.chain(optax.sgd(0.1), bcdl_jax.train.params_ema(decay))
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    state = optimizer.init(params)
    history = []
    for step in range(20):
        updates, state = jax.jit(optimizer.update)(
            jax.tree.map(lambda leaf, step=step: leaf + 0.1 * step, params), state, params
        )
        params = optax.apply_updates(params, updates)
        history.append(params)
    expected = None
    for number, seen in enumerate(history):
        weight = min(decay, number / (number + 1))
        seen = jax.tree.map(np.float64, seen)
        expected = seen if number == 0 else jax.tree.map(lambda e, s, w=weight: w * e + (1 - w) * s, expected, seen)
    average = bcdl_jax.train.averaged_params(state)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), average, expected)
    if decay == 0:
        jax.tree.map(np.testing.assert_array_equal, average, params)


def test_averages_of_half_precision_params_are_in_float32():
    averaging = bcdl_jax.train.params_ema(0.999)
    params = {"a": jnp.zeros(3, jnp.bfloat16), "mask": jnp.ones(3, bool)}
    state = averaging.init(params)._replace(steps=jnp.array(10_000))
    update = jax.jit(averaging.update)
    for _ in range(10):
        _, state = update({"a": jnp.ones(3, jnp.bfloat16), "mask": jnp.zeros(3, bool)}, state, params)
    np.testing.assert_allclose(state.average["a"], 1 - 0.999**10, rtol=1e-4)
    assert {name: leaf.dtype for name, leaf in state.average.items()} == {"a": jnp.float32, "mask": jnp.bool_}


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="decay is 1"):
        bcdl_jax.train.params_ema(1.0)
    averaging = bcdl_jax.train.params_ema(0.9)
    with pytest.raises(ValueError, match="params is None"):
        averaging.update(1.0, averaging.init(1.0))
    with pytest.raises(ValueError, match="holds 0 averages"):
        bcdl_jax.train.averaged_params(optax.adam(1e-3).init({"a": jnp.ones(2)}))
