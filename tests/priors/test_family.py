"""Mistakes in a prior of one's own are reported in one sentence."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import pytest

import bcdl_jax
from bcdl_jax.priors.normal_jeffreys import GroupNormalJeffreysPosterior


class OwnPosterior(GroupNormalJeffreysPosterior):
    extra_scale: jax.Array = flax.struct.field(metadata={"kind": "scale", "axis": "group"})
    kl_shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def kl_divergence(self):
        return jnp.zeros(self.kl_shape)


OWN = ("scale_mean", "scale_log_variance", "extra_scale", "kl_shape")


@dataclasses.dataclass(frozen=True)
class Own(bcdl_jax.Family):
    posterior_type = OwnPosterior
    start_keys = 1
    fields: tuple[str, ...] = OWN
    key_index: int = 0
    kl_shape: tuple[int, ...] = ()

    def start_fields(self, keys, kernel, groups):
        zeros = jnp.zeros(groups)
        values = {"scale_mean": zeros + 1, "scale_log_variance": zeros, "kl_shape": self.kl_shape, "extra": 1.0}
        values["extra_scale"] = jax.random.normal(keys[self.key_index], (groups,))
        return {name: values[name] for name in self.fields}


def start(family, key):
    return bcdl_jax.Dense(2, family=family).init(key, jnp.ones((1, 3)))["params"]


def test_a_complete_family_starts(key):
    assert float(bcdl_jax.kl_divergence(start(Own(), key))) == 0


@pytest.mark.parametrize("fields", [OWN[:2], (*OWN, "extra")])
def test_a_field_that_is_absent_or_one_too_many(fields, key):
    with pytest.raises(
        ValueError, match=rf"start_fields returns {', '.join(fields)}; it must return .*: {', '.join(OWN)}\."
    ):
        start(Own(fields=fields), key)


def test_too_few_keys(key):
    with pytest.raises(ValueError, match=r"Own\.start_fields reads more PRNG keys than start_keys, 1\."):
        start(Own(key_index=1), key)


def test_a_kl_divergence_that_is_no_scalar(key):
    with pytest.raises(ValueError, match=r"layer posterior has shape \(3,\); the posterior must return a scalar"):
        bcdl_jax.kl_divergence(start(Own(kl_shape=(3,)), key))
