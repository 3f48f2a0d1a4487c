"""The transforms of the library on shrunk params: of each family, with a grouped convolution, plain layers and layers that are gone."""

import functools
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from bcdl_jax import compression
from bcdl_jax.compression import QuantizedLayer, prune_units
from tests.compression.test_rates import MASKS
from tests.conftest import CHAIN

FAMILIES = {
    "nj": bcdl_jax.GroupNormalJeffreys(),
    "horseshoe": bcdl_jax.GroupHorseshoe(tau0=1.0),
    "svd": bcdl_jax.SparseVariationalDropout(),
}
GONE = ["down", "up"]

each_family = pytest.mark.parametrize(
    "family", ["nj", *(pytest.param(name, marks=pytest.mark.slow) for name in ("horseshoe", "svd"))]
)


class Branched(nn.Module):
    """Two convolutions, the second one with two feature groups, a plain layer, and a residual branch of two dense layers."""

    family: bcdl_jax.Family

    @nn.compact
    def __call__(self, x):
        dense, conv = (functools.partial(layer, family=self.family) for layer in (bcdl_jax.Dense, bcdl_jax.Conv))
        x = nn.relu(conv(4, (3, 3), name="first")(x))
        x = nn.relu(conv(6, (3, 3), 2, "VALID", feature_group_count=2, name="grouped")(x))
        x = nn.relu(dense(6, name="wide")(x.reshape(x.shape[0], -1)))
        x = nn.relu(nn.Dense(5, name="plain")(x))
        x = x + dense(5, name="up")(nn.relu(dense(4, name="down")(x)))
        return dense(3, use_bias=False, name="last")(x)


IMAGES = jax.random.normal(jax.random.key(1), (3, 5, 5, 2))


@functools.cache
def branched(family):
    """(apply, pruned params): some units of each layer are masked, and all of one layer of the branch."""
    model = Branched(FAMILIES[family])
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]
    rng = np.random.default_rng(3)
    masks = {}
    for name, layer in bcdl_jax.variational_layers(params).items():
        kept = rng.random(layer.unit_mask.shape) < (0.5 if layer.prunes_weights else 0.7)
        if layer.prunes_weights:
            kept[..., 1] = False
        masks[name] = jnp.asarray(kept & (name != "up"))
    return jax.jit(lambda params, x: model.apply({"params": params}, x)), prune_units(params, masks, GONE)


@functools.cache
def shrunk(family, quantized=False):
    """(apply, whole params, small function, small params, report)."""
    apply, params = branched(family)
    params = bcdl_jax.reduce_precision(params, 0.3) if quantized else params
    with pytest.warns(UserWarning, match="Nothing is left of layers down, up"):
        small_apply, small, report = bcdl_jax.shrink(apply, params, IMAGES)
    return apply, params, small_apply, small, report


def layers_of(params):
    return {name: node["posterior"] for name, node in params.items() if "posterior" in node}


def kept_sides(report, whole):
    """The kept inputs and outputs of each layer, as masks of the whole layer."""
    kept = {leaf.path: leaf.kept for leaf in report.leaves}
    sides = {}
    for name, layer in layers_of(whole).items():
        for side, size in (("input", layer.input_mask.size), ("output", layer.output_mask.size)):
            flags = np.zeros(size, bool)
            flags[kept[f"{name}/posterior/{side}_mask"][0]] = True
            sides[name, side] = jnp.asarray(flags)
    return sides


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["posterior", "quantized"])
@each_family
def test_a_layer_is_cut_as_a_whole(family, quantized):
    apply, params, small_apply, small, report = shrunk(family, quantized)
    np.testing.assert_allclose(small_apply(small, IMAGES[:1]), apply(params, IMAGES[:1]), rtol=1e-4, atol=1e-5)
    assert report.bytes[1] == sum(leaf.nbytes for leaf in jax.tree.leaves(small)) < report.bytes[0]
    for entry, leaf, whole in zip(report.leaves, jax.tree.leaves(small), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(whole)[np.ix_(*entry.kept)] if whole.ndim else whole)
    for name, layer in layers_of(small).items():
        *window, rows, outputs = layer.kernel_shape
        groups = layer.input_mask.size // rows if rows else 1
        assert outputs % groups == 0
        # The layer has the shapes of a fresh layer of these widths.
        node = layer if not quantized else layers_of(bcdl_jax.reduce_precision(shrunk(family)[1], 0.3))[name]
        bias = None if layer.bias_size == 0 and name == "last" else jnp.zeros(outputs)
        kernel = jnp.zeros((*window, rows, outputs))
        fresh = FAMILIES[family].create(jax.random.key(0), kernel, bias, layer.group_axis, groups)
        fresh = bcdl_jax.reduce_precision({"a": fresh}, 1.0)["a"] if quantized else fresh
        assert type(fresh) is type(node)
        assert list(map(np.shape, jax.tree.leaves(fresh))) == list(map(np.shape, jax.tree.leaves(layer)))
        assert (rows == outputs == 0) == (name in GONE)


@pytest.mark.slow
@each_family
def test_transforms_of_variational_layers(family):
    _, params, _, small, report = shrunk(family)
    sides = kept_sides(report, params)
    cut_masks = {
        name: {
            "posterior": layer.with_masks(
                (layer.input_mask > 0) & sides[name, "input"], (layer.output_mask > 0) & sides[name, "output"]
            )
        }
        for name, layer in layers_of(params).items()
    }
    for name, value in bcdl_jax.priors.kl_divergence_per_layer(small).items():
        expected = bcdl_jax.priors.kl_divergence_per_layer(cut_masks)[name]
        assert float(value) == pytest.approx(float(expected) if name not in GONE else 0.0, rel=1e-5)
    scores = compression.pruning_scores(small)
    assert set(scores) == set(layers_of(small)) - set(GONE)
    for name, whole in compression.pruning_scores(params).items():
        side = "input" if layers_of(params)[name].group_axis == "input" else "output"
        if name not in GONE and whole.ndim == 1:
            np.testing.assert_allclose(scores[name], whole[sides[name, side]], rtol=1e-6)
    assert compression.kept_groups(small, math.inf)["up"] == 0
    # The thresholds need no entries for layers that are gone, and may have some.
    thresholds = {name: float(jnp.median(score)) for name, score in scores.items()}
    by_median = bcdl_jax.prune(small, thresholds, GONE)
    assert jax.tree.map(jnp.shape, by_median) == jax.tree.map(jnp.shape, small)
    again = bcdl_jax.prune(small, thresholds | dict.fromkeys(GONE, math.nan))
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(by_median)))
    assert float(bcdl_jax.kl_divergence(by_median)) < float(bcdl_jax.kl_divergence(small))
    chosen = bcdl_jax.choose_thresholds(small, lambda _: 0.0, max_increase=0, chain=GONE)
    assert chosen["up"] == math.inf
    weights = bcdl_jax.mean_weights(small)
    again = bcdl_jax.from_trained(small, weights)
    for mine, theirs in zip(jax.tree.leaves(bcdl_jax.mean_weights(again)), jax.tree.leaves(weights), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    variances = compression.weight_variances(small)
    assert jax.tree.map(jnp.shape, variances) == jax.tree.map(jnp.shape, weights)
    for same_shapes in (bcdl_jax.balance_scales, bcdl_jax.clip_variances, bcdl_jax.train.parameter_fields):
        assert jax.tree.structure(same_shapes(small)) == jax.tree.structure(small)
    assert bcdl_jax.train.create_train_state(small, optax.adam(0.1), jax.random.key(0)).failed_parts.shape == (8,)


@pytest.mark.slow
@each_family
def test_shrinking_then_rounding_goes_round(family, tmp_path):
    apply, params, small_apply, small, report = shrunk(family)
    kept = {leaf.path.removesuffix("/posterior").replace("/posterior", ""): leaf.kept for leaf in report.leaves}
    kept |= {f"{name}/kernel": kept[f"{name}/kernel_mean"] for name in layers_of(small)}
    kept |= {f"{name}/bias": kept[f"{name}/bias_mean"] for name in layers_of(small) if name != "last"}
    levels = bcdl_jax.baselines.reduce_to_levels(small, *bcdl_jax.baselines.share_weights(small, 4))
    rounded = (bcdl_jax.reduce_precision(small, 0.3), compression.reduce_precision_by_round_off(small), levels)
    for number, reduced in enumerate(rounded):
        bcdl_jax.save(tmp_path / "small", reduced, names=True)
        loaded = bcdl_jax.load(tmp_path / "small", like=small)
        jax.tree.map(np.testing.assert_array_equal, loaded, reduced)
        assert [summary.shape for summary in bcdl_jax.codec.summarize((tmp_path / "small").read_bytes())] == [
            np.shape(node) if not compression.is_layer(node) else node.kernel_shape
            for node in jax.tree.leaves(reduced, is_leaf=compression.is_layer)
        ]
        assert jax.tree.structure(bcdl_jax.load(tmp_path / "small")) == jax.tree.structure(reduced)
        # The whole network with the rounded weights at their places. The other weights keep their values.
        twin = jax.tree.map(np.array, bcdl_jax.mean_weights(params))
        for name, node in bcdl_jax.mean_weights(loaded).items():
            for entry, array in node.items():
                twin[name][entry][np.ix_(*kept[f"{name}/{entry}"])] = array
        expected = apply(bcdl_jax.from_trained(params, twin), IMAGES)
        np.testing.assert_allclose(small_apply(loaded, IMAGES), expected, rtol=1e-4, atol=1e-5)
        assert float(jnp.abs(expected - apply(params, IMAGES)).max()) > 1e-5
        assert float(bcdl_jax.rate(reduced)) > (1.2 if number != 1 else 1)
    assert float(compression.rate_paper_maximum(rounded[0])) > 2
    small_apply = jax.jit(small_apply)
    np.testing.assert_allclose(small_apply(levels, IMAGES), expected, rtol=1e-4, atol=1e-5)


@each_family
def test_rounding_then_shrinking_goes_round(family, tmp_path):
    apply, params, small_apply, small, _ = shrunk(family, True)
    bcdl_jax.save(tmp_path / "small", small)
    loaded = bcdl_jax.load(tmp_path / "small", like=shrunk(family)[3] if family == "nj" else small)
    jax.tree.map(np.testing.assert_array_equal, loaded, small)
    np.testing.assert_allclose(small_apply(loaded, IMAGES), apply(params, IMAGES), rtol=1e-4, atol=1e-5)
    bits = weights = others = 0
    for name, node in small.items():
        layer = node.get("posterior")
        if layer is None:
            others += sum(leaf.size for leaf in jax.tree.leaves(node))
            continue
        kept = np.asarray(layer.kernel != 0) if layer.prunes_weights else np.asarray(layer.kernel_mask)
        kept = np.broadcast_to(kept, layer.kernel.shape).sum()
        bits += int(kept) * int(layer.kernel_bits)
        weights += layer.kernel.size
        if name != "last":
            bits += int(np.sum(layer.output_mask)) * int(layer.bias_bits)
            weights += layer.bias.size
        if name in GONE:
            continue
        bits += 32 * (1 if name == "last" else 2)
        if layer.prunes_weights:
            bits += min(32 * int(kept), layer.kernel.size)
        elif not layer.group_mask.all():
            bits += layer.group_mask.size
    assert float(bcdl_jax.rate(small)) == pytest.approx(32 * (weights + others) / (bits + 32 * others), rel=1e-5)


@pytest.fixture(scope="module")
def small_net(net):
    """The net 6-5-4-3, cut to 4-3-4-3: (model, pruned params, small function, small params, report)."""
    model, params, inputs = net
    pruned = prune_units(params, MASKS, CHAIN)
    return model, pruned, *bcdl_jax.shrink(lambda p, x: model.apply({"params": p}, x), pruned, inputs)


def test_rates_of_a_shrunk_net_by_hand(small_net):
    _, pruned, _, small, _ = small_net
    weights, biases = 4 * 3 + 3 * 4 + 4 * 3, 3 + 4 + 3
    assert float(bcdl_jax.rate(small)) == float(compression.rate_paper(small)) == 1.0
    reduced = bcdl_jax.reduce_precision(small, 0.25)
    layers = [reduced[name]["posterior"] for name in CHAIN]
    for mine, whole in zip(layers, map(bcdl_jax.reduce_precision(pruned, 0.25).get, CHAIN), strict=True):
        assert mine.kernel_bits == whole["posterior"].kernel_bits  # The kept weights are the same, and so is the step.
        assert float(mine.kernel_step) == pytest.approx(float(whole["posterior"].kernel_step), rel=1e-6)
    bits = 12 * sum(int(layer.kernel_bits) for layer in layers)
    assert float(compression.rate_paper(reduced)) == pytest.approx(32 * weights / bits)
    bits += sum(size * int(layer.bias_bits) for size, layer in zip((3, 4, 3), layers)) + 6 * 32
    assert float(bcdl_jax.rate(reduced)) == pytest.approx(32 * (weights + biases) / bits)


@pytest.mark.slow
def test_modules_of_the_small_widths_take_the_small_params(net, small_net):
    inputs = net[2]
    _, pruned, small_apply, small, report = small_net
    kept = next(leaf.kept[0] for leaf in report.leaves if leaf.path == "Dense_0/posterior/kernel_mean")

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            for width in (3, 4):
                x = nn.relu(bcdl_jax.Dense(width)(x, deterministic=deterministic))
            return bcdl_jax.Dense(3)(x, deterministic=deterministic)

    mine = Small().apply({"params": small}, inputs[:, kept])
    np.testing.assert_allclose(mine, small_apply(small, inputs), rtol=1e-4, atol=1e-5)
    sampled = Small().apply({"params": small}, inputs[:, kept], False, rngs={"noise": jax.random.key(0)})
    assert jnp.isfinite(sampled).all()
    assert float(jnp.abs(sampled - mine).max()) > 0.01
    assert float(bcdl_jax.kl_divergence(small)) == pytest.approx(float(bcdl_jax.kl_divergence(pruned)), rel=1e-5)


@pytest.mark.slow
def test_a_shrunk_net_is_trained_on(net, small_net):
    """The small function of the sampled network, and the KL of its params, make a training step."""
    model, pruned, inputs = net[0], small_net[1], net[2]
    key = jax.random.key(7)

    def sampled(params, x, key):
        return model.apply({"params": params}, x, deterministic=False, rngs={"noise": key})

    small_sampled, small, report = bcdl_jax.shrink(sampled, pruned, (inputs, key))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, small_net[3])
    optimizer = optax.adam(0.01)
    steps = [
        bcdl_jax.train.make_train_step(lambda p, x, k, f=f: jnp.mean(f(p, x, k) ** 2), optimizer, num_examples=7)
        for f in (sampled, small_sampled)
    ]
    whole = bcdl_jax.train.create_train_state(pruned, optimizer, key)
    trained = [jax.jit(step)(state, inputs) for step, state in zip(steps, (whole, bcdl_jax.cut(whole, report)))]
    for name, value in trained[1][1].items():
        assert float(value) == pytest.approx(float(trained[0][1][name]), rel=1e-4)
    (state, _), (small_state, _) = trained
    for mine, theirs in zip(
        jax.tree.leaves(small_state.params), jax.tree.leaves(bcdl_jax.cut(state.params, report)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)
    # The small function takes rounded params, which have no noise.
    reduced = bcdl_jax.reduce_precision(small, 0.1)
    outputs = [small_sampled(reduced, inputs, jax.random.key(seed)) for seed in range(2)]
    np.testing.assert_array_equal(*outputs)
    np.testing.assert_allclose(outputs[0], small_net[2](reduced, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["posterior", "quantized"])
def test_widths_are_rounded_up_in_all_arrays(net, small_net, quantized):
    model, pruned, inputs = net[0], small_net[1], net[2]
    params = bcdl_jax.reduce_precision(pruned, 0.25) if quantized else pruned
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs, multiple_of=2)
    np.testing.assert_allclose(small_apply(small, inputs), apply(params, inputs), rtol=1e-4, atol=1e-5)
    assert [layer.kernel_shape for layer in layers_of(small).values()] == [(4, 4), (4, 4), (4, 3)]
    reduced = small if quantized else bcdl_jax.reduce_precision(small, 0.25)
    assert float(compression.rate_paper(reduced)) > 1
    assert bcdl_jax.codec.decode(bcdl_jax.codec.encode(reduced), small)["Dense_0"]["posterior"].kernel_shape == (4, 4)


@pytest.mark.slow
def test_a_shrunk_net_is_pruned_and_shrunk_again(net, small_net):
    model, pruned, inputs = net[0], small_net[1], net[2]
    _, _, small_apply, small, _ = small_net
    second = {"Dense_1": jnp.array([True, False, True])}  # Inputs 0, 2 and 3 of the whole net are left.
    smaller_apply, smaller, _ = bcdl_jax.shrink(small_apply, prune_units(small, second), inputs)
    both = prune_units(pruned, {"Dense_1": jnp.array([True, False, False, True, False])})
    expected = bcdl_jax.shrink(lambda p, x: model.apply({"params": p}, x), both, inputs)
    jax.tree.map(np.testing.assert_array_equal, smaller, expected[1])
    np.testing.assert_allclose(smaller_apply(smaller, inputs), expected[0](expected[1], inputs), rtol=1e-4, atol=1e-5)


def test_a_network_of_which_nothing_is_left(net):
    """Its output is a constant."""
    model, params, inputs = net
    pruned = bcdl_jax.prune(params, -math.inf, CHAIN)
    for tree in (pruned, bcdl_jax.reduce_precision(pruned, 0.25)):
        with pytest.warns(UserWarning, match="Nothing is left of layers Dense_0, Dense_1, Dense_2"):
            small_apply, small, _ = bcdl_jax.shrink(lambda p, x: model.apply({"params": p}, x), tree, inputs)
        np.testing.assert_allclose(small_apply(small, inputs), model.apply({"params": tree}, inputs), atol=1e-6)
        assert [layer.kernel_shape for layer in layers_of(small).values()] == [(0, 0)] * 3
        assert float(bcdl_jax.rate(small)) == float(compression.rate_paper(small)) == math.inf
    assert float(compression.rate_paper_maximum(small)) == math.inf
    data = bcdl_jax.codec.encode(small, names=True)
    jax.tree.map(np.testing.assert_array_equal, bcdl_jax.codec.decode(data), small)
    posteriors = shrunk_away(pruned, model, inputs)
    assert compression.pruning_scores(posteriors) == {}
    assert float(bcdl_jax.kl_divergence(posteriors)) == 0
    weights = bcdl_jax.mean_weights(posteriors)
    assert bcdl_jax.baselines.magnitude_masks(weights, 0.5)["Dense_0"]["kernel"].shape == (0, 0)
    assert float(bcdl_jax.baselines.surgery_thresholds(weights, 1.0)["Dense_0"]["kernel"]) == 0
    with pytest.raises(ValueError, match="params holds only kernels without elements"):
        bcdl_jax.baselines.create_mixture(weights)


def shrunk_away(params, model, inputs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Nothing is left")
        return bcdl_jax.shrink(lambda p, x: model.apply({"params": p}, x), params, inputs)[1]


def test_a_small_function_refuses_other_layers(net, small_net):
    _, _, small_apply, _, _ = small_net
    whole = bcdl_jax.reduce_precision(small_net[1], 0.25)
    assert isinstance(whole["Dense_0"]["posterior"], QuantizedLayer)
    with pytest.raises(
        ValueError, match=r"small_params has layer Dense_0 with kernel shape \(6, 5\); it must be \(4, 3\)"
    ):
        small_apply(whole, net[2])


class Stack(nn.Module):
    """Three residual blocks in a scan, whose layers are stacked."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                hidden = nn.relu(bcdl_jax.Dense(6, name="up")(x))
                return x + bcdl_jax.Dense(4, name="down")(hidden), None

        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


@pytest.mark.slow
def test_stacked_layers(key):
    x = jax.random.normal(key, (2, 4))
    params = jax.jit(Stack().init)(key, x)["params"]["blocks"]
    masks = {"up": ("output_mask", jnp.arange(6) < 4), "down": ("input_mask", jnp.arange(6) < 4)}
    for name, (field, mask) in masks.items():
        layer = params[name]["posterior"]
        params[name] = {"posterior": layer.replace(**{field: getattr(layer, field) * mask})}
    apply = jax.jit(lambda params, x: Stack().apply({"params": {"blocks": params}}, x))
    reduce = jax.vmap(lambda params: bcdl_jax.reduce_precision(params, 0.2))
    small_apply, small, _ = bcdl_jax.shrink(apply, params, x)
    for name, shape in (("up", (3, 4, 4)), ("down", (3, 4, 4))):
        assert small[name]["posterior"].kernel_shape == small[name]["posterior"].kernel_log_variance.shape == shape
    np.testing.assert_allclose(small_apply(small, x), apply(params, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small_apply(reduce(small), x), apply(reduce(params), x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(bcdl_jax.kl_divergence)(small), jax.vmap(bcdl_jax.kl_divergence)(params), rtol=1e-5
    )
