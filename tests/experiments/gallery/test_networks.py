"""The networks of the gallery: written without the library, for batches of any size."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.gallery import GALLERY, store
from experiments.gallery.networks import gru, series, tabular, text_transformer
from experiments.runtime.errors import UserError
from tests.test_structure import ROOT, imported_modules

# The shape and the dtype of an input, and the shape of an output.
SHAPES = {
    "resnet20": ((32, 32, 3), np.uint8, (10,)),
    "vision_transformer": ((28, 28, 1), np.uint8, (10,)),
    "gru": ((gru.LENGTH,), np.int32, (gru.LANGUAGES,)),
    "text_transformer": (
        (text_transformer.LENGTH,),
        np.int32,
        (text_transformer.LENGTH, text_transformer.CHARACTERS),
    ),
    "series": ((series.LENGTH, 1), np.float32, (series.HORIZONS,)),
    "tabular": ((tabular.COLUMNS,), np.float32, (1,)),
    "nnx_net": ((28, 28, 1), np.uint8, (10,)),
    "equinox_net": ((28, 28, 1), np.uint8, (10,)),
}
HAS_EQUINOX = importlib.util.find_spec("equinox") is not None


def network(name):
    if name == "equinox_net" and not HAS_EQUINOX:
        pytest.skip("equinox is not installed")
    return GALLERY[name]


def batch(name, examples):
    shape, dtype, _ = SHAPES[name]
    values = np.random.default_rng(0).integers(1, 10, (examples, *shape))
    return jnp.asarray(values.astype(dtype))


def test_the_shapes_are_those_of_all_networks():
    assert list(SHAPES) == list(GALLERY)


def test_network_files_do_not_use_the_library():
    paths = [path for path in (ROOT / "experiments/gallery/networks").glob("*.py") if path.name != "__init__.py"]
    assert {path.stem for path in paths} == set(GALLERY)
    packages = {module.split(".")[0] for path in paths for module in imported_modules(path)}
    assert packages <= {"__future__", "typing", "jax", "flax", "equinox"}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_have_the_shape_of_the_batch(name):
    entry, parts = network(name), []

    def outputs(key, inputs):
        apply, variables = entry.make(key)
        parts.append(variables)
        return apply(variables, inputs)

    for examples in (1, 3):
        found = jax.eval_shape(outputs, jax.random.key(0), batch(name, examples))
        assert found.shape == (examples, *SHAPES[name][2])
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(parts[0]))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tabular" else pytest.mark.slow) for name in SHAPES]
)
def test_an_output_does_not_depend_on_its_batch(name):
    apply, variables = network(name).make(jax.random.key(0))
    inputs = batch(name, 3)
    together, apart = apply(variables, inputs), [apply(variables, inputs[row : row + 1])[0] for row in range(3)]
    np.testing.assert_allclose(together, np.stack(apart), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_running_averages_follow_the_batches_in_training_alone():
    entry = GALLERY["resnet20"]
    apply, variables = entry.make(jax.random.key(0))
    assert set(variables) == {"params", "batch_stats"}
    outputs, updates = entry.learn(variables, batch("resnet20", 3))
    assert set(updates) == {"batch_stats"}
    assert any(
        not np.array_equal(*pair)
        for pair in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(updates["batch_stats"]), strict=True)
    )
    assert not np.allclose(outputs, apply(variables, batch("resnet20", 3)))


@pytest.mark.slow
def test_later_characters_do_not_change_earlier_scores():
    apply, variables = GALLERY["text_transformer"].make(jax.random.key(0))
    texts = batch("text_transformer", 1)
    changed = texts.at[:, 60:].set(11)
    np.testing.assert_allclose(apply(variables, texts)[:, :60], apply(variables, changed)[:, :60], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_zeros_after_a_word_do_not_change_its_scores():
    apply, variables = GALLERY["gru"].make(jax.random.key(0))
    words = batch("gru", 2).at[:, 5:].set(0)
    np.testing.assert_allclose(apply(variables, words), apply(variables, words[:, :6]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tabular" else pytest.mark.slow) for name in SHAPES]
)
def test_trained_networks_load(name):
    entry = network(name)
    if not (store.TRAINED / store.weights_name(entry)).exists():
        pytest.skip(f"{name} was not trained yet")
    apply, variables = store.load_trained(entry)
    start = entry.make(jax.random.key(0))[1]
    assert jax.tree.structure(variables) == jax.tree.structure(start)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, start)
    assert np.isfinite(apply(variables, batch(name, 2))).all()


def test_a_network_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="gru needs the package wordfreq"):
        GALLERY["gru"].check_packages()
    GALLERY["resnet20"].check_packages()
