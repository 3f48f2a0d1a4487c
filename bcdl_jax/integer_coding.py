"""Arrays of integers to bits and back: a probability for every binary decision, from what was coded before.

An integer is told by a few decisions: is it zero, its sign, the length of its magnitude in binary, one step at a time, and the bits
after the leading one. Several counts give each decision a probability: over all such decisions, over those with the same value one
row above, and so on. A small network of one layer per kind of decision, trained while coding, mixes them (context mixing
[Mahoney 2005], in integers). Weights of neighbouring inputs are alike, which is what is gained over the entropy of the histogram.

Integers are coded in chunks: within one the counts stand still, so that a chunk takes a few array operations. Everything is exact
integer arithmetic, so that each machine decodes the same. FORMAT.md beside this file says it all once more, for other decoders.
"""

from __future__ import annotations

import dataclasses
from decimal import Decimal, localcontext
from functools import cache
from typing import Any

import numpy as np

from bcdl_jax.range_coder import Decoder, Encoder

# Kinds of decisions: 0: not zero? 1: negative? 2 + e: has its magnitude more than e + 1 binary digits? and, for the first three bits after
# the leading one of a magnitude of e + 1 digits, _TAIL + 8 e + (1, those bits so far). Further bits are not modelled.
_ZERO, _SIGN, _LENGTH, _TAIL = 0, 1, 2, 40
_KINDS = _TAIL + 8 * 32
_MODELLED_TAIL = 3
_CLASSES = 13  # a neighbour's value, as sign and number of binary digits, at most 6
_PRIOR_WEIGHT, _LIMIT = 8, 1023
_LEARNING_SHIFT, _ONE = 16, 1 << 16
_STEPS_PER_NAT, _EDGE = 170, 2047  # of the logistic scale
MIN_CHUNK, MAX_CHUNK = 16, 256


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The logistic function and its inverse: probability by log-odds (index 0 is -2047), log-odds by probability / 16."""
    with localcontext() as context:
        context.prec = 30
        squash = []
        for step in range(-_EDGE, _EDGE + 1):
            value = Decimal(_ONE) / (1 + (-Decimal(step) / _STEPS_PER_NAT).exp())
            squash.append(min(max(int(value.to_integral_value()), 1), _ONE - 1))
        stretch = []
        for cell in range(4096):
            odds = (Decimal(2 * cell + 1) / (8192 - 2 * cell - 1)).ln() * _STEPS_PER_NAT
            stretch.append(min(max(int(odds.to_integral_value()), -_EDGE), _EDGE))
    return np.array(squash), np.array(stretch)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a flattened array is gone through.

    Attributes:
      chunk: how many integers are coded at a time.
      above: how far back the integer one row up stands, at least ``chunk``; 0 if no neighbours are looked at.
    """

    chunk: int
    above: int


def layout_of(row: int) -> Layout:
    """For rows of that many integers, in which column by column the same thing happens; 0 for a plain sequence."""
    chunk = min(row * -(-MIN_CHUNK // row), MAX_CHUNK) if row else MIN_CHUNK
    return Layout(chunk, max(row, chunk) if row else 0)


class _Model:
    """Counts and mixing weights of one array."""

    def __init__(self, layout: Layout, prior: np.ndarray):
        self._layout = layout
        sizes = [1, _CLASSES, _CLASSES, 5 * 5, 16] if layout.above else [1]
        self._prior = prior
        self._counts = [np.zeros((2, _KINDS * size), np.int64) for size in sizes]
        self._sizes = sizes
        self._weights = np.full((_KINDS, len(sizes)), _ONE // len(sizes) + _ONE // 16, np.int64)
        self._squash, self._stretch = _tables()

    def contexts(self, past: np.ndarray, start: int, stop: int) -> list[np.ndarray]:
        """A context per input and integer of a chunk, from the integers before it."""
        places = np.arange(start, stop)
        contexts = [np.zeros(stop - start, np.int64)]
        if self._layout.above:
            one, two, three, four = (_back(past, places, times * self._layout.above) for times in (1, 2, 3, 4))
            contexts.append(_digits(one))
            contexts.append(_digits((2 * one + two + (one + two + three + four) // 2) // 3))
            contexts.append(np.clip(_digits(one) - 4, 0, 4) * 5 + np.clip(_digits(two) - 4, 0, 4))
            energy = abs(one) * 4 + abs(two) * 3 + abs(three) * 2 + abs(four)
            contexts.append(np.minimum(_bit_length(energy), 15))
        return contexts

    def probabilities(
        self, kinds: np.ndarray, contexts: list[np.ndarray]
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """For decisions of some kinds: their probabilities, and what ``learn`` wants to know again."""
        cells = [kinds * size + context for size, context in zip(self._sizes, contexts, strict=True)]
        prior = self._prior[kinds]
        inputs = np.empty((len(kinds), len(cells)), np.int64)
        for place, (counts, cell) in enumerate(zip(self._counts, cells, strict=True)):
            ones, total = counts[1, cell], counts[0, cell] + counts[1, cell]
            probability = (ones * _ONE + _PRIOR_WEIGHT * prior) // (total + _PRIOR_WEIGHT)
            inputs[:, place] = self._stretch[probability >> 4]
        mixed = (self._weights[kinds] * inputs).sum(1) >> 16
        return self._squash[np.clip(mixed, -_EDGE, _EDGE) + _EDGE], cells, inputs

    def learn(
        self,
        kinds: np.ndarray,
        bits: np.ndarray,
        probabilities: np.ndarray,
        cells: list[np.ndarray],
        inputs: np.ndarray,
    ) -> None:
        for counts, cell in zip(self._counts, cells, strict=True):
            np.add.at(counts, (bits, cell), 1)
            full = cell[counts[0, cell] + counts[1, cell] > _LIMIT]
            counts[:, full] //= 2
        errors = (bits * _ONE - probabilities)[:, None]
        np.add.at(self._weights, kinds, inputs * errors >> _LEARNING_SHIFT)


def _back(past: np.ndarray, places: np.ndarray, distance: int) -> np.ndarray:
    return np.where(places >= distance, past[np.maximum(places - distance, 0)], 0)


def _bit_length(values: np.ndarray) -> np.ndarray:
    """Of non-negative integers below 2^53."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _digits(values: np.ndarray) -> np.ndarray:
    """Sign and number of binary digits, 0 to 12; 6 for zero."""
    return 6 + np.sign(values) * np.minimum(_bit_length(abs(values)), 6)


def prior_table(scale: int) -> np.ndarray:
    """Probabilities of all kinds of decisions, in units of 2^-16, if magnitudes fell off geometrically.

    Args:
      scale: 0 to 255, eight times the binary logarithm of the mean of 1 + magnitude.
    """
    # The mean in units of 1/256, and the chance that a magnitude goes on by one, in units of 2^-32.
    mean = (256 << (scale >> 3)) * (8 + (scale & 7)) // 8
    going_on = ((mean - 256) << 32) // mean

    def power(exponent_log: int) -> int:
        value = going_on
        for _ in range(exponent_log):
            value = value * value >> 32
        return value

    table = np.full(_KINDS, _ONE // 2, np.int64)

    def put(kind: int, value: int, whole: int) -> None:
        table[kind] = min(max((value << 16) // max(whole, 1), 1 << 8), _ONE - (1 << 8))

    put(_ZERO, going_on, 1 << 32)
    for extra in range(32):
        put(_LENGTH + extra, power(extra), 1 << 32)  # 2^extra further at least
        for depth in range(min(extra, _MODELLED_TAIL)):
            upper = power(extra - 1 - depth)
            for prefix in range(1 << depth):
                put(_TAIL + 8 * extra + (1 << depth | prefix), upper, (1 << 32) + upper)
    return table


def encode_integers(encoder: Encoder, values: np.ndarray, layout: Layout, scale: int) -> None:
    """Codes a flat array of integers of magnitudes below 2^32."""
    values = values.astype(np.int64)
    _run(_Writer(encoder, values), values.size, layout, scale)


def decode_integers(decoder: Decoder, size: int, layout: Layout, scale: int) -> np.ndarray:
    """The integers that were coded with the same layout and scale, int64."""
    return _run(_Reader(decoder), size, layout, scale)


class _Writer:
    """Answers the questions about the integers at some places, and codes the answers."""

    def __init__(self, encoder: Encoder, values: np.ndarray):
        self._encoder = encoder
        self._magnitudes, self._negative = abs(values), values < 0
        self._lengths = _bit_length(self._magnitudes)

    def is_nonzero(self, places: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        return self._code(self._magnitudes[places] > 0, probabilities)

    def is_negative(self, places: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        return self._code(self._negative[places], probabilities)

    def is_longer(self, places: np.ndarray, probabilities: np.ndarray, digits: np.ndarray) -> np.ndarray:
        return self._code(self._lengths[places] > digits, probabilities)

    def digit(self, places: np.ndarray, probabilities: np.ndarray, shift: np.ndarray) -> np.ndarray:
        return self._code(self._magnitudes[places] >> shift & 1, probabilities)

    def rest(self, places: np.ndarray, counts: np.ndarray) -> np.ndarray:
        values = self._magnitudes[places] & ((1 << counts) - 1)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._encoder.encode_raw(value, count)
        return values

    def _code(self, bits: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        bits = bits.astype(np.int64)
        self._encoder.encode(bits.tolist(), probabilities.tolist())
        return bits


class _Reader:
    """Answers the same questions from the coded bits."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def is_nonzero(self, places: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        return np.array(self._decoder.decode(probabilities.tolist()), np.int64)

    is_negative = is_nonzero

    def is_longer(self, places: np.ndarray, probabilities: np.ndarray, digits: np.ndarray) -> np.ndarray:
        return self.is_nonzero(places, probabilities)

    digit = is_longer

    def rest(self, places: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.array([self._decoder.decode_raw(count) for count in counts.tolist()], np.int64)


def _run(port: _Writer | _Reader, size: int, layout: Layout, scale: int) -> np.ndarray:
    model = _Model(layout, prior_table(scale))
    values = np.zeros(size, np.int64)
    for start in range(0, size, layout.chunk):
        stop = min(start + layout.chunk, size)
        contexts = model.contexts(values, start, stop)
        lessons: list[tuple[Any, ...]] = []

        def ask(question, where, kinds, *about, start=start, contexts=contexts, lessons=lessons):  # type: ignore[no-untyped-def]
            probabilities, cells, inputs = model.probabilities(kinds, [context[where] for context in contexts])
            bits = question(start + where, probabilities, *about)
            lessons.append((kinds, bits, probabilities, cells, inputs))
            return bits

        where = np.arange(stop - start)
        where = where[ask(port.is_nonzero, where, np.full(len(where), _ZERO)) == 1]
        if len(where):
            negative = ask(port.is_negative, where, np.full(len(where), _SIGN))
            digits, open_ = np.ones(len(where), np.int64), np.arange(len(where))
            while len(open_) and digits[open_[0]] < 32:
                longer = ask(port.is_longer, where[open_], _LENGTH + digits[open_] - 1, digits[open_])
                digits[open_] += longer
                open_ = open_[longer == 1]
            magnitudes = np.ones(len(where), np.int64)
            for depth in range(_MODELLED_TAIL):
                more = np.flatnonzero(digits - 1 > depth)
                kinds = _TAIL + 8 * (digits[more] - 1) + magnitudes[more]
                bits = ask(port.digit, where[more], kinds, digits[more] - 2 - depth) if len(more) else 0
                magnitudes[more] = magnitudes[more] * 2 + bits
            counts = np.maximum(digits - 1 - _MODELLED_TAIL, 0)
            magnitudes = (magnitudes << counts) + port.rest(start + where, counts)
            values[start + where] = np.where(negative == 1, -magnitudes, magnitudes)
        for lesson in lessons:
            model.learn(*lesson)
    return values
