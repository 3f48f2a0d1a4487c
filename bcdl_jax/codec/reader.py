"""The reader of the compressed file. It checks every number of a file, so that a damaged file raises CompressedFileError."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax.codec.format import (
    ARRAY_DTYPES,
    MAGIC,
    STEP_DTYPE_MASK,
    STEP_DTYPE_SHIFT,
    STEP_DTYPES,
    VERSION,
    ArrayFlag,
    ArrayHeader,
    CodedLimit,
    CompressedFileError,
    EntryKind,
    FileFlag,
    LayerFlag,
    LayerHeader,
    damaged,
    floats_of,
    levels_fit,
)
from bcdl_jax.codec.stream_reader import StreamReader
from bcdl_jax.compression.quantization import integer_bits
from bcdl_jax.compression.quantized_layer import QuantizedLayer

_HEAD = len(MAGIC) + 2  # The magic bytes, the version and the flags.
_CHECKSUM = 4
_MAX_VARINT_BYTES = 6


class FileReader:
    """Checks the content of a file and reads its headers; ``entries`` then decodes the entries one by one.

    Args:
      data: The bytes of the file.
      max_bytes: The largest memory that the content may take.

    Attributes:
      names: Names of the entries, or None if the file has no names.
      headers: Headers of the entries, in order.
    """

    def __init__(self, data: bytes, max_bytes: int) -> None:
        _check_head(data)
        cursor = _Cursor(data[_HEAD:-_CHECKSUM])
        count, copied = cursor.varint(), cursor.varint()
        if max(count, copied) > cursor.bytes_left:
            raise damaged("bytes are missing")
        self._copied = _Cursor(cursor.take_last(copied))
        self.names = _read_names(self._copied, count) if data[5] & FileFlag.NAMES else None
        self.headers = [_read_header(cursor) for _ in range(count)]
        memory = sum(header.memory for header in self.headers)
        if memory > max_bytes:
            raise CompressedFileError(
                f"The content of the file is too large: it takes {memory:,} bytes in memory, and max_bytes is {max_bytes:,}."
            )
        self._stream = StreamReader(cursor.take(cursor.bytes_left), CodedLimit.of_file(len(data)))

    def entries(self) -> Iterator[tuple[QuantizedLayer | np.ndarray, float]]:
        """Each layer or array, with the number of bytes that it takes. It can be used once."""
        for header in self.headers:
            bits, copied = self._stream.bits_read, self._copied.bytes_left
            value: QuantizedLayer | np.ndarray
            if isinstance(header, LayerHeader):
                value, floats = self._layer(header), sum(number.nbytes for number in header.stored_numbers)
            else:
                value, floats = self._array(header), 0
            copied -= self._copied.bytes_left
            yield value, (self._stream.bits_read - bits) / 8 + copied + floats
        if self._copied.bytes_left or self._stream.bytes_left:
            raise damaged("it has bytes after its last entry")

    def _layer(self, header: LayerHeader) -> QuantizedLayer:
        *window, fan_in, features = header.shape
        inputs = self._stream.read_set(fan_in * header.feature_groups)
        outputs = self._stream.read_set(features)
        rows = inputs if header.feature_groups == 1 else np.ones(fan_in, bool)
        sets = [*(np.ones(size, bool) for size in window), rows, outputs]
        kernel = _spread(self._stream.read_integers(_kept_shape(sets), np.dtype(np.int16)), sets)
        bias = None
        if LayerFlag.BIAS in header.flags:
            bias = np.zeros(features, np.int16)
            bias[outputs] = self._stream.read_integers((int(outputs.sum()),), bias.dtype)
        if header.levels is not None and not levels_fit(header.levels, kernel):
            raise damaged("the levels of a layer do not fit its integers")
        bits = header.bits or [int(integer_bits(array)) for array in (kernel, bias) if array is not None]
        return QuantizedLayer(
            kernel=jnp.asarray(kernel),
            kernel_step=_without_rounding(header.steps[0]),
            kernel_bits=jnp.asarray(bits[0], jnp.int32),
            bias=None if bias is None else jnp.asarray(bias),
            bias_step=None if bias is None else _without_rounding(header.steps[1]),
            bias_bits=None if bias is None else jnp.asarray(bits[1], jnp.int32),
            input_mask=jnp.asarray(inputs),
            output_mask=jnp.asarray(outputs),
            group_axis="output" if LayerFlag.OUTPUT_GROUPS in header.flags else "input",
            prunes_weights=LayerFlag.PRUNED_WEIGHTS in header.flags,
            kernel_levels=None if header.levels is None else _without_rounding(header.levels),
        )

    def _array(self, header: ArrayHeader) -> np.ndarray:
        sets = [self._stream.read_set(size) for size in header.shape]
        shape = _kept_shape(sets)
        if header.coded and header.dtype.kind in "biu":
            kept = self._stream.read_integers(shape, header.dtype)
        elif header.coded:
            integers = self._stream.read_integers(shape, np.dtype(np.int64))
            kept = floats_of(integers, header.exponent, header.dtype)
        else:
            kept = _from_little_endian(self._copied.take(math.prod(shape) * header.dtype.itemsize), header.dtype)
            if header.dtype.kind == "b" and (kept.view(np.uint8) > 1).any():
                raise damaged("a bool is neither 0 nor 1")
            kept = kept.reshape(shape)
        return _spread(kept, sets)


def _kept_shape(sets: Sequence[np.ndarray]) -> tuple[int, ...]:
    return tuple(int(np.count_nonzero(flags)) for flags in sets)


def _spread(kept: np.ndarray, sets: Sequence[np.ndarray]) -> np.ndarray:
    """The array that holds the given values at the kept indices of each axis, and 0 elsewhere."""
    for axis, flags in enumerate(sets):
        if not flags.all():
            whole = np.zeros((*kept.shape[:axis], flags.size, *kept.shape[axis + 1 :]), kept.dtype)
            np.moveaxis(whole, axis, 0)[flags] = np.moveaxis(kept, axis, 0)
            kept = whole
    return kept


class _Cursor:
    """Bytes that are read from front to back. Reading beyond the end raises CompressedFileError."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    @property
    def bytes_left(self) -> int:
        return len(self._data) - self._place

    def take(self, count: int) -> bytes:
        if count > self.bytes_left:
            raise damaged("bytes are missing")
        self._place += count
        return self._data[self._place - count : self._place]

    def take_last(self, count: int) -> bytes:
        """Cuts off the last ``count`` bytes, at most ``bytes_left``."""
        end = len(self._data) - count
        last, self._data = self._data[end:], self._data[:end]
        return last

    def varint(self) -> int:
        value = 0
        for group in range(_MAX_VARINT_BYTES):
            (byte,) = self.take(1)
            value |= (byte & 127) << 7 * group
            if byte < 128:
                return value
        raise damaged("a number in its header is too large")


def _check_head(data: bytes) -> None:
    if len(data) < 12 or not data.startswith(MAGIC):
        raise CompressedFileError("This is not a compressed params file: it does not begin with BCDL.")
    if data[4] != VERSION:
        raise CompressedFileError(f"The file has format version {data[4]}; this library reads version {VERSION}.")
    if zlib.crc32(data[:-_CHECKSUM]).to_bytes(_CHECKSUM, "little") != data[-_CHECKSUM:]:
        raise damaged("its checksum does not match")
    if data[5] not in (0, FileFlag.NAMES):
        raise damaged("it has unknown flags")


def _read_names(copied: _Cursor, count: int) -> list[str]:
    text = copied.take(copied.varint())
    try:
        names = text.decode().split("\n")
    except UnicodeDecodeError:
        raise damaged("its names are not UTF-8 text") from None
    if len(names) != count and (count or text):
        raise damaged(f"it has {len(names)} names for {count} entries")
    return names if count else []


def _read_header(cursor: _Cursor) -> LayerHeader | ArrayHeader:
    first, second = cursor.take(2)
    kind, axes = divmod(first, 16)
    shape = tuple(cursor.varint() for _ in range(axes))
    if kind == EntryKind.ARRAY:
        return _read_array_header(cursor, second, shape)
    if kind == EntryKind.LAYER and axes >= 2:
        return _read_layer_header(cursor, second, shape)
    raise damaged("an entry has an unknown kind")


def _read_array_header(cursor: _Cursor, second: int, shape: tuple[int, ...]) -> ArrayHeader:
    coded, number = divmod(second, ArrayFlag.CODED)
    if number >= len(ARRAY_DTYPES):
        raise damaged("an array has an unknown type")
    dtype, exponent = ARRAY_DTYPES[number], 0
    if coded and dtype.kind not in "biu":
        exponent = int.from_bytes(cursor.take(1), "little", signed=True)
    return ArrayHeader(shape, dtype, bool(coded), exponent)


def _read_layer_header(cursor: _Cursor, second: int, shape: tuple[int, ...]) -> LayerHeader:
    flags = LayerFlag(second & ~STEP_DTYPE_MASK)
    dtype = STEP_DTYPES[(second & STEP_DTYPE_MASK) >> STEP_DTYPE_SHIFT]
    groups = 1
    if LayerFlag.FEATURE_GROUPS in flags:
        groups = cursor.varint()
        if groups < 2:
            raise damaged(f"a layer cannot have {groups} feature groups")
    arrays = 2 if LayerFlag.BIAS in flags else 1
    bits = tuple(cursor.take(arrays)) if LayerFlag.BITS in flags else None
    of_kernel = cursor.varint() if LayerFlag.LEVELS in flags else 1  # The number of its levels, or its step.
    numbers = _from_little_endian(cursor.take((of_kernel + arrays - 1) * dtype.itemsize), dtype)
    if not np.isfinite(numbers).all():
        raise damaged("a step or a level is not a finite number")
    if LayerFlag.LEVELS not in flags:
        return LayerHeader(shape, flags, groups, bits, tuple(numbers), None)
    return LayerHeader(shape, flags, groups, bits, (dtype.type(1), *numbers[of_kernel:]), numbers[:of_kernel])


def _from_little_endian(data: bytes, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)


def _without_rounding(number: np.ndarray) -> Any:
    """A JAX array, or the array itself if JAX would round it: without x64, JAX has no float64."""
    return jnp.asarray(number) if jax.dtypes.canonicalize_dtype(number.dtype) == number.dtype else number
