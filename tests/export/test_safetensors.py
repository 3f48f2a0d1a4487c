import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax

safetensors_numpy = pytest.importorskip("safetensors.numpy")


def test_names_arrays_and_metadata_are_read_back(conv_net, tmp_path):
    path = tmp_path / "net.safetensors"
    tree = {
        "params": {"Dense_0": {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.arange(2.0)}},
        "scalar": jnp.float32(3),
        "half": jnp.ones((2, 3), jnp.bfloat16),
        # A layer of which ``shrink`` leaves nothing has arrays without elements.
        "empty": {"kernel": jnp.zeros((0, 0)), "other": jnp.zeros((0, 2), jnp.int8)},
    }
    assert bcdl_jax.export_safetensors(path, tree, metadata={"trained_on": "noise"}) == path.stat().st_size
    loaded = safetensors_numpy.load_file(path)
    expected = {
        jax.tree_util.keystr(key, simple=True, separator="."): leaf
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert set(loaded) == set(expected)
    for name, array in loaded.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"trained_on": "noise"}
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]

    _, params, _ = conv_net
    bcdl_jax.export_safetensors(path, bcdl_jax.reduce_precision(params, 0.5))
    loaded = safetensors_numpy.load_file(path)
    assert set(loaded) == {
        f"{layer}.{name}" for layer in ("Conv_0", "Conv_1", "Dense_0") for name in ("kernel", "bias")
    }


def test_bad_input_is_refused(key, tmp_path):
    with pytest.raises(ValueError, match="metadata has the entry 'epochs': 3; the key and the value must be strings"):
        bcdl_jax.export_safetensors(tmp_path / "a", {"x": jnp.ones(3)}, metadata={"epochs": 3})
    with pytest.raises(ValueError, match="An array has the name __metadata__, which the format reserves"):
        bcdl_jax.export_safetensors(tmp_path / "a", {"__metadata__": jnp.ones(3)})
    for dtype in (jnp.int4, jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"x has the type {jnp.dtype(dtype).name}; allowed are bool, int8"):
            bcdl_jax.export_safetensors(tmp_path / "a", {"x": jnp.ones(3, dtype)})
    with pytest.raises(ValueError, match="key has the type key<"):
        bcdl_jax.export_safetensors(tmp_path / "a", {"key": key})
    assert not list(tmp_path.iterdir())


def test_a_shrunk_variational_network_is_written_as_its_mean_weights(conv_net, tmp_path):
    model, params, inputs = conv_net
    pruned = bcdl_jax.compression.prune_units(params, {"Conv_0": jnp.arange(4) < 3}, ["Conv_0", "Conv_1", "Dense_0"])
    small = bcdl_jax.shrink(lambda params, x: model.apply({"params": params}, x), pruned, inputs)[1]
    bcdl_jax.export_safetensors(tmp_path / "a", small)
    written = safetensors_numpy.load_file(tmp_path / "a")
    kernel = bcdl_jax.mean_weights(pruned)["Conv_1"]["kernel"]
    np.testing.assert_allclose(written["Conv_1.kernel"], kernel[..., :3, :], rtol=1e-6)
