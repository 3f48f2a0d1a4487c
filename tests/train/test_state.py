import jax
import jax.numpy as jnp
import optax
import pytest

import bcdl_jax
from tests.train.helpers import setup


def test_a_state_needs_variational_layers_and_a_key():
    with pytest.raises(ValueError, match="params holds no variational layers"):
        bcdl_jax.train.create_train_state({"Dense_0": {"kernel": jnp.ones((2, 2))}}, optax.sgd(0.1), jax.random.key(0))
    _, _, states = setup(optax.sgd(0.1), seeds=(0,))
    params = bcdl_jax.train.select_seed(states, 0).params
    for key in (0, jnp.zeros(2), jnp.uint32(3), jnp.zeros(5, jnp.uint32)):
        with pytest.raises(ValueError, match=r"key is .*; it must be a PRNG key"):
            bcdl_jax.train.create_train_state(params, optax.sgd(0.1), key)
    assert bcdl_jax.train.create_train_state(params, optax.sgd(0.1), jax.random.PRNGKey(0)).key.shape == (2,)
