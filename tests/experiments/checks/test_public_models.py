import jax
import pytest

import bcdl_jax
from experiments.checks.public_models import command, flax_models

MLP = ["--only", "flax/linen_mlp", "--zeros", "own"]


def test_a_model_passes_all_checks(tmp_path, capsys):
    assert command.main([*MLP, "--out", str(tmp_path)]) == 0
    table = (tmp_path / "public_models.md").read_text()
    assert table in capsys.readouterr().out
    row = table.splitlines()[2].strip("| ").split(" | ")
    assert len(row) == len(command.COLUMNS)
    assert row[3:5] == ["3,668 -> 1,940", "2,592 -> 1,344"]  # 16 of 24 units are left in both layers.
    assert row[7:] == ["1, 2, 5", *["ok"] * 5]


@pytest.mark.parametrize(
    "change", [lambda array: array + 1, pytest.param(lambda array: array.astype("float16"), marks=pytest.mark.slow)]
)
def test_a_file_of_other_weights_fails(change, tmp_path, monkeypatch):
    save = bcdl_jax.save
    monkeypatch.setattr(bcdl_jax, "save", lambda path, params: save(path, jax.tree.map(change, params)))
    assert command.main([*MLP, "--out", str(tmp_path)]) == 1
    assert "The loaded params differ from the saved params." in (tmp_path / "public_models.md").read_text()


def test_packages_that_are_not_installed_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(["--only", "keras", "equinox/mlp", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "public_models.md").read_text()
    assert f"keras is not installed: {len(command.SOURCES['keras'].models)} models skipped" in table
    assert "equinox is not installed: 1 model skipped" in table


def test_bad_arguments(tmp_path, capsys):
    assert command.main(["--only", "flax/no_model", "--out", str(tmp_path)]) == 2
    assert "--only is 'flax/no_model'; allowed are flax" in capsys.readouterr().err


def test_the_list_of_models_is_complete():
    assert list(flax_models.models()) == list(command.SOURCES["flax"].models)
