"""The VGG experiment, with a narrow network on a few padded digits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from experiments import registry, vgg
from experiments.io import data
from experiments.networks import vgg as networks
from experiments.pipeline import measures
from experiments.pipeline.augmentation import augmented
from experiments.report import scoring
from tests.experiments.small_data import few_digits


def test_recipes_and_widths():
    assert vgg.EXPERIMENT.recipe("cifar10").shift
    for method in registry.method_names():
        narrow = vgg.EXPERIMENT.recipe("cifar10", method=method, width=0.25)
        assert (narrow.mirror, narrow.shift) == (True, 0)
        assert not vgg.EXPERIMENT.recipe("mnist_5k", method=method).mirror
    net = networks.vgg(bcdl_jax.GroupHorseshoe(), 0.25)
    params = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8))["params"]
    layers = bcdl_jax.variational_layers(params)
    assert set(layers) == set(params) == set(vgg.EXPERIMENT.network.chain)
    widths = [layers[name].kernel_shape[-1] for name in vgg.EXPERIMENT.network.chain]
    assert widths == [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128, 128, 10]
    assert [layers[name].clip_var for name in vgg.EXPERIMENT.network.chain] == [0.01] * 4 + [0.04] * 3 + [None] * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "0"], "--width is 0; it must be more than 0 and at most 1."),
        (["--width", "nan"], "--width is nan; it must be more than 0 and at most 1."),
        (["--dataset", "mnist"], "--dataset is 'mnist'; allowed are cifar10, mnist_5k."),
    ],
)
def test_errors_are_one_sentence(arguments, message, capsys):
    assert vgg.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_images_are_mirrored_with_probability_one_half():
    images = jax.random.randint(jax.random.key(0), (400, 4, 4, 2), 0, 256).astype(jnp.uint8)
    found = np.asarray(jax.jit(functools.partial(augmented, mirror=True))(images, jax.random.key(1)))
    same = (found == np.asarray(images)).all((1, 2, 3))
    turned = (found == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ turned).all()
    assert 150 < same.sum() < 250


def test_shifts_have_equal_probabilities_and_reflect_at_the_edges():
    images = jax.random.randint(jax.random.key(0), (900, 5, 6, 2), 0, 256).astype(jnp.uint8)
    found = np.asarray(jax.jit(functools.partial(augmented, shift=1))(images, jax.random.key(1)))
    padded = np.pad(np.asarray(images), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    moved = [
        (found == padded[:, down : down + 5, right : right + 6]).all((1, 2, 3)) for down, right in np.ndindex(3, 3)
    ]
    assert (np.sum(moved, axis=0) == 1).all()
    assert all(70 < count < 130 for count in np.sum(moved, axis=1))
    half = np.asarray(augmented(images[:450], jax.random.key(1), shift=1))
    np.testing.assert_array_equal(half, found[:450])
    for shift in (-1, 5):
        with pytest.raises(ValueError, match=rf"shift is {shift}; .* must be at least 0 and less than 5"):
            augmented(images, jax.random.key(1), shift=shift)


@pytest.mark.slow
def test_a_loss_with_random_changes_of_images_shrinks_at_any_batch_size():
    model = networks.VGG(bcdl_jax.GroupNormalJeffreys(), widths=((3, 4),), hidden=5, batch_norm=False)
    images = jax.random.randint(jax.random.key(0), (6, 8, 8, 3), 0, 256).astype(jnp.uint8)
    batch, key = (images, jnp.arange(6)), jax.random.key(1)
    params = jax.jit(model.init)(jax.random.key(2), images)["params"]
    first = params["Conv_0"]["posterior"].replace(output_mask=jnp.array([1.0, 0, 1]))
    params = params | {"Conv_0": {"posterior": first}}

    def shifted(params, batch, key):
        return 1 + measures.sampled_cross_entropy(model, params, batch, key, mirror=True, shift=2)

    small, small_params, report = bcdl_jax.shrink(shifted, params, (batch, key))
    assert report.multiply_adds[1] < report.multiply_adds[0]
    for size in (6, 5):
        some = jax.tree.map(lambda array, size=size: array[:size], batch)
        expected = float(shifted(params, some, key))
        assert float(jax.jit(small)(small_params, some, key)) == pytest.approx(expected, rel=1e-5)
    plain = 1 + measures.sampled_cross_entropy(model, params, batch, key)
    assert float(plain) != pytest.approx(float(shifted(params, batch, key)), rel=1e-4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quick"
    dataset = few_digits(64, 32, 32)
    # The network learns nothing in so few steps. Chosen thresholds could prune all of it on some machines, so they are given.
    thresholds = ["--thresholds", *["3"] * len(vgg.EXPERIMENT.network.chain)]
    arguments = ["--dataset", "mnist_5k", "--quick", "--width", "0.05", "--seeds", "1", *thresholds, "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: dataset)
        return vgg.main(arguments), out


@pytest.mark.slow
def test_a_run_writes_its_files_and_its_width(finished):
    status, out = finished
    assert status == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["experiment"], result["method"], result["width"]) == ("vgg", "gnj", 0.05)
    (run,) = result["runs"]
    assert run["failure"] is None
    assert run["total_units"][:4] == [3, 3, 6, 6]
    assert {path.name for path in out.iterdir()} >= {
        "compressed_seed1.bcdl",
        "pretrained_seed1.npz",
        *vgg.EXPERIMENT.pictures,
    }


@pytest.mark.slow
def test_the_file_is_scored_at_its_width_only(finished):
    _, out = finished
    (error,) = scoring.test_errors([out / "compressed_seed1.bcdl"], "mnist_5k", None, 0.05)
    (run,) = json.loads((out / "result.json").read_text())["runs"]
    # The run scored the file in another process, with other optimisations of the compiler, which may change the class of a few images.
    assert error == pytest.approx(run["test_error"]["file"], abs=0.5)
    with pytest.raises(scoring.UserError, match=r"not one of VGG at 0\.5 times the width"):
        scoring.test_errors([out / "compressed_seed1.bcdl"], "mnist_5k", None, 0.5)
