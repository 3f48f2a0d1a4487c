import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from PIL import Image

import bcdl_jax
from experiments import lenet5, score
from experiments.cli import options
from experiments.io import data, files
from experiments.networks.lenet import LeNet5
from experiments.pipeline import measures
from tests.experiments.small_data import SAMPLE_IMAGES, few_digits

SHAPES = {"Conv_0": (5, 5, 1, 20), "Conv_1": (5, 5, 20, 50), "Dense_0": (800, 500), "Dense_1": (500, 10)}


def test_the_network_is_lenet5_caffe_with_its_first_layer_clipped():
    params = jax.eval_shape(LeNet5().init, jax.random.key(0), SAMPLE_IMAGES)["params"]
    layers = bcdl_jax.variational_layers(params)
    assert {name: layer.kernel_shape for name, layer in layers.items()} == SHAPES
    assert tuple(layers) == lenet5.EXPERIMENT.network.chain
    assert [layer.clip_var for layer in layers.values()] == [0.25, None, None, None]


def test_recipes():
    full, embedded = lenet5.EXPERIMENT.recipe("mnist"), lenet5.EXPERIMENT.recipe("mnist_5k")
    assert (full.pretrain_epochs, full.log_variance_factor, full.warmup_epochs) == (3, 6.0, 1)
    without = options.parse(lenet5.EXPERIMENT, ["--no-shrinking"])
    assert options.adapt(full, without) == dataclasses.replace(full, max_shrinking_change=None)
    assert full.batch_size == 128 > embedded.batch_size
    assert lenet5.EXPERIMENT.recipe("fashion_mnist") == full
    args = options.parse(lenet5.EXPERIMENT, ["--pretrained", "net.npz"])
    assert options.adapt(full, args).pretrain_epochs == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on few digits: (exit status, output directory)."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    dataset = few_digits(96, 32, 64)
    arguments = [
        "--dataset",
        "mnist_5k",
        "--quick",
        "--epochs",
        "1",
        "--pretrain-epochs",
        "3",
        "--fine-tune-epochs",
        "0",
        "--tensorboard",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", lambda *_, **__: dataset)
        return lenet5.main([*arguments, "--seeds", "2", "--out", str(out)]), out, dataset


@pytest.mark.slow
def test_the_change_of_the_predictions_is_their_divergence(finished):
    _, out, dataset = finished
    model, images = LeNet5(), dataset.validation.images
    like = jax.eval_shape(model.init, jax.random.key(0), SAMPLE_IMAGES)["params"]
    names = files.arrays_by_layer_field(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like))
    with np.load(out / "trained_seed2.npz", allow_pickle=False) as file:
        trained = jax.tree.unflatten(jax.tree.structure(like), [file[name] for name in names])
    nets = [trained, bcdl_jax.prune(trained, float(np.median(bcdl_jax.compression.pruning_scores(trained)["Dense_0"])))]
    old, new = (scipy.special.softmax(np.asarray(model.apply({"params": net}, images), np.float64), -1) for net in nets)
    expected = np.mean(scipy.stats.entropy(old, new, axis=-1))
    assert float(measures.measure_change(model, images)(nets[0])(nets[1])) == pytest.approx(expected, rel=1e-3)
    assert float(measures.measure_change(model, images)(nets[0])(nets[0])) == pytest.approx(0, abs=1e-6)
    # The change is the same without the groups that are already masked.
    further = bcdl_jax.prune(nets[1], float(np.quantile(bcdl_jax.compression.pruning_scores(trained)["Dense_0"], 0.3)))
    whole, shrunk = (measures.measure_change(model, images, masked)(nets[1])(further) for masked in (None, nets[1]))
    assert 1e-4 < float(whole) == pytest.approx(float(shrunk), rel=1e-3)


@pytest.mark.slow
def test_all_files_are_there(finished):
    status, out, _ = finished
    assert status == 0
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    params = {f"{stage}_seed2.npz" for stage in ("pretrained", "trained", "pruned", "reduced")}
    (events,) = (name for name in files if name.startswith("tensorboard/seed2/events.out.tfevents."))
    expected = {"result.json", "metrics.jsonl", "compressed_seed2.bcdl", *params, *lenet5.EXPERIMENT.pictures, events}
    assert files == expected


@pytest.mark.slow
def test_result_file(finished):
    _, out, dataset = finished
    result = json.loads((out / "result.json").read_text())
    assert (result["experiment"], result["method"]) == ("lenet5", "gnj")
    (run,) = result["runs"]
    assert list(run["test_error"]) == ["pretrained", "trained", "pruned", "reduced", "file"]
    assert run["total_units"] == [20, 50, 800, 500]
    assert run["float32_bytes"] == 4 * 431_080
    assert run["multiply_adds"][0] == 24 * 24 * 500 + 8 * 8 * 25_000 + 800 * 500 + 5000
    assert run["kept_units"][2] <= 16 * run["kept_units"][1]
    # NumPy computes the error of the pre-trained network again.
    with np.load(out / "pretrained_seed2.npz", allow_pickle=False) as file:
        assert str(file["trained_on"]) == "mnist_5k"
        assert {name: file[f"{name}/kernel"].shape for name in SHAPES} == SHAPES
        hidden = dataset.test.images / 127.5 - 1
        for name in ("Conv_0", "Conv_1"):
            windows = np.lib.stride_tricks.sliding_window_view(hidden, (5, 5), axis=(1, 2))
            hidden = np.einsum("nhwcij,ijco->nhwo", windows, file[f"{name}/kernel"]) + file[f"{name}/bias"]
            hidden = np.maximum(hidden, 0)
            hidden = np.max([hidden[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
        hidden = hidden.reshape(len(hidden), -1) @ file["Dense_0/kernel"] + file["Dense_0/bias"]
        logits = np.maximum(hidden, 0) @ file["Dense_1/kernel"] + file["Dense_1/bias"]
    error = 100 * np.mean(np.argmax(logits, -1) != dataset.test.labels)
    assert error == pytest.approx(run["test_error"]["pretrained"], abs=1.6)


@pytest.mark.slow
def test_metrics_and_event_files_agree(finished):
    _, out, _ = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("pretrain", 3),
        ("train", 1),
    ]
    assert lines[2]["loss"] < lines[0]["loss"]
    assert all(line["images_per_second"] > 0 and line["peak_memory_mb"] > 100 for line in lines)
    (path,) = (out / "tensorboard" / "seed2").iterdir()
    logged = scalars(path)
    assert logged["train/kept/Conv_1", 1] == lines[3]["kept"]["Conv_1"]
    assert logged["train/loss", 1] == pytest.approx(lines[3]["loss"])
    assert logged["pretrain/validation_error", 2] == pytest.approx(lines[1]["validation_error"])
    assert len(logged) == 3 * 4 + 10


def scalars(path):
    """The scalars of an event file, by tag and step."""
    from tensorboardX.proto.event_pb2 import Event

    content, events = path.read_bytes(), []
    while content:  # A record is a length, its checksum, the data and their checksum.
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}


@pytest.mark.slow
def test_pictures(finished):
    _, out, _ = finished
    for name in lenet5.EXPERIMENT.pictures:
        with Image.open(out / name) as picture:
            assert min(picture.size) >= 300
            assert not name.endswith(".gif") or picture.n_frames == 2


@pytest.mark.slow
def test_the_compressed_file_is_recognised_and_scored(finished, tmp_path, capsys):
    _, out, _ = finished
    path = out / "compressed_seed2.bcdl"
    assert score.main(["--dataset", "mnist_5k", str(path)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert f"test error {result['runs'][0]['test_error']['file']:.2f} %" in capsys.readouterr().out
    other = tmp_path / "other.bcdl"
    bcdl_jax.save(other, {"a": np.ones(3, np.float32)})
    assert score.main(["--dataset", "mnist_5k", str(other)]) == 2
    error = capsys.readouterr().err
    assert "not one of LeNet-300-100" in error
    assert "not one of LeNet-5-Caffe" in error
    assert "those of VGG need --vgg WIDTH" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "bayes"], "--method is 'bayes'; allowed are gnj, ghs"),
        (["--pretrain-epochs", "-1"], "--pretrain-epochs is -1; it must be at least 0"),
        (
            ["--pretrain-epochs", "2", "--pretrained", "net.npz"],
            "--pretrained and --pretrain-epochs exclude each other",
        ),
        (["--thresholds", "1", "2", "3"], "--thresholds has 3 values; it must have 4, one per layer"),
    ],
)
def test_bad_input_prints_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert lenet5.main(["--dataset", "mnist_5k", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pretrained_weights_of_a_dense_network_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("net.npz", trained_on="mnist_5k", **{"Conv_0/kernel": np.zeros((5, 5, 20, 1))})
    assert lenet5.main(["--dataset", "mnist_5k", "--pretrained", "net.npz"]) == 2
    assert "has Conv_0/kernel of shape (5, 5, 20, 1); it must be (5, 5, 1, 20)" in capsys.readouterr().err
