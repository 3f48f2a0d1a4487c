"""The reader of the coded stream. It raises CompressedFileError for a stream that contradicts the format."""

from __future__ import annotations

import math

import numpy as np

from bcdl_jax.codec.bitmap import BitmapModel
from bcdl_jax.codec.format import CONSTANT_WIDTH, RAW_FLAGS, CodedLimit, IntegerCoding, SetCoding, damaged
from bcdl_jax.codec.integer_coding import decode_integers, layout_of
from bcdl_jax.codec.range_coder import Decoder


class StreamReader:
    """Reads the sets and arrays of a ``StreamWriter``, in the same order.

    Args:
      data: The bytes of the stream.
      limit: The limit of the file on coded numbers.
    """

    def __init__(self, data: bytes, limit: CodedLimit) -> None:
        self._coder = Decoder(data)
        self._length = len(data)
        self._limit = limit
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
        if coding == IntegerCoding.SPARSE:
            indices, values = self._read_sparse(size)
            array = np.zeros(size, dtype)
            array[indices] = _in_range(values, dtype)
            return array.reshape(shape)
        if coding == IntegerCoding.RAW:
            values = self._read_raw(size)
        elif coding == IntegerCoding.PLAIN:
            values = self._read_scaled(size, 0)
        elif len(shape) > 1:
            values = self._read_scaled(size, shape[-1])
        else:
            raise damaged("an array without rows is coded by rows")
        self._check_end()
        return _in_range(values, dtype).reshape(shape)

    def _read_raw(self, size: int) -> np.ndarray:
        width = self._coder.decode_raw(6)
        constant = width == 0
        if not constant:
            self._limit.use(size)
        if width > CONSTANT_WIDTH or size * width > 8 * (self._length + 8):
            raise damaged("bytes are missing")
        width = width or CONSTANT_WIDTH
        sign = 1 << (width - 1)
        raw = np.array([self._coder.decode_raw(width) for _ in range(1 if constant else size)], np.int64)
        return np.broadcast_to((raw ^ sign) - sign, size)

    def _read_scaled(self, count: int, row: int) -> np.ndarray:
        self._limit.use(count)
        scale = self._coder.decode_raw(8)
        values = decode_integers(self._coder, count, layout_of(row), scale)
        self._check_end()
        return values

    def _read_sparse(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The indices and the values of all integers that are not zero."""
        indices = self._read_indices(size)
        values = self._read_scaled(len(indices), 0) if len(indices) else np.zeros(0, np.int64)
        if not values.all():
            raise damaged("a sparse array lists a zero")
        return indices, values

    def _read_indices(self, size: int) -> np.ndarray:
        count = self._coder.decode_raw(32)
        if count == RAW_FLAGS:
            self._limit.use(size)
            return np.flatnonzero([self._coder.decode_raw(1) for _ in range(size)])
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
        self._limit.use(size)
        model, bits = BitmapModel(self._latest_sets.get(size)), []
        for index in range(size):
            (bit,) = self._coder.decode([model.probability(index)])
            model.update(bit)
            bits.append(bit)
        return np.array(bits, bool)

    def _check_end(self) -> None:
        if self._coder.bytes_beyond_the_end > 4:
            raise damaged("it ends within its coded stream")


def _in_range(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The integers in the given type. Raises CompressedFileError if one of them is out of its range."""
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if values.size and (values.min() < low or values.max() > high):
        raise damaged(f"an integer is out of the range of {dtype.name}")
    return values.astype(dtype)
