"""A binary range coder: bits with 16-bit probabilities to bytes and back, in integer arithmetic alone.

The carry-propagating coder of LZMA [Pavlov 1998, after Martin 1979], but for the ending: as few bytes are written as tell the bits
apart, and a decoder reads zeros beyond the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

PROBABILITY_BITS = 16
_TOP = 1 << 24
_MASK = (1 << 32) - 1


class Encoder:
    """Takes bits, gives bytes."""

    def __init__(self) -> None:
        self._low, self._range = 0, _MASK
        self._cache, self._pending = 0, 0  # the last byte, and how many 0xFF after it, that a carry may still change
        self._started = False
        self._out = bytearray()

    def encode(self, bits: Sequence[int], probabilities: Sequence[int]) -> None:
        """Codes bits (0 or 1), each with the probability that it is 1, in units of 2^-16, from 1 to 65535."""
        low, size = self._low, self._range
        for bit, probability in zip(bits, probabilities, strict=True):
            bound = (size >> PROBABILITY_BITS) * probability
            if bit:
                size = bound
            else:
                low += bound
                size -= bound
            while size < _TOP:
                size <<= 8
                low = self._shift(low)
        self._low, self._range = low, size

    def encode_raw(self, value: int, bits: int) -> None:
        """Codes the lowest ``bits`` bits of a number, highest first, at one bit each."""
        for place in range(bits - 1, -1, -1):
            self._range >>= 1
            if value >> place & 1:
                self._low += self._range
            while self._range < _TOP:
                self._range <<= 8
                self._low = self._shift(self._low)

    def copy(self) -> Encoder:
        """A coder in the same state, to go back to."""
        other = Encoder()
        other.__dict__.update(self.__dict__)
        other._out = bytearray(self._out)
        return other

    @property
    def bits_written(self) -> float:
        """How much information was put in so far."""
        return 8 * (len(self._out) + self._pending + self._started) + 32 - math.log2(self._range)

    def _shift(self, low: int) -> int:
        if low < 0xFF000000 or low > _MASK:
            carry = low >> 32
            if self._started:
                self._out.append((self._cache + carry) & 0xFF)
            self._out.extend([(0xFF + carry) & 0xFF] * self._pending)
            self._started, self._pending, self._cache = True, 0, (low >> 24) & 0xFF
        else:
            self._pending += 1
        return (low << 8) & _MASK

    def finish(self) -> bytes:
        """The bytes of all that was coded. The coder can't be used afterwards."""
        # Of all numbers in [low, low + range) the one with the most zeros at its end.
        for zeros in range(32, -1, -1):
            value = -(-self._low >> zeros) << zeros
            if value < self._low + self._range:
                break
        self._low = value
        for _ in range(5):
            self._low = self._shift(self._low)
        # Not more than the decoder reads ahead, so that a stream that was cut short shows.
        return bytes(self._out[:-4] + self._out[-4:].rstrip(b"\0"))


class Decoder:
    """Takes bytes, gives the bits back, if asked with the same probabilities in the same order."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 4
        self._range = _MASK
        self._code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    @property
    def bits_read(self) -> float:
        """How much information was taken out so far."""
        return 8 * (self._place - 4) + 32 - math.log2(self._range)

    @property
    def bytes_left(self) -> int:
        """How many bytes were not read at all."""
        return max(0, len(self._data) - self._place)

    @property
    def bytes_beyond_the_end(self) -> int:
        """How many bytes were read after the last one: at most 4 if the data is whole."""
        return max(0, self._place - len(self._data))

    def decode(self, probabilities: Iterable[int]) -> list[int]:
        """The next bits, one for each probability."""
        code, size, data, place, length = self._code, self._range, self._data, self._place, len(self._data)
        bits = []
        for probability in probabilities:
            bound = (size >> PROBABILITY_BITS) * probability
            if code < bound:
                size = bound
                bits.append(1)
            else:
                code -= bound
                size -= bound
                bits.append(0)
            while size < _TOP:
                size <<= 8
                code = (code << 8 | (data[place] if place < length else 0)) & _MASK
                place += 1
        self._code, self._range, self._place = code, size, place
        return bits

    def decode_raw(self, bits: int) -> int:
        """The next number of that many bits."""
        value = 0
        for _ in range(bits):
            self._range >>= 1
            bit = self._code >= self._range
            if bit:
                self._code -= self._range
            value = value << 1 | bit
            while self._range < _TOP:
                self._range <<= 8
                byte = self._data[self._place] if self._place < len(self._data) else 0
                self._code = (self._code << 8 | byte) & _MASK
                self._place += 1
        return value
