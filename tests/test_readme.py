"""The README's example is run as it stands."""

import re
from pathlib import Path

import pytest

import bcdl_jax

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(capsys, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 8
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks[:6]), names)
    printed = capsys.readouterr().out
    pruned, reduced = map(float, re.match(r"([\d.]+)x, ([\d.]+)x\n", printed).groups())
    assert 1 <= pruned < reduced
    assert int(re.search(r"(\d+) bytes on disk", printed)[1]) == (tmp_path / "model.bcdl").stat().st_size


def test_the_example_of_shrinking_prints_what_it_says_and_exports(capsys, tmp_path, monkeypatch):
    text = README.read_text()
    section = text[text.index("## Make it small") :]
    block, export = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    printed = capsys.readouterr().out
    # The difference of the outputs is rounding noise, which depends on the machine.
    assert re.sub(r"outputs: .*", "", printed) == re.sub(r"outputs: .*", "", shown)
    exec(export, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net.onnx",
        "net.safetensors",
        "net.stablehlo",
        "net_torch.safetensors",
    ]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"bcdl_jax\.([A-Za-z_]+)", README.read_text()))))
def test_names_in_the_readme_exist(name):
    assert hasattr(bcdl_jax, name)
    assert getattr(bcdl_jax, name).__doc__
    assert name in bcdl_jax.__all__
