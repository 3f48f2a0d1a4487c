"""The committed results, and that the README quotes them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import bcdl_jax
from experiments.networks.lenet import LeNet5, LeNet300
from experiments.report import tables

ROOT = Path(__file__).parents[3]
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "experiments" / "results").glob("*_mnist*.json")}


def test_there_are_results():
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
def test_what_a_committed_file_holds_is_written_to_the_same_bytes(name, model):
    """By groups, by single weights, and by levels: neither the format nor what the writer makes of it changes by mistake."""
    data = (ROOT / "experiments" / "results" / f"{name}.bcdl").read_bytes()
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 28, 28, 1), np.uint8))["params"]
    assert bcdl_jax.codec.encode(bcdl_jax.codec.decode(data, like)) == data


def test_the_readme_has_the_table_that_is_printed():
    readme = (ROOT / "README.md").read_text()
    for line in tables.as_markdown(
        tables.make_table(tables.read_results([tables.COMMITTED], ["mnist", "cifar10"])[0])
    ).splitlines():
        assert line in readme, line


@pytest.mark.parametrize("name", ["lenet300_gnj_mnist", "lenet300_gnj_mnist_5k"])
def test_the_readme_quotes_the_file(name):
    result = RESULTS[name]
    readme = (ROOT / "README.md").read_text()
    assert result["command"] in readme
    mean, low_high = result["mean"], result["range"]
    cells = [
        f"{mean['test_error'][s]:.2f} ({low_high['test_error'][s][0]:.2f} to {low_high['test_error'][s][1]:.2f})"
        for s in mean["test_error"]
    ]
    cells += [f"{mean[kind][stage]:.1f}x" for kind in ("rate", "rate_paper") for stage in ("pruned", "reduced")]
    for cell in cells:
        assert cell in readme, cell
    runs = result["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    for run in runs:
        assert "-".join(map(str, run["kept_units"])) in readme
    assert f"{runs[0]['seconds'] / 60:.1f} minutes a seed" in readme
    assert f"{runs[0]['peak_memory_mb']} MB" in readme
    assert f"{mean['file_bytes']:,.0f} bytes" in readme
    assert f"{mean['ratio_file']:.1f}x" in readme


@pytest.mark.parametrize("name", [name for name, result in RESULTS.items() if result["dataset"]["name"] == "mnist"])
def test_the_compressed_files_of_the_results_are_there(name):
    """And are those of the result: same size, same bits, and for groups the same kept units."""
    for run in RESULTS[name]["runs"]:
        path = ROOT / "experiments" / "results" / f"{name}_seed{run['seed']}.bcdl"
        assert path.stat().st_size == run["file_bytes"]
        layers = bcdl_jax.codec.summarize(path.read_bytes())
        assert [layer.bits for layer in layers] == run["bits"]
        kept = [layer.kept[-1] if len(layer.shape) > 2 else layer.kept[0] for layer in layers]
        if RESULTS[name]["method"] in ("gnj", "ghs"):
            assert kept == run["kept_units"]


def test_the_readme_quotes_the_speed_of_inference():
    result = json.loads((ROOT / "experiments" / "results" / "inference.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert result["command"] == "python -m experiments.benchmark_inference"
    for entry in result["results"]:
        before, after = entry["multiply_adds"]
        row = rf"\| {entry['title']} \| {entry['batch']} \|.*{entry['speed_up']['shrunk']:.2f}x \| {before / after:.2f}x \|\n"
        assert re.search(row, readme), row
