"""Prices of diamonds, from the table that plotnine carries."""

from __future__ import annotations

import csv

import numpy as np

from experiments.gallery.data.packages import packaged_file, random_rows, splits_of
from experiments.gallery.entry import Splits

NUMBERS = ("carat", "depth", "table", "x", "y", "z")
KINDS = ("cut", "color", "clarity")
_SIZES = ("x", "y", "z")


def diamonds(_: str | None = None) -> Splits:
    """Rows [n, 26], standardised by the training rows, and prices in dollars [n, 1].

    Each kind becomes one column per value. Equal rows count once, and rows with a size of zero are left out.
    """
    with packaged_file("plotnine", "data/diamonds.csv").open(newline="") as file:
        names, *lines = csv.reader(file)
    unique = list(dict.fromkeys(map(tuple, lines)))
    table = {name: np.array(column) for name, column in zip(names, zip(*unique, strict=True), strict=True)}
    known = np.all([table[name].astype(float) > 0 for name in _SIZES], axis=0)
    columns = [table[name].astype(np.float32) for name in NUMBERS]
    columns += [table[kind] == value for kind in KINDS for value in np.unique(table[kind])]
    inputs = np.stack(columns, axis=1).astype(np.float32)[known]
    prices = table["price"].astype(np.float32)[known, None]
    rows = random_rows(len(inputs))
    train = inputs[rows[0]]
    return splits_of(((inputs - train.mean(0)) / train.std(0), prices), rows)
