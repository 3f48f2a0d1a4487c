import jax
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.graph import analyze, trace
from bcdl_jax.graph.data_flow import wholly_unknown
from tests.conftest import CHAIN, CONV_CHAIN
from tests.shrinking.random_networks import random_network


@pytest.mark.slow
def test_values_that_are_not_evaluated_are_wholly_unknown(net, conv_net, key):
    """Compares with an analysis for which all values are evaluated."""
    cases = [random_network(seed) for seed in range(1000, 1006)]
    for (model, params, inputs), chain in ((net, CHAIN), (conv_net, CONV_CHAIN)):
        rates = np.concatenate([np.ravel(rate) for rate in bcdl_jax.compression.pruning_scores(params).values()])
        pruned = bcdl_jax.prune(params, float(np.median(rates)), chain)
        sampled = lambda params, x, key, model=model: model.apply(  # noqa: E731
            {"params": params}, x, deterministic=False, rngs={"noise": key}
        )
        cases.append((sampled, pruned, (inputs, key)))
    left_out = 0
    for apply, params, inputs in cases:
        program = trace(apply, params, *(inputs if isinstance(inputs, tuple) else (inputs,)))
        leaves = jax.tree.leaves((params, inputs))
        count = len(jax.tree.leaves(params))
        axes = [frozenset()] * len(program.shapes)
        facts = {}
        for without in (frozenset(), wholly_unknown(program, count)):
            values = program.evaluate(*leaves, without=without)
            facts[bool(without)] = analyze(program, values, count, axes, frozenset()).facts
        for number in without:
            assert facts[False][number].unknown.all()
        left_out += len(without)
        for whole, partial in zip(facts[False], facts[True], strict=True):
            for name in ("unknown", "value", "live"):
                np.testing.assert_array_equal(getattr(whole, name), getattr(partial, name))
    assert left_out > 1000
