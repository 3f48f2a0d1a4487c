import json

import pytest

from experiments import registry, table
from experiments.report import tables
from experiments.report.published import MODELS, PAPER


def result(experiment="lenet5", method="ghs", dataset="mnist", **changes):
    mean = {
        "test_error": {"pretrained": 0.9, "trained": 1.1, "pruned": 1.0, "reduced": 0.96, "file": 0.97},
        "rate_paper": {"pruned": 150.0, "reduced": 420.4, "maximum": 800.0},
        "kept_weights": 4305,
        "file_bytes": 2000.0,
        "ratio_file": 862.2,
    }
    run = {"failure": None, "total_weights": 430_500, "file_bytes": 2000, "test_error": {"file": 0.97}}
    return {
        "experiment": experiment,
        "method": method,
        "dataset": {"name": dataset},
        "command": f"python -m experiments.{experiment} --method {method}",
        "seconds": 120,
        "machine": "a machine",
        "mean": mean,
        "runs": [run, run],
    } | changes


def write(directory, value, name="one.json"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(value))
    return directory


def test_our_row_is_below_the_papers(tmp_path, capsys):
    committed = write(tmp_path / "committed", result())
    assert table.main(["--results", str(committed), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if "156x (1.0)" in line)
    ours = lines[place + 1]
    for cell in ("here (2 seeds)", "1 %", "150x (1.00)", "420x (0.96)", "800x (0.97)", "2,000 B, 862x (0.97)", "0.90"):
        assert cell in ours
    assert sum("not run here" in line for line in lines) == len(PAPER) - 1
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert "| group horseshoe prior, here (2 seeds) | 1 % | 150x (1.00) | 420x (0.96) | 800x (0.97) |" in markdown
    assert "python -m experiments.lenet5 --method ghs: 2 minutes, a machine" in markdown
    assert (tmp_path / "out" / "table.png").stat().st_size > 1000


def test_a_later_directory_replaces_results_and_other_data_sets_are_left_out(tmp_path):
    first = write(tmp_path / "first", result(seconds=1))
    second = write(tmp_path / "second" / "run", result(seconds=2), "result.json")
    write(second.parent, result(method="gnj", dataset="mnist_5k"))
    write(second.parent, {"results": []}, "benchmark.json")
    quick = "python -m experiments.lenet5 --quick"
    write(second.parent, result(method="dc", command=quick, dataset="mnist_5k"), "quick.json")
    write(second.parent, result(dataset="kmnist"), "unknown.json")
    found, left_out = tables.read_results([first, second.parent], ["mnist"])
    assert set(found) == {tables.Key("lenet5", 1, "ghs")}
    assert found["lenet5", 1, "ghs"]["seconds"] == 2
    assert left_out == [
        f"Left out: {second.parent}/one.json is of mnist_5k; --dataset mnist_5k shows it.",
        f"Left out: {second.parent}/quick.json comes from a --quick run, whose figures mean nothing.",
        f"Left out: {second.parent}/unknown.json is of kmnist.",
    ]


def test_the_title_names_another_data_set(tmp_path, capsys):
    made = write(tmp_path / "made", result(dataset="mnist_5k"))
    assert table.main(["--results", str(made), "--dataset", "mnist_5k", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "LeNet-5-Caffe, MNIST; ours: mnist_5k" in lines
    assert "VGG, CIFAR-10; ours: mnist_5k" in lines
    assert any("not run here: python -m experiments.lenet5 --method dc --dataset mnist_5k" in line for line in lines)
    assert table.main(["--results", str(made), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "VGG, CIFAR-10" in out
    assert "one.json is of mnist_5k" in out
    assert table.main(["--results", str(made), "--dataset", "cifar10", "--out", str(tmp_path / "out")]) == 0
    assert "LeNet" not in capsys.readouterr().out.split("VGG")[0]


def test_a_narrower_network_has_a_row_of_its_own(tmp_path, capsys):
    stored = {"name": "cifar10", "remark": "The images are stored as JPEG."}
    made = write(tmp_path / "made", result("vgg", "gnj", width=0.25) | {"dataset": stored})
    assert table.main(["--results", str(made), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if "14x (8.6)" in line)
    assert "not run here: python -m experiments.vgg --method gnj" in lines[place + 1]
    assert "group normal-Jeffreys prior, here at 0.25 times the width (2 seeds)" in lines[place + 2]
    assert any("data set cifar10. The images are stored as JPEG." in line for line in lines)


def test_the_row_of_a_run_without_a_finished_seed_says_so():
    assert tables.our_row(result(mean=None))[1] == "no seed was trained to the end"


def test_committed_results_make_a_table():
    results, left_out = tables.read_results([tables.COMMITTED], ["mnist"])
    assert not left_out
    assert not tables.read_results([tables.COMMITTED.parent / "results" / ".." / "results"], ["mnist"])[1]
    assert ("lenet300", 1, "gnj") in results
    text = tables.as_text(tables.make_table(results))
    assert all(tables.title_of(name) in text for name in registry.EXPERIMENTS)


def test_published_figures_name_known_methods_and_networks():
    assert {row.method for row in PAPER} == set(registry.method_names())
    assert {row.network for row in PAPER} == set(registry.EXPERIMENTS)
    assert {model.network for model in MODELS} <= set(registry.EXPERIMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--results", "nowhere"], "--results nowhere is not a directory"),
        (["--run-quick", "--dataset", "mnist"], "--dataset is given with --run-quick"),
        (["--dataset", "cats"], "--dataset is 'cats'; allowed are"),
    ],
)
def test_errors_are_one_sentence(arguments, message, tmp_path, capsys):
    assert table.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_error_names_a_damaged_result(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    assert table.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "bad.json cannot be read as a result" in capsys.readouterr().err
    for damage in ({"dataset": "mnist"}, {"command": None}, {"mean": {}}, {"experiment": "resnet"}, {"runs": []}):
        write(tmp_path, result() | damage, "bad.json")
        assert table.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        assert "bad.json is not the whole result of a run (" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert table.main(["--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'} is a file" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.slow
def test_every_method_runs_quickly(tmp_path, capsys):
    assert table.main(["--run-quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 runs" in out
    assert sum("here (1 seed)" in line for line in out.splitlines()) == 12
