import jax
import jax.numpy as jnp
import optax
import pytest

import bcdl_jax
from tests.conftest import assert_trees_close
from tests.train.helpers import setup


def test_parameter_fields_and_a_learning_rate_per_kind(data):
    _, _, states = setup(optax.sgd(1.0), seeds=(0,))
    params = bcdl_jax.train.select_seed(states, 0).params | {"other": jnp.ones(2)}
    kinds = bcdl_jax.train.parameter_fields(params)
    assert kinds["other"] == "deterministic"
    assert kinds["Dense_0"]["posterior"].kernel_log_variance == "kernel_log_variance"
    ones = jax.tree.map(jnp.ones_like, params)
    factors = {"kernel_log_variance": 4.0, "scale_mean": 0.0}
    scaled, _ = bcdl_jax.train.scale_by_kind(factors).update(ones, optax.EmptyState())
    by_optax = optax.partition(
        {kind: optax.scale(factors.get(kind, 1.0)) for kind in set(jax.tree.leaves(kinds))},
        bcdl_jax.train.parameter_fields,
    )
    expected, _ = by_optax.update(ones, by_optax.init(params))
    assert_trees_close(scaled, expected, rtol=0)
    assert float(scaled["Dense_1"]["posterior"].kernel_log_variance[0, 0]) == 4
    assert float(scaled["Dense_1"]["posterior"].scale_mean[0]) == 0
    scaled, _ = bcdl_jax.train.scale_by_kind({"log_variance": 3.0, "bias_log_variance": 0.0}).update(
        ones, optax.EmptyState()
    )
    layer = scaled["Dense_0"]["posterior"]
    found = [float(jnp.ravel(getattr(layer, name))[0]) for name in ("kernel_log_variance", "scale_log_variance")]
    assert found == [3, 3]
    assert (float(layer.bias_log_variance[0]), float(layer.kernel_mean[0, 0])) == (0, 1)


FACTORS = {"mean": 2.0, "log_variance": 3.0, "scale": 0.5, "mask": 7.0}
COMMON_KINDS = {
    "kernel_mean": "mean",
    "kernel_log_variance": "log_variance",
    "bias_mean": "mean",
    "bias_log_variance": "log_variance",
    "input_mask": "mask",
    "output_mask": "mask",
}
OWN_KINDS = {
    bcdl_jax.GroupNormalJeffreys: {"scale_mean": "scale", "scale_log_variance": "log_variance"},
    bcdl_jax.GroupHorseshoe: {
        "layer_gamma_log_mean": "scale",
        "layer_gamma_log_variance": "log_variance",
        "layer_inverse_log_mean": "scale",
        "layer_inverse_log_variance": "log_variance",
        "group_gamma_log_mean": "scale",
        "group_gamma_log_variance": "log_variance",
        "group_inverse_log_mean": "scale",
        "group_inverse_log_variance": "log_variance",
    },
}


@pytest.mark.parametrize("family", OWN_KINDS, ids=lambda family: family.__name__)
def test_each_array_has_the_factor_of_its_kind(family):
    ones = jax.tree.map(jnp.ones_like, family().create(jax.random.key(0), jnp.ones((3, 2)), jnp.ones(2), "input"))
    scaled, _ = bcdl_jax.train.scale_by_kind(FACTORS).update(ones, optax.EmptyState())
    found = {name: set(leaf.ravel().tolist()) for name, leaf in vars(scaled).items() if isinstance(leaf, jax.Array)}
    assert found == {name: {FACTORS[kind]} for name, kind in (COMMON_KINDS | OWN_KINDS[family]).items()}


def test_a_kind_that_does_not_exist_is_refused(data):
    _, _, states = setup(optax.sgd(1.0), seeds=(0,))
    with pytest.raises(
        ValueError,
        match=r"factors names kind kernel_logvar; the kinds are bias_log_variance, bias_mean, [^.]*\blog_variance, ",
    ):
        bcdl_jax.train.scale_by_kind({"kernel_logvar": 0.0}).update(
            bcdl_jax.train.select_seed(states, 0).params, optax.EmptyState()
        )
