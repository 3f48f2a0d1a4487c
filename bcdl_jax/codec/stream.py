"""The coded stream: sets of kept indices and arrays of integers, in one run of the range coder.

The writer tries several codings of a set or an array and takes the shortest one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bcdl_jax.codec.format import (
    CODED_PER_BYTE,
    IntegerCoding,
    Limits,
    SetCoding,
    damaged,
    two_complement_width,
)
from bcdl_jax.codec.integer_coding import decode_integers, encode_integers, layout_of
from bcdl_jax.codec.range_coder import Decoder, Encoder

# The number of integers on which the coding with neighbours is compared with the plain one.
_SAMPLE = 2**14
_CONSTANT_WIDTH = 33  # The raw bits of the one integer of a constant array.


class StreamWriter:
    """Writes sets of kept indices and arrays of integers.

    Args:
      latest_sets: The latest set of each size, where the writer continues after other sets.
    """

    def __init__(self, latest_sets: Mapping[int, np.ndarray] | None = None) -> None:
        self._coder = Encoder()
        self._latest_sets = dict(latest_sets or {})

    def write_set(self, flags: np.ndarray) -> None:
        """Writes a set of kept indices, an array of bool."""
        if flags.all():
            self._coder.encode_raw(SetCoding.ALL, 2)
        else:
            latest = self._latest_sets.get(flags.size)
            removed, kept = np.flatnonzero(~flags), np.flatnonzero(flags)
            best = _smallest(
                [
                    _Candidate(SetCoding.REMOVED, functools.partial(_write_indices, indices=removed)),
                    _Candidate(SetCoding.KEPT, functools.partial(_write_indices, indices=kept)),
                    _Candidate(
                        SetCoding.BITMAP, functools.partial(_write_bitmap, flags=flags, latest=latest), flags.size
                    ),
                ]
            )
            assert best is not None  # Lists of indices always keep to the limits of a reader.
            self._coder.encode_raw(best.coding, 2)
            best.write(self._coder)
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
        width = two_complement_width(flat)
        raw_bits = 6 + width * flat.size
        candidates = _integer_candidates(flat, row)
        best = candidates[0] if len(candidates) == 1 else _smallest(candidates, raw_bits)
        if best is not None:
            before = self._coder.copy()
            self._coder.encode_raw(best.coding, 2)
            best.write(self._coder)
            bits = self._coder.bits_written - before.bits_written - 2
            if bits < raw_bits and best.coded <= CODED_PER_BYTE * bits / 8:
                return
            self._coder = before
        self._write_raw(flat, width)

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
            self._coder.encode_raw(int(values[0]) & ((1 << _CONSTANT_WIDTH) - 1), _CONSTANT_WIDTH)
            return
        for value in values.tolist():
            self._coder.encode_raw(value & ((1 << width) - 1), width)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """One coding of a set or an array.

    Attributes:
      coding: Number of the coding.
      write: Function that writes the content to a coder.
      coded: Number of coded integers or bitmap entries, which the limits of a reader must allow for the bytes written; 0 for lists of
        indices and sparse arrays, which always keep to the limits.
    """

    coding: int
    write: Callable[[Encoder], None]
    coded: int = 0


def _integer_candidates(flat: np.ndarray, row: int) -> list[_Candidate]:
    """The codings that may be shorter than raw bits, for a flattened array with rows of length ``row`` (0: no rows)."""
    candidates = []
    if flat.size > 1:
        # A part of the array shows whether neighbours help.
        sample = functools.partial(_write_scaled, values=flat[:_SAMPLE])
        neighbours_help = row and _size(functools.partial(sample, row=row)) < _size(functools.partial(sample, row=0))
        coding, used_row = (IntegerCoding.WITH_NEIGHBOURS, row) if neighbours_help else (IntegerCoding.PLAIN, 0)
        write = functools.partial(_write_scaled, values=flat, row=used_row)
        candidates.append(_Candidate(coding, write, flat.size))
    if 4 * np.count_nonzero(flat) < flat.size:
        candidates.append(_Candidate(IntegerCoding.SPARSE, functools.partial(_write_sparse, values=flat)))
    return candidates


def _smallest(candidates: Sequence[_Candidate], below: float = math.inf) -> _Candidate | None:
    """The candidate with the fewest bytes, among those within the limits and with fewer than ``below`` bits; None if there is none."""
    sizes = []
    for candidate in candidates:
        size = _size(candidate.write)
        if candidate.coded <= CODED_PER_BYTE * size and 8 * size < below:
            sizes.append((size, candidate.coding, candidate))
    return min(sizes, key=lambda entry: entry[:2])[2] if sizes else None


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


def _write_bitmap(coder: Encoder, flags: np.ndarray, latest: np.ndarray | None) -> None:
    model = _BitmapModel(latest)
    for index, bit in enumerate(flags.astype(int).tolist()):
        coder.encode([bit], [model.probability(index)])
        model.update(bit)


class StreamReader:
    """Reads the sets and arrays of a ``StreamWriter``, in the same order.

    Args:
      data: The bytes of the stream.
      limits: The limits of the file.
    """

    def __init__(self, data: bytes, limits: Limits) -> None:
        self._coder = Decoder(data)
        self._length = len(data)
        self._limits = limits
        self._latest_sets: dict[int, np.ndarray] = {}

    @property
    def bits_read(self) -> float:
        """The amount of information read so far, in bits."""
        return self._coder.bits_read

    @property
    def bytes_left(self) -> int:
        """The number of bytes that were not read."""
        return self._coder.bytes_left

    def read_set(self, size: int) -> np.ndarray:
        """The next set of kept indices, an array of bool of length ``size``."""
        coding = self._coder.decode_raw(2)
        if coding == SetCoding.ALL:
            flags = np.ones(size, bool)
        elif coding == SetCoding.BITMAP:
            flags = self._read_bitmap(size)
        else:
            flags = np.full(size, coding == SetCoding.REMOVED)
            flags[self._read_indices(size)] = coding == SetCoding.KEPT
        self._check_end()
        self._latest_sets[size] = flags
        return flags

    def read_integers(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The next array of integers. Raises CompressedFileError if one of them is out of the range of ``dtype``."""
        size = math.prod(shape)
        if not size:
            return np.zeros(shape, dtype)
        coding = self._coder.decode_raw(2)
        if coding == IntegerCoding.RAW:
            values = self._read_raw(size)
        elif coding == IntegerCoding.SPARSE:
            values = self._read_sparse(size)
        elif coding == IntegerCoding.PLAIN:
            values = self._read_scaled(size, 0)
        elif len(shape) > 1:
            values = self._read_scaled(size, shape[-1])
        else:
            raise damaged("an array without rows is coded by rows")
        self._check_end()
        low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        if values.min() < low or values.max() > high:
            raise damaged(f"an integer is out of the range of {dtype.name}")
        return values.astype(dtype).reshape(shape)

    def _read_raw(self, size: int) -> np.ndarray:
        width = self._coder.decode_raw(6)
        constant = width == 0
        if constant:
            self._limits.use_elements(size)
        else:
            self._limits.use_coded(size)
        if width > _CONSTANT_WIDTH or size * width > 8 * (self._length + 8):
            raise damaged("bytes are missing")
        width = width or _CONSTANT_WIDTH
        sign = 1 << (width - 1)
        raw = np.array([self._coder.decode_raw(width) for _ in range(1 if constant else size)], np.int64)
        return np.broadcast_to((raw ^ sign) - sign, size)

    def _read_scaled(self, count: int, row: int) -> np.ndarray:
        self._limits.use_coded(count)
        scale = self._coder.decode_raw(8)
        values = decode_integers(self._coder, count, layout_of(row), scale)
        self._check_end()
        return values

    def _read_sparse(self, size: int) -> np.ndarray:
        indices = self._read_indices(size)
        self._limits.use_elements(size)
        values = np.zeros(size, np.int64)
        if len(indices):
            values[indices] = self._read_scaled(len(indices), 0)
            if not values[indices].all():
                raise damaged("a sparse array lists a zero")
        return values

    def _read_indices(self, size: int) -> np.ndarray:
        count = self._coder.decode_raw(32)
        if count > size:
            raise damaged("a list of indices is too long")
        if not count:
            return np.zeros(0, int)
        gaps = self._read_scaled(count, 0)
        indices = np.cumsum(gaps + 1) - 1
        if (gaps < 0).any() or indices[-1] >= size:
            raise damaged("an index is out of range")
        return indices

    def _read_bitmap(self, size: int) -> np.ndarray:
        self._limits.use_coded(size)
        model, bits = _BitmapModel(self._latest_sets.get(size)), []
        for index in range(size):
            (bit,) = self._coder.decode([model.probability(index)])
            model.update(bit)
            bits.append(bit)
        return np.array(bits, bool)

    def _check_end(self) -> None:
        if self._coder.bytes_beyond_the_end > 4:
            raise damaged("it ends within its coded stream")


class _BitmapModel:
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
