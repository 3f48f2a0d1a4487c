"""The model of a bitmap, which the writer and the reader of the coded stream share."""

from __future__ import annotations

import numpy as np


class BitmapModel:
    """The probability that an index is kept, given the index before it and the same index in the latest set of the same size."""

    def __init__(self, latest: np.ndarray | None) -> None:
        self._latest = None if latest is None else latest.astype(int).tolist()
        self._counts = [[1, 1] for _ in range(9)]
        self._previous = 2
        self._current = self._counts[0]

    def probability(self, index: int) -> int:
        """The probability that ``index`` is kept, in units of 2^-16."""
        self._current = self._counts[3 * self._previous + (2 if self._latest is None else self._latest[index])]
        return min(max((self._current[1] << 16) // (self._current[0] + self._current[1]), 1), 65535)

    def update(self, bit: int) -> None:
        """Counts the bit of the index whose probability was given last."""
        self._current[bit] += 2
        self._previous = bit
