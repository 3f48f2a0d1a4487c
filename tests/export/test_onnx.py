import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.conftest import CONV_CHAIN
from tests.shrinking.random_networks import random_network

pytest.importorskip("jax2onnx")
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
    rates = np.concatenate([np.ravel(rate) for rate in bcdl_jax.compression.pruning_scores(params).values()])
    reduced = bcdl_jax.reduce_precision(bcdl_jax.prune(params, float(np.median(rates)), CONV_CHAIN), 0.25)
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


def test_an_operation_without_a_counterpart_is_refused_and_leaves_no_file(tmp_path):
    apply = lambda params, x: jax.lax.reduce_window(  # noqa: E731
        x, -jnp.inf, jax.lax.max, (2, 2), (1, 1), "VALID", base_dilation=(2, 1)
    )
    with pytest.raises(
        NotImplementedError, match="could not be converted to ONNX; its primitives are reduce_window_max"
    ):
        bcdl_jax.export_onnx(tmp_path / "net.onnx", apply, {}, jnp.ones((4, 4)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(NotImplementedError, match="reduce_window_max of int32"):
        bcdl_jax.export_onnx(
            tmp_path / "net.onnx", lambda params, x: nn.max_pool(x, (2, 2)), {}, jnp.ones((2, 4, 4, 1), jnp.int32)
        )
    with pytest.raises(ValueError, match="begin with a scalar"):
        bcdl_jax.export_onnx(tmp_path / "net.onnx", apply, {}, np.float32(1))


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
