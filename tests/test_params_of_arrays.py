"""Every function of params refuses trees with leaves that are not arrays, such as modules of Equinox, and names the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bcdl_jax
from bcdl_jax import baselines, compression, priors, train
from bcdl_jax._tree import check_arrays

INPUTS = jnp.ones((2, 4))
# A module with a function among its leaves, as those of Equinox.
MODULE = {"layer": {"kernel": jnp.ones((4, 3))}, "activation": jax.nn.relu}


def apply(params, inputs):
    return inputs @ params["layer"]["kernel"]


def error(params):
    return 0.0


FUNCTIONS = {
    "shrink": lambda params: bcdl_jax.shrink(apply, params, INPUTS),
    "save": lambda params: bcdl_jax.save("net.bcdl", params),
    "encode": bcdl_jax.codec.encode,
    "reduce_precision": lambda params: bcdl_jax.reduce_precision(params, 0.5),
    "by_round_off": compression.reduce_precision_by_round_off,
    "choose_relative_step": lambda params: bcdl_jax.choose_relative_step(params, error, max_increase=1),
    "prune": lambda params: bcdl_jax.prune(params, 0.0),
    "prune_units": lambda params: compression.prune_units(params, {}),
    "kept_groups": compression.kept_groups,
    "pruning_scores": compression.pruning_scores,
    "choose_thresholds": lambda params: bcdl_jax.choose_thresholds(params, error, max_increase=1),
    "from_trained": lambda params: bcdl_jax.from_trained(params, params),
    "mean_weights": bcdl_jax.mean_weights,
    "weight_variances": compression.weight_variances,
    "rate": bcdl_jax.rate,
    "rate_paper": compression.rate_paper,
    "rate_paper_maximum": compression.rate_paper_maximum,
    "layer_bits": compression.layer_bits,
    "variational_layers": bcdl_jax.variational_layers,
    "kl_divergence": bcdl_jax.kl_divergence,
    "kl_divergence_per_layer": priors.kl_divergence_per_layer,
    "clip_variances": bcdl_jax.clip_variances,
    "balance_scales": bcdl_jax.balance_scales,
    "negative_elbo": lambda params: bcdl_jax.negative_elbo(0.0, params, num_examples=1),
    "create_train_state": lambda params: train.create_train_state(params, None, jax.random.key(0)),
    "magnitude_masks": lambda params: baselines.magnitude_masks(params, 0.5),
    "export_safetensors": lambda params: bcdl_jax.export_safetensors("net.safetensors", params),
    "torch_state_dict": lambda params: bcdl_jax.export.torch_state_dict(apply, params, INPUTS),
    "export_onnx": lambda params: bcdl_jax.export_onnx("net.onnx", apply, params, INPUTS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_leaf_that_is_no_array_is_named_with_the_way_out(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in {"export_onnx": ["onnx"], "export_safetensors": ["safetensors"]}.get(name, []):
        pytest.importorskip(package)
    with pytest.raises(ValueError, match=r"params holds at activation a custom_jvp; .* eqx.partition\(.* nnx.split\("):
        FUNCTIONS[name](MODULE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leaf", ["text", object(), np.array(["a"]), np.array([None])])
def test_texts_and_objects_are_no_arrays(leaf):
    with pytest.raises(ValueError, match="tree holds at 1 a "):
        check_arrays([1.0, leaf], "tree")
    with pytest.raises(ValueError, match="tree is a "):
        check_arrays(leaf, "tree")


def test_arrays_numbers_and_shapes_are_arrays():
    shapes = jax.eval_shape(lambda: (jnp.ones(2), jax.random.key(0)))
    check_arrays(
        [1, 2.0, True, 1j, np.float32(3), np.ones(2), jnp.ones(2, jnp.bfloat16), jax.random.key(0), shapes, None]
    )
    jax.jit(check_arrays)(jnp.ones(2))
    # JAX gives the gradients of integers a type without numbers.
    check_arrays(np.zeros(2, jax.dtypes.float0))


def test_an_equinox_module_works_by_its_arrays():
    equinox = pytest.importorskip("equinox")
    module = equinox.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"params holds at activation a .*eqx.partition"):
        bcdl_jax.shrink(lambda net, x: jax.vmap(net)(x), module, INPUTS)
    arrays, rest = equinox.partition(module, equinox.is_array)
    bcdl_jax.shrink(lambda arrays, x: jax.vmap(equinox.combine(arrays, rest))(x), arrays, INPUTS)


def test_an_nnx_module_that_holds_rngs_works_by_its_params():
    """As the README says: the copies let a dropout count its keys within the trace."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.dense(x))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    small_apply, small, _ = bcdl_jax.shrink(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, INPUTS)
    expected = nnx.merge(graph, params, rest, copy=True)(INPUTS)
    np.testing.assert_allclose(small_apply(small, INPUTS), expected, rtol=1e-5)
