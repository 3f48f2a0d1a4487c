import dataclasses
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

import bcdl_jax
from experiments.benchmarks import inference
from experiments.benchmarks.contestants import CASES, masks_of


@pytest.mark.slow
def test_the_shrunk_networks_have_the_kept_sizes(capsys):
    for name, widths in (("lenet300", (278, 98, 13)), ("lenet5", (76, 16))):
        case = CASES[name]
        images = np.zeros((2, *case.image), np.uint8)
        variables = jax.jit(case.model.init)(jax.random.key(0), images)
        masks = masks_of(case, variables, 0)
        pruned = jax.tree.map(np.multiply, variables, masks)
        _, _, report = bcdl_jax.shrink(case.model.apply, pruned, images)
        dense = [leaf.after for leaf in report.leaves if "Dense" in leaf.path and leaf.path.endswith("kernel")]
        assert dense == list(zip(widths, (*widths[1:], 10), strict=True))
    convolutions = [leaf.after for leaf in report.leaves if "Conv" in leaf.path and leaf.path.endswith("kernel")]
    assert convolutions == [(5, 5, 1, 5), (5, 5, 5, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("onnx", [True, False])
def test_the_benchmark_prints_all_sides_and_writes_its_files(onnx, tmp_path, monkeypatch, capsys):
    if not onnx:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        pytest.importorskip("onnx")
    case = dataclasses.replace(CASES["lenet300"], batches=(1, 64))
    monkeypatch.setitem(CASES, "lenet300", case)
    arguments = ["--nets", "lenet300", "--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path / "out")]
    assert inference.main(arguments) == 0
    out = capsys.readouterr().out
    assert "LeNet-300-100, GNJ, batch 64" in out
    assert out.count("9.29x fewer multiply-adds") == 2
    assert ("onnxruntime or onnx is not installed" in out) != onnx
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["result.json", "speed.png"]
    results = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    assert [result["batch"] for result in results] == [1, 64]
    engines = ["XLA", "XLA, for_cpu", *["onnxruntime"] * onnx]
    for result in results:
        assert [(time["side"], time["engine"]) for time in result["times"]] == [
            (side, engine) for side in ("dense", "masked", "shrunk") for engine in engines
        ]
        fastest = {
            side: min((time["seconds"] for time in result["times"] if time["side"] == side), key=np.median)
            for side in ("dense", "masked", "shrunk")
        }
        for side in ("masked", "shrunk"):
            expected = np.median(np.divide(fastest["dense"], fastest[side]))
            assert result["speed_up"][side] == pytest.approx(expected)
    assert inference.main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nets", "resnet"], "--nets names resnet; allowed are lenet300"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--seconds", "0"], "--seconds is 0.0"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message, tmp_path, capsys):
    assert inference.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert message in capsys.readouterr().err
