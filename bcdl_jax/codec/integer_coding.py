"""Arrays of integers to bits and back: a probability for every binary decision, from what was coded before.

An integer is told by a few decisions: is it zero, its sign, the length of its magnitude in binary, one step at a time, and the bits
after the leading one. Several counts give each decision a probability: over all such decisions, over those with the same value one
row above, and so on. A small network of one layer per kind of decision, trained while coding, mixes them (context mixing
[Mahoney 2005], in integers). Weights of neighbouring inputs are alike, which is what is gained over the entropy of the histogram.

Integers are coded in chunks: within one the counts stand still, so that a chunk takes a few array operations. A writer knows all answers
and asks for the probabilities of a chunk at once; a reader needs those of one question before it can put the next. Everything is exact
integer arithmetic, in floating point where that is faster and no less exact, so that each machine decodes the same. FORMAT.md beside this file
says it all once more, for other decoders.
"""

from __future__ import annotations

import dataclasses
import itertools
from decimal import Decimal, localcontext
from functools import cache

import numpy as np

from bcdl_jax.codec.range_coder import Decoder, Encoder

# Kinds of decisions: 0: not zero? 1: negative? 2 + e: has its magnitude more than e + 1 binary digits? and, for the first three bits after
# the leading one of a magnitude of e + 1 digits, _TAIL + 8 e + (1, those bits so far). Further bits are not modelled.
_ZERO, _SIGN, _LENGTH, _TAIL = 0, 1, 2, 40
_KINDS = _TAIL + 8 * 32
_MODELLED_TAIL, _MOST_DIGITS = 3, 32
_CLASSES = 13  # a neighbour's value, as sign and number of binary digits, at most 6
_PRIOR_WEIGHT, _LIMIT = 8, 1023
_LEARNING_SHIFT, _ONE = 16, 1 << 16
_STEPS_PER_NAT, _EDGE = 170, 2047  # of the logistic scale
MIN_CHUNK, MAX_CHUNK = 16, 256
_BLOCK = 1 << 15  # integers whose decisions are listed at a time, to bound the memory that it takes


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
      above: how far back the integer one row up stands, at least ``chunk``, since those of a chunk are told together; 0 if no neighbours are
        looked at.
    """

    chunk: int
    above: int


def layout_of(row: int) -> Layout:
    """For rows of that many integers, in which column by column the same thing happens; 0 for a plain sequence."""
    chunk = min(row * -(-MIN_CHUNK // row), MAX_CHUNK) if row else MIN_CHUNK
    return Layout(chunk, max(row, chunk) if row else 0)


class _Model:
    """Counts and mixing weights of one array."""

    def __init__(self, layout: Layout, scale: int):
        self._layout = layout
        sizes = np.array([1, _CLASSES, _CLASSES, 5 * 5, 16] if layout.above else [1])
        self._sizes, self._starts = sizes, _KINDS * (np.cumsum(sizes) - sizes)
        # How many decisions each cell, a context of a kind of decision, has seen, and how many of them were 1: whole numbers.
        self._totals, self._ones = np.zeros((2, _KINDS * sizes.sum()))
        self._weights = np.full((_KINDS, len(sizes)), _ONE // len(sizes) + _ONE // 16, np.int64)
        self._prior = _PRIOR_WEIGHT * prior_table(scale).astype(np.float64)
        self._squash, self._stretch = _tables()

    def contexts(self, values: np.ndarray, start: int, stop: int) -> np.ndarray:
        """[stop - start, inputs]: a context per input and integer, from the integers at least a chunk before it."""
        contexts = np.empty((stop - start, len(self._sizes)), np.int64)
        contexts[:, 0] = 0
        if self._layout.above:
            one, two, three, four = (_back(values, start, stop, times * self._layout.above) for times in (1, 2, 3, 4))
            contexts[:, 1] = _digits(one)
            contexts[:, 2] = _digits((2 * one + two + (one + two + three + four) // 2) // 3)
            contexts[:, 3] = np.clip(contexts[:, 1] - 4, 0, 4) * 5 + np.clip(_digits(two) - 4, 0, 4)
            energy = abs(one) * 4 + abs(two) * 3 + abs(three) * 2 + abs(four)
            contexts[:, 4] = np.minimum(_bit_length(energy), 15)
        return contexts

    def cells(self, kinds: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """[decisions, inputs]: the cells of decisions of these kinds in these contexts."""
        return kinds[:, None] * self._sizes + (contexts + self._starts)

    def predict(self, kinds: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probabilities that decisions are 1, and the inputs of the mixture, for ``learn``."""
        # The quotient of whole numbers this small, rounded as floats are, never reaches the next whole number.
        evidence = _ONE * self._ones.take(cells) + self._prior.take(kinds)[:, None]
        inputs = self._stretch.take((evidence / (16 * (self._totals.take(cells) + _PRIOR_WEIGHT))).astype(np.int64))
        mixed = (self._weights.take(kinds, 0) * inputs).sum(1) >> 16
        return self._squash.take(mixed + _EDGE, mode="clip"), inputs

    def learn(
        self, kinds: np.ndarray, bits: np.ndarray, cells: np.ndarray, probabilities: np.ndarray, inputs: np.ndarray
    ) -> None:
        """Counts the decisions of a whole chunk, and corrects the weights; the kinds asked for in one step are asked for in no other."""
        np.add.at(self._totals, cells.ravel(), 1.0)
        np.add.at(self._ones, cells[bits == 1].ravel(), 1.0)
        full = cells[self._totals.take(cells) > _LIMIT]
        ones, zeros = self._ones[full], self._totals[full] - self._ones[full]
        self._ones[full], self._totals[full] = ones // 2, ones // 2 + zeros // 2
        errors = (bits * _ONE - probabilities)[:, None]
        places = kinds[:, None] * len(self._sizes) + np.arange(len(self._sizes))
        np.add.at(self._weights.reshape(-1), places.ravel(), (inputs * errors >> _LEARNING_SHIFT).ravel())


def _back(values: np.ndarray, start: int, stop: int, distance: int) -> np.ndarray:
    """The values that stand so far before the places from start to stop; 0 before the first."""
    missing = min(max(distance - start, 0), stop - start)
    return np.concatenate([np.zeros(missing, np.int64), values[start + missing - distance : stop - distance]])


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
    model = _Model(layout, scale)
    step = _BLOCK // layout.chunk * layout.chunk
    for start in range(0, values.size, step):
        block = values[start : start + step]
        places, kinds, bits = _decisions(block)
        chunks = places // layout.chunk
        order = np.argsort(chunks, kind="stable")
        kinds, bits = kinds[order], bits[order]
        cells = model.cells(kinds, model.contexts(values, start, start + len(block))[places[order]])
        bounds = np.searchsorted(chunks[order], np.arange(-(-len(block) // layout.chunk) + 1)).tolist()
        magnitudes = abs(block)
        unmodelled = _unmodelled_bits(_bit_length(magnitudes))
        for begin, (first, last) in zip(range(0, len(block), layout.chunk), itertools.pairwise(bounds), strict=True):
            asked, told = slice(first, last), slice(begin, begin + layout.chunk)
            probabilities, inputs = model.predict(kinds[asked], cells[asked])
            encoder.encode(bits[asked].tolist(), probabilities.tolist())
            model.learn(kinds[asked], bits[asked], cells[asked], probabilities, inputs)
            for magnitude, count in zip(magnitudes[told].tolist(), unmodelled[told].tolist(), strict=True):
                encoder.encode_raw(magnitude, count)


def _decisions(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that is asked about some integers: places, kinds and answers, question by question and each in the order of the integers."""
    magnitudes = abs(values)
    digits = _bit_length(magnitudes)
    places = np.arange(len(values))
    steps = [(places, np.full(len(places), _ZERO), digits > 0)]
    places = places[digits > 0]
    steps.append((places, np.full(len(places), _SIGN), values[places] < 0))
    for length in range(1, min(int(digits.max()), _MOST_DIGITS - 1) + 1):
        asked = places[digits[places] >= length]
        steps.append((asked, np.full(len(asked), _LENGTH + length - 1), digits[asked] > length))
    for depth in range(_MODELLED_TAIL):
        asked = places[digits[places] - 1 > depth]
        after = digits[asked] - 2 - depth  # bits that follow the one that is asked for
        kinds = _TAIL + 8 * (digits[asked] - 1) + (magnitudes[asked] >> after + 1)
        steps.append((asked, kinds, magnitudes[asked] >> after & 1))
    places, kinds, bits = map(np.concatenate, zip(*steps, strict=True))
    return places, kinds, bits.astype(np.int64)


def _unmodelled_bits(digits: np.ndarray) -> np.ndarray:
    """How many bits of magnitudes of so many digits are coded as they are."""
    return np.maximum(digits - 1 - _MODELLED_TAIL, 0)


def decode_integers(decoder: Decoder, size: int, layout: Layout, scale: int) -> np.ndarray:
    """The integers that were coded with the same layout and scale, int64."""
    model = _Model(layout, scale)
    values = np.zeros(size, np.int64)
    for start in range(0, size, layout.chunk):
        stop = min(start + layout.chunk, size)
        values[start:stop] = _decode_chunk(decoder, model, model.contexts(values, start, stop))
    return values


def _decode_chunk(decoder: Decoder, model: _Model, contexts: np.ndarray) -> np.ndarray:
    lessons: list[tuple[np.ndarray, ...]] = []

    def ask(places: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        cells = model.cells(kinds, contexts[places])
        probabilities, inputs = model.predict(kinds, cells)
        bits = np.array(decoder.decode(probabilities.tolist()), np.int64)
        lessons.append((kinds, bits, cells, probabilities, inputs))
        return bits

    values, places = np.zeros(len(contexts), np.int64), np.arange(len(contexts))
    places = places[ask(places, np.full(len(places), _ZERO)) == 1]
    if len(places):
        negative = ask(places, np.full(len(places), _SIGN))
        digits, open_ = np.ones(len(places), np.int64), np.arange(len(places))
        while len(open_) and digits[open_[0]] < _MOST_DIGITS:
            longer = ask(places[open_], _LENGTH + digits[open_] - 1)
            digits[open_] += longer
            open_ = open_[longer == 1]
        magnitudes = np.ones(len(places), np.int64)
        for depth in range(_MODELLED_TAIL):
            more = np.flatnonzero(digits - 1 > depth)
            if len(more):
                bits = ask(places[more], _TAIL + 8 * (digits[more] - 1) + magnitudes[more])
                magnitudes[more] = magnitudes[more] * 2 + bits
        counts = _unmodelled_bits(digits)
        rest = [decoder.decode_raw(count) for count in counts.tolist()]
        magnitudes = (magnitudes << counts) + np.array(rest, np.int64)
        values[places] = np.where(negative == 1, -magnitudes, magnitudes)
    model.learn(*map(np.concatenate, zip(*lessons, strict=True)))
    return values
