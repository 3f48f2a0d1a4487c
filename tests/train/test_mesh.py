import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax


@pytest.mark.slow
def test_on_eight_devices():
    """The number of simulated devices must be set before JAX starts, so that the tests run in a process of their own."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "tests/train/on_eight_devices.py",
    ]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_one_device_is_a_mesh_too(key):
    mesh = bcdl_jax.train.make_mesh(devices=jax.devices()[:1])
    assert bcdl_jax.train.process_rows(mesh, 7) == slice(0, 7)
    state = bcdl_jax.train.place_state({"a": jnp.arange(3.0), "key": key}, mesh)
    step = bcdl_jax.train.jit_step(lambda state, data: (state | {"a": state["a"] + data.sum()}, data.max()), state)
    after, metrics = step(state, bcdl_jax.train.place_data(np.arange(4.0, dtype=np.float32), mesh))
    np.testing.assert_array_equal(bcdl_jax.train.fetch(after)["a"], [6, 7, 8])
    assert float(metrics) == 3
    assert jax.random.key_data(key).tolist() == jax.random.key_data(bcdl_jax.train.fetch(after)["key"]).tolist()


def test_without_a_mesh_jit_step_donates_and_places_nothing():
    state = {"a": jnp.arange(3.0)}
    assert bcdl_jax.train.replicated(state) is None
    after, _ = bcdl_jax.train.jit_step(lambda state: ({"a": state["a"] + 1}, 0), state)(state)
    assert state["a"].is_deleted()
    np.testing.assert_array_equal(bcdl_jax.train.fetch(after)["a"], [1, 2, 3])
