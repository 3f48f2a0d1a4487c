import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from tests.conftest import assert_trees_close
from tests.shrinking.networks import ResNet, dense_chain, random_chain


@pytest.mark.slow
def test_report_gives_the_kept_indices_and_cut_follows_them():
    params = random_chain(3)
    inputs = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    small_apply, small, report = bcdl_jax.shrink(dense_chain, params, inputs)
    for leaf, value, small_value in zip(report.leaves, jax.tree.leaves(params), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(value[np.ix_(*leaf.kept)], small_value)
        assert leaf.after == small_value.shape
        assert leaf.before == value.shape

    def loss(apply, params):
        return jnp.sum(apply(params, inputs)[:, 0] ** 2)

    whole = jax.grad(functools.partial(loss, dense_chain))(params)
    assert_trees_close(bcdl_jax.cut(whole, report), jax.grad(functools.partial(loss, small_apply))(small), atol=1e-5)
    optimizer = optax.adam(1e-3)
    state = optimizer.update(whole, optimizer.init(params), params)[1]
    small_state = bcdl_jax.cut(state, report)
    assert jax.tree.map(jnp.shape, small_state[0].mu) == jax.tree.map(jnp.shape, small)
    assert small_state[0].count == state[0].count
    with pytest.raises(ValueError, match=r"layer0/bias has shape \(1,\); it must be \(9,\)"):
        bcdl_jax.cut(jax.tree.map(lambda _: np.ones(1), params), report)


def test_expand_undoes_cut():
    params = random_chain(3)
    _, small, report = bcdl_jax.shrink(dense_chain, params, np.ones((5, 7), np.float32))
    optimizer = optax.adam(1e-3)
    whole = {"optimizer": optimizer.init(params), "key": jax.random.key(3), "steps": jnp.array(3)}
    assert_trees_close(bcdl_jax.expand(bcdl_jax.cut(whole, report), report, into=whole), whole)
    ones = jax.tree.map(jnp.ones_like, small)
    expanded = bcdl_jax.expand({"params": ones, "steps": 4}, report, into={"params": params, "steps": 3})
    assert expanded["steps"] == 4
    for leaf, value, original in zip(
        report.leaves, jax.tree.leaves(expanded["params"]), jax.tree.leaves(params), strict=True
    ):
        expected = np.array(original)
        for index in np.ndindex(*leaf.after):
            expected[tuple(int(kept[i]) for kept, i in zip(leaf.kept, index, strict=True))] = 1
        np.testing.assert_array_equal(value, expected)
    with pytest.raises(ValueError, match=r"layer0/bias has shape \(9,\); it must be"):
        bcdl_jax.expand(params, report, into=params)
    with pytest.raises(ValueError, match="nothing to cut or expand"):
        bcdl_jax.expand({"other": np.ones(3)}, report, into={"other": np.ones(3)})


def test_the_state_of_an_optimiser_of_params_alone_is_cut_by_the_report_of_all_variables(key):
    inputs = jax.random.normal(key, (2, 8, 8, 3))
    variables = jax.jit(ResNet().init)(key, inputs)
    kernel = variables["params"]["Conv_1"]["kernel"].at[..., ::2].set(0)
    variables["params"]["Conv_1"]["kernel"] = kernel
    variables["params"]["BatchNorm_1"]["scale"] = variables["params"]["BatchNorm_1"]["scale"].at[::2].set(0)
    _, small, report = bcdl_jax.shrink(ResNet().apply, variables, inputs)
    assert small["params"]["Conv_1"]["kernel"].shape != kernel.shape
    state = bcdl_jax.cut(optax.adam(0.1).init(variables["params"]), report)
    assert jax.tree.map(jnp.shape, state[0].mu) == jax.tree.map(jnp.shape, small["params"])
