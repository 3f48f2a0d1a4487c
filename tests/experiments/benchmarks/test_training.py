import json
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from experiments.benchmarks import floor, training, training_measures, training_sides
from experiments.benchmarks.floor import Products, floor_seconds, products_of
from experiments.benchmarks.training_sides import Settings, images_of
from experiments.networks.lenet import LeNet5, LeNet300
from experiments.networks.vgg import VGG


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "resnet"], "--network is resnet; allowed are lenet300, lenet5, vgg."),
        (["--measure", "luck"], "--measure is luck; allowed are speed, ensemble, memory."),
        (["--dtype", "float16"], "--dtype is float16; allowed are float32, bfloat16."),
        (["--device", "tpu"], "--device is tpu; allowed are cpu, gpu."),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1."),
        (["--examples", "-5"], "--examples is -5; it must be at least 1."),
        (["--examples", "10", "--batch-size", "20"], "--examples is 10; it must be at least --batch-size, 20."),
        (["--width", "nan"], "--width is nan; it must be more than 0 and at most 4."),
        (["--out", "result.txt"], "--out is result.txt; it must be a file that ends in .json."),
        (["--out", "nowhere/result.json"], "--out is nowhere/result.json; there is no directory nowhere."),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, message, capsys):
    assert training.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_a_gpu_that_is_not_there_gets_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert training.main(["--device", "gpu"]) == 2
    assert capsys.readouterr().err == "error: --device is gpu, but jax finds no gpu here: it runs on cpu.\n"


class OneLayer(nn.Module):
    """A network that compiles fast."""

    dtype: Any = None

    @nn.compact
    def __call__(self, images, *, deterministic=True):
        inputs = images.reshape(images.shape[0], -1) / 127.5 - 1
        return bcdl_jax.Dense(10, dtype=self.dtype)(inputs, deterministic=deterministic)


@pytest.mark.slow
def test_it_measures_prints_and_writes_without_torch(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(training_sides, "LeNet300", OneLayer)
    monkeypatch.setattr(floor, "_ALL_SECONDS", 0.05)
    out = tmp_path / "result.json"
    arguments = ["--network", "lenet300", "--measure", "speed", "ensemble"]
    arguments += ["--rounds", "2", "--examples", "256", "--out", str(out)]
    assert training.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "torch: not installed" in printed
    assert "LeNet-300-100, float32, batch 128, 2 steps per epoch: 0.01 GFLOP" in printed
    content = json.loads(out.read_text())
    assert content["command"].startswith("python -m experiments.benchmark_training --network lenet300")
    assert content["versions"]["jax"] == jax.__version__
    speed, ensemble = content["results"]
    assert [result["measure"] for result in content["results"]] == ["speed", "ensemble"]
    assert list(speed["seconds_per_step"]) == ["bcdl_jax"]
    first, second = speed["loss"]["bcdl_jax"]
    assert second < first
    least = sum(min(layer["seconds"].values()) for layer in speed["layers"])
    assert speed["floor_seconds"] == pytest.approx(least)
    assert speed["fraction_of_floor_speed"] == pytest.approx(least / np.median(speed["seconds_per_step"]["bcdl_jax"]))
    at_once, in_a_row = (ensemble["seconds_per_step"][name] for name in ("at once", "in a row"))
    assert ensemble["seeds"] == 8
    assert ensemble["factor"] == pytest.approx(np.median(np.divide(in_a_row, at_once)))
    assert training.main(arguments) == 2
    assert f"--out {out} exists" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_the_memory_of_training_is_measured_in_a_process_of_its_own():
    settings = Settings("lenet5", *images_of("lenet5", 256), 128, "float32", 1.0)
    np.ones(2 * 10**9, np.uint8)  # The memory of this process must not count.
    assert 3e8 < training_measures.memory(settings)["peak_bytes"]["host"] < 1.5e9


@pytest.mark.parametrize(("model", "side", "channels"), [(LeNet300(), 28, 1), (LeNet5(), 28, 1), (VGG(), 32, 3)])
def test_the_products_are_those_of_the_layers(model, side, channels):
    """They fit the shapes of the kernels, and for LeNet-5-Caffe the count by hand."""
    images = jax.ShapeDtypeStruct((4, side, side, channels), np.uint8)
    layers = products_of(model, images)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    kernels = sorted(layer.kernel_mean.shape for layer in bcdl_jax.variational_layers(params).values())
    assert sorted((layer.k, layer.n) for layer in layers) == sorted((int(np.prod(k[:-1])), k[-1]) for k in kernels)
    assert [layer.input_gradient for layer in layers] == [isinstance(model, LeNet300), *[True] * (len(layers) - 1)]
    if isinstance(model, LeNet5):
        assert [layer.m for layer in layers] == [4 * 24 * 24, 4 * 8 * 8, 4, 4]
        assert sum(layer.operations for layer in layers) == 2 * 4 * (
            576 * 25 * 20 * 4 + 6 * (64 * 500 * 50 + 800 * 500 + 500 * 10)
        )


def test_the_floor_grows_with_the_products(monkeypatch):
    monkeypatch.setattr(floor, "_ALL_SECONDS", 0.05)
    pytest.importorskip("torch")
    small, large = floor_seconds([Products(8, 8, 8, True), Products(256, 256, 256, True)], "float32", "cpu")
    assert set(small) == set(large) == {"XLA", "numpy", "torch"}
    assert all(large[library] > small[library] > 0 for library in small)


CASES = {
    "lenet300": (LeNet300(), {}),
    "lenet5": (LeNet5(widths=(3, 4, 7)), {"pool_after": (0, 1)}),
    "vgg": (VGG(widths=((2, 3), (4,)), hidden=5), {"padding": 1, "pool_after": (1, 2), "batch_norm": True}),
}


def twins(name, **fields):
    """The same network on both sides, as functions of images and, on ours, a key. The given fields of all layers are set to constants."""
    torch = pytest.importorskip("torch")
    from experiments.benchmarks import torch_twins

    model, options = CASES[name]
    images = images_of(name, 16)[0]
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]

    def with_fields(node):
        if not isinstance(node, bcdl_jax.Posterior):
            return node
        return node.replace(**{field: jnp.full_like(getattr(node, field), value) for field, value in fields.items()})

    params = jax.tree.map(with_fields, params, is_leaf=bcdl_jax.compression.is_layer)
    posteriors = list(bcdl_jax.variational_layers(jax.device_get(params)).values())
    net = torch_twins.network(posteriors, **options)

    @jax.jit
    def ours(images, key):
        variables, rngs = {"params": params}, {"noise": key}
        if name != "vgg":
            return model.apply(variables, images, deterministic=False, rngs=rngs)
        return model.apply(variables, images, deterministic=False, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    def theirs(images):
        with torch.no_grad():
            return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1).numpy()

    return params, net, images, ours, theirs


@pytest.mark.parametrize("name", CASES)
def test_the_torch_twin_is_the_same_network(name):
    """Without variance the scores are the same. The KL is the same for any variance."""
    vanishing = dict.fromkeys(("kernel_log_variance", "bias_log_variance", "scale_log_variance"), -40.0)
    _, _, images, ours, theirs = twins(name, **vanishing)
    np.testing.assert_allclose(theirs(images), ours(images, jax.random.key(1)), atol=5e-3)
    params, net, *_ = twins(name)
    kl = sum(float(layer.kl_divergence().detach()) for layer in net if hasattr(layer, "kl_divergence"))
    assert kl == pytest.approx(float(bcdl_jax.kl_divergence(params)), rel=1e-5)


@pytest.mark.parametrize("name", ["lenet300", "lenet5"])
def test_the_torch_twin_has_the_same_noise(name):
    """The mean and the standard deviation of the scores of one image agree. The noise of the scales, which the positions of a convolution
    share, is the larger part."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    noisy = {"kernel_log_variance": -7.0, "bias_log_variance": -7.0, "scale_log_variance": -2.0}
    _, _, images, ours, theirs = twins(name, **noisy)
    many = np.repeat(images[3:4], 4000, axis=0)
    a, b = np.asarray(ours(many, jax.random.key(1))), theirs(many)
    np.testing.assert_allclose(b.std(0), a.std(0), rtol=0.08)
    np.testing.assert_allclose(b.mean(0), a.mean(0), atol=5 * np.max(a.std(0)) * np.sqrt(2 / 4000))


def test_the_torch_twin_clips_the_first_layer():
    torch = pytest.importorskip("torch")
    _, net, *_ = twins("lenet300", kernel_log_variance=-2.0, bias_log_variance=-2.0)
    layers = [layer for layer in net if hasattr(layer, "clip_variances")]
    for layer in layers:
        layer.clip_variances()
    largest = [float(torch.exp(layer.kernel_log_variance.detach()).max()) for layer in layers]
    assert largest == pytest.approx([0.04, np.exp(-2), np.exp(-2)])


@pytest.mark.parametrize(("network", "examples"), [("lenet300", 1280), ("lenet5", 1280)])
def test_both_sides_train_alike(network, examples):
    """The loss of the first epochs agrees. Most of it is the KL, which has no noise; the tolerance is small compared with the rest."""
    pytest.importorskip("torch")
    images, labels = images_of(network, examples)
    settings = Settings(network, images, labels, 64, "float32", 1.0)
    ours, _ = training_sides.our_side(settings)
    theirs = training_sides.torch_side(settings, "cpu", compiled=False)
    for _ in range(2):
        assert ours() == pytest.approx(theirs(), abs=0.15)
