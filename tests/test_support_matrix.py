"""Each cell of the README's table "What works on which layers"."""

from __future__ import annotations

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax

README = Path(__file__).parents[1] / "README.md"


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(8, name="pruned")(x)))


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (3, 3))(nn.relu(nn.Conv(8, (3, 3), name="pruned")(x)))


class GroupedConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="pruned")(x))
        return nn.Conv(4, (1, 1))(x)


class TransposedConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (1, 1))(nn.relu(nn.ConvTranspose(8, (3, 3), name="pruned")(x)))


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.Embed(10, 8, name="pruned")(x))


class Norms(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="pruned")(nn.LayerNorm()(x))
        return nn.Dense(4)(nn.relu(nn.BatchNorm(use_running_average=True)(x)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=8, name="pruned")(x))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.RNN(nn.SimpleCell(8, name="pruned"))(x))


NUMBERS = jax.random.normal(jax.random.key(0), (2, 5, 6))
IMAGES = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
NETWORKS = {
    "dense": (Dense(), NUMBERS[:, 0]),
    "convolution": (Convolution(), IMAGES),
    "grouped convolution": (GroupedConvolution(), IMAGES),
    "transposed convolution": (TransposedConvolution(), IMAGES),
    "embedding": (Embedding(), jnp.arange(6).reshape(2, 3)),
    "batch norm, layer norm": (Norms(), NUMBERS[:, 0]),
    "attention": (Attention(), NUMBERS),
    "recurrent cell in a `scan`": (Recurrent(), NUMBERS),
}
VARIATIONAL = {"dense": bcdl_jax.Dense, "convolution": bcdl_jax.Conv, "grouped convolution": bcdl_jax.Conv}


def matrix() -> dict[str, dict[str, str]]:
    section = README.read_text().split("## What works on which layers")[1]
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ][: len(NETWORKS) + 2]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


CELLS = matrix()


def pruned_network(kind):
    """(apply, variables without the last half of the channels that "pruned" makes, inputs)."""
    model, inputs = NETWORKS[kind]
    variables = jax.jit(model.init)(jax.random.key(1), inputs)

    def prune(path, leaf):
        names = [key.key for key in path]
        if "pruned" not in names:
            return leaf
        return leaf.at[..., leaf.shape[-1] // 2 :].set(0)

    return model.apply, jax.tree_util.tree_map_with_path(prune, variables), inputs


def test_the_table_names_the_networks_that_are_tested():
    assert list(CELLS) == list(NETWORKS)


@pytest.mark.parametrize("kind", NETWORKS)
def test_variational(kind):
    assert (CELLS[kind]["variational"] == "yes") == (kind in VARIATIONAL)
    if kind == "grouped convolution":
        layer = bcdl_jax.Conv(8, (3, 3), feature_group_count=2)
    elif kind in VARIATIONAL:
        layer = bcdl_jax.Dense(8) if kind == "dense" else bcdl_jax.Conv(8, (3, 3))
    else:
        return
    inputs = NETWORKS[kind][1]
    params = layer.init(jax.random.key(0), inputs)["params"]
    sampled = layer.apply({"params": params}, inputs, deterministic=False, rngs={"noise": jax.random.key(1)})
    assert np.isfinite(sampled).all()
    assert float(bcdl_jax.kl_divergence(params)) > 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_shrink(kind):
    apply, variables, inputs = pruned_network(kind)
    small_apply, small, report = bcdl_jax.shrink(apply, variables, inputs)
    leaves = {leaf.path: leaf for leaf in report.leaves if "/pruned/" in leaf.path}
    smaller = [leaf.path for leaf in leaves.values() if leaf.after != leaf.before]
    assert (CELLS[kind]["shrink"] == "yes") == bool(smaller), str(report)
    np.testing.assert_allclose(small_apply(small, inputs), apply(variables, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_compressed_file(kind, tmp_path):
    path = tmp_path / "model.bcdl"
    assert (CELLS[kind]["compressed file"] == "yes") == (kind in VARIATIONAL)
    if kind in VARIATIONAL:
        layer = bcdl_jax.Dense(64) if kind == "dense" else bcdl_jax.Conv(64, (3, 3))
        params = layer.init(jax.random.key(0), NETWORKS[kind][1])["params"]
        reduced = bcdl_jax.reduce_precision(params, 1.0)
        assert bcdl_jax.save(path, reduced) < 4 * params["posterior"].kernel_mean.size
        return
    assert CELLS[kind]["compressed file"] == "stored"
    _, variables, _ = pruned_network(kind)
    bcdl_jax.save(path, variables, names=True)
    loaded = bcdl_jax.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_onnx(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    apply, variables, inputs = pruned_network(kind)
    assert CELLS[kind]["ONNX"] == "yes"
    path = tmp_path / "model.onnx"
    bcdl_jax.export_onnx(path, apply, variables, inputs)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: np.asarray(inputs)}
    np.testing.assert_allclose(session.run(None, feeds)[0], apply(variables, inputs), rtol=1e-3, atol=1e-4)


def test_every_cell_has_a_known_word():
    words = {word for cells in CELLS.values() for word in cells.values()}
    assert words <= {"yes", "no", "stored"}
    assert re.search(r"\"stored\": `save` keeps these arrays as they are", README.read_text())
