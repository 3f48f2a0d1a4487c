import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from tests.conftest import CONV_CHAIN, prune_half


def test_the_small_network_runs_from_stablehlo_with_jax_alone(conv_net, tmp_path):
    model, params, inputs = conv_net
    reduced = bcdl_jax.reduce_precision(prune_half(params, CONV_CHAIN), 0.25)
    apply = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    small_apply, small, _ = bcdl_jax.shrink(apply, reduced, inputs)
    path = tmp_path / "net.stablehlo"
    assert bcdl_jax.export_stablehlo(path, small_apply, small, inputs) == path.stat().st_size
    run = bcdl_jax.load_stablehlo(path)
    for batch in (1, 3, 8):
        images = jax.random.normal(jax.random.key(batch), (batch, *inputs.shape[1:]))
        np.testing.assert_allclose(run(images), apply(reduced, images), rtol=1e-4, atol=1e-5)
    np.save(tmp_path / "images.npy", inputs)
    code = (
        "import sys, jax, numpy as np; sys.modules['bcdl_jax'] = sys.modules['flax'] = None;"
        f"run = jax.export.deserialize(bytearray(open({str(path)!r}, 'rb').read())).call;"
        f"np.save({str(tmp_path / 'out.npy')!r}, run(np.load({str(tmp_path / 'images.npy')!r})))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), apply(reduced, inputs), rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images.npy", "net.stablehlo", "out.npy"]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_a_network_that_samples_takes_typed_keys(tmp_path, implementation):
    layer = bcdl_jax.Dense(3, deterministic=False)
    key, inputs = jax.random.key(0, impl=implementation), jnp.ones((3, 4))
    params = layer.init({"params": key, "noise": key}, inputs)["params"]

    def sample(params, x, key):
        return layer.apply({"params": params}, x, rngs={"noise": key})

    def sample_each(params, x, keys):
        return jax.vmap(sample, in_axes=(None, 0, 0))(params, x, keys)

    others = jnp.ones((5, 4))
    for function, example, keys in (
        (sample, key, jax.random.key(7, impl=implementation)),
        (sample_each, jax.random.split(key, 3), jax.random.split(key, 5)),
    ):
        bcdl_jax.export_stablehlo(tmp_path / "net", function, params, (inputs, example), platforms=["cpu"])
        outputs = bcdl_jax.load_stablehlo(tmp_path / "net")(others, keys)
        np.testing.assert_allclose(outputs, function(params, others, keys), rtol=1e-5, atol=1e-6)


def test_for_cpu_is_exported_for_any_batch_size(tmp_path, key):
    apply = lambda kernel, x: jax.nn.relu(jax.lax.conv(x, kernel, (1, 1), "SAME"))  # noqa: E731
    kernel, images = jax.random.normal(key, (4, 2, 3, 3)), jax.random.normal(key, (9, 2, 6, 5))
    bcdl_jax.export_stablehlo(tmp_path / "net", bcdl_jax.for_cpu(apply, examples_at_a_time=4), kernel, images)
    np.testing.assert_allclose(
        bcdl_jax.load_stablehlo(tmp_path / "net")(images), apply(kernel, images), rtol=1e-4, atol=1e-5
    )


def test_a_loop_that_computes_with_the_batch_size_is_exported(tmp_path):
    """The loop calls a function with a custom derivative, which stays one step."""

    def apply(params, inputs):
        @jax.custom_jvp
        def mean(values):
            return values / inputs.shape[0]

        mean.defjvp(lambda values, moves: (mean(*values), mean(*moves)))
        return jax.lax.fori_loop(0, 2, lambda _, values: mean(values @ params), inputs)

    params, inputs = jnp.eye(3).at[2].set(0), jnp.ones((2, 3))
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs)
    bcdl_jax.export_stablehlo(tmp_path / "net.stablehlo", small_apply, small, inputs)
    exported = bcdl_jax.load_stablehlo(tmp_path / "net.stablehlo")
    for size in (1, 2, 4):
        others = jnp.ones((size, 3))
        np.testing.assert_allclose(exported(others), apply(params, others), rtol=1e-6)


@pytest.mark.slow
def test_a_loop_beside_indexing_is_exported_for_any_batch_size(tmp_path, key):
    """With a symbolic batch size, JAX traces ``[:, -1]`` to other steps than ``shrink`` analysed."""

    class LastOutput(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            outputs = nn.RNN(nn.GRUCell(12))(inputs)[:, -1]
            return nn.Dense(3, name="out")(jnp.where(outputs > 2, jnp.nan, outputs))

    model, inputs = LastOutput(), jax.random.normal(key, (4, 8, 5))
    params = model.init(key, inputs)["params"]
    params["out"]["kernel"] = params["out"]["kernel"].at[:6].set(0)

    def apply(params, inputs):
        return model.apply({"params": params}, inputs)

    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs)
    assert small["out"]["kernel"].shape == (6, 3)
    bcdl_jax.export_stablehlo(tmp_path / "net.stablehlo", small_apply, small, inputs)
    exported = bcdl_jax.load_stablehlo(tmp_path / "net.stablehlo")
    for size in (1, 4, 7):
        others = jax.random.normal(jax.random.key(size), (size, 8, 5))
        np.testing.assert_allclose(exported(others), apply(params, others), atol=1e-6)


@pytest.mark.parametrize("export", [bcdl_jax.export_stablehlo, bcdl_jax.export_onnx])
@pytest.mark.parametrize("small", [True, False])
def test_a_network_that_depends_on_the_batch_size_is_refused(export, small, tmp_path):
    if export is bcdl_jax.export_onnx:
        pytest.importorskip("onnx")
    params, inputs = np.array([[1.0, 0], [2, 0]], np.float32), np.ones((3, 2), np.float32)
    apply = lambda params, x: (x if len(x) > 4 else 2 * x) @ params  # noqa: E731
    network = bcdl_jax.shrink(apply, params, inputs)[:2] if small else (apply, params)
    with pytest.raises(ValueError, match="cannot be traced with a batch of unknown size, so it cannot be exported"):
        export(tmp_path / "net", *network, inputs)
    assert not list(tmp_path.iterdir())


def test_invalid_files_and_arguments_are_named_in_the_error(tmp_path):
    pytest.importorskip("onnx")
    apply, inputs = lambda params, x: params * x, np.ones((3, 2), np.float32)
    with pytest.raises(
        ValueError, match=r"platforms has the unknown entries \['gpu'\]; allowed are cpu, cuda, rocm, tpu"
    ):
        bcdl_jax.export_stablehlo(tmp_path / "net", apply, 2.0, inputs, platforms=("gpu",))
    for path in (tmp_path / "none" / "net", tmp_path):
        for export in (bcdl_jax.export_stablehlo, bcdl_jax.export_onnx):
            with pytest.raises(OSError, match=f"'{path}'"):
                export(path, apply, 2.0, inputs)
    assert not list(tmp_path.iterdir())
    path = tmp_path / "net"
    bcdl_jax.export_stablehlo(path, apply, 2.0, inputs)
    whole = path.read_bytes()
    for damaged in (b"", b"nothing of the kind", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a file of export_stablehlo, or it is damaged"):
            bcdl_jax.load_stablehlo(path)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match="export_onnx needs onnx: pip install"):
        bcdl_jax.export_onnx(tmp_path / "net", lambda params, x: x, {}, np.ones((3, 2)))
    with pytest.raises(ModuleNotFoundError, match="export_safetensors needs safetensors: pip install"):
        bcdl_jax.export_safetensors(tmp_path / "net", {"a": np.ones(2)})


def test_inputs_without_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="are empty"):
        bcdl_jax.export_stablehlo(tmp_path / "a", lambda params: params, np.float32(2), ())
    with pytest.raises(ValueError, match="begin with a scalar"):
        bcdl_jax.export_stablehlo(tmp_path / "a", lambda params, x: x * params, np.float32(2), np.float32(1))


@pytest.mark.slow
def test_numbers_that_grow_with_the_batch(tmp_path, key):
    """Rows that are chosen by place and index, as in CLIP, and a mean over the batch."""

    def apply(params, ids):
        hidden = params["embedding"][ids] @ params["kernel"]
        return hidden[jnp.arange(hidden.shape[0]), (ids == 2).argmax(-1)] + hidden.mean((0, 1))

    params = {"embedding": jax.random.normal(key, (9, 6)).at[:, :2].set(0), "kernel": jax.random.normal(key, (6, 5))}
    ids = jax.random.randint(key, (3, 4), 0, 9)
    small_apply, small, _ = bcdl_jax.shrink(apply, params, ids)
    assert small["kernel"].shape == (4, 5)
    for function, tree in ((apply, params), (small_apply, small)):
        bcdl_jax.export_stablehlo(tmp_path / "net", function, tree, ids)
        exported = jax.export.deserialize(bytearray((tmp_path / "net").read_bytes()))
        for size in (1, 2, 5):
            batch = jnp.resize(ids, (size, 4)).astype(ids.dtype)
            np.testing.assert_allclose(exported.call(batch), apply(params, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "loop", [jax.lax.map, lambda body, x: jax.lax.scan(lambda carry, row: (carry, body(row)), 0, x)[1]]
)
def test_a_small_network_that_loops_over_the_batch_is_exported(loop, tmp_path, key):
    params = {"first": jax.random.normal(key, (6, 6)).at[:, 3:].set(0), "last": jax.random.normal(key, (6, 2))}
    inputs = jax.random.normal(key, (4, 6))
    apply = lambda params, x: loop(lambda row: jax.nn.relu(row @ params["first"]) @ params["last"], x)  # noqa: E731
    small_apply, small, _ = bcdl_jax.shrink(apply, params, inputs)
    assert small["first"].shape == (6, 3)
    bcdl_jax.export_stablehlo(tmp_path / "net", small_apply, small, inputs)
    run = bcdl_jax.load_stablehlo(tmp_path / "net")
    for size in (1, 3):
        np.testing.assert_allclose(run(inputs[:size]), apply(params, inputs[:size]), rtol=1e-5, atol=1e-5)
