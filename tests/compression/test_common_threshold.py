import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.compression.common_threshold import choose_common_threshold


@pytest.fixture
def layers(key):
    """Two layers whose units have log dropout rates from -8 to 4."""

    def layer(key, units):
        node = bcdl_jax.GroupNormalJeffreys().create(key, jax.random.normal(key, (units, 3)), None, "input")
        rates = jax.random.uniform(key, (units,), minval=-8.0, maxval=4.0)
        return node.replace(scale_log_variance=rates + 2 * jnp.log(jnp.abs(node.scale_mean)))

    keys = jax.random.split(key)
    return {"first": layer(keys[0], 30), "second": layer(keys[1], 20)}


def pruned_units(params):
    return sum(int((layer.input_mask <= 0).sum()) for layer in params.values())


def test_it_is_the_lowest_threshold_that_the_error_allows(layers):
    scores = np.concatenate([np.asarray(each) for each in bcdl_jax.compression.pruning_scores(layers).values()])
    for allowed in (0, 7, 29):
        calls = []

        def error(params, calls=calls):
            calls.append(params)
            return pruned_units(params)

        found = choose_common_threshold(layers, error, max_increase=allowed)
        assert len(set(found.values())) == 1
        assert pruned_units(bcdl_jax.prune(layers, found)) == allowed == int((scores >= found["first"]).sum())
        assert len(calls) <= 8
    # Units that are gone stay gone, and do not count.
    before = bcdl_jax.prune(layers, 2.0)
    gone = pruned_units(before)
    after = bcdl_jax.prune(before, choose_common_threshold(before, pruned_units, max_increase=5))
    assert pruned_units(after) == gone + 5


def test_each_layer_keeps_its_best_unit(layers):
    found = choose_common_threshold(layers, lambda params: 0.0, max_increase=1.0)
    assert [int((layer.input_mask > 0).sum()) for layer in bcdl_jax.prune(layers, found).values()] == [1, 1]
