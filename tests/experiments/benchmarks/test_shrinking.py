import pytest

from experiments.benchmarks import shrinking
from experiments.benchmarks.large_models import LARGE_MODELS


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_MODELS)
def test_a_model_shrinks(name, capsys):
    assert shrinking.main(["--models", name, "--tiny"]) == 0
    printed = capsys.readouterr().out
    assert LARGE_MODELS[name].title in printed
    rate = float(printed.split("multiply-adds ")[1].split("x")[0])
    assert rate > 1.01


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        shrinking.main(["--models", "alexnet"])
    assert "invalid choice: 'alexnet'" in capsys.readouterr().err
