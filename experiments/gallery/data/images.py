"""CIFAR-10 and MNIST, as the project's other experiments read and split them."""

from __future__ import annotations

from experiments.gallery.entry import Examples, Splits
from experiments.io import data


def cifar10(data_dir: str | None) -> Splits:
    """CIFAR-10: images [n, 32, 32, 3] of uint8."""
    return _splits("cifar10", data_dir)


def mnist(data_dir: str | None) -> Splits:
    """MNIST: images [n, 28, 28, 1] of uint8."""
    return _splits("mnist", data_dir)


def _splits(name: str, data_dir: str | None) -> Splits:
    found = data.load(name, data_dir, replaceable=False)
    train, validation, test = (
        Examples(part.images, part.labels) for part in (found.train, found.validation, found.test)
    )
    return Splits(train, validation, test, found.remark)
