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


@pytest.mark.parametrize("family", [bcdl_jax.GroupNormalJeffreys(), bcdl_jax.GroupHorseshoe()])
def test_scale_is_the_kind_of_the_locations_of_the_scales(family):
    ones = jax.tree.map(jnp.ones_like, family.create(jax.random.key(0), jnp.ones((3, 2)), jnp.ones(2), "input"))
    scaled, _ = bcdl_jax.train.scale_by_kind({"scale": 0.5, "log_variance": 3.0}).update(ones, optax.EmptyState())
    arrays = {name: leaf for name, leaf in vars(scaled).items() if isinstance(leaf, jax.Array)}
    factors = {name: set(leaf.ravel().tolist()) for name, leaf in arrays.items()}
    for name in ("kernel_mean", "bias_mean", "input_mask"):
        assert factors[name] == {1}
    scales = {name for name in factors if "scale" in name or name.startswith(("layer", "group"))}
    means, variances = ({name for name in scales if name.endswith(end)} for end in ("mean", "log_variance"))
    assert means
    assert means | variances == scales
    assert all(factors[name] == {0.5} for name in means)
    assert all(factors[name] == {3} for name in variances | {"kernel_log_variance", "bias_log_variance"})


def test_a_kind_that_does_not_exist_is_refused(data):
    _, _, states = setup(optax.sgd(1.0), seeds=(0,))
    with pytest.raises(
        ValueError,
        match=r"factors names kind kernel_logvar; the kinds are bias_log_variance, bias_mean, [^.]*\blog_variance, ",
    ):
        bcdl_jax.train.scale_by_kind({"kernel_logvar": 0.0}).update(
            bcdl_jax.train.select_seed(states, 0).params, optax.EmptyState()
        )
