import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bcdl_jax
from bcdl_jax.export import onnx_elementwise
from tests.conftest import CONV_CHAIN, prune_half
from tests.shrinking.random_networks import random_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run_onnx(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(inputs)})


def check(path, apply, params, inputs, exported=None):
    """Checks that the file computes the results of ``apply`` at several batch sizes."""
    assert bcdl_jax.export_onnx(path, *(exported or (apply, params)), inputs) == path.stat().st_size
    for batch in (1, 2, len(inputs)):
        results = run_onnx(path, inputs[:batch])
        for mine, theirs in zip(results, jax.tree.leaves(jax.jit(apply)(params, inputs[:batch])), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(jnp.abs(theirs).max() + 1))


def test_the_small_network_runs_in_onnxruntime(conv_net, tmp_path):
    model, params, inputs = conv_net
    reduced = bcdl_jax.reduce_precision(prune_half(params, CONV_CHAIN), 0.25)
    apply = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    small_apply, small, _ = bcdl_jax.shrink(apply, reduced, inputs)
    check(tmp_path / "net.onnx", apply, reduced, inputs, (small_apply, small))
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 12, 18, 20])  # 3-d and grouped convolutions, flatten, attention, norms, reversal.
@pytest.mark.filterwarnings("ignore:Nothing is left:UserWarning")
def test_shrunk_random_networks(seed, tmp_path):
    apply, params, inputs = random_network(seed)
    check(tmp_path / "net.onnx", apply, params, inputs, bcdl_jax.shrink(apply, params, inputs)[:2])


def written(seed, directory):
    """True if an extended random network is written as ONNX; its file must compute the same as the network."""
    apply, params, inputs = random_network(seed, extended=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Nothing is left")
        small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs, tolerance=0.05)
    path = directory / f"{seed}.onnx"
    try:
        bcdl_jax.export_onnx(path, small_apply, small, inputs)
    except NotImplementedError:
        return False
    for batch in (1, 3):
        (mine,) = run_onnx(path, inputs[:batch])
        theirs = np.asarray(apply(params, inputs[:batch]))
        np.testing.assert_allclose(mine, theirs, rtol=0.02, atol=0.02 * np.abs(theirs).max())
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_extended_random_networks(seed, tmp_path):
    assert written(seed, tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_200_extended_random_networks(tmp_path):
    assert sum(written(seed, tmp_path) for seed in range(200)) >= 190


POOLS = {
    "max": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "overlapping": lambda x: nn.max_pool(x, (3, 2), (2, 1), "SAME"),
    "one axis": lambda x: nn.max_pool(x, (3, 1), (2, 1), "SAME"),
    "average": lambda x: nn.avg_pool(x, (2, 3), (2, 2), ((1, 0), (0, 1))),
    "channels first": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 1), "VALID"),
    "gelu": nn.gelu,
    "mean": lambda x: x.mean((1, 2)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_and_activations(name, key, tmp_path):
    check(
        tmp_path / "net.onnx",
        lambda params, x: params * POOLS[name](x),
        jnp.float32(2),
        jax.random.normal(key, (4, 6, 7, 3)),
    )


def dense(dtype):
    layer = nn.Dense(4, dtype=dtype, param_dtype=dtype)
    return lambda x: layer.apply(layer.init(KEY, x), x).astype(jnp.float32)


def convolution(dtype, **arguments):
    layer = nn.Conv(4, (3,), dtype=dtype, param_dtype=dtype, **arguments)
    return lambda x: layer.apply(layer.init(KEY, x), x).astype(jnp.float32)


def recurrent(cell, **arguments):
    layer = nn.RNN(cell, **arguments)
    return lambda x: layer.apply(layer.init(KEY, x), x)


def causal_attention(x):
    layer = nn.MultiHeadDotProductAttention(2)
    mask = nn.make_causal_mask(x[..., 0])
    return layer.apply(layer.init(KEY, x, mask=mask), x, mask=mask)


def integers(x, scale=3):
    return jnp.round(x * scale).astype(jnp.int32)


def loop(x):
    state = (0, x)
    go_on, body = (lambda s: (s[0] < 3) & (abs(s[1]).max() < 100)), (lambda s: (s[0] + 1, s[1] * 1.5))
    return lax.while_loop(go_on, body, state)[1]


KEY = jax.random.key(0)
MATRIX = jax.random.normal(jax.random.key(1), (6, 6)) / 3
TABLE = jax.random.normal(jax.random.key(2), (5, 4))
# Functions of an array [batch, 5, 6]; those of the second table take part in the fast tests.
SLOW_STEPS = {
    "bool selection": lambda x: jnp.where(x > 0, x > 1, x < -1),
    "mixed product": lambda x: lax.dot(x[:, 0].astype(jnp.float16), MATRIX, preferred_element_type=jnp.float32),
    "int8 product": lambda x: lax.dot(
        integers(x[:, 0]).astype(jnp.int8), integers(MATRIX).astype(jnp.int8), preferred_element_type=jnp.int32
    ),
    "float16 dense": dense(jnp.float16),
    "float16 convolution": convolution(jnp.float16),
    "bfloat16 convolution": convolution(jnp.bfloat16),
    "interior padding": lambda x: lax.pad(x, 1.0, ((0, 0, 0), (1, 0, 2), (-1, 2, 0))),
    "convolution with negative padding": convolution(jnp.float32, padding=[(-1, 2)]),
    "input dilation": convolution(jnp.float32, input_dilation=2, padding=[(1, 1)]),
    "3d convolution": lambda x: nn.Conv(2, (2, 2, 2)).init_with_output(KEY, x.reshape(-1, 5, 3, 2, 1))[0],
    "integer pooling": lambda x: nn.max_pool(integers(x), (2,), (2,)),
    "dilated pooling": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (1, 2, 1), (1, 1, 2), "SAME", window_dilation=(1, 2, 1)
    ),
    "pooling with base dilation": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2), (1, 1, 1), "VALID", base_dilation=(1, 2, 1)
    ),
    "tensordot": lambda x: jnp.tensordot(x, jnp.ones((5, 6, 3)), ((1, 2), (0, 1))),
    "vector product": lambda x: x @ MATRIX[0],
    "remainder": lambda x: jnp.remainder(x, 0.7) + integers(x) // 3,
    "int8 overflow": lambda x: jnp.clip(integers(x, 30), -90, 90).astype(jnp.int8) * jnp.int8(2),
    "bits": lambda x: (integers(x) & 6) | 1,
    "activations": lambda x: jax.nn.softplus(x) + jax.nn.elu(x) + jax.nn.mish(x) + jax.nn.log_sigmoid(x) + jnp.expm1(x),
    "functions": lambda x: jnp.arctan2(x, x + 1) + jnp.cbrt(x) + jnp.log1p(abs(x)) + lax.erfc(x) + jnp.exp2(x) + x**3,
    "rounding": lambda x: jnp.round(x * 2) + lax.round(x * 2) + jnp.trunc(x) + jnp.sign(x) + jnp.isfinite(1 / x),
    "cumulative": lambda x: lax.cummax(x, 1) + lax.cumprod(x, 2, reverse=True) + lax.cummin(x, 1) + jnp.cumsum(x, 2),
    "sorting": lambda x: jnp.sort(x) + jnp.argsort(x) + lax.sort((x, 2 * x), dimension=2, num_keys=1)[1],
    "top k": lambda x: lax.top_k(x, 2),
    "take along an axis": lambda x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1),
    "two index arrays": lambda x: x[:, jnp.array([0, 2]), jnp.array([1, 3])],
    "one index for each example": lambda x: x[jnp.arange(x.shape[0]), jnp.argmax(x[..., 0], -1)],
    "indices beyond the table": lambda x: jnp.take(TABLE, integers(x), axis=0, mode="fill", fill_value=0.0),
    "clipped indices": lambda x: jnp.take(TABLE, integers(x), axis=1, mode="clip"),
    "scattered sums": lambda x: (
        jnp.zeros((x.shape[0], 4)).at[jnp.arange(x.shape[0])[:, None], integers(x[:, 0])].add(x[:, 0])
    ),
    "updates": lambda x: x.at[:, 1:3].set(7.0).at[:, 0].multiply(2.0),
    "dynamic slices": lambda x: (
        lax.dynamic_slice_in_dim(x, jnp.argmax(x[0, 0]), 2, 2)
        + lax.dynamic_update_slice_in_dim(x, 2 * x[..., :2], jnp.argmax(x[0, 1]), 2)[..., :2]
    ),
    "segments": jax.vmap(lambda row: jax.ops.segment_sum(row, jnp.array([0, 0, 1, 1, 5]), 3)),
    "GRU": recurrent(nn.GRUCell(4)),
    "backwards LSTM": recurrent(nn.OptimizedLSTMCell(4), reverse=True, keep_order=True),
    "while": loop,
    "branches": lambda x: (
        lax.cond(x[0, 0, 0] > -100, lambda y: y @ MATRIX, lambda y: 2 * y, x)
        + lax.switch(integers(x[0, 0, 0] * 0 + 0.4), [lambda y: y, lambda y: 2 * y, lambda y: 3 * y], x)
    ),
    "positions in the batch": lambda x: x[:, 0] - x[:, 0].mean(0) + jnp.arange(x.shape[0])[:, None],
    "pairs in the batch": lambda x: (x[:, 0] @ x[:, 0].T).sum(1),
    "reversed batch": lambda x: x[::-1],
    "repetition": lambda x: jnp.repeat(jnp.tile(x, (1, 1, 2)), 2, axis=1)[:, ::-3],
    "group norm": lambda x: nn.GroupNorm(2).init_with_output(KEY, x)[0],
}
STEPS = {
    "causal mask": lambda x: jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((5, 6), bool)), x, -1e9)),
    "causal convolution": convolution(jnp.float32, padding="CAUSAL"),
    "integer product": lambda x: integers(x) @ integers(MATRIX),
    "mixture of experts": lambda x: jnp.einsum(
        "be,bd,edh->bh", jax.nn.softmax(x[:, 0, :3]), x[:, 1], jnp.ones((3, 6, 4))
    ),
    "bfloat16 dense": dense(jnp.bfloat16),
    "attention": causal_attention,
    "scan": lambda x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum((1, 2))), x, jnp.stack([MATRIX] * 3), reverse=True)[
        0
    ],
    "embedding": lambda x: TABLE[abs(integers(x)) % 5],
}


@pytest.mark.parametrize("name", [*STEPS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_STEPS)])
def test_steps(name, tmp_path):
    function = (STEPS | SLOW_STEPS)[name]
    inputs = jax.random.normal(KEY, (4, 5, 6))
    path = tmp_path / "net.onnx"
    tolerance = 0.05 if "float16" in name or "mixed" in name else 2e-4
    assert bcdl_jax.export_onnx(path, lambda params, x: function(x), {}, inputs) == path.stat().st_size
    for batch in (1, 2, 3):
        results = run_onnx(path, inputs[:batch])
        for mine, theirs in zip(results, jax.tree.leaves(jax.jit(function)(inputs[:batch])), strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


def test_params_keep_their_names_and_types(tmp_path):
    layer, inputs = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), jnp.ones((2, 6), jnp.bfloat16)
    variables = layer.init(KEY, inputs)
    bcdl_jax.export_onnx(tmp_path / "net.onnx", layer.apply, variables, inputs)
    model = onnx.load(tmp_path / "net.onnx")
    stored = {each.name: each.data_type for each in model.graph.initializer}
    assert (
        stored.items() >= {"params/kernel": onnx.TensorProto.BFLOAT16, "params/bias": onnx.TensorProto.BFLOAT16}.items()
    )
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "convolution"])
def test_float64(name, tmp_path):
    with jax.enable_x64(True):
        layer = nn.Dense(4, dtype=jnp.float64) if name == "dense" else nn.Conv(4, (3,), dtype=jnp.float64)
        inputs = jax.random.normal(KEY, (3, 5, 6), jnp.float64)
        variables = layer.init(KEY, inputs)
        bcdl_jax.export_onnx(tmp_path / "net.onnx", layer.apply, variables, inputs)
        (mine,) = run_onnx(tmp_path / "net.onnx", inputs[:2])
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, layer.apply(variables, inputs[:2]), atol=1e-5)


def test_large_params_go_to_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("bcdl_jax.export.onnx._MOST_INLINE_BYTES", 1000)
    params, inputs = {"w": jax.random.normal(KEY, (40, 40))}, jnp.ones((2, 40))
    size = bcdl_jax.export_onnx(tmp_path / "net.onnx", lambda params, x: x @ params["w"], params, inputs)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["net.onnx", "net.onnx.data"]
    assert size == sum(file.stat().st_size for file in files) > 6400
    np.testing.assert_allclose(run_onnx(files[0], inputs)[0], inputs @ params["w"], rtol=1e-4)


def test_an_operation_without_a_counterpart_is_refused_and_leaves_no_file(tmp_path):
    path = tmp_path / "net.onnx"

    class Spectrum(nn.Module):
        @nn.compact
        def __call__(self, x):
            return abs(jnp.fft.rfft(nn.relu(x)))

    with pytest.raises(
        NotImplementedError,
        match=r"Step \d of \d, the primitive fft in Spectrum, cannot be converted: it has no counterpart in ONNX",
    ):
        bcdl_jax.export_onnx(path, Spectrum().apply, {}, jnp.ones((4, 4)))
    with pytest.raises(NotImplementedError, match=r"the primitive erf_inv, cannot be converted: it has no counterpart"):
        bcdl_jax.export_onnx(path, lambda params, x: jax.scipy.special.erfinv(x), {}, jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="begin with a scalar"):
        bcdl_jax.export_onnx(path, lambda params, x: x, {}, np.float32(1))
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_gets_no_name(tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_elementwise.RULES, "sin", onnx_elementwise.RULES["cos"])
    with pytest.raises(NotImplementedError, match="onnxruntime computes other outputs from the file than the network"):
        bcdl_jax.export_onnx(tmp_path / "net.onnx", lambda params, x: jnp.sin(x), {}, jnp.ones((4, 4)))
    assert not list(tmp_path.iterdir())
