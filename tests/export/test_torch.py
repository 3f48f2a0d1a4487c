from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 2), padding="VALID")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(5)(x.reshape(len(x), -1)))
        return nn.Dense(4)(x)


@pytest.fixture(scope="module")
def net(key):
    """(apply, variables with random averages and scales of the norm, images)."""
    images = jax.random.normal(key, (3, 9, 8, 2))
    variables = jax.jit(Net().init)(key, images)
    fresh = lambda leaf: jax.random.uniform(jax.random.fold_in(key, leaf.size), leaf.shape, minval=0.5)  # noqa: E731
    return Net().apply, jax.tree.map(lambda leaf: fresh(leaf) if leaf.ndim == 1 else leaf, variables), images


def channels_first(state, images):
    """The network in the layout of PyTorch, computed by numpy and ``lax.conv``: channels first, weights [out, in]."""
    x = jnp.moveaxis(images, -1, 1)
    x = jax.lax.conv(x, state["Conv_0.weight"], (1, 1), "VALID")
    shaped = lambda name: state[name][None, :, None, None]  # noqa: E731
    x = x + shaped("Conv_0.bias") - shaped("BatchNorm_0.running_mean")
    x = x / jnp.sqrt(shaped("BatchNorm_0.running_var") + 1e-5)
    x = jnp.maximum(x * shaped("BatchNorm_0.weight") + shaped("BatchNorm_0.bias"), 0)
    batch, channels, rows, columns = x.shape
    x = x[:, :, : rows // 2 * 2, : columns // 2 * 2].reshape(batch, channels, rows // 2, 2, columns // 2, 2).max((3, 5))
    x = x.reshape(batch, -1)
    x = x[:, state.get("Dense_0.input_indices", np.arange(x.shape[1]))]
    x = jnp.maximum(x @ state["Dense_0.weight"].T + state["Dense_0.bias"], 0)
    return x @ state["Dense_1.weight"].T + state["Dense_1.bias"]


def pruned(variables):
    """The variables without two channels and some inputs of the dense layer."""
    params = variables["params"]
    kernel = params["Dense_0"]["kernel"].at[jnp.array([0, 7, 19, 30])].set(0)
    norm = jax.tree.map(lambda leaf: leaf.at[jnp.array([1, 4])].set(0), params["BatchNorm_0"])
    return variables | {"params": params | {"Dense_0": params["Dense_0"] | {"kernel": kernel}, "BatchNorm_0": norm}}


def test_the_torch_layout_computes_the_same_with_channels_first(net):
    apply, variables, images = net
    state = bcdl_jax.export.torch_state_dict(apply, variables, images)
    assert state["Conv_0.weight"].shape == (6, 2, 3, 2)
    assert state["Dense_0.weight"].shape == (5, 3 * 3 * 6)
    assert "Dense_0.input_indices" not in state
    np.testing.assert_allclose(channels_first(state, images), apply(variables, images), rtol=1e-4, atol=1e-5)


def test_the_torch_layout_of_a_shrunk_network_lists_the_inputs_it_reads(net):
    apply, variables, images = net
    masked = pruned(variables)
    small_apply, small, _ = bcdl_jax.shrink(apply, masked, images)
    state = bcdl_jax.export.torch_state_dict(small_apply, small, images)
    assert state["Conv_0.weight"].shape[0] == 4
    assert state["Dense_0.weight"].shape[1] == len(state["Dense_0.input_indices"]) < 9 * 4
    assert (np.diff(state["Dense_0.input_indices"]) > 0).all()
    np.testing.assert_allclose(channels_first(state, images), apply(masked, images), rtol=1e-4, atol=1e-5)


class Between(nn.Module):
    """A flatten, the function ``between``, and a dense layer."""

    between: Callable

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2, 2))(x)
        return nn.Dense(2)(self.between(x.reshape(len(x), -1)))


def between(function, key):
    images = jax.random.normal(key, (2, 3, 4, 2))
    model = Between(function)
    return model.apply, jax.jit(model.init)(key, images), images


@pytest.mark.parametrize("function", [lambda x: x, nn.relu, nn.gelu, nn.silu, lambda x: x[:, ::-1][:, ::-1] * 2])
def test_the_order_is_followed_through_activations(function, key):
    apply, variables, images = between(function, key)
    weight = bcdl_jax.export.torch_state_dict(apply, variables, images)["Dense_0.weight"]
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(weight, kernel.reshape(3, 4, 3, 2).transpose(3, 2, 0, 1).reshape(2, -1))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.LayerNorm()(x),
        lambda x: nn.BatchNorm(use_running_average=True)(x),
        lambda x: jnp.concatenate([x, x[:, :1]], 1),
        lambda x: x.reshape(len(x), 2, -1),
        nn.softmax,
    ],
)
def test_a_lost_order_is_refused(function, key):
    with pytest.raises(ValueError, match="inputs of params/Dense_0/kernel were flattened and then mixed"):
        bcdl_jax.export.torch_state_dict(*between(function, key))


def test_channels_of_one_position_are_not_flattened(key):
    tokens = jax.random.normal(key, (2, 5, 4))
    for function in (lambda x: x[:, 0], lambda x: x.mean(1), lambda x: x):
        apply = lambda params, x, function=function: function(x) @ params["kernel"]  # noqa: E731
        kernel = jnp.arange(12.0).reshape(4, 3)
        state = bcdl_jax.export.torch_state_dict(apply, {"kernel": kernel}, tokens)
        assert set(state) == {"weight"}
        np.testing.assert_array_equal(state["weight"], kernel.T)


def test_a_norm_in_groups_before_a_flatten_keeps_the_order(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (2, 2))(x)))
            return nn.Dense(2)(x.reshape(len(x), -1))

    images = jax.random.normal(key, (2, 3, 5, 2))
    variables = jax.jit(Model().init)(key, images)
    weight = bcdl_jax.export.torch_state_dict(Model().apply, variables, images)["Dense_0.weight"]
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(weight, kernel.reshape(3, 5, 4, 2).transpose(3, 2, 0, 1).reshape(2, -1))


def pixel_shuffle(x):
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows, columns, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * rows, 2 * columns, channels // 4)


@pytest.mark.parametrize(
    "function",
    [
        pixel_shuffle,
        lambda x: x[:, ::-1],
        lambda x: x.transpose(0, 2, 1, 3),
        lambda x: x.reshape(*x.shape[:3], 2, 4).swapaxes(3, 4).reshape(x.shape),
        lambda x: jnp.repeat(x, 2, 1),
        lambda x: jnp.roll(x, 1, 2),
        lambda x: jnp.concatenate([x, x[..., :2]], -1),
        lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    ],
)
def test_the_order_is_that_of_the_flattened_image(function, key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = function(nn.Conv(8, (3, 3))(x))
            self.sow("intermediates", "image", x)
            return nn.Dense(5)(x.reshape(len(x), -1))

    images = jax.random.normal(key, (2, 4, 6, 3))
    variables = {"params": jax.jit(Model().init)(key, images)["params"]}
    state = bcdl_jax.export.torch_state_dict(Model().apply, variables, images)
    assert set(state) == {"Conv_0.weight", "Conv_0.bias", "Dense_0.weight", "Dense_0.bias"}
    outputs, sown = Model().apply(variables, images, mutable="intermediates")
    flat = np.asarray(sown["intermediates"]["image"][0]).transpose(0, 3, 1, 2).reshape(2, -1)
    np.testing.assert_allclose(flat @ state["Dense_0.weight"].T + state["Dense_0.bias"], outputs, rtol=1e-4, atol=1e-5)


def test_tokens_are_flattened_in_their_own_order(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (2, 2), (2, 2))(x).reshape(len(x), -1, 4)
            return nn.Dense(2)((nn.MultiHeadDotProductAttention(2)(x) + x).reshape(len(x), -1))

    images = jax.random.normal(key, (2, 4, 4, 3))
    variables = jax.jit(Model().init)(key, images)
    state = bcdl_jax.export.torch_state_dict(Model().apply, variables, images)
    np.testing.assert_array_equal(state["Dense_0.weight"], variables["params"]["Dense_0"]["kernel"].T)


def test_the_read_positions_of_an_image_with_one_channel_are_listed(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Conv(1, (3, 3))(x)).reshape(len(x), -1))

    images = jax.random.normal(key, (2, 4, 4, 3))
    variables = jax.jit(Model().init)(key, images)
    kernel = variables["params"]["Dense_0"]["kernel"]
    variables["params"]["Dense_0"]["kernel"] = kernel.at[::2].set(0)
    small_apply, small, _ = bcdl_jax.shrink(Model().apply, variables, images)
    state = bcdl_jax.export.torch_state_dict(small_apply, small, images)
    np.testing.assert_array_equal(state["Dense_0.input_indices"], np.arange(1, 16, 2))


def test_an_image_without_a_batch_is_flattened_with_channels_first(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(nn.Conv(2, (3, 3))(x).reshape(-1))

    image = jax.random.normal(key, (4, 3, 3))
    variables = jax.jit(Model().init)(key, image)
    weight = bcdl_jax.export.torch_state_dict(Model().apply, variables, image)["Dense_0.weight"]
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(weight, kernel.reshape(4, 3, 2, 5).transpose(3, 2, 0, 1).reshape(5, -1))
    layer, images = nn.DenseGeneral(5, axis=(1, 2, 3)), jax.random.normal(key, (2, 4, 3, 2))
    variables = layer.init(key, images)
    state = bcdl_jax.export.torch_state_dict(layer.apply, variables, images)
    flat = np.asarray(images).transpose(0, 3, 1, 2).reshape(2, -1)
    outputs = layer.apply(variables, images)
    np.testing.assert_allclose(flat @ state["weight"].T + state["bias"], outputs, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    """Attention over three heads of four features, which are flattened."""

    @nn.compact
    def __call__(self, x):
        query, key, value = (nn.Dense(12, name=name)(x).reshape(*x.shape[:2], 3, 4) for name in ("q", "k", "v"))
        scores = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
        heads = jnp.einsum("bhqk,bkhd->bqhd", scores, value)
        return nn.Dense(5, name="out")(heads.reshape(*x.shape[:2], 12))


def attention_of_torch(state, x, heads, names, scale):
    """Attention in the layout of PyTorch, computed by numpy."""
    linear = lambda name, x: x @ state[f"{name}.weight"].T + state[f"{name}.bias"]  # noqa: E731
    query, key, value = (linear(name, x).reshape(*x.shape[:2], heads, -1) for name in names[:3])
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query * scale, key))
    mixed = np.einsum("bhqk,bkhd->bqhd", scores, value).reshape(*x.shape[:2], -1)
    indices = state.get(f"{names[3]}.input_indices", np.arange(mixed.shape[-1]))
    return linear(names[3], mixed[..., indices])


def test_attention_computes_the_same_in_the_torch_layout(key):
    x = np.asarray(jax.random.normal(key, (2, 5, 12)))
    variables = jax.jit(Attention().init)(key, x)
    state = bcdl_jax.export.torch_state_dict(Attention().apply, variables, x)
    assert not any("indices" in name for name in state)
    np.testing.assert_allclose(
        attention_of_torch(state, x, 3, [*"qkv", "out"], 1),
        Attention().apply(variables, x),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_flattened_heads_that_a_shrunk_layer_reads_are_listed(key):
    x = np.asarray(jax.random.normal(key, (2, 5, 12)))
    variables = jax.jit(Attention().init)(key, x)
    kernel = variables["params"]["out"]["kernel"]
    variables["params"]["out"]["kernel"] = kernel.at[jnp.array([1, 4, 5, 6, 10])].set(0)
    small_apply, small, _ = bcdl_jax.shrink(Attention().apply, variables, x)
    state = bcdl_jax.export.torch_state_dict(small_apply, small, x)
    kept = [0, 2, 3, 7, 8, 9, 11]
    np.testing.assert_array_equal(state["out.input_indices"], kept)
    assert state["v.weight"].shape == (7, 12)
    # The small network puts the seven outputs of v back among the twelve features of the heads.
    state["v.weight"], state["v.bias"] = (
        np.zeros((12, *small.shape[1:]), small.dtype) for small in (state["v.weight"], state["v.bias"])
    )
    whole = bcdl_jax.export.torch_state_dict(Attention().apply, variables, x)
    for name in ("v.weight", "v.bias"):
        state[name][kept] = whole[name][kept]
    outputs = attention_of_torch(state, x, 3, [*"qkv", "out"], 1)
    np.testing.assert_allclose(outputs, Attention().apply(variables, x), rtol=1e-4, atol=1e-5)


def test_several_axes_of_inputs_or_outputs_become_one(key):
    x = np.asarray(jax.random.normal(key, (2, 5, 8)))
    layer = nn.MultiHeadDotProductAttention(2)
    variables = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), layer.init(key, x))
    state = bcdl_jax.export.torch_state_dict(layer.apply, variables, x)
    assert state["query.weight"].shape == (8, 8)
    assert state["query.bias"].shape == (8,)
    outputs = attention_of_torch(state, x, 2, ["query", "key", "value", "out"], 0.5)
    np.testing.assert_allclose(outputs, layer.apply(variables, x), rtol=1e-3, atol=1e-4)


def test_a_kernel_that_the_network_changes_becomes_the_result(key):
    x = jax.random.normal(key, (2, 5, 4))
    mask = jnp.arange(32.0).reshape(2, 4, 4) % 3 > 0
    layer = nn.Conv(4, (2,), mask=mask)
    variables = layer.init(key, x)
    weight = bcdl_jax.export.torch_state_dict(layer.apply, variables, x)["weight"]
    np.testing.assert_array_equal(weight, (variables["params"]["kernel"] * mask).transpose(2, 1, 0))
    kernel = jax.random.normal(key, (3, 4))
    state = bcdl_jax.export.torch_state_dict(lambda params, x: x @ params["kernel"].T, {"kernel": kernel}, x)
    np.testing.assert_array_equal(state["weight"], kernel)
    left = lambda params, x: (params["kernel"] @ x[0].T).T  # noqa: E731
    np.testing.assert_array_equal(bcdl_jax.export.torch_state_dict(left, {"kernel": kernel}, x)["weight"], kernel)
    names = lambda params, x: x @ params["first"] @ params["last"]  # noqa: E731
    own = {"first": kernel.T, "last": kernel}
    assert set(bcdl_jax.export.torch_state_dict(names, own, x)) == {"first", "last"}
    half = lambda params, x: x.astype(jnp.bfloat16) @ params["kernel"].astype(jnp.bfloat16).T  # noqa: E731
    state = bcdl_jax.export.torch_state_dict(half, {"kernel": kernel}, x)
    np.testing.assert_array_equal(state["weight"], kernel)  # The weights are stored in the type of the params.


@pytest.mark.parametrize(
    ("apply", "shape"),
    [
        (lambda params, x: x * params["kernel"], (5, 4)),
        (lambda params, x: x @ (params["kernel"] * params["other"]), (4, 4)),
        (lambda params, x: jnp.einsum("bti,tio->bto", x, params["kernel"]), (5, 4, 3)),
    ],
)
def test_kernels_used_in_other_ways_are_refused(apply, shape, key):
    params = {"kernel": jnp.ones(shape), "other": jnp.ones((4, 1))}
    with pytest.raises(ValueError, match=r"kernel of shape .* has no PyTorch layout: it is not used as the kernel of"):
        bcdl_jax.export.torch_state_dict(apply, params, jax.random.normal(key, (2, 5, 4)))


def test_torch_itself_computes_the_same(net):
    torch = pytest.importorskip("torch")
    apply, variables, images = net
    state = {
        name: torch.from_numpy(array)
        for name, array in bcdl_jax.export.torch_state_dict(apply, variables, images).items()
    }
    layers = {
        "Conv_0": torch.nn.Conv2d(2, 6, (3, 2)),
        "BatchNorm_0": torch.nn.BatchNorm2d(6).eval(),
        "Dense_0": torch.nn.Linear(54, 5),
        "Dense_1": torch.nn.Linear(5, 4),
    }
    loaded = torch.nn.ModuleDict(layers).load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert not loaded.missing_keys
    with torch.no_grad():
        x = torch.from_numpy(np.array(jnp.moveaxis(images, -1, 1)))
        x = torch.nn.functional.max_pool2d(torch.relu(layers["BatchNorm_0"](layers["Conv_0"](x))), 2)
        x = layers["Dense_1"](torch.relu(layers["Dense_0"](torch.flatten(x, 1))))
    np.testing.assert_allclose(x.numpy(), apply(variables, images), rtol=1e-4, atol=1e-5)


def test_embeddings_norms_and_other_arrays(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.LayerNorm()(nn.Embed(7, 5)(tokens))
            return nn.Conv(3, (2,), use_bias=False)(x) * self.param("own", nn.initializers.ones, (3,))

    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    params = Model().init(key, tokens)
    state = bcdl_jax.export.torch_state_dict(Model().apply, params, tokens)
    assert {name: array.shape for name, array in state.items()} == {
        "Embed_0.weight": (7, 5),
        "LayerNorm_0.weight": (5,),
        "LayerNorm_0.bias": (5,),
        "Conv_0.weight": (3, 5, 2),
        "own": (3,),
    }
    np.testing.assert_array_equal(state["Conv_0.weight"], params["params"]["Conv_0"]["kernel"].transpose(2, 1, 0))


def test_bad_input_is_refused(conv_net, key):
    model, params, inputs = conv_net
    with pytest.raises(
        ValueError, match="params holds a GroupNormalJeffreysPosterior; it must hold arrays only, see mean_weights"
    ):
        bcdl_jax.export.torch_state_dict(lambda params, x: model.apply({"params": params}, x), params, inputs)
    transposed = nn.ConvTranspose(3, (2, 2), (2, 2))
    with pytest.raises(ValueError, match="params/kernel belongs to a transposed convolution"):
        bcdl_jax.export.torch_state_dict(transposed.apply, transposed.init(key, inputs), inputs)
    with pytest.raises(ValueError, match="would both be called x"):
        bcdl_jax.export.torch_state_dict(
            lambda params, x: x, {"x": {"weight": jnp.ones(1), "scale": jnp.ones(1)}}, inputs
        )


class Branch(nn.Module):
    """A dense layer, and a branch of two further ones."""

    @nn.compact
    def __call__(self, x, dense=nn.Dense):
        x = nn.relu(dense(5, name="first")(x))
        return dense(3, name="last")(x + dense(5, name="up")(nn.relu(dense(4, name="down")(x))))


def test_a_layer_of_which_nothing_is_left_is_left_out(key):
    x = jax.random.normal(key, (2, 6))
    params = Branch().init(key, x)["params"]
    params["up"] = jax.tree.map(jnp.zeros_like, params["up"])
    apply = lambda params, x: Branch().apply({"params": params}, x)  # noqa: E731
    with pytest.warns(UserWarning, match="Nothing is left of layers down, up"):
        small_apply, small, _ = bcdl_jax.shrink(apply, params, x)
    with pytest.warns(UserWarning, match="The state dict leaves out down, up, of which no elements are left"):
        state = bcdl_jax.export.torch_state_dict(small_apply, small, x)
    assert sorted(state) == ["first.bias", "first.weight", "last.bias", "last.weight"]
    hidden = np.maximum(x @ state["first.weight"].T + state["first.bias"], 0)
    outputs = hidden @ state["last.weight"].T + state["last.bias"]
    np.testing.assert_allclose(outputs, apply(params, x), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match=r"The state dict leaves out last/bias, of which"):
        bcdl_jax.export.torch_state_dict(
            lambda p, x: x @ p["last"]["kernel"], {"last": {"bias": jnp.ones(0), "kernel": jnp.ones((6, 2))}}, x
        )
