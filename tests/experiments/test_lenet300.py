import json
import math
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import bcdl_jax
from experiments import lenet300, score
from experiments.checks import kill_and_resume as crash_test
from experiments.cli import options
from experiments.io import data
from experiments.networks.lenet import LeNet300
from experiments.pipeline.progress import Progress
from experiments.report.result import result as make_result
from experiments.report.run_table import print_table


def test_the_network_has_266610_weights_and_biases():
    params = jax.eval_shape(LeNet300().init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.uint8))["params"]
    layers = bcdl_jax.variational_layers(params)
    assert sum(layer.kernel_mean.size + layer.bias_mean.size for layer in layers.values()) == 266_610
    assert [layer.kernel_mean.shape for layer in layers.values()] == [(784, 300), (300, 100), (100, 10)]
    assert [layer.clip_var for layer in layers.values()] == [0.04, None, None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run of two seeds: (exit status, output directory)."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    arguments = ["--dataset", "mnist_5k", "--quick", "--epochs", "4", "--seeds", "3", "5", "--out", str(out)]
    return lenet300.main(arguments), out


@pytest.mark.slow
def test_all_files_are_there(finished):
    status, out = finished
    assert status == 0
    params = [f"{stage}_seed{seed}.npz" for stage in ("trained", "pruned", "reduced") for seed in (3, 5)]
    compressed = ["compressed_seed3.bcdl", "compressed_seed5.bcdl"]
    expected = ["result.json", "metrics.jsonl", *params, *compressed, *lenet300.EXPERIMENT.pictures]
    assert sorted(path.name for path in out.iterdir()) == sorted(expected)


@pytest.mark.slow
def test_result_file(finished):
    _, out = finished
    result = json.loads((out / "result.json").read_text())
    assert result["experiment"] == "lenet300"
    assert result["method"] == "gnj"
    assert result["dataset"] == {"name": "mnist_5k", "train": 3500, "validation": 500, "test": 1000}
    assert result["command"].startswith("python -m experiments.lenet300 --dataset mnist_5k --quick")
    assert [run["seed"] for run in result["runs"]] == [3, 5]
    for run in result["runs"]:
        assert set(run["test_error"]) == {"trained", "pruned", "reduced", "file"}
        assert run["test_error"]["file"] == pytest.approx(run["test_error"]["reduced"], abs=0.11)
        assert run["file_bytes"] == (out / f"compressed_seed{run['seed']}.bcdl").stat().st_size
        assert run["ratio_file"] == pytest.approx(1_066_440 / run["file_bytes"], abs=0.01)
        assert run["float32_bytes"] == 1_066_440
        assert all(0 < error < 60 for error in run["test_error"].values())
        assert run["total_units"] == [784, 300, 100]
        assert all(0 < kept <= total for kept, total in zip(run["kept_units"], run["total_units"], strict=True))
        inputs, hidden, last = run["kept_units"]
        weights = [inputs * hidden, hidden * last, last * 10]
        assert run["rate_paper"]["pruned"] == pytest.approx(266_200 / sum(weights), rel=1e-5)
        reduced = 266_200 * 32 / sum(count * bits for count, bits in zip(weights, run["bits"], strict=True))
        assert run["rate_paper"]["reduced"] == pytest.approx(reduced, rel=1e-5)
        assert run["multiply_adds"] == [266_200, sum(weights)]
        assert run["shrunk_float32_bytes"] == 4 * (sum(weights) + hidden + last + 10)
        assert run["rate"]["pruned"] < run["rate_paper"]["pruned"]
        assert run["seconds"] > 0
        assert run["peak_memory_mb"] > 100
    for stage in ("trained", "pruned", "reduced", "file"):
        errors = [run["test_error"][stage] for run in result["runs"]]
        assert result["mean"]["test_error"][stage] == pytest.approx(sum(errors) / 2)
        assert result["range"]["test_error"][stage] == [min(errors), max(errors)]
    assert {"python", "jax", "flax", "optax"} <= set(result["versions"])


@pytest.mark.slow
def test_metrics_file(finished):
    _, out = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"], line["seed"]) for line in lines] == [
        *[("train", epoch, seed) for epoch in range(1, 5) for seed in (3, 5)],
        *[("fine_tune", 5, seed) for seed in (3, 5)],
    ]
    for line in lines:
        weight = 1 if line["phase"] == "train" else 0.6
        assert line["loss"] == pytest.approx(line["nll"] + weight * line["kl"], rel=1e-4)
        assert set(line["kept"]) == {"Dense_0", "Dense_1", "Dense_2"}
    assert lines[6]["validation_error"] < lines[0]["validation_error"]


@pytest.mark.slow
def test_reduced_parameters_score_as_reported(finished):
    """NumPy computes the error again from the integers and steps in the file."""
    _, out = finished
    test = data.load("mnist_5k").test
    with np.load(out / "reduced_seed5.npz", allow_pickle=False) as file:
        hidden = test.images.reshape(len(test), -1) / 127.5 - 1
        for name in ("Dense_0", "Dense_1", "Dense_2"):
            assert np.issubdtype(file[f"{name}/kernel"].dtype, np.integer)
            hidden = hidden @ (file[f"{name}/kernel"] * file[f"{name}/kernel_step"])
            hidden = hidden + file[f"{name}/bias"] * file[f"{name}/bias_step"]
            hidden = np.maximum(hidden, 0) if name != "Dense_2" else hidden
            kept = int(file[f"{name}/input_mask"].sum())
            assert not file[f"{name}/kernel"][~file[f"{name}/input_mask"]].any()
            largest = int(np.abs(file[f"{name}/kernel"]).max())
            assert file[f"{name}/kernel_bits"] in (
                math.ceil(math.log2(largest + 1)) + 1,
                math.ceil(math.log2(largest)) + 1,
            )
    error = 100 * np.mean(np.argmax(hidden, -1) != test.labels)
    run = json.loads((out / "result.json").read_text())["runs"][1]
    assert error == pytest.approx(run["test_error"]["reduced"], abs=0.11)
    assert kept == run["kept_units"][2]


@pytest.mark.slow
def test_compressed_files_hold_the_reduced_parameters_and_are_scored(finished, tmp_path, monkeypatch, capsys):
    def unavailable(*_):
        raise data.Unavailable("no internet connection")

    _, out = finished
    template = jax.eval_shape(LeNet300().init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.uint8))["params"]
    params = bcdl_jax.load(out / "compressed_seed5.bcdl", like=template)
    with np.load(out / "reduced_seed5.npz", allow_pickle=False) as file:
        for name, layer in params.items():
            for field in ("kernel", "kernel_step", "bias", "bias_step", "input_mask", "output_mask"):
                np.testing.assert_array_equal(getattr(layer["posterior"], field), file[f"{name}/{field}"])
    path = str(out / "compressed_seed5.bcdl")
    assert score.main(["--dataset", "mnist_5k", path]) == 0
    run = json.loads((out / "result.json").read_text())["runs"][1]
    assert capsys.readouterr().out == (
        "The embedded digits are training images of full MNIST: an error on them is meaningful only for a network that was trained on them.\n"
        f"{path}: {run['file_bytes']:,} bytes, test error {run['test_error']['file']:.2f} %\n"
    )
    damaged = tmp_path / "damaged.bcdl"
    damaged.write_bytes(Path(path).read_bytes()[:-1])
    for bad, message in (
        (damaged, f"{damaged} cannot be decoded: The file is damaged"),
        (tmp_path / "none.bcdl", "No such file"),
    ):
        assert score.main(["--dataset", "mnist_5k", str(bad)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(data, "_load_full", unavailable)
    assert score.main([path]) == 2
    assert (
        "--dataset mnist is not available: no internet connection. Give --data-dir or set TFDS_DATA_DIR, or use --dataset mnist_5k."
        in capsys.readouterr().err
    )
    assert score.main(["--dataset", "cifar", path]) == 2
    assert "--dataset is 'cifar'" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures(finished):
    _, out = finished
    for name in lenet300.EXPERIMENT.pictures:
        with Image.open(out / name) as picture:
            assert min(picture.size) >= 300
            if name.endswith(".gif"):
                assert picture.n_frames == 5  # These are the start and four epochs.
                first = np.asarray(picture.convert("RGB"), np.int32)
                picture.seek(4)
                assert np.abs(np.asarray(picture.convert("RGB"), np.int32) - first).max() > 50


@pytest.mark.slow
def test_an_existing_directory_stays_unchanged(finished, capsys):
    _, out = finished
    before = (out / "result.json").read_bytes()
    assert lenet300.main(["--dataset", "mnist_5k", "--quick", "--out", str(out)]) == 2
    assert "exists and is not empty; name another directory or add --overwrite" in capsys.readouterr().err
    assert (out / "result.json").read_bytes() == before


def interrupted(monkeypatch, number, arguments):
    """The exit status of a run that receives a signal in its second epoch."""
    show = Progress.show

    def interrupt(self, report):
        show(self, report)
        if report.reports[0].epoch == 2:
            signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "show", interrupt)
        with pytest.raises(SystemExit) as stopped:
            lenet300.main(arguments)
    return stopped.value.code


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_files(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--dataset", "mnist_5k", "--quick", "--out", str(out)]
    assert interrupted(monkeypatch, signal.SIGINT, arguments) == 130
    assert "Interrupted; the finished files are in" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "interrupted.npz", "metrics.jsonl"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    with np.load(out / "interrupted.npz", allow_pickle=False) as file:
        assert file["Dense_0/kernel_mean"].shape == (1, 784, 300)


@pytest.mark.slow
def test_a_run_resumed_after_sigterm_writes_the_same_files(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--dataset", "mnist_5k", "--quick", "--epochs", "4", "--seeds", "3", "5", "--out", str(out)]
    assert interrupted(monkeypatch, signal.SIGTERM, arguments) == 143
    assert f"Stopped by SIGTERM; the training so far is saved in {out}/checkpoints/000001" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert lenet300.main([*arguments, "--resume", "--learning-rate", "0.01"]) == 2
    assert "since learning_rate was 0.001 and is now 0.01; fine_tune_learning_rate was" in capsys.readouterr().err
    assert lenet300.main([*arguments, "--resume"]) == 0
    assert f"Resumes the run in {out} from {out}/checkpoints/000001." in capsys.readouterr().out
    assert lenet300.main([*arguments, "--resume", "--overwrite"]) == 2
    assert f"--resume is given, but the run in {out} is complete" in capsys.readouterr().err
    undisturbed = finished[1]
    assert crash_test.differences(out, undisturbed) == ["result.json"]
    results = [json.loads((directory / "result.json").read_text()) for directory in (undisturbed, out)]
    assert [result["resumed"] for result in results] == [0, 1]
    assert results[1]["mean"] == results[0]["mean"]


@pytest.mark.slow
def test_a_run_that_diverges_says_so_and_keeps_its_last_good_state(tmp_path, capsys):
    arguments = ["--dataset", "mnist_5k", "--quick", "--learning-rate", "1e30", "--out", str(tmp_path / "out")]
    assert lenet300.main(arguments) == 2
    error = capsys.readouterr().err
    assert "No seed could be trained to the end; their last states are in" in error
    assert "Seed 0 was stopped in epoch 1, step" in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl", "trained_seed0.npz"]
    with np.load(tmp_path / "out" / "trained_seed0.npz", allow_pickle=False) as file:
        assert all(np.isfinite(file[name]).all() for name in file.files)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert line["loss"] is None
    assert "not finite" in line["failure"]


@pytest.mark.slow
def test_a_failed_seed_is_shown_and_left_out_of_the_mean(finished, capsys):
    _, out = finished
    runs = json.loads((out / "result.json").read_text())["runs"]
    broken = [runs[0], runs[1] | {"failure": "Seed 5 was stopped in epoch 1."}]
    print_table(broken)
    printed = capsys.readouterr().out
    assert "not in the mean: Seed 5 was stopped in epoch 1." in printed
    assert f"trained {runs[0]['test_error']['trained']:.2f} % (" in printed
    dataset = data.load("mnist_5k")
    recipe = lenet300.EXPERIMENT.recipe("mnist_5k", True)
    context = types.SimpleNamespace(dataset=dataset, recipe=recipe, checkpoints=types.SimpleNamespace(resumed=0))
    about = {"experiment": "lenet300", "method": "gnj", "command": "command", "seconds": 1.0}
    result = make_result(context, broken, **about)
    assert result["mean"]["test_error"] == runs[0]["test_error"]
    failed = [run | {"failure": "stopped"} for run in runs]
    assert make_result(context, failed, **about)["mean"] is None


def test_the_warm_up_keeps_its_share_of_the_epochs():
    args = options.parse(lenet300.EXPERIMENT, ["--epochs", "26", "--learning-rate", "0.01"])
    adapted = options.adapt(lenet300.EXPERIMENT.recipe("mnist"), args)
    assert (adapted.epochs, adapted.warmup_epochs) == (26, 5)
    assert (adapted.learning_rate, adapted.fine_tune_learning_rate) == (0.01, 0.001)  # The recipe has 2e-3 and 2e-4.
    adapted = options.adapt(lenet300.EXPERIMENT.recipe("mnist_5k"), args)
    assert (adapted.learning_rate, adapted.fine_tune_learning_rate) == (0.01, 0.02)


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_from_outside(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.lenet300",
        "--dataset",
        "mnist_5k",
        "--seeds",
        "0",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Interrupted; the finished files are in" in error
    assert b"Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "interrupted.npz", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar"], "--dataset is 'cifar'; allowed are mnist, mnist_5k, fashion_mnist"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--epochs", "-3"], "--epochs is -3; it must be at least 1"),
        (["--fine-tune-epochs", "-1"], "--fine-tune-epochs is -1; it must be at least 0"),
        (["--checkpoint-every", "-1"], "--checkpoint-every is -1; it must be at least 0"),
        (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--batch-size", "3501"], "--batch-size is 3501; it must be at most the number of training examples, 3500"),
        (["--learning-rate", "-0.1"], "--learning-rate is -0.1; it must be a positive number"),
        (["--thresholds", "-2", "-3"], "--thresholds has 2 values; it must have 3, one per layer"),
        (["--thresholds", "nan", "0", "0"], "--thresholds holds a value that is not a number"),
        (["--seeds", "1", "1"], "--seeds names a seed twice"),
        (["--seeds", "-1"], "--seeds holds -1; a seed must be at least 0"),
        (["--seeds", "5000000000"], "--seeds holds 5000000000; a seed must be at least 0 and less than 2147483648"),
        (["--pretrained", "no/such.npz"], "--pretrained no/such.npz cannot be read"),
        (["--out", "/proc/nothing"], "--out /proc/nothing cannot be written"),
    ],
)
def test_bad_input_prints_one_sentence_and_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset = [] if "--dataset" in arguments else ["--dataset", "mnist_5k"]
    assert lenet300.main([*dataset, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pretrained_weights_of_another_network_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arrays = {
        f"Dense_{index}/{name}": np.zeros((a, b) if name == "kernel" else (b,), np.float32)
        for index, (a, b) in enumerate([(784, 300), (300, 100), (100, 10)])
        for name in ("kernel", "bias")
    }

    def attempt(**changes):
        np.savez(
            "net.npz", trained_on="mnist_5k", **{name: a for name, a in (arrays | changes).items() if a is not None}
        )
        assert lenet300.main(["--dataset", "mnist_5k", "--pretrained", "net.npz"]) == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["net.npz"]
        return capsys.readouterr().err

    assert "has no array Dense_1/bias; it must hold Dense_0/kernel" in attempt(**{"Dense_1/bias": None})
    assert "has Dense_1/kernel of shape (300, 50); it must be (300, 100)" in attempt(
        **{"Dense_1/kernel": np.zeros((300, 50))}
    )
    assert "holds Dense_3/kernel; allowed are" in attempt(**{"Dense_3/kernel": np.zeros(1)})


@pytest.mark.long
@pytest.mark.slow
def test_training_starts_from_a_pretrained_network(tmp_path):
    """A run that starts from the weights of another run has its error after a very small step."""
    finished = tmp_path / "first"
    assert lenet300.main(["--dataset", "mnist_5k", "--seeds", "0", "--epochs", "20", "--out", str(finished)]) == 0
    with np.load(finished / "trained_seed0.npz") as file:
        weights = {
            f"{name}/{part}": file[f"{name}/{part}_mean"]
            * (file[f"{name}/scale_mean"][:, None] if part == "kernel" else 1)
            for name in lenet300.EXPERIMENT.network.chain
            for part in ("kernel", "bias")
        }
    np.savez(tmp_path / "net.npz", trained_on="mnist_5k", **weights)
    arguments = [
        "--dataset",
        "mnist_5k",
        "--seeds",
        "0",
        "--epochs",
        "1",
        "--learning-rate",
        "1e-9",
        "--fine-tune-epochs",
        "0",
    ]
    arguments += ["--pretrained", str(tmp_path / "net.npz"), "--out", str(tmp_path / "second")]
    assert lenet300.main(arguments) == 0
    errors = [
        json.loads((tmp_path / name / "result.json").read_text())["runs"][0]["test_error"]["trained"]
        for name in ("first", "second")
    ]
    assert errors[0] == pytest.approx(errors[1], abs=0.2)
