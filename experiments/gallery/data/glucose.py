"""Blood glucose of one person, every five minutes from March to October 2010, from bokeh-sampledata, to which it was given as public domain."""

from __future__ import annotations

import csv
import gzip

import numpy as np

from experiments.gallery.data.packages import packaged_file, splits_of
from experiments.gallery.entry import Splits
from experiments.gallery.networks.series import LENGTH

# The forecasts: 15, 30 and 60 minutes after the last value, in steps of five minutes.
STEPS = (3, 6, 12)
# The largest difference between the time of a step and five minutes, in seconds.
_STEP_SECONDS, _TOLERANCE = 300, 90
# The first times of the validation part and of the test part.
_BOUNDARIES = np.array(["2010-08-15", "2010-09-10"], "datetime64[s]")


def glucose(_: str | None = None) -> Splits:
    """Windows of three hours [n, 36, 1] and the values after them [n, 3], in mg/dl. The parts follow each other in time."""
    with gzip.open(packaged_file("bokeh_sampledata", "_data/CGM.csv.gz"), "rt") as file:
        lines = list(csv.DictReader(file))
    times = np.array([line["datetime"] for line in lines], "datetime64[s]")
    values = np.array([line["glucose"] for line in lines], np.float32)
    length = LENGTH + STEPS[-1]
    differences = np.diff(times).astype(int) - _STEP_SECONDS
    gaps = np.concatenate([[0], np.cumsum(np.abs(differences) > _TOLERANCE)])
    starts = np.arange(len(values) - length + 1)
    ends = starts + length - 1
    parts = np.searchsorted(_BOUNDARIES, times, "right")
    # A window without a gap, within one part.
    starts = starts[(gaps[starts] == gaps[ends]) & (parts[starts] == parts[ends])]
    inputs = values[starts[:, None] + np.arange(LENGTH)][..., None]
    targets = values[starts[:, None] + LENGTH - 1 + np.array(STEPS)]
    return splits_of((inputs, targets), [np.flatnonzero(parts[starts] == part) for part in range(3)])
