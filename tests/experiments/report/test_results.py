"""The committed results: their files, and the figures that the guide of the results quotes from them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import bcdl_jax
from experiments.networks.lenet import LeNet5, LeNet300
from experiments.report import tables

DIRECTORY = Path(__file__).parents[3] / "experiments" / "results"
RESULTS = {path.stem: json.loads(path.read_text()) for path in DIRECTORY.glob("*_mnist*.json")}


@pytest.fixture(scope="module")
def guide():
    """The text of experiments/results/README.md."""
    return (DIRECTORY / "README.md").read_text()


def test_results_are_named_by_experiment_method_and_data_set():
    assert set(RESULTS) >= {"lenet300_gnj_mnist", "lenet300_gnj_mnist_5k", "lenet5_gnj_mnist"}
    for name, result in RESULTS.items():
        assert name == f"{result['experiment']}_{result['method']}_{result['dataset']['name']}"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lenet5_gnj_mnist_seed0", LeNet5()),
        ("lenet300_sparse_vd_mnist_seed2", LeNet300()),
        ("lenet300_sws_mnist_seed0", LeNet300()),
    ],
)
def test_a_decoded_file_is_encoded_to_the_same_bytes(name, model):
    """One file with groups, one with single weights and one with levels. A change of the format or of the writer fails here."""
    data = (DIRECTORY / f"{name}.bcdl").read_bytes()
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.uint8))["params"]
    assert bcdl_jax.codec.encode(bcdl_jax.codec.decode(data, like)) == data


def test_the_guide_has_the_printed_table(guide):
    results, _ = tables.read_results([tables.COMMITTED], ["mnist", "cifar10"])
    assert tables.as_markdown(tables.make_table(results)).strip() in guide


@pytest.mark.parametrize("name", ["lenet300_gnj_mnist", "lenet300_gnj_mnist_5k"])
def test_the_guide_quotes_the_result(name, guide):
    result = RESULTS[name]
    assert result["command"] in guide
    mean, low_high = result["mean"], result["range"]
    cells = [
        f"{mean['test_error'][s]:.2f} ({low_high['test_error'][s][0]:.2f} to {low_high['test_error'][s][1]:.2f})"
        for s in mean["test_error"]
    ]
    cells += [f"{mean[kind][stage]:.1f}x" for kind in ("rate", "rate_paper") for stage in ("pruned", "reduced")]
    for cell in cells:
        assert cell in guide, cell
    runs = result["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    for run in runs:
        assert "-".join(map(str, run["kept_units"])) in guide
    assert f"{runs[0]['seconds'] / 60:.1f} minutes a seed" in guide
    assert f"{runs[0]['peak_memory_mb']} MB" in guide
    assert f"{mean['file_bytes']:,.0f} bytes" in guide
    assert f"{mean['ratio_file']:.1f}x" in guide


@pytest.mark.parametrize("name", [name for name, result in RESULTS.items() if result["dataset"]["name"] == "mnist"])
def test_the_compressed_files_match_the_result(name):
    """The sizes, the bits, and for groups the kept units are equal."""
    for run in RESULTS[name]["runs"]:
        path = DIRECTORY / f"{name}_seed{run['seed']}.bcdl"
        assert path.stat().st_size == run["file_bytes"]
        layers = bcdl_jax.codec.summarize(path.read_bytes())
        assert [layer.bits for layer in layers] == run["bits"]
        kept = [layer.kept[-1] if len(layer.shape) > 2 else layer.kept[0] for layer in layers]
        if RESULTS[name]["method"] in ("gnj", "ghs"):
            assert kept == run["kept_units"]


def test_the_guide_quotes_the_speed_of_inference(guide):
    result = json.loads((DIRECTORY / "inference.json").read_text())
    assert result["command"] == "python -m experiments.benchmark_inference"
    for entry in result["results"]:
        before, after = entry["multiply_adds"]
        row = rf"\| {entry['title']} \| {entry['batch']} \|.*{entry['speed_up']['shrunk']:.2f}x \| {before / after:.2f}x \|\n"
        assert re.search(row, guide), row
