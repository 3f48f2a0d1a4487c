"""The masks of ``prune_useless``, compared with the outputs of networks whose weights are replaced unit by unit."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import bcdl_jax
from bcdl_jax._tree import map_named_layers
from bcdl_jax.compression import choose_thresholds, prune_units
from bcdl_jax.conversion import variational
from bcdl_jax.train import ShrinkingConfig, create_train_state, params_ema, prune_state
from bcdl_jax.train.while_shrinking import mask_further


def skip(p, x):
    hidden = jnp.tanh(x @ p["a"] + p["bias"])
    hidden = hidden + jnp.tanh(hidden @ p["b"])
    return hidden @ p["c"] + p["last"]


def concatenation(p, x):
    return jnp.concatenate([jnp.tanh(x @ p["a"]), x[:, :2], jax.nn.gelu(x @ p["b"] + p["bias"])], -1) @ p["c"]


def gate(p, x):
    return ((x @ p["a"]) * jax.nn.sigmoid(x @ p["b"] + p["bias"])) @ p["c"]


def convolutions(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    hidden = lax.conv_general_dilated(x, p["a"], (1, 1), "VALID", dimension_numbers=numbers) + p["bias"]
    hidden = lax.reduce_window(jnp.tanh(hidden), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")
    hidden = lax.conv_general_dilated(hidden, p["b"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2)
    return jnp.tanh(hidden).reshape(len(x), -1) @ p["c"]


def heads(p, x):
    hidden = jnp.tanh(x @ p["a"] + p["bias"])
    return {"first": hidden[:, :4] @ p["b"], "second": jnp.tanh(hidden[:, 2:] @ p["c"]) @ p["d"]}


def recurrent(p, x):
    def cell(state, x):
        state = jnp.tanh(x @ p["a"] + state @ p["b"] + p["bias"])
        return state, state @ p["c"]

    state, outputs = lax.scan(cell, jnp.zeros((len(x), 5)), jnp.swapaxes(x, 0, 1))
    return outputs, state[:, :2]


def stacked(p, x):
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w["a"] + w["bias"]) @ w["b"], 0), x @ p["in"], p["layers"])[0]


def norms(p, x):
    hidden = jnp.tanh(x @ p["a"])
    hidden = (hidden - hidden.mean(-1, keepdims=True)) * lax.rsqrt(hidden.var(-1, keepdims=True) + 1e-3) * p["gain"]
    hidden = hidden @ p["b"]
    hidden = (hidden - p["mean"]) * (lax.rsqrt(p["var"] + 1e-3) * p["scale"]) + p["shift"]
    return jnp.tanh(hidden) @ p["c"]


def tied(p, x):
    hidden = jnp.tanh(p["table"][x] @ p["a"]).sum(1)
    return jnp.tanh(hidden @ p["b"]) @ p["table"].T, p["other"][x] @ p["c"]


# The network, the shapes of its params, and the shape of its inputs.
NETWORKS = {
    "skip": (skip, {"a": (6, 5), "bias": (5,), "b": (5, 5), "c": (5, 3), "last": (3,)}, (6,)),
    "concatenation": (concatenation, {"a": (6, 4), "b": (6, 3), "bias": (3,), "c": (9, 3)}, (6,)),
    "gate": (gate, {"a": (5, 6), "b": (5, 6), "bias": (6,), "c": (6, 2)}, (5,)),
    "convolutions": (
        convolutions,
        {"a": (2, 2, 3, 4), "bias": (4,), "b": (2, 1, 2, 6), "c": (24, 2)},
        (4, 4, 3),
    ),
    "heads": (heads, {"a": (5, 6), "bias": (6,), "b": (4, 2), "c": (4, 5), "d": (5, 2)}, (5,)),
    "recurrent": (recurrent, {"a": (4, 5), "b": (5, 5), "bias": (5,), "c": (5, 3)}, (3, 4)),
    "stacked": (stacked, {"in": (4, 5), "layers": {"a": (3, 5, 6), "bias": (3, 6), "b": (3, 6, 5)}}, (4,)),
    "norms": (
        norms,
        dict.fromkeys("abc", (5, 5)) | dict.fromkeys(("gain", "mean", "var", "scale", "shift"), (5,)),
        (5,),
    ),
    "tied": (tied, {"table": (7, 6), "a": (6, 5), "b": (5, 6), "other": (7, 4), "c": (4, 2)}, None),
}
QUICK = ("skip",)
CASES = [
    pytest.param(name, seed, marks=() if name in QUICK and not seed else pytest.mark.slow)
    for name in NETWORKS
    for seed in range(4)
]


def converted(name, prior=None):
    """The variational network, and its inputs."""
    apply, shapes, shape = NETWORKS[name]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda size: rng.uniform(0.3, 1, size).astype(np.float32) * rng.choice([-1, 1], size).astype(np.float32),
        shapes,
        is_leaf=lambda size: isinstance(size, tuple),
    )
    params |= {"var": np.abs(params["var"])} if "var" in params else {}
    x = rng.integers(0, 7, (24, 5)) if shape is None else rng.normal(size=(8, *shape)).astype(np.float32)
    return variational(apply, params, x, prior=prior), x


def pruned_at_random(params, rng):
    """The params without random inputs and outputs of all layers, and without random single weights if the family prunes them."""
    rates = {"kept units": rng.choice([0.4, 0.7, 0.9]), "kept outputs": rng.choice([0.6, 0.8, 1])}

    def prune(_, layer):
        layer = layer.prune_units(jnp.asarray(rng.random(layer.unit_mask.shape) < rates["kept units"]))
        outputs = jnp.asarray(rng.random(layer.output_mask.shape) < rates["kept outputs"])
        return layer.with_masks(layer.input_mask > 0, (layer.output_mask > 0) & outputs)

    return map_named_layers(prune, params, bcdl_jax.Posterior)


def masks(params):
    """The masks of the inputs and outputs of each layer."""
    layers = bcdl_jax.variational_layers(params)
    return {name: (np.asarray(one.input_mask) > 0, np.asarray(one.output_mask) > 0) for name, one in layers.items()}


def units(params):
    """The layer, the side (0 for inputs) and the number of each unit."""
    return [(name, side, i) for name, each in masks(params).items() for side in (0, 1) for i in range(len(each[side]))]


def with_other_weights(params, unit, rng):
    """The params with new means of all weights of a unit. Masks stay, so that masked weights stay 0."""
    name, side, number = unit

    def change(other, layer):
        if other != name:
            return layer
        sides = [np.zeros(mask.shape, bool) for mask in (layer.input_mask, layer.output_mask)]
        sides[side][number], sides[1 - side][:] = True, True
        kernel, bias = np.array(layer.kernel_mean), layer.bias_mean
        chosen = layer.with_masks(jnp.asarray(sides[0]), jnp.asarray(sides[1]))
        where = np.broadcast_to(super(type(chosen), chosen).kernel_mask, kernel.shape)
        kernel[where] += rng.uniform(0.3, 0.6, kernel.shape)[where]
        if bias is not None and side == 1:
            bias = np.array(bias)
            bias[number] += 0.4
        return layer.replace(kernel_mean=jnp.asarray(kernel), bias_mean=bias)

    return map_named_layers(change, params, bcdl_jax.Posterior)


def change_of_each_unit(model, params, x):
    """For each unit, the largest change of the outputs at the means if its weights change."""
    rng = np.random.default_rng(1)
    others = [with_other_weights(params, unit, rng) for unit in units(params)]
    every = jax.tree.map(lambda *leaves: np.stack(leaves), params, *others)
    outputs = jax.jit(jax.vmap(model.apply, (0, None)))(every, x)
    differences = [
        np.abs(leaf[1:] - leaf[:1]).reshape(len(leaf) - 1, -1).max(1, initial=0)
        for leaf in map(np.asarray, jax.tree.leaves(outputs))
    ]
    return dict(zip(units(params), np.max(differences, 0), strict=True))


def assert_masks_only_useless_units(model, params, x, key):
    """Returns the params without useless units."""
    useful = model.prune_useless(params)
    assert jax.tree.structure(useful) == jax.tree.structure(params)
    for sampling_key in (None, key):
        run = jax.jit(lambda params, x, key=sampling_key: model.apply(params, x, key=key))
        jax.tree.map(np.testing.assert_array_equal, run(useful, x), run(params, x))
    before, after, again = masks(params), masks(useful), masks(model.prune_useless(useful))
    for name in before:
        for old, new, same in zip(before[name], after[name], again[name], strict=True):
            assert not (new & ~old).any()
            np.testing.assert_array_equal(same, new)
    changes = change_of_each_unit(model, params, x)
    for (name, side, number), change in changes.items():
        assert change == 0 or after[name][side][number], (name, side, number, change)
    return useful


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_unit_is_kept_if_and_only_if_it_changes_the_outputs(name, seed, key):
    model, x = converted(name)
    params = pruned_at_random(model.params, np.random.default_rng(seed))
    useful = assert_masks_only_useless_units(model, params, x, key)
    if name == "stacked":
        return  # One analysis holds for all layers, so that some useless units of one layer stay.
    after = masks(useful)
    for (layer, side, number), change in change_of_each_unit(model, useful, x).items():
        assert change > 1e-6 or not after[layer][side][number], (layer, side, number, change)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip", "convolutions", "recurrent", "stacked"])
def test_families_that_prune_single_weights(name, key):
    model, x = converted(name, bcdl_jax.SparseVariationalDropout())
    for seed in range(2):
        params = pruned_at_random(model.params, np.random.default_rng(seed))
        assert_masks_only_useless_units(model, params, x, key)


@functools.cache
def dense(sizes=(9, 8, 6, 3), with_bias=True):
    """A plain chain of layers with ReLU, its names, and inputs."""
    names = [f"layer{place}" for place in range(len(sizes) - 1)]

    def apply(params, x):
        for name in names:
            x = x @ params[name]["kernel"] + (params[name]["bias"] if with_bias else 0)
            x = x if name == names[-1] else jax.nn.relu(x)
        return x

    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32)}
        | ({"bias": np.ones(shape[1], np.float32)} if with_bias else {})
        for name, shape in zip(names, itertools.pairwise(sizes), strict=True)
    }
    x = rng.normal(size=(16, sizes[0])).astype(np.float32)
    model = variational(apply, params, x)
    return model, [f"{name}/kernel" for name in names], x


def noisy(params, rng):
    """The params with scales of which about a half are noise."""

    def change(_, layer):
        size = layer.scale_mean.shape
        return layer.replace(scale_log_variance=jnp.asarray(rng.choice([-4.0, 4.0], size) + rng.normal(size=size)))

    return map_named_layers(change, params, bcdl_jax.Posterior)


def test_a_plain_chain_gets_the_masks_of_prune_with_a_chain(key):
    model, chain, _ = dense()
    params = noisy(model.params, np.random.default_rng(0))
    found, expected = masks(bcdl_jax.prune(params, 0.0, network=model)), masks(bcdl_jax.prune(params, 0.0, chain))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert 0 < sum(each[1].sum() for each in expected.values()) < 17
    jax.tree.map(np.testing.assert_array_equal, masks(bcdl_jax.prune(params, 0.0, network=model, chain=())), expected)


@pytest.mark.parametrize("with_bias", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_unit_that_is_constant_is_kept(with_bias):
    """With all inputs pruned, the hidden units are the ReLU of their biases, which the next layer reads."""
    model, chain, x = dense() if with_bias else dense((4, 3, 2), with_bias)
    params = prune_units(model.params, {chain[0]: jnp.zeros(x.shape[1], bool)})
    useful = model.prune_useless(params)
    np.testing.assert_array_equal(model.apply(useful, x), model.apply(params, x))
    first, *others = masks(useful).values()
    assert not first[0].any()
    assert (first[1] == with_bias).all()
    assert all((mask == with_bias).all() for each in others for mask in each)
    assert bool((model.apply(useful, x) != 0).any()) == with_bias


def test_zeros_that_training_may_change_do_not_count():
    """A gate that starts at 0, and biases of 0."""
    params = {"a": jnp.ones((4, 3)), "bias": jnp.zeros(3), "b": jnp.ones((3, 4)), "gate": jnp.zeros(())}
    x = jnp.ones((2, 4))
    model = variational(lambda p, x: x + p["gate"] * (jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"]), params, x)
    without_inputs = prune_units(model.params, {"a": jnp.zeros(4, bool)})
    for params in (model.params, without_inputs):
        for _, outputs in masks(model.prune_useless(params)).values():
            assert outputs.all()


class Attention(nn.Module):
    """Attention between norms, over looked-up rows."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(9, 8)(x)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.gelu(nn.Dense(12)(x))[:, 0])


@pytest.mark.slow
def test_an_attention_loses_the_units_between_pruned_groups(key):
    x = jax.random.randint(key, (4, 5), 0, 9)
    model = variational(Attention().apply, jax.jit(Attention().init)(key, x), x)
    layers = bcdl_jax.variational_layers(model.params)
    values = "params/MultiHeadDotProductAttention_0/value/kernel"
    out, head, hidden = (
        f"params/{name}/kernel" for name in ("MultiHeadDotProductAttention_0/out", "Dense_0", "Dense_1")
    )
    keep = {name: jnp.arange(layers[name].unit_mask.size) >= 3 for name in (out, head)}
    useful = masks(model.prune_useless(prune_units(model.params, keep)))
    np.testing.assert_array_equal(useful[values][1], np.arange(8) >= 3)
    np.testing.assert_array_equal(useful[hidden][1], np.arange(12) >= 3)
    assert all(mask.all() for name, each in useful.items() for mask in each if name not in (values, hidden, out, head))
    for seed in range(3):
        assert_masks_only_useless_units(
            model, pruned_at_random(model.params, np.random.default_rng(seed)), np.asarray(x), key
        )


@pytest.mark.slow
def test_quantised_layers_stay_and_their_masks_count(key):
    model, chain, _ = dense()
    params = prune_units(model.params, {chain[2]: jnp.arange(6) > 1})
    rounded = bcdl_jax.reduce_precision(params, 0.5)
    mixed = params | {"layer2": rounded["layer2"]}
    useful = model.prune_useless(mixed)
    assert useful["layer2"]["kernel"] is not None
    jax.tree.map(np.testing.assert_array_equal, useful["layer2"], rounded["layer2"])
    np.testing.assert_array_equal(masks(useful)[chain[1]][1], np.arange(6) > 1)
    jax.tree.map(np.testing.assert_array_equal, model.prune_useless(rounded), rounded)


def test_the_search_counts_useful_weights_alone():
    model, chain, x = dense()
    params = noisy(model.params, np.random.default_rng(0))
    run = jax.jit(model.apply)
    expected, sizes = run(params, x), []

    def error(pruned):
        sizes.append(sum(float(one.kept_weights()) for one in bcdl_jax.variational_layers(pruned).values()))
        return jnp.abs(run(pruned, x) - expected).mean()

    with_network = choose_thresholds(params, error, max_increase=1, network=model)
    own, sizes = sizes, []
    assert with_network == choose_thresholds(params, error, max_increase=1, chain=chain)
    assert own == sizes


def test_training_prunes_by_data_flow(key):
    model, chain, _ = dense()
    params = noisy(model.params, np.random.default_rng(0))
    optimizer = optax.chain(optax.sgd(0.1), params_ema(0.9))
    state = create_train_state(params, optimizer, key)
    expected = prune_state(state, 0.0, chain)
    for pruned in (
        prune_state(state, 0.0, network=model),
        mask_further(ShrinkingConfig(lambda *_: 0.0, lambda _: None, 0.0, network=model), state),
    ):
        jax.tree.map(np.testing.assert_array_equal, masks(pruned.params), masks(expected.params))
        averages = [part.optimizer_state[1].average for part in (pruned, expected)]
        jax.tree.map(np.testing.assert_array_equal, *map(masks, averages))


def test_bad_input_is_refused():
    model, chain, _ = dense()
    message = "chain and network are both given; give network alone"
    with pytest.raises(ValueError, match=message):
        bcdl_jax.prune(model.params, 0.0, chain, network=model)
    with pytest.raises(ValueError, match=message):
        choose_thresholds(model.params, lambda _: 0.0, max_increase=1, chain=chain, network=model)
    with pytest.raises(ValueError, match=message):
        ShrinkingConfig(lambda *_: 0.0, lambda _: None, 0.0, chain, network=model)
    with pytest.raises(ValueError, match=r"prune_useless reads the masks of its layers; call it outside of jax\.jit"):
        jax.jit(model.prune_useless)(model.params)
    with pytest.raises(ValueError, match="params has another structure than the params of the converted network"):
        model.prune_useless({"network": model.params})
