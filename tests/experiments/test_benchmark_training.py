import re

import numpy as np
import pytest

from experiments import benchmark_training, data


def test_bad_arguments_get_one_sentence(capsys):
    for arguments, message in (
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--examples", "-5"], "--examples is -5; it must be at least 1"),
        (["--examples", "10", "--batch-size", "20"], "--examples is 10; it must be at least --batch-size, 20"),
    ):
        assert benchmark_training.main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_it_trains_and_prints_what_it_compared(capsys, monkeypatch):
    def missing(*_):
        raise ImportError

    monkeypatch.setattr(benchmark_training, "torch_epoch", missing)
    assert benchmark_training.main(["--rounds", "2", "--examples", "256"]) == 0
    printed = capsys.readouterr().out
    assert "torch: not installed" in printed
    assert "256 images an epoch, batch 128" in printed
    losses = re.findall(r"bcdl_jax +\d+ images/s \(loss ([\d.]+)\)", printed)
    assert len(losses) == 2
    assert float(losses[1]) < float(losses[0])


def test_both_sides_train_the_same_network():
    """The loss of the first epoch agrees: same start distribution, same objective, same optimiser."""
    pytest.importorskip("torch")
    digits = data.load("mnist_5k").train
    images, labels = digits.images[np.arange(2560)], digits.labels[np.arange(2560)]
    ours, _ = benchmark_training.jax_epoch(images, labels, 128)
    theirs = benchmark_training.torch_epoch(images, labels, 128)
    assert ours() == pytest.approx(theirs(), rel=2e-3)
