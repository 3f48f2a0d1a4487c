import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax.conversion import variational


class Transformer(nn.Module):
    """Patches, a class token, attention, and a layer norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = jnp.concatenate(
            [jnp.broadcast_to(self.param("token", nn.initializers.normal(), (8,)), (len(x), 1, 8)), x], 1
        )
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.gelu(nn.Dense(12)(x))[:, 0])


class Convolutions(nn.Module):
    """Grouped, strided and transposed convolutions, with batch norm, a skip and a flatten."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
        y = nn.Conv(8, (3, 2), 2, feature_group_count=2)(x)
        x = nn.ConvTranspose(4, (2, 2), (2, 2))(nn.relu(y)) + x
        return nn.Dense(3)(x.reshape(len(x), -1))


class Half(nn.Module):
    """Layers that compute in bfloat16."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=jnp.bfloat16)(
            nn.relu(nn.DenseGeneral((2, 3), dtype=jnp.bfloat16)(x)).reshape(len(x), 6)
        )


def vector_network(params, x):
    """A network for one example, as Equinox writes it: weights [out, in] on the left, with ``vmap`` over the examples."""

    def one(x):
        hidden = jax.nn.relu(params["first"] @ x + params["bias"])
        return params["last"] @ (hidden + jax.nn.relu(params["again"] @ hidden))

    return jax.vmap(one)(x)


def tied_network(params, x):
    """One weight for two layers, and a vector."""
    for _ in range(2):
        x = jnp.tanh(x @ params["weight"])
    return x @ params["vector"]


class Recurrent(nn.Module):
    """A gated recurrent layer in front of a head."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.GRUCell(4))(x)[:, -1])


class Block(nn.Module):
    """One of the layers of ``Stacked``."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4)(nn.remat(nn.Dense)(6)(nn.LayerNorm()(x))), None


class Stacked(nn.Module):
    """Layers whose params are stacked."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(layers()(x, None)[0])


def vectors(key):
    shapes = {"first": (6, 5), "bias": (6,), "again": (6, 6), "last": (3, 6)}
    return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}


def linen(model, shape):
    return lambda key: (model.apply, jax.jit(model.init)(key, jnp.ones(shape)), jax.random.normal(key, shape))


def trained_norms(model, shape):
    """A network whose batch norms have averages, gains and shifts as after training."""

    def make(key):
        apply, variables, x = linen(model, shape)(key)
        return apply, jax.tree.map(lambda leaf: leaf + 0.1 + jax.random.uniform(key, leaf.shape), variables), x

    return make


NETWORKS = {
    "transformer": (linen(Transformer(), (2, 8, 8, 2)), 7),
    "convolutions": (trained_norms(Convolutions(), (2, 4, 4, 2)), 4),
    "vectors": (lambda key: (vector_network, vectors(key), jax.random.normal(key, (2, 5))), 3),
    "tied": (
        lambda key: (
            tied_network,
            {"weight": jax.random.normal(key, (5, 5)), "vector": jnp.arange(5.0)},
            jax.random.normal(key, (2, 5)),
        ),
        2,
    ),
    "half": (linen(Half(), (2, 5)), 2),
    "recurrent": (linen(Recurrent(), (2, 5, 3)), 7),
    "stacked": (linen(Stacked(), (2, 4)), 7),
}


SLOW = ("transformer", "half", "convolutions", "tied", "recurrent", "stacked")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS]
)
def case(request, key):
    """(apply, params, inputs [2, ...], the variational network, the number of kernels)."""
    make, count = NETWORKS[request.param]
    apply, params, x = make(key)
    return apply, params, x, variational(apply, params, x), count


def compiled(model):
    return jax.jit(lambda params, x, key: model.apply(params, x, key=key))


def test_the_means_compute_the_same_at_any_batch_size(case, key):
    apply, params, x, model, count = case
    assert len(bcdl_jax.variational_layers(model.params)) == count
    tolerance = 2e-2 if jax.tree.leaves(apply(params, x))[0].dtype == jnp.bfloat16 else 1e-5
    for size in (1, 5):
        inputs = jax.random.normal(key, (size, *x.shape[1:]))
        expected = np.asarray(apply(params, inputs), np.float32)
        found = np.asarray(jax.jit(model.apply)(model.params, inputs), np.float32)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    restored = model.mean_params(model.params)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    if "batch_stats" not in params:  # Batch norms are folded into the kernels.
        for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5)


def test_samples_and_gradients(case, key):
    _, _, x, model, _ = case
    sample = compiled(model)
    outputs = sample(model.params, x, key)
    np.testing.assert_array_equal(outputs, sample(model.params, x, key))
    assert bool((outputs != sample(model.params, x, jax.random.key(3))).any())
    # The noise of an example depends neither on the batch nor on the other examples.
    more = sample(model.params, jnp.concatenate([x, 2 * x, x]), key)
    tolerance = 2e-2 if outputs.dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(more[:2].astype(float), outputs.astype(float), rtol=tolerance, atol=tolerance)
    many = jax.jit(jax.vmap(lambda key: model.apply(model.params, x, key=key)))(jax.random.split(key, 3))
    assert many.shape == (3, *outputs.shape)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply(params, x, key=key).astype(jnp.float32) ** 2)))(
        model.params
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    variances = [layer.kernel_log_variance for layer in bcdl_jax.variational_layers(gradient).values()]
    assert all(bool((leaf != 0).any()) for leaf in variances)


def test_pruned_params_shrink_and_are_saved(case, key, tmp_path):
    _, _, x, model, _ = case

    def without_last_groups(layer):
        return layer.prune_units(jnp.arange(layer.unit_mask.size) < layer.unit_mask.size - 1)

    is_layer = lambda node: isinstance(node, bcdl_jax.Posterior)  # noqa: E731
    pruned = jax.tree.map(
        lambda node: without_last_groups(node) if is_layer(node) else node, model.params, is_leaf=is_layer
    )
    rounded = bcdl_jax.reduce_precision(pruned, 0.5)
    outputs = np.asarray(jax.jit(model.apply)(rounded, x), np.float32)
    bcdl_jax.save(tmp_path / "net.bcdl", rounded)
    loaded = bcdl_jax.load(tmp_path / "net.bcdl", like=model.params)
    np.testing.assert_array_equal(np.asarray(jax.jit(model.apply)(loaded, x), np.float32), outputs)
    small_apply, small, report = bcdl_jax.shrink(model.apply, pruned, x)
    assert report.bytes[1] < report.bytes[0]
    expected = np.asarray(jax.jit(model.apply)(pruned, x), np.float32)
    found = jax.jit(small_apply)(small, x)
    tolerance = 2e-2 if found.dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=tolerance * np.abs(expected).max())
    with pytest.raises(ValueError, match="which has no noise to sample; pass no key"):
        model.apply(rounded, x, key=key)


@pytest.mark.parametrize("side", ["left", "right"])
def test_samples_have_the_predicted_moments(side, key):
    x = jax.random.normal(key, (2, 3, 4))
    weight = jax.random.normal(key, (4, 5) if side == "right" else (5, 4))
    apply = {
        "right": lambda params, x: x @ params["weight"],
        "left": lambda params, x: jnp.einsum("oi,bti->bto", params["weight"], x),
    }[side]
    model = variational(apply, {"weight": weight}, x)
    node = model.params["weight"].replace(
        kernel_log_variance=jnp.linspace(-3, 0, 20).reshape(4, 5), scale_log_variance=jnp.linspace(-3, -1, 4)
    )
    samples = jax.jit(jax.vmap(lambda key: model.apply({"weight": node}, x, key=key)))(jax.random.split(key, 40_000))
    mean, variance = node.kernel_moments()
    deviation = np.sqrt(x**2 @ variance)
    np.testing.assert_allclose(samples.mean(0), x @ mean, atol=5 * float(deviation.max()) / 200)
    np.testing.assert_allclose(samples.std(0), deviation, rtol=0.05)


def test_sampled_rows_of_a_table_have_the_predicted_moments(key):
    table, indices = jax.random.normal(key, (7, 4)), jnp.array([[0, 6, 3], [3, 3, 5]])
    model = variational(lambda params, x: params["table"][x], {"table": table}, indices)
    node = model.params["table"].replace(
        kernel_log_variance=jnp.linspace(-3, 0, 28).reshape(4, 7), scale_log_variance=jnp.linspace(-3, -1, 4)
    )
    samples = jax.jit(jax.vmap(lambda key: model.apply({"table": node}, indices, key=key)))(
        jax.random.split(key, 40_000)
    )
    mean, variance = node.kernel_moments()
    deviation = np.sqrt(variance.T[indices])
    np.testing.assert_allclose(samples.mean(0), mean.T[indices], atol=5 * float(deviation.max()) / 200)
    np.testing.assert_allclose(samples.std(0), deviation, rtol=0.05)


def test_a_table_and_its_transpose_share_one_posterior(key):
    """Without noise of the weights, the looked-up rows and the product have the same scales."""

    def apply(params, x):
        rows = params["table"][x]
        return rows, jnp.eye(4)[x] @ params["table"].T

    x = jnp.array([0, 1, 3])
    model = variational(apply, {"table": jnp.ones((5, 4))}, x)
    assert model.plan.leaves[0].groups_of == "columns"
    node = model.params["table"].replace(kernel_log_variance=jnp.full((4, 5), -60.0), scale_log_variance=jnp.zeros(4))
    rows, products = model.apply({"table": node}, x, key=key)
    np.testing.assert_allclose(products, np.take_along_axis(rows, x[:, None], 1) * jnp.ones(5), rtol=1e-2, atol=1e-2)
    assert float(rows.std()) > 0.1


@pytest.mark.slow
def test_a_cell_shares_its_scales_over_time_and_stacked_layers_have_their_own(key):
    x = jnp.ones((500, 4))

    def cell(params, x):
        return jax.lax.scan(lambda carry, _: (carry, x @ params["weight"]), 0, length=3)[1]

    def stack(params, x):
        return jax.lax.scan(lambda carry, weight: (carry, x @ weight), 0, params["weight"])[1]

    quiet = {"kernel_log_variance": jnp.full((4, 5), -60.0), "scale_log_variance": jnp.zeros(4)}
    model = variational(cell, {"weight": jnp.ones((4, 5))}, x)
    times = model.apply({"weight": model.params["weight"].replace(**quiet)}, x, key=key)
    np.testing.assert_allclose(times[1:], times[:1] * jnp.ones((2, 1, 1)), rtol=1e-2, atol=1e-2)
    model = variational(stack, {"weight": jnp.ones((3, 4, 5))}, x)
    nodes = tuple(node.replace(**quiet) for node in model.params["weight"])
    first, second, _ = model.apply({"weight": nodes}, x, key=key)[..., 0]
    assert float(jnp.std(first)) > 1
    assert abs(float(jnp.corrcoef(first, second)[0, 1])) < 0.2
    # The noise of the weights is new at each time.
    noisy = {"kernel_log_variance": jnp.zeros((4, 5)), "scale_log_variance": jnp.full(4, -60.0)}
    model = variational(cell, {"weight": jnp.ones((4, 5))}, x)
    first, second, _ = model.apply({"weight": model.params["weight"].replace(**noisy)}, x, key=key)[..., 0]
    assert float(jnp.std(first)) > 1
    assert abs(float(jnp.corrcoef(first, second)[0, 1])) < 0.2


@pytest.mark.parametrize("layer", ["dense", pytest.param("convolution", marks=pytest.mark.slow)])
def test_a_bias_belongs_to_the_posterior_of_its_kernel(layer, key):
    """The converted layer has the distribution of the library's own layer."""
    if layer == "dense":
        plain, own, x = nn.Dense(3), bcdl_jax.Dense(3), jax.random.normal(key, (2, 4))
    else:
        plain, own, x = nn.Conv(3, (2, 2)), bcdl_jax.Conv(3, (2, 2)), jax.random.normal(key, (2, 3, 3, 2))
    params = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), plain.init(key, x))
    model = variational(plain.apply, params, x)
    node = model.params["params"]["kernel"]
    assert model.params["params"]["bias"] is None
    assert node.bias_mean.shape == (3,)
    assert str(model.plan.leaves[0]) == "params/bias  3: belongs to params/kernel"
    node = node.replace(bias_log_variance=jnp.array([0.0, -1, -2]), scale_log_variance=node.scale_log_variance / 3)
    keys = jax.random.split(key, 20_000)
    converted = {"params": {"kernel": node, "bias": None}}
    samples = jax.jit(jax.vmap(lambda key: model.apply(converted, x, key=key)))(keys)
    expected = jax.jit(
        jax.vmap(lambda key: own.apply({"params": {"posterior": node}}, x, deterministic=False, rngs={"noise": key}))
    )(keys)
    spread = np.asarray(expected.std(0))
    np.testing.assert_allclose(samples.mean(0), expected.mean(0), atol=6 * spread.max() / np.sqrt(len(keys)))
    np.testing.assert_allclose(samples.std(0), spread, rtol=0.06)
    np.testing.assert_allclose(
        model.apply(converted, x), own.apply({"params": {"posterior": node}}, x), rtol=1e-4, atol=1e-5
    )
    without = variational(plain.apply, params, x, rules={"bias": None})
    assert without.params["params"]["kernel"].bias_mean is None
    np.testing.assert_allclose(without.apply(without.params, x), plain.apply(params, x), rtol=1e-4, atol=1e-5)


def test_biases_of_transposed_products_and_of_several_axes(key):
    def bias_after(apply, params, inputs):
        return variational(apply, params, inputs).params["bias"]

    vectors = {"weight": jnp.ones((6, 5)), "bias": jnp.arange(6.0)}
    examples = lambda params, x: jax.vmap(lambda x: params["weight"] @ x + params["bias"])(x)  # noqa: E731
    assert bias_after(examples, vectors, jnp.ones((2, 5))) is None
    reverse = lambda params, x: x @ params["weight"].T + params["bias"][::-1]  # noqa: E731
    assert bias_after(reverse, vectors, jnp.ones((2, 5))) is not None
    once = lambda params, x: x @ params["weight"].T + params["bias"] * params["bias"]  # noqa: E731
    assert bias_after(once, vectors, jnp.ones((2, 5))) is not None
    # A sum along another axis of the same size.
    rows = lambda params, x: jnp.einsum("bti,oi->bto", x, params["weight"]) + params["bias"][:, None]  # noqa: E731
    assert bias_after(rows, vectors, jnp.ones((2, 6, 5))) is not None

    layer, x = nn.DenseGeneral((2, 3)), jax.random.normal(key, (4, 5))
    params = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), layer.init(key, x))
    model = variational(layer.apply, params, x)
    assert model.params["params"]["bias"] is None
    np.testing.assert_allclose(model.apply(model.params, x), layer.apply(params, x), rtol=1e-4, atol=1e-5)
    distance = np.abs(model.apply(model.params, x, key=key) - layer.apply(params, x))
    deviation = float(model.params["params"]["kernel"].bias_log_variance[0]) / 2
    assert 0 < distance.max() < 20 * np.exp(deviation), (distance.max(), np.exp(deviation))


def test_a_scale_with_a_second_factor_of_zero_is_not_folded(key):
    """The outputs of the given network would not be restored from the folded kernel."""
    apply = lambda params, x: x @ params["kernel"] * (params["gain"] * params["other"]) + 0 * x[:, :1]  # noqa: E731
    params = dict(zip(("kernel", "gain", "other"), numbers(key, (5, 4), (4,), (4,)), strict=True))
    x = jax.random.normal(key, (3, 5))
    folded = variational(apply, params, x)
    assert {leaf.path for leaf in folded.plan.leaves if leaf.held_by} == {"gain", "other"}
    plain = variational(apply, params | {"gain": jnp.zeros(4), "other": jnp.zeros(4)}, x)
    assert not any(leaf.held_by for leaf in plain.plan.leaves)
    for model in (folded, plain):
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(model.mean_params(model.params)))


def numbers(key, *shapes):
    return [jax.random.uniform(jax.random.fold_in(key, place), shape) + 0.2 for place, shape in enumerate(shapes)]


NORMS = {
    "gain, shift": lambda p, y: (y - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1e-3) * p["gain"]) + p["shift"],
    "gain": lambda p, y: (y - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-3) * p["gain"],
    "gain of the outputs": lambda p, y: (y + p["shift"]) * p["gain"],
    "no gain": lambda p, y: (y - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-3) + p["shift"],
    "gain that is read twice": lambda p, y: y * p["gain"] + p["gain"],
}


@pytest.mark.parametrize(
    "norm", [pytest.param(norm, marks=() if norm == "gain, shift" else pytest.mark.slow) for norm in NORMS]
)
def test_a_batch_norm_is_folded_into_the_kernel(norm, key):
    def apply(params, x):
        return NORMS[norm](params, x @ params["kernel"]) @ params["last"]

    names = ("kernel", "last", "mean", "var", "gain", "shift")
    params = dict(zip(names, numbers(key, (5, 4), (4, 2), (4,), (4,), (4,), (4,)), strict=True))
    x = jax.random.normal(key, (3, 5))
    model = variational(apply, params, x, rules={"kernel": bcdl_jax.SparseVariationalDropout()})
    held = {leaf.path for leaf in model.plan.leaves if leaf.held_by == "kernel"}
    assert (
        held
        == {
            "gain, shift": {"mean", "var", "gain", "shift"},
            # A mean can hold the bias.
            "gain": {"mean"},
            "gain of the outputs": {"shift", "gain"},
            "no gain": {"mean"},
            "gain that is read twice": set(),
        }[norm]
    )
    expected = jax.jit(apply)(params, x)
    np.testing.assert_allclose(jax.jit(model.apply)(model.params, x), expected, rtol=1e-4, atol=1e-5)

    def quiet(node):
        fields = {
            name: getattr(node, name)
            for name in ("kernel_log_variance", "bias_log_variance", "scale_log_variance")
            if getattr(node, name, None) is not None
        }
        return node.replace(**{name: jnp.full_like(value, -60) for name, value in fields.items()})

    is_layer = lambda node: isinstance(node, bcdl_jax.Posterior)  # noqa: E731
    silent = jax.tree.map(lambda node: quiet(node) if is_layer(node) else node, model.params, is_leaf=is_layer)
    sampled = jax.jit(lambda params, x: model.apply(params, x, key=key))(silent, x)
    np.testing.assert_allclose(sampled, expected, rtol=2e-3, atol=2e-3)
    if {"gain", "shift"} <= held:  # An output without weights and bias is then exactly zero.
        node = model.params["kernel"]
        node = node.replace(kernel_mean=node.kernel_mean.at[:, 0].set(0), bias_mean=node.bias_mean.at[0].set(0))
        restored = model.mean_params(model.params | {"kernel": node})
        hidden = jax.jit(lambda params, x: NORMS[norm](params, x @ params["kernel"]))(restored, x)
        assert bool((hidden[:, 0] == 0).all())
        assert bool((hidden[:, 1:] != 0).all())


def test_products_that_share_a_weight_share_its_scales(key):
    """Without noise of the weights, two products with one kernel and equal inputs are equal."""
    x = jnp.ones((3, 4))
    model = variational(
        lambda params, x: (x @ params["weight"], (2 * x) @ params["weight"]), {"weight": jnp.ones((4, 5))}, x
    )
    node = model.params["weight"].replace(kernel_log_variance=jnp.full((4, 5), -60.0), scale_log_variance=jnp.zeros(4))
    first, second = model.apply({"weight": node}, x, key=key)
    np.testing.assert_allclose(2 * first, second, rtol=1e-2, atol=1e-2)
    assert float(first.std()) > 0.1


def test_the_plan_names_what_stays_plain_and_why(key):
    x = jnp.arange(6).reshape(2, 3)

    def apply(params, x):
        hidden = params["embedding"][x] @ params["kernel"]
        return hidden @ params["plain"] + jnp.where(params["flags"], params["bias"], 0)

    params = {
        "embedding": jnp.ones((7, 4)),
        "kernel": jnp.ones((4, 5)),
        "plain": jnp.ones((5, 2)),
        "bias": jnp.ones(2),
        "flags": jnp.ones(2, bool),
        "unused": jnp.ones(3),
    }
    model = variational(apply, params, x, rules={"plain": None, "ker": bcdl_jax.GroupHorseshoe()})
    assert str(model.plan).splitlines() == [
        "bias  2: stays plain, since it is read by select_n",
        "embedding  7 x 4: GroupNormalJeffreys, a group for each of 4 columns",
        "flags  2: stays plain, since it has the type bool",
        "kernel  4 x 5: GroupHorseshoe, a group for each of 4 inputs",
        "plain  5 x 2: stays plain, since rules leaves it plain",
        "unused  3: stays plain, since nothing reads it",
        f"48 of 65 numbers become variational, KL {model.plan.kl_divergence:,.0f} nats at the start",
    ]
    np.testing.assert_allclose(bcdl_jax.kl_divergence(model.params), model.plan.kl_divergence, rtol=1e-5)


def test_bad_input_is_refused(key):
    apply = lambda params, x: x @ params["weight"]  # noqa: E731
    params, x = {"weight": jnp.ones((4, 5))}, jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"The pattern 'heads' of rules matches no array; params holds weight\."):
        variational(apply, params, x, rules={"heads": None})
    with pytest.raises(ValueError, match=r"rules\['weight'\] is a str; it must be a Family or None"):
        variational(apply, params, x, rules={"weight": "normal"})
    with pytest.raises(ValueError, match=r"No array of params can become variational\. weight: it is read by add"):
        variational(lambda params, x: x + params["weight"], {"weight": jnp.ones((4,))}, x)
    with pytest.raises(ValueError, match="weight of params holds 1 values that are not finite in float32"):
        variational(apply, {"weight": jnp.ones((4, 5)).at[0, 0].set(jnp.nan)}, x)
    model = variational(apply, params, x)
    layers = variational(
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, 0), x, p["w"])[0], {"w": jnp.ones((3, 4, 4))}, x
    )
    with pytest.raises(ValueError, match="params holds tuple at w; it must hold a tuple of 3 posteriors"):
        layers.apply({"w": layers.params["w"][:2]}, x)
    with pytest.raises(ValueError, match="params has another structure than the params of the converted network"):
        model.apply({"other": 1}, x)
    with pytest.raises(ValueError, match="at weight; it must hold a posterior or a quantised layer"):
        model.apply(params, x)
    seeds = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), model.params)
    with pytest.raises(
        ValueError, match=r"The kernel at weight has shape \(2, 4, 5\); it must have \(4, 5\)\. .* jax\.vmap"
    ):
        model.apply(seeds, x)


def test_functions_that_are_not_pure_are_refused():
    params, x = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, jnp.ones((4, 3))

    def by_value(params, x):
        return x @ params["w"] if params["b"].sum() > 0 else -x @ params["w"]

    with pytest.raises(ValueError, match="by_value uses the value of an array in Python, such as in if, float"):
        bcdl_jax.variational(by_value, params, x)
    with pytest.raises(ValueError, match="uses the value of an array in Python"):
        bcdl_jax.variational(lambda params, x: np.asarray(x) @ params["w"], params, x)
    calls = itertools.count()

    def stateful(params, x):
        return x @ params["w"] if next(calls) % 2 else jnp.tanh(x @ params["w"])

    with pytest.raises(ValueError, match="apply computes something else at each call with the same arguments"):
        bcdl_jax.variational(stateful, params, x)
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="Random numbers must come from a key among the inputs"):
        bcdl_jax.variational(lambda params, x: x @ params["w"] * generator.random(2, np.float32), params, x)


def test_a_wrong_number_of_inputs_is_named(key):
    def two_inputs(params, x, y):
        return (x + y) @ params["kernel"]

    params, x = {"kernel": jax.random.normal(key, (3, 2))}, jnp.ones((4, 3))
    message = (
        r"apply cannot be called with params and 1 input: missing a required argument: 'y'\. Several inputs are a tuple"
    )
    for function in (bcdl_jax.variational, bcdl_jax.shrink):
        with pytest.raises(ValueError, match=message):
            function(two_inputs, params, [x, x])
