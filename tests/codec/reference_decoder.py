"""A slow, simple decoder of the compressed params file, in the terms and the order of bcdl_jax/codec/FORMAT.md.

It shares no code with bcdl_jax.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INTEGER_TYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
_ARRAY_TYPES = [
    *map(np.dtype, _INTEGER_TYPES),
    np.dtype("float16"),
    _BFLOAT16,
    np.dtype("float32"),
    np.dtype("float64"),
]
_STEP_TYPES = [np.dtype("float32"), np.dtype("float16"), _BFLOAT16, np.dtype("float64")]


def decode(data: bytes) -> tuple[list[str] | None, list[dict[str, Any]]]:
    """Decodes a compressed params file.

    Args:
      data: The bytes of the file.

    Returns:
      The names, or None if the file has none, and the entries. An entry is a dict of the kind "array" with its value, or of the kind
      "layer" with the fields of a quantised layer (None for a missing bias or missing levels).

    Raises:
      ValueError: The file contradicts the format.
    """
    if len(data) < 4 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("The checksum is wrong.")
    reader = _Bytes(data[:-4])
    if reader.take(4) != b"BCDL" or reader.byte() != 1:
        raise ValueError("Not a compressed params file of version 1.")
    flags = reader.byte()
    _require(flags <= 1, "unknown flags")
    number_of_entries = reader.varint()
    copied_length = reader.varint()
    headers = [_read_header(reader) for _ in range(number_of_entries)]
    stream_length = reader.left() - copied_length
    _require(stream_length >= 0, "the copied part is longer than the rest of the file")
    stream = reader.take(stream_length)

    names = None
    if flags & 1:
        text = reader.take(reader.varint()).decode("utf-8")
        names = text.split("\n") if number_of_entries else []
        _require(bool(number_of_entries) or not text, "names without entries")
        _require(len(names) == number_of_entries, "the number of names is not the number of entries")

    limits = _Limits(coded=4096 + 32 * len(data))
    contents = _Contents(_RangeDecoder(stream), limits)
    entries = [
        _read_layer(header, contents) if isinstance(header, _LayerHeader) else _read_array(header, contents, reader)
        for header in headers
    ]
    contents.coder.finish()
    _require(reader.left() == 0, "copied bytes are left over")
    return names, entries


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"The file contradicts its format: {message}.")


class _Bytes:
    """Bytes that are read from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, count: int) -> bytes:
        _require(count <= self.left(), "it is too short")
        self._position += count
        return self._data[self._position - count : self._position]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for group in range(6):
            byte = self.byte()
            value |= (byte & 127) << (7 * group)
            if byte < 128:
                return value
        raise ValueError("The file contradicts its format: a varint of more than 6 bytes.")


@dataclass
class _Limits:
    """The coded numbers that may still be read. They bound the work that a small damaged file can cause."""

    coded: int

    def use_coded(self, count: int) -> None:
        self.coded -= count
        _require(self.coded >= 0, "too many coded integers for its length")


# Headers


@dataclass
class _ArrayHeader:
    dtype: np.dtype
    coded: bool
    shape: tuple[int, ...]
    exponent: int | None  # None but for coded floats.

    def lengths(self) -> list[int]:
        return [*self.shape]


@dataclass
class _LayerHeader:
    shape: tuple[int, ...]
    feature_groups: int
    group_axis: str
    prunes_weights: bool
    kernel_levels: np.ndarray | None
    has_bias: bool
    kernel_bits: int | None  # None if the file does not store it.
    bias_bits: int | None
    kernel_step: np.generic
    bias_step: np.generic | None

    def lengths(self) -> list[int]:
        return [*self.shape, self.feature_groups, self.shape[-2] * self.feature_groups]


def _read_header(reader: _Bytes) -> _ArrayHeader | _LayerHeader:
    kind, axes = divmod(reader.byte(), 16)
    _require(kind in (0, 1), "unknown kind of entry")
    return _read_array_header(reader, axes) if kind == 1 else _read_layer_header(reader, axes)


def _read_array_header(reader: _Bytes, axes: int) -> _ArrayHeader:
    coded, number = divmod(reader.byte(), 128)
    _require(number < len(_ARRAY_TYPES), "unknown type")
    shape = tuple(reader.varint() for _ in range(axes))
    exponent = None
    if coded and number >= len(_INTEGER_TYPES):
        exponent = reader.byte()
        exponent -= 256 * (exponent > 127)
    return _ArrayHeader(_ARRAY_TYPES[number], bool(coded), shape, exponent)


def _read_layer_header(reader: _Bytes, axes: int) -> _LayerHeader:
    _require(axes >= 2, "a kernel of fewer than two axes")
    rest, flags = divmod(reader.byte(), 16)
    marks, step_type = divmod(rest, len(_STEP_TYPES))
    has_levels, prunes_weights = divmod(marks, 2)
    has_bias = bool(flags & 1)
    shape = tuple(reader.varint() for _ in range(axes))
    feature_groups = reader.varint() if flags & 4 else 1
    _require(feature_groups >= 2 or not flags & 4, "fewer than two feature groups")
    kernel_bits = reader.byte() if flags & 8 else None
    bias_bits = reader.byte() if flags & 8 and has_bias else None
    levels = None
    if has_levels:
        levels = np.array([_read_step(reader, _STEP_TYPES[step_type]) for _ in range(reader.varint())])
        _require(0 not in levels and sorted(set(levels)) == list(levels), "levels that are 0 or not ascending")
    kernel_step = _STEP_TYPES[step_type].type(1) if has_levels else _read_step(reader, _STEP_TYPES[step_type])
    return _LayerHeader(
        shape=shape,
        feature_groups=feature_groups,
        group_axis="output" if flags & 2 else "input",
        prunes_weights=bool(prunes_weights),
        kernel_levels=levels,
        has_bias=has_bias,
        kernel_bits=kernel_bits,
        bias_bits=bias_bits,
        kernel_step=kernel_step,
        bias_step=_read_step(reader, _STEP_TYPES[step_type]) if has_bias else None,
    )


def _read_step(reader: _Bytes, dtype: np.dtype) -> np.generic:
    step = _from_little_endian(reader.take(dtype.itemsize), dtype)[0]
    _require(math.isfinite(float(step)), "a step that is not finite")
    return step


def _from_little_endian(data: bytes, dtype: np.dtype) -> np.ndarray:
    words = np.frombuffer(data, f"<u{dtype.itemsize}")
    return words.astype(f"=u{dtype.itemsize}").view(dtype)


# Contents of the entries


def _read_layer(header: _LayerHeader, contents: _Contents) -> dict[str, Any]:
    *window, inputs, outputs = header.shape
    input_mask = contents.kept(inputs * header.feature_groups)
    output_mask = contents.kept(outputs)
    kernel_inputs = input_mask if header.feature_groups == 1 else np.ones(inputs, bool)
    kernel_masks = [*(np.ones(length, bool) for length in window), kernel_inputs, output_mask]
    kernel = contents.integer_array(kernel_masks, np.dtype("int16"))
    if header.kernel_levels is not None:
        negative = sum(level < 0 for level in header.kernel_levels)
        known = range(-negative, len(header.kernel_levels) - negative + 1)
        _require(all(int(integer) in known for integer in kernel.ravel()), "an integer without a level")
    bias = contents.integer_array([output_mask], np.dtype("int16")) if header.has_bias else None
    kernel_bits, bias_bits = header.kernel_bits, header.bias_bits
    if kernel_bits is None:
        kernel_bits = _shortest_bits(kernel)
        bias_bits = None if bias is None else _shortest_bits(bias)
    return {
        "kind": "layer",
        "kernel": kernel,
        "kernel_step": header.kernel_step,
        "kernel_bits": kernel_bits,
        "bias": bias,
        "bias_step": header.bias_step,
        "bias_bits": bias_bits,
        "input_mask": input_mask,
        "output_mask": output_mask,
        "group_axis": header.group_axis,
        "prunes_weights": header.prunes_weights,
        "kernel_levels": header.kernel_levels,
    }


def _shortest_bits(integers: np.ndarray) -> int:
    bits = 0
    for integer in map(int, integers[integers != 0]):
        bits = max(bits, (integer if integer >= 0 else -integer - 1).bit_length() + 1)
    return bits


def _read_array(header: _ArrayHeader, contents: _Contents, copied: _Bytes) -> dict[str, Any]:
    masks = [contents.kept(length) for length in header.shape]
    if header.exponent is not None:
        integers = contents.integer_array(masks, np.dtype(np.int64))
        exact = [float(int(value) * Fraction(2) ** header.exponent) for value in integers.ravel()]
        with np.errstate(over="ignore"):
            floats = np.array(exact).astype(header.dtype)
        _require([float(value) for value in floats] == exact, "a float that its type cannot hold")
        floats = floats.reshape(integers.shape)
        return {"kind": "array", "value": floats}
    if header.coded:
        return {"kind": "array", "value": contents.integer_array(masks, header.dtype)}
    count = math.prod(int(np.count_nonzero(mask)) for mask in masks)
    data = copied.take(count * header.dtype.itemsize)
    _require(header.dtype.kind != "b" or set(data) <= {0, 1}, "a bool that is neither 0 nor 1")
    return {"kind": "array", "value": _placed(_from_little_endian(data, header.dtype), masks)}


def _placed(values: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """The array with the values at the kept indices, in row-major order, and zeros elsewhere."""
    array = np.zeros([len(mask) for mask in masks], values.dtype)
    if masks:
        array[np.ix_(*masks)] = values.reshape([np.count_nonzero(mask) for mask in masks])
    else:
        array[()] = values[0]
    return array


class _Contents:
    """The coded stream as sets of kept indices and arrays of integers."""

    def __init__(self, coder: _RangeDecoder, limits: _Limits) -> None:
        self.coder = coder
        self._limits = limits
        self._latest_set: dict[int, np.ndarray] = {}  # By number of indices.

    def kept(self, length: int) -> np.ndarray:
        """Reads a set of kept indices, as a mask."""
        coding = self.coder.raw(2)
        if coding == 0:
            mask = np.ones(length, bool)
        elif coding == 1:
            mask = self._bitmap(length)
        else:
            mask = np.full(length, coding == 2)
            mask[self._indices(length)] = coding == 3
        self._latest_set[length] = mask
        return mask

    def _bitmap(self, length: int) -> np.ndarray:
        self._limits.use_coded(length)
        latest = self._latest_set.get(length)
        zeros, ones = [1] * 9, [1] * 9
        bits: list[int] = []
        for index in range(length):
            before = bits[-1] if bits else 2
            context = 3 * before + (2 if latest is None else int(latest[index]))
            probability = 65536 * ones[context] // (zeros[context] + ones[context])
            bit = self.coder.bit(min(max(probability, 1), 65535))
            (ones if bit else zeros)[context] += 2
            bits.append(bit)
        return np.array(bits, bool)

    def _indices(self, length: int) -> list[int]:
        """Reads a list of indices below ``length``."""
        count = self.coder.raw(32)
        if count == 2**32 - 1:
            self._limits.use_coded(length)
            return [index for index in range(length) if self.coder.raw(1)]
        _require(count <= length, "more indices than there are")
        indices = []
        index = -1
        for gap in self._scaled(count, None):
            _require(gap >= 0, "indices that do not ascend")
            index += gap + 1
            _require(index < length, "an index out of range")
            indices.append(index)
        return indices

    def integer_array(self, masks: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Reads the integers at the kept indices, in an array that is zero elsewhere."""
        integers = self._integers([int(np.count_nonzero(mask)) for mask in masks])
        smallest, largest = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        _require(all(smallest <= integer <= largest for integer in integers), "an integer out of range of its type")
        return _placed(np.array(integers, dtype), masks)

    def _integers(self, shape: Sequence[int]) -> list[int]:
        count = math.prod(shape)
        if count == 0:
            return []
        coding = self.coder.raw(2)
        if coding == 0:
            width = self.coder.raw(6)
            if width:
                self._limits.use_coded(count)
            _require(width <= 33, "raw integers of a width out of range")
            same, width = width == 0, width or 33
            raw = [self.coder.raw(width)] * count if same else [self.coder.raw(width) for _ in range(count)]
            return [value - (1 << width) if value >> (width - 1) else value for value in raw]
        if coding == 1:
            _require(len(shape) >= 2, "neighbours in an array of fewer than two axes")
            return self._scaled(count, shape[-1])
        if coding == 2:
            return self._scaled(count, None)
        indices = self._indices(count)
        integers = [0] * count
        for index, value in zip(indices, self._scaled(len(indices), None)):
            _require(value != 0, "a zero among the nonzero integers")
            integers[index] = value
        return integers

    def _scaled(self, count: int, row_length: int | None) -> list[int]:
        """Reads scaled integers. A count of 0 reads no bits."""
        if count == 0:
            return []
        self._limits.use_coded(count)
        return _ScaledIntegers(self.coder, row_length).read(count)


# The range coder


class _RangeDecoder:
    def __init__(self, stream: bytes) -> None:
        self._stream = stream
        self._position = 0
        self._range = 2**32 - 1
        self._code = 0
        for _ in range(4):
            self._code = self._code << 8 | self._next_byte()

    def _next_byte(self) -> int:
        self._position += 1
        _require(self._position <= len(self._stream) + 4, "the coded stream is too short")
        return self._stream[self._position - 1] if self._position <= len(self._stream) else 0

    def _renew(self) -> None:
        while self._range < 2**24:
            self._range <<= 8
            self._code = (self._code << 8 | self._next_byte()) & 0xFFFFFFFF

    def bit(self, probability: int) -> int:
        """Decodes a bit that is 1 with this probability, in units of 2^-16."""
        bound = (self._range >> 16) * probability
        bit = int(self._code < bound)
        if bit:
            self._range = bound
        else:
            self._code -= bound
            self._range -= bound
        self._renew()
        return bit

    def raw(self, bits: int) -> int:
        """Decodes a number of ``bits`` raw bits."""
        value = 0
        for _ in range(bits):
            self._range >>= 1
            bit = int(self._code >= self._range)
            if bit:
                self._code -= self._range
            self._renew()
            value = value << 1 | bit
        return value

    def finish(self) -> None:
        _require(self._position >= len(self._stream), "the coded stream is too long")


# The model of scaled integers


@dataclass
class _Decision:
    kind: int
    contexts: tuple[int, ...]
    x: list[int]
    probability: int
    bit: int


class _ScaledIntegers:
    def __init__(self, coder: _RangeDecoder, row_length: int | None) -> None:
        self._coder = coder
        self._priors = _priors(coder.raw(8))
        self._plain = row_length is None
        self._chunk = 16 if row_length is None else min(row_length * -(-16 // row_length), 256)
        self._distance = 0 if row_length is None else max(row_length, self._chunk)
        self._inputs = range(1 if row_length is None else 5)
        # Counts by input, kind and context; weights by input and kind.
        self._counts: dict[tuple[int, int, int], list[int]] = defaultdict(lambda: [0, 0])
        start = 65536 // len(self._inputs) + 4096
        self._weights: dict[tuple[int, int], int] = defaultdict(lambda: start)
        self._values: list[int] = []
        self._steps: list[list[_Decision]] = []  # The decisions of the chunk, step by step.

    def read(self, count: int) -> list[int]:
        while len(self._values) < count:
            self._read_chunk(min(self._chunk, count - len(self._values)))
        return self._values

    def _read_chunk(self, size: int) -> None:
        self._steps = []
        contexts = [self._contexts(len(self._values) + place) for place in range(size)]

        bits = self._step(dict.fromkeys(range(size), 0), contexts)
        places = [place for place in range(size) if bits[place]]
        negative = self._step(dict.fromkeys(places, 1), contexts)

        digits = dict.fromkeys(places, 1)
        longer_places = places
        for e in range(31):
            longer = self._step(dict.fromkeys(longer_places, 2 + e), contexts)
            longer_places = [place for place in longer_places if longer[place]]
            for place in longer_places:
                digits[place] += 1

        magnitudes = dict.fromkeys(places, 1)  # The leading bits that are decoded so far.
        for t in range(3):
            kinds = {
                place: 40 + 8 * (digits[place] - 1) + magnitudes[place] for place in places if digits[place] - 1 > t
            }
            for place, bit in self._step(kinds, contexts).items():
                magnitudes[place] = 2 * magnitudes[place] + bit
        for place in places:
            remaining = max(digits[place] - 4, 0)
            magnitudes[place] = magnitudes[place] << remaining | self._coder.raw(remaining)

        values = [0] * size
        for place in places:
            values[place] = -magnitudes[place] if negative[place] else magnitudes[place]
        self._values += values
        for step in self._steps:
            self._learn(step)

    def _contexts(self, place: int) -> tuple[int, ...]:
        if self._plain:
            return (0,)
        above = [place - distance * self._distance for distance in (1, 2, 3, 4)]
        a1, a2, a3, a4 = (self._values[i] if i >= 0 else 0 for i in above)
        c1 = min(max(_class(a1) - 4, 0), 4)
        c2 = min(max(_class(a2) - 4, 0), 4)
        return (
            0,
            _class(a1),
            _class((2 * a1 + a2 + (a1 + a2 + a3 + a4) // 2) // 3),
            5 * c1 + c2,
            min((4 * abs(a1) + 3 * abs(a2) + 2 * abs(a3) + abs(a4)).bit_length(), 15),
        )

    def _step(self, kinds: dict[int, int], contexts: list[tuple[int, ...]]) -> dict[int, int]:
        """Decodes a decision of the given kind at each place, in ascending order."""
        decisions = {place: self._decide(kind, contexts[place]) for place, kind in kinds.items()}
        self._steps.append(list(decisions.values()))
        return {place: decision.bit for place, decision in decisions.items()}

    def _decide(self, kind: int, contexts: tuple[int, ...]) -> _Decision:
        prior = self._priors[kind]
        x = []
        mixed = 0
        for i in self._inputs:
            zeros, ones = self._counts[i, kind, contexts[i]]
            x.append(_stretch((65536 * ones + 8 * prior) // (zeros + ones + 8)))
            mixed += self._weights[i, kind] * x[i]
        probability = _squash(min(max(mixed >> 16, -2047), 2047))
        return _Decision(kind, contexts, x, probability, self._coder.bit(probability))

    def _learn(self, step: list[_Decision]) -> None:
        for i in self._inputs:
            touched = {(i, decision.kind, decision.contexts[i]) for decision in step}
            for decision in step:
                self._counts[i, decision.kind, decision.contexts[i]][decision.bit] += 1
            for cell in touched:
                if sum(self._counts[cell]) > 1023:
                    self._counts[cell] = [count // 2 for count in self._counts[cell]]
            for decision in step:
                error = 65536 * decision.bit - decision.probability
                self._weights[i, decision.kind] += (decision.x[i] * error) >> 16


def _class(value: int) -> int:
    length = min(value.bit_length(), 6)
    return 6 - length if value < 0 else 6 + length


def _priors(scale: int) -> dict[int, int]:
    """The prior of each kind."""
    mean = (256 << (scale >> 3)) * (8 + (scale & 7)) // 8
    g = [((mean - 256) << 32) // mean]
    while len(g) < 32:
        g.append(g[-1] ** 2 >> 32)

    def ratio(u: int, v: int) -> int:
        return min(max((u << 16) // max(v, 1), 256), 65536 - 256)

    priors: dict[int, int] = defaultdict(lambda: 32768)
    priors[0] = ratio(g[0], 2**32)
    for e in range(32):
        priors[2 + e] = ratio(g[e], 2**32)
    for e in range(1, 32):
        for t in range(min(e, 3)):
            h = g[e - 1 - t]
            for m in range(2**t, 2 ** (t + 1)):
                priors[40 + 8 * e + m] = ratio(h, 2**32 + h)
    return priors


_DECIMAL = Context(prec=30, rounding=ROUND_HALF_EVEN)


@cache
def _squash(y: int) -> int:
    exponential = _DECIMAL.exp(_DECIMAL.divide(Decimal(-y), Decimal(170)))
    probability = int(
        _DECIMAL.to_integral_value(_DECIMAL.divide(Decimal(65536), _DECIMAL.add(Decimal(1), exponential)))
    )
    return min(max(probability, 1), 65535)


@cache
def _stretch(probability: int) -> int:
    c = probability >> 4
    logarithm = _DECIMAL.ln(_DECIMAL.divide(Decimal(2 * c + 1), Decimal(8191 - 2 * c)))
    return min(max(int(_DECIMAL.to_integral_value(_DECIMAL.multiply(Decimal(170), logarithm))), -2047), 2047)
