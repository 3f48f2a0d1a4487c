"""Shared by the tests: a key, and small networks."""

from __future__ import annotations

import functools
import gc
import mmap
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax._tree import map_layers
from bcdl_jax.priors.posterior import Posterior

# Most tests compile more than they compute.
jax.config.update("jax_disable_most_optimizations", True)


def _use_the_faster_compiler(flag="xla_cpu_use_fusion_emitters"):
    """Turns off XLA's newer code generator for the CPU, which takes 1.6 times as long. XLA aborts at a flag it does not know."""
    library = Path(jaxlib.__file__).parent / "libjax_common.so"
    if library.exists():
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(flag.encode()) >= 0:
                os.environ["XLA_FLAGS"] = f"--{flag}=false {os.environ.get('XLA_FLAGS', '')}"


_use_the_faster_compiler()


def pytest_configure(config):
    """Keeps compiled programs in the cache of pytest for the next run: XLA takes 40 ms for each of the thousands.

    Each process has a directory of its own, since JAX does not write the files atomically.
    """
    if hasattr(config, "cache"):
        jax.config.update(
            "jax_compilation_cache_dir", str(config.cache.mkdir(f"xla_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"))
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class SmallNet(nn.Module):
    """6-5-4-3 with ReLU."""

    clip_var: float | None = None

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = nn.relu(
            bcdl_jax.Dense(5, family=bcdl_jax.GroupNormalJeffreys(clip_var=self.clip_var))(
                x, deterministic=deterministic
            )
        )
        x = nn.relu(bcdl_jax.Dense(4)(x, deterministic=deterministic))
        return bcdl_jax.Dense(3)(x, deterministic=deterministic)


class SmallConvNet(nn.Module):
    """Two convolutions, a flatten and a dense layer."""

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        x = nn.relu(bcdl_jax.Conv(4, (3, 3))(x, deterministic=deterministic))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(bcdl_jax.Conv(6, (3, 3), padding="VALID")(x, deterministic=deterministic))
        return bcdl_jax.Dense(3)(x.reshape(x.shape[0], -1), deterministic=deterministic)


CHAIN = ["Dense_0", "Dense_1", "Dense_2"]
CONV_CHAIN = ["Conv_0", "Conv_1", "Dense_0"]


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Nothing is read from or left in the cache of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def rare_garbage_collection():
    """Tracing makes millions of objects, all of them needed: looking for cycles among them takes longer than the tests."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    yield
    gc.set_threshold(*before)


@pytest.fixture(scope="module", autouse=True)
def no_programs_of_other_modules():
    """Compiled programs are shared within a module and freed after it."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def key():
    return jax.random.key(20170523)


def spread(params, key):
    """The params with every array moved to a value of its own, as after training; masks stay."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
    moved = jax.tree.map(lambda leaf, leaf_key: leaf + 0.5 * jax.random.normal(leaf_key, leaf.shape), params, keys)

    def finish(pair):
        variances = {
            name: jnp.clip(getattr(pair, name) + 5, -6, 0)
            for name in ("kernel_log_variance", "bias_log_variance", "scale_log_variance")
        }
        return pair.replace(
            input_mask=jnp.ones_like(pair.input_mask), output_mask=jnp.ones_like(pair.output_mask), **variances
        )

    return map_layers(finish, moved, Posterior)


@pytest.fixture(scope="session")
def net(key):
    """(model, params with values of their own, inputs [7, 6])."""
    return _network(SmallNet(), key, (7, 6))


@pytest.fixture(scope="session")
def conv_net(key):
    """(model, params with values of their own, inputs [3, 8, 8, 2])."""
    return _network(SmallConvNet(), key, (3, 8, 8, 2))


def _network(model, key, shape):
    inputs = jax.random.normal(jax.random.fold_in(key, 1), shape)
    return model, jax.jit(lambda: spread(model.init(key, inputs)["params"], key))(), inputs


def prune_half(params, chain=None):
    """The params without the groups whose score is not below the median score of all groups."""
    scores = np.concatenate([np.ravel(score) for score in bcdl_jax.compression.pruning_scores(params).values()])
    return bcdl_jax.prune(params, float(np.median(scores)), chain)


def run(model, params, inputs, key=None):
    """The compiled forward pass: at the means, or sampled if there is a key."""
    return _run(model, params, inputs) if key is None else _run(model, params, inputs, key)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, inputs, key=None):
    if key is None:
        return model.apply({"params": params}, inputs)
    return model.apply({"params": params}, inputs, deterministic=False, rngs={"noise": key})


def make_posterior(key, kernel_shape, group_axis, *, use_bias=True, feature_group_count=1):
    """A group normal-Jeffreys posterior with values of its own."""
    kernel = jax.random.normal(key, kernel_shape)
    bias = jax.random.normal(jax.random.fold_in(key, 1), kernel_shape[-1:]) if use_bias else None
    posterior = bcdl_jax.GroupNormalJeffreys().create(key, kernel, bias, group_axis, feature_group_count)
    values = np.random.default_rng(0)
    replaced = {
        "kernel_log_variance": values.uniform(-4, 0, kernel_shape),
        "scale_mean": values.uniform(-1.5, 1.5, posterior.scale_mean.shape),
        "scale_log_variance": values.uniform(-4, 0, posterior.scale_mean.shape),
    }
    if use_bias:
        replaced["bias_log_variance"] = values.uniform(-4, 0, kernel_shape[-1:])
    return posterior.replace(**{name: jnp.asarray(value, jnp.float32) for name, value in replaced.items()})


def assert_trees_close(a, b, rtol=1e-6, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_allclose(left, right, rtol=rtol, atol=atol)
