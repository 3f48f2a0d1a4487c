"""A binary range coder: bits with 16-bit probabilities to bytes and back, in integer arithmetic.

It is the carry-propagating coder of LZMA [P98] with another ending: the encoder drops the zero bytes at the
end, and the decoder reads zeros beyond the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

PROBABILITY_BITS = 16
_TOP = 1 << 24
_MASK = (1 << 32) - 1


class Encoder:
    """Encodes bits to bytes."""

    def __init__(self) -> None:
        self._low, self._range = 0, _MASK
        # The last byte and the number of bytes 0xFF after it. A carry may still change them.
        self._cache, self._pending = 0, 0
        self._started = False
        self._out = bytearray()

    def encode(self, bits: Sequence[int], probabilities: Sequence[int]) -> None:
        """Encodes bits.

        Args:
          bits: The bits, 0 or 1.
          probabilities: The probability that each bit is 1, in units of 2^-16, from 1 to 65535.
        """
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
        """Encodes the lowest ``bits`` bits of a number, highest first, each with probability 1/2."""
        for place in range(bits - 1, -1, -1):
            self._range >>= 1
            if value >> place & 1:
                self._low += self._range
            while self._range < _TOP:
                self._range <<= 8
                self._low = self._shift(self._low)

    def copy(self) -> Encoder:
        """A second encoder in the same state."""
        other = Encoder()
        other.__dict__.update(self.__dict__)
        other._out = bytearray(self._out)
        return other

    @property
    def bits_written(self) -> float:
        """The amount of information encoded so far, in bits."""
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
        """The bytes of all encoded bits. The encoder cannot be used afterwards."""
        # The number in [low, low + range) with the most zeros at its end gives the fewest bytes.
        for zeros in range(32, -1, -1):
            value = -(-self._low >> zeros) << zeros
            if value < self._low + self._range:
                break
        self._low = value
        for _ in range(5):
            self._low = self._shift(self._low)
        # The decoder reads 4 bytes ahead. If more zeros were dropped, it could not detect a truncated stream.
        return bytes(self._out[:-4] + self._out[-4:].rstrip(b"\0"))


class Decoder:
    """Decodes the bits from the bytes of an ``Encoder``, given the same probabilities in the same order."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 4
        self._range = _MASK
        self._code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    @property
    def bits_read(self) -> float:
        """The amount of information decoded so far, in bits."""
        return 8 * (self._place - 4) + 32 - math.log2(self._range)

    @property
    def bytes_left(self) -> int:
        """The number of bytes that were not read."""
        return max(0, len(self._data) - self._place)

    @property
    def bytes_beyond_the_end(self) -> int:
        """The number of bytes read after the last one, at most 4 if the data is complete."""
        return max(0, self._place - len(self._data))

    def decode(self, probabilities: Iterable[int]) -> list[int]:
        """Decodes the next bits, one for each probability."""
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
        """Decodes a number of ``bits`` bits that ``encode_raw`` wrote."""
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
