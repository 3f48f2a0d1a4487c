"""Each cell of the README's table "Supported layers"."""

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


class GroupedOrTransposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, name="pruned")(x))
        return nn.ConvTranspose(4, (3, 3), name="pruned_inputs")(x)


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.Embed(10, 8, name="pruned")(x))


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(8, name="pruned")(x))))


class LayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(8, name="pruned")(nn.LayerNorm()(x))))


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
    "grouped or transposed convolution": (GroupedOrTransposed(), IMAGES),
    "embedding": (Embedding(), jnp.arange(6).reshape(2, 3)),
    "batch norm": (BatchNorm(), NUMBERS[:, 0]),
    "layer norm": (LayerNorm(), NUMBERS[:, 0]),
    "attention": (Attention(), NUMBERS),
    "recurrent cell in a `scan`": (Recurrent(), NUMBERS),
}


def matrix() -> dict[str, dict[str, str]]:
    section = README.read_text().split("## Supported layers")[1]
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


def is_of_kind(kind, path):
    """Whether an array, or the node in its place, belongs to a layer of this kind. ``path`` is joined by "/"."""
    return {"batch norm": "BatchNorm", "layer norm": "LayerNorm"}.get(kind, "pruned") in path


@pytest.mark.parametrize("kind", NETWORKS)
def test_variational(kind):
    apply, variables, inputs = pruned_network(kind)
    model = bcdl_jax.variational(apply, variables, inputs)
    found = {leaf.is_variational for leaf in model.plan.leaves if is_of_kind(kind, leaf.path)}
    assert found == {CELLS[kind]["variational"] == "yes"}, str(model.plan)


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
    apply, variables, inputs = pruned_network(kind)
    model = bcdl_jax.variational(apply, variables, inputs)
    reduced = bcdl_jax.reduce_precision(model.params, 1.0)
    path = tmp_path / "model.bcdl"
    bcdl_jax.save(path, reduced)
    loaded = bcdl_jax.load(path, like=reduced)
    jax.tree.map(np.testing.assert_array_equal, loaded, reduced)
    is_layer = bcdl_jax.compression.is_layer
    nodes = jax.tree_util.tree_leaves_with_path(reduced, is_leaf=is_layer)
    layers = {jax.tree_util.keystr(path, simple=True, separator="/") for path, node in nodes if is_layer(node)}
    coded = {(leaf.held_by or leaf.path) in layers for leaf in model.plan.leaves if is_of_kind(kind, leaf.path)}
    assert coded == {CELLS[kind]["compressed file"] == "yes"}
    assert CELLS[kind]["compressed file"] in ("yes", "stored")


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
    assert re.search(r"\"stored\": no posterior; `compress` rounds such arrays", README.read_text())
