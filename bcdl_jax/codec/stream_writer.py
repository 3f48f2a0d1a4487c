"""The writer of the coded stream: sets of kept indices and arrays of integers, in one run of the range coder.

The writer tries several codings of a set or an array and takes the shortest one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bcdl_jax.codec.bitmap import BitmapModel
from bcdl_jax.codec.format import CODED_PER_BYTE, CONSTANT_WIDTH, RAW_FLAGS, CodedLimit, IntegerCoding, SetCoding
from bcdl_jax.codec.integer_coding import encode_integers, layout_of
from bcdl_jax.codec.range_coder import Encoder
from bcdl_jax.compression.quantization import integer_bits

# The number of integers on which the coding with neighbours is compared with the plain one.
_SAMPLE = 2**14


class StreamWriter:
    """Writes sets of kept indices and arrays of integers.

    Args:
      latest_sets: The latest set of each size, where the writer continues after other sets.
    """

    def __init__(self, latest_sets: Mapping[int, np.ndarray] | None = None) -> None:
        self._coder = Encoder()
        self._latest_sets = dict(latest_sets or {})
        self._coded = 0  # The number of coded numbers so far, which a reader limits.

    def write_set(self, flags: np.ndarray) -> None:
        """Writes a set of kept indices, an array of bool."""
        if flags.all():
            self._coder.encode_raw(SetCoding.ALL, 2)
        else:
            latest = self._latest_sets.get(flags.size)
            removed, kept = np.flatnonzero(~flags), np.flatnonzero(flags)
            changes = 1 + min(len(removed), len(kept))
            candidates = [
                _Candidate(
                    coding,
                    functools.partial(_write_indices, indices=listed),
                    len(listed),
                    _most_bits(len(listed), changes),
                )
                for coding, listed in ((SetCoding.REMOVED, removed), (SetCoding.KEPT, kept))
            ]
            write_bitmap = functools.partial(_write_bitmap, flags=flags, latest=latest)
            bitmap = _Candidate(SetCoding.BITMAP, write_bitmap, flags.size, _most_bits(flags.size, 2 * changes))
            for size, candidate in self._by_size([*candidates, bitmap]):
                if candidate is bitmap and candidate.coded > CODED_PER_BYTE * size:
                    continue
                if self._write_within_limit(candidate):
                    break
            else:
                self._coder.encode_raw(SetCoding.KEPT, 2)
                _write_raw_flags(self._coder, flags)
                self._coded += flags.size
        self._latest_sets[flags.size] = flags

    def write_integers(self, values: np.ndarray) -> None:
        """Writes an array of integers of magnitudes up to ``MAX_CODED_MAGNITUDE``."""
        if not values.size:
            return
        row = values.shape[-1] if values.ndim > 1 and values.size > values.shape[-1] else 0
        flat = values.ravel().astype(np.int64)
        if flat.size > 1 and (flat == flat[0]).all():
            self._write_raw(flat, 0)
            return
        width = max(1, int(integer_bits(flat)))
        raw_bits = 6 + width * flat.size
        for _, candidate in self._by_size(_integer_candidates(flat, row)):
            least = candidate.coded / 4 if candidate.coding != IntegerCoding.SPARSE else 0
            if self._write_within_limit(candidate, least, raw_bits):
                return
        self._write_raw(flat, width)

    def _by_size(self, candidates: Sequence[_Candidate]) -> list[tuple[int, _Candidate]]:
        """The candidates that a reader may accept, with the number of bytes of each, the shortest one first."""
        possible = [each for each in candidates if self._keeps_to_limit(each, each.most_bits)]
        if len(possible) < 2:
            return [(0, each) for each in possible]
        sizes = [(_size(each.write), each.coding, each) for each in possible]
        return [(size, each) for size, _, each in sorted(sizes, key=lambda entry: entry[:2])]

    def _keeps_to_limit(self, candidate: _Candidate, bits: float) -> bool:
        """Whether a reader accepts the coded numbers so far and those of a candidate that takes ``bits`` bits.

        Long runs of equal numbers take almost no bits, and a reader refuses too many coded numbers for the bytes of a file.
        """
        return self._coded + candidate.coded <= CodedLimit.of_file((self._coder.bits_written + bits) / 8).left

    def _write_within_limit(self, candidate: _Candidate, least: float = 0, below: float = math.inf) -> bool:
        """Writes a candidate if a reader accepts it and it takes at least ``least`` and less than ``below`` bits.

        Returns:
          False if it is not written.
        """
        before = self._coder.copy()
        self._coder.encode_raw(candidate.coding, 2)
        candidate.write(self._coder)
        bits = self._coder.bits_written - before.bits_written - 2
        if least <= bits < below and self._keeps_to_limit(candidate, 0):
            self._coded += candidate.coded
            return True
        self._coder = before
        return False

    def size_with(self, array: np.ndarray, sets: Sequence[np.ndarray]) -> int:
        """The number of bytes that these sets, and the array's integers at their indices, take in a stream of their own."""
        trial = StreamWriter(self._latest_sets)
        for flags in sets:
            trial.write_set(flags)
        trial.write_integers(array[np.ix_(*sets)] if array.ndim else array)
        return len(trial.finish())

    def finish(self) -> bytes:
        """The bytes of the stream. The writer cannot be used afterwards."""
        return self._coder.finish()

    def _write_raw(self, values: np.ndarray, width: int) -> None:
        """Writes each integer in ``width`` bits, or, with a width of 0, the one integer of a constant array."""
        self._coder.encode_raw(IntegerCoding.RAW, 2)
        self._coder.encode_raw(width, 6)
        if not width:
            self._coder.encode_raw(int(values[0]) & ((1 << CONSTANT_WIDTH) - 1), CONSTANT_WIDTH)
            return
        self._coded += values.size
        for value in values.tolist():
            self._coder.encode_raw(value & ((1 << width) - 1), width)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """One coding of a set or an array.

    Attributes:
      coding: Number of the coding.
      write: Function that writes the content to a coder.
      coded: Number of coded integers or bits of a bitmap, which a reader limits.
      most_bits: A bound on the bits that it takes.
    """

    coding: int
    write: Callable[[Encoder], None]
    coded: int
    most_bits: float


def _integer_candidates(flat: np.ndarray, row: int) -> list[_Candidate]:
    """The codings that may be shorter than raw bits, for a flattened array with rows of length ``row`` (0: no rows)."""
    candidates, nonzero = [], int(np.count_nonzero(flat))
    if flat.size > 1:
        # A part of the array shows whether neighbours help.
        sample = functools.partial(_write_scaled, values=flat[:_SAMPLE])
        neighbours_help = row and _size(functools.partial(sample, row=row)) < _size(functools.partial(sample, row=0))
        coding, used_row = (IntegerCoding.WITH_NEIGHBOURS, row) if neighbours_help else (IntegerCoding.PLAIN, 0)
        write = functools.partial(_write_scaled, values=flat, row=used_row)
        candidates.append(_Candidate(coding, write, flat.size, _most_bits(flat.size, nonzero)))
    if 4 * nonzero < flat.size:
        write = functools.partial(_write_sparse, values=flat)
        candidates.append(_Candidate(IntegerCoding.SPARSE, write, 2 * nonzero, _most_bits(2 * nonzero, 2 * nonzero)))
    return candidates


def _most_bits(count: int, nonzero: int) -> float:
    """A bound on the bits of ``count`` coded numbers, of which ``nonzero`` are not zero. A long run of zeros takes almost nothing."""
    return 64 * nonzero + count / 50 + 1000


def _size(write: Callable[[Encoder], None]) -> int:
    coder = Encoder()
    write(coder)
    return len(coder.finish())


def _write_scaled(coder: Encoder, values: np.ndarray, row: int) -> None:
    scale = int(np.clip(np.rint(8 * np.log2(1 + np.abs(values).mean())), 0, 255))
    coder.encode_raw(scale, 8)
    encode_integers(coder, values, layout_of(row), scale)


def _write_sparse(coder: Encoder, values: np.ndarray) -> None:
    indices = np.flatnonzero(values)
    _write_indices(coder, indices)
    if len(indices):
        _write_scaled(coder, values[indices], 0)


def _write_indices(coder: Encoder, indices: np.ndarray) -> None:
    """Writes an ascending list of indices as the gaps between them."""
    coder.encode_raw(len(indices), 32)
    if len(indices):
        _write_scaled(coder, np.diff(indices, prepend=-1) - 1, 0)


def _write_raw_flags(coder: Encoder, flags: np.ndarray) -> None:
    """Writes a raw bit for each index, in place of a list of indices."""
    coder.encode_raw(RAW_FLAGS, 32)
    for bit in flags.astype(int).tolist():
        coder.encode_raw(bit, 1)


def _write_bitmap(coder: Encoder, flags: np.ndarray, latest: np.ndarray | None) -> None:
    model = BitmapModel(latest)
    for index, bit in enumerate(flags.astype(int).tolist()):
        coder.encode([bit], [model.probability(index)])
        model.update(bit)
