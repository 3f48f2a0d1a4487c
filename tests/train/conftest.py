"""Shared by the tests of training: the data set."""

import jax
import jax.numpy as jnp
import pytest

from tests.train.helpers import EXAMPLES


@pytest.fixture(scope="module")
def data(key):
    inputs = jax.random.normal(key, (EXAMPLES, 6))
    return inputs, jnp.argmax(inputs[:, :3], axis=-1)
