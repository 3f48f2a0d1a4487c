"""The README's example is run as it stands."""

import re
from pathlib import Path

import pytest

import bcdl_jax

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    exec("\n".join(blocks), names)
    pruned, reduced = map(float, re.fullmatch(r"([\d.]+)x, ([\d.]+)x\n", capsys.readouterr().out).groups())
    assert 1 <= pruned < reduced


@pytest.mark.parametrize("name", sorted(set(re.findall(r"bcdl_jax\.([A-Za-z_]+)", README.read_text()))))
def test_names_in_the_readme_exist(name):
    assert hasattr(bcdl_jax, name)
    assert getattr(bcdl_jax, name).__doc__
    assert name in bcdl_jax.__all__
