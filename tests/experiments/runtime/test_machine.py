import importlib.metadata

import numpy as np
import pytest

from experiments.runtime import machine


@pytest.mark.slow
def test_the_peak_memory_is_that_of_the_process():
    before = machine.peak_process_bytes()
    size = before + 10**8
    np.ones(size, np.uint8)
    assert size < machine.peak_process_bytes() < 3 * size


def test_the_peak_memory_is_the_same_in_both_units():
    assert machine.peak_process_megabytes() == pytest.approx(machine.peak_process_bytes() / 2**20, abs=1)


def test_versions_leave_out_packages_that_are_not_installed():
    found = machine.versions("no-such-package")
    assert list(found) == ["python", "jax", "jaxlib", "flax", "optax", "numpy"]
    assert found["jax"] == importlib.metadata.version("jax")
    assert list(machine.package_versions()) == ["jax", "jaxlib", "flax", "optax"]
