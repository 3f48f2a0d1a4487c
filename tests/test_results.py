"""The committed results, and that the README quotes them."""

import json
import re
from pathlib import Path

import pytest

import bcdl_jax

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "experiments" / "results").glob("lenet300_*.json"))


def test_there_are_results():
    assert {path.stem for path in RESULTS} >= {"lenet300_mnist", "lenet300_mnist_5k"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_readme_quotes_the_file(path):
    result = json.loads(path.read_text())
    assert path.stem == f"{result['experiment']}_{result['dataset']['name']}"
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


def test_the_compressed_files_of_the_results_are_there():
    """And are those of the result: same size, same kept units."""
    result = json.loads((ROOT / "experiments" / "results" / "lenet300_mnist.json").read_text())
    for run in result["runs"]:
        path = ROOT / "experiments" / "results" / f"lenet300_mnist_seed{run['seed']}.bcdl"
        assert path.stat().st_size == run["file_bytes"]
        layers = bcdl_jax.summarize(path.read_bytes())
        assert [layer.kept[0] for layer in layers] == run["kept_units"]
        assert [layer.bits for layer in layers] == run["bits"]


def test_the_readme_quotes_the_speed_of_inference():
    result = json.loads((ROOT / "experiments" / "results" / "inference.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert result["command"] == "python -m experiments.benchmark_inference"
    for entry in result["results"]:
        before, after = entry["multiply_adds"]
        row = rf"\| {entry['title']} \| {entry['batch']} \|.*{entry['speed_up']['shrunk']:.2f}x \| {before / after:.2f}x \|\n"
        assert re.search(row, readme), row
