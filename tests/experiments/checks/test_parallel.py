import pytest

from experiments.checks import parallel as parallel_check


# The hardest cases of each way. The program itself runs all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "way"), [("dense", "mesh"), ("convolutional", "mesh"), ("relu", "pmap"), ("dense", "processes")]
)
def test_twenty_steps_on_many_devices_are_those_on_one(net, way, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # Compilation takes most of the time.
    found = parallel_check.in_child_processes(net, way)
    assert (found["devices"], found["processes"]) == ((2, 2) if way == "processes" else (8, 1))
    for name in ("params", "gradients"):
        assert 0 < found[name] <= 1e-5, found


def test_a_difference_that_is_too_large_fails(monkeypatch, capsys):
    measured = {"devices": 8, "processes": 1, "params": 1e-7, "gradients": 2e-5}
    monkeypatch.setattr(parallel_check, "in_child_processes", lambda net, way: measured)
    assert parallel_check.main(["--nets", "dense", "--ways", "mesh"]) == 1
    assert "2.0e-05" in capsys.readouterr().out
