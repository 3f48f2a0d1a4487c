"""The facts about values, compared with values for several inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bcdl_jax.graph import analyze, trace
from bcdl_jax.graph.data_flow import analyze_zeros
from bcdl_jax.graph.moving import differences
from bcdl_jax.graph.primitives import is_plain
from tests.conftest import CHAIN, CONV_CHAIN, prune_half
from tests.shrinking.random_networks import random_network


def facts_and_values(apply, params, *inputs):
    """The analysis of a network, and all its values for each of the inputs."""
    program = trace(apply, params, *inputs[0])
    analysis = analyze(program, jax.tree.leaves(params), differences(program, program))
    numbers = [number for number, shape in enumerate(program.shapes) if is_plain(shape.dtype)]
    everything = dataclasses.replace(program, outputs=tuple(numbers), result_tree=jax.tree.structure(numbers))
    run = jax.jit(lambda *arguments: everything.run(arguments, {}))
    values = [list(map(np.asarray, run(*jax.tree.leaves((params, *each))))) for each in inputs]
    return [analysis.facts[number] for number in numbers], values


def assert_known_elements_hold(apply, params, *inputs):
    known = 0
    facts, values = facts_and_values(apply, params, *inputs)
    for each in values:
        for fact, value in zip(facts, each, strict=True):
            unknown, expected = np.broadcast_to(fact.unknown, value.shape), np.broadcast_to(fact.value, value.shape)
            assert fact.value.dtype == value.dtype or fact.unknown.all()
            np.testing.assert_allclose(value[~unknown], expected[~unknown], rtol=1e-5, atol=1e-6)
            known += 0 if fact.fixed else int((~unknown).sum())
    return known


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_known_elements_do_not_depend_on_the_inputs(seed):
    apply, params, x = random_network(1000 + seed, extended=True)
    inputs = [(x,), (np.random.default_rng(seed).normal(size=x.shape).astype(np.float32),)]
    assert_known_elements_hold(apply, params, *inputs)


@pytest.mark.slow
def test_known_elements_of_sampled_networks(net, conv_net, key):
    for (model, params, inputs), chain in ((net, CHAIN), (conv_net, CONV_CHAIN)):
        pruned = prune_half(params, chain)
        sampled = lambda params, x, key, model=model: model.apply(  # noqa: E731
            {"params": params}, x, deterministic=False, rngs={"noise": key}
        )
        keys = jax.random.split(key, 2)
        assert assert_known_elements_hold(sampled, pruned, (inputs, keys[0]), (inputs + 1, keys[1])) > 100


def scanned(length):
    def apply(params, x):
        def layer(state, weights):
            counter, x = state
            hidden = jnp.tanh(x @ weights["up"])
            return (counter + 1, x + hidden @ weights["down"]), hidden

        (_, x), hidden = lax.scan(layer, (0, x), params, length=length)
        return x, hidden

    return apply


def test_facts_about_a_scan_hold_in_all_iterations():
    rng = np.random.default_rng(0)
    params = {
        "up": rng.normal(size=(3, 4, 6)).astype(np.float32),
        "down": rng.normal(size=(3, 6, 4)).astype(np.float32),
    }
    params["up"][..., [1, 4]] = 0  # Dead in all layers.
    params["up"][0, :, 2] = 0  # Dead in one layer.
    inputs = [(rng.normal(size=(5, 4)).astype(np.float32),) for _ in range(2)]
    assert assert_known_elements_hold(scanned(3), params, *inputs) > 0
    facts, _ = facts_and_values(scanned(3), params, *inputs)
    hidden = next(fact for fact in facts[len(params) :] if fact.unknown.ndim == 3)
    unknown = np.broadcast_to(hidden.unknown, (3, 5, 6))
    np.testing.assert_array_equal(unknown[0, 0], [True, False, True, True, False, True])
    np.testing.assert_array_equal(unknown, np.broadcast_to(unknown[:1, :1], unknown.shape))


def test_only_the_zeros_of_params_are_known():
    """A unit without weights is the ReLU of its bias: it is 0 only if the bias is."""
    params = {"bias": np.ones(3), "first": np.ones((4, 3)), "last": np.ones((3, 2))}
    program = trace(lambda p, x: jnp.maximum(x @ p["first"] + p["bias"], 0) @ p["last"], params, np.ones((2, 4)))
    may_differ = [np.array([True, True, False]), np.ones((4, 3), bool), np.ones((1, 1), bool)]
    may_differ[1][:, 1:] = False
    analysis = analyze_zeros(program, may_differ, differences(program, program))
    bias, first, last = (analysis.facts[number].live for number in program.inputs[:3])
    np.testing.assert_array_equal(np.broadcast_to(bias, 3), [True, True, False])
    np.testing.assert_array_equal(np.broadcast_to(first, (4, 3)), [[True, False, False]] * 4)
    np.testing.assert_array_equal(np.broadcast_to(last, (3, 2)), [[True] * 2] * 2 + [[False] * 2])
