import numpy as np
import pytest

from experiments.checks.differences import relative_difference

EXPECTED = {"a": np.array([2.0, -4.0]), "b": np.array([1.0, 0.0]), "empty": np.zeros((0, 3))}


def test_the_difference_is_relative_to_the_largest_value_of_its_array():
    assert relative_difference(EXPECTED, EXPECTED) == 0
    assert relative_difference(EXPECTED | {"a": np.array([2.5, -4.0])}, EXPECTED) == 0.125
    assert relative_difference({}, {}) == 0


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_in_any_array_is_an_infinite_difference(name, value):
    other = {"a": EXPECTED["a"] + 1e-7, "b": EXPECTED["b"] + 1e-7, "empty": EXPECTED["empty"]}
    broken = other | {name: np.array([1.0, value])}
    assert relative_difference(broken, EXPECTED) == np.inf
    assert relative_difference(EXPECTED, broken) == np.inf
    assert relative_difference(broken, broken) == np.inf


def test_other_shapes_are_an_infinite_difference():
    assert relative_difference(EXPECTED | {"b": np.ones(1)}, EXPECTED) == np.inf
    assert relative_difference([np.ones(2)], [np.ones(2), np.ones(2)]) == np.inf


def test_an_expected_array_of_zeros_has_no_tolerance():
    assert relative_difference(np.zeros(3), np.zeros(3)) == 0
    assert relative_difference(np.full(3, 1e-9), np.zeros(3)) > 1
