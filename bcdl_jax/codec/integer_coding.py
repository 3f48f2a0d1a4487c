"""Entropy coding of integer arrays: every binary decision has a probability that is learned from the earlier ones.

An integer is coded as a few decisions: whether it is zero, its sign, the number of binary digits of its magnitude (one decision for each
further digit), and the bits after the leading one. Several counters give each decision a probability: one counts all decisions of the
same kind, one those with the same value in the row above, and so on. A network with one layer for each kind of decision mixes these
probabilities, and is trained during coding (context mixing [M05], with integers). Neighbouring inputs have similar weights, so
the code is shorter than the entropy of the histogram.

Integers are coded in chunks. The counts and weights stay fixed within a chunk, so that a chunk takes a few array operations. The encoder
has all decisions of a chunk, and computes their probabilities at once. The decoder needs the bits of one step for the next one. All
results are exact integers, also where floating point computes them faster, so that every machine decodes the same values. FORMAT.md
specifies the algorithm for other decoders.
"""

from __future__ import annotations

import dataclasses
import itertools
from decimal import Decimal, localcontext
from functools import cache

import numpy as np

from bcdl_jax.codec.range_coder import Decoder, Encoder

# Kinds of decisions: 0: nonzero? 1: negative? 2 + e: more than e + 1 binary digits in the magnitude? The first three bits after the leading
# one of a magnitude of e + 1 digits have the kinds _TAIL + 8 e + (the bits so far, the leading one included). Further bits have no model.
_ZERO, _SIGN, _LENGTH, _TAIL = 0, 1, 2, 40
_KINDS = _TAIL + 8 * 32
_MODELLED_TAIL, _MAX_DIGITS = 3, 32
_CLASSES = 13  # The sign and the number of binary digits, at most 6, of a neighbour.
_PRIOR_COUNT, _MAX_COUNT = 8, 1023
_LEARNING_SHIFT, _ONE = 16, 1 << 16
_STEPS_PER_NAT, _MAX_LOG_ODDS = 170, 2047
MIN_CHUNK, MAX_CHUNK = 16, 256
_BLOCK = 1 << 15  # The encoder lists the decisions of this many integers at a time, to bound its memory.


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The logistic function and its inverse: probability by log-odds (index 0 is -2047), log-odds by probability / 16."""
    with localcontext() as context:
        context.prec = 30
        squash = []
        for step in range(-_MAX_LOG_ODDS, _MAX_LOG_ODDS + 1):
            value = Decimal(_ONE) / (1 + (-Decimal(step) / _STEPS_PER_NAT).exp())
            squash.append(min(max(int(value.to_integral_value()), 1), _ONE - 1))
        stretch = []
        for cell in range(4096):
            odds = (Decimal(2 * cell + 1) / (8192 - 2 * cell - 1)).ln() * _STEPS_PER_NAT
            stretch.append(min(max(int(odds.to_integral_value()), -_MAX_LOG_ODDS), _MAX_LOG_ODDS))
    return np.array(squash), np.array(stretch)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of a flattened array.

    Attributes:
      chunk: Number of integers that are coded at a time.
      above: Distance to the integer one row above, at least ``chunk``, since the integers of a chunk are coded together; 0 for a plain
        sequence without neighbours.
    """

    chunk: int
    above: int


def layout_of(row: int) -> Layout:
    """The layout for rows of length ``row`` whose columns have similar values, or for a plain sequence (0)."""
    chunk = min(row * -(-MIN_CHUNK // row), MAX_CHUNK) if row else MIN_CHUNK
    return Layout(chunk, max(row, chunk) if row else 0)


class _Model:
    """The counts and mixing weights of one array."""

    def __init__(self, layout: Layout, scale: int) -> None:
        self._layout = layout
        sizes = np.array([1, _CLASSES, _CLASSES, 5 * 5, 16] if layout.above else [1])
        self._sizes, self._starts = sizes, _KINDS * (np.cumsum(sizes) - sizes)
        # For each cell (a kind of decision in one context), the number of decisions and the number of ones. Both are whole numbers.
        self._totals, self._ones = np.zeros((2, _KINDS * sizes.sum()))
        self._weights = np.full((_KINDS, len(sizes)), _ONE // len(sizes) + _ONE // 16, np.int64)
        self._prior = _PRIOR_COUNT * prior_table(scale).astype(np.float64)
        self._squash, self._stretch = _tables()

    def contexts(self, values: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The context of each integer for each input of the mixture, [stop - start, inputs], from integers of earlier chunks."""
        contexts = np.empty((stop - start, len(self._sizes)), np.int64)
        contexts[:, 0] = 0
        if self._layout.above:
            one, two, three, four = (_earlier(values, start, stop, rows * self._layout.above) for rows in (1, 2, 3, 4))
            contexts[:, 1] = _class(one)
            contexts[:, 2] = _class((2 * one + two + (one + two + three + four) // 2) // 3)
            contexts[:, 3] = np.clip(contexts[:, 1] - 4, 0, 4) * 5 + np.clip(_class(two) - 4, 0, 4)
            energy = abs(one) * 4 + abs(two) * 3 + abs(three) * 2 + abs(four)
            contexts[:, 4] = np.minimum(_bit_length(energy), 15)
        return contexts

    def cells(self, kinds: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """The cells of decisions, [decisions, inputs], from their kinds [decisions] and contexts [decisions, inputs]."""
        return kinds[:, None] * self._sizes + (contexts + self._starts)

    def predict(self, kinds: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probabilities that decisions are 1, and the inputs of the mixture, which ``learn`` needs."""
        # The integers are so small that the rounding of a quotient never reaches the next integer.
        evidence = _ONE * self._ones.take(cells) + self._prior.take(kinds)[:, None]
        inputs = self._stretch.take((evidence / (16 * (self._totals.take(cells) + _PRIOR_COUNT))).astype(np.int64))
        mixed = (self._weights.take(kinds, 0) * inputs).sum(1) >> 16
        return self._squash.take(mixed + _MAX_LOG_ODDS, mode="clip"), inputs

    def learn(
        self, kinds: np.ndarray, bits: np.ndarray, cells: np.ndarray, probabilities: np.ndarray, inputs: np.ndarray
    ) -> None:
        """Counts the decisions of a whole chunk and corrects the weights. All decisions of one kind belong to the same step."""
        np.add.at(self._totals, cells.ravel(), 1.0)
        np.add.at(self._ones, cells[bits == 1].ravel(), 1.0)
        full = cells[self._totals.take(cells) > _MAX_COUNT]
        ones, zeros = self._ones[full], self._totals[full] - self._ones[full]
        self._ones[full], self._totals[full] = ones // 2, ones // 2 + zeros // 2
        errors = (bits * _ONE - probabilities)[:, None]
        places = kinds[:, None] * len(self._sizes) + np.arange(len(self._sizes))
        np.add.at(self._weights.reshape(-1), places.ravel(), (inputs * errors >> _LEARNING_SHIFT).ravel())


def _earlier(values: np.ndarray, start: int, stop: int, distance: int) -> np.ndarray:
    """The values ``distance`` places before those from ``start`` to ``stop``; 0 before the first one."""
    missing = min(max(distance - start, 0), stop - start)
    return np.concatenate([np.zeros(missing, np.int64), values[start + missing - distance : stop - distance]])


def _bit_length(values: np.ndarray) -> np.ndarray:
    """The number of binary digits of non-negative integers below 2^53."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _class(values: np.ndarray) -> np.ndarray:
    """The sign and the number of binary digits as one number from 0 to 12; 6 for zero."""
    return 6 + np.sign(values) * np.minimum(_bit_length(abs(values)), 6)


def prior_table(scale: int) -> np.ndarray:
    """The probability of each kind of decision before any is counted, in units of 2^-16, for geometrically distributed magnitudes.

    Args:
      scale: Eight times the binary logarithm of the mean of 1 + magnitude, from 0 to 255.
    """
    mean = (256 << (scale >> 3)) * (8 + (scale & 7)) // 8  # In units of 1/256.
    # The probability that a magnitude is larger by 2^0, 2^1, 2^2, ... at least, in units of 2^-32.
    larger_by = [((mean - 256) << 32) // mean]
    while len(larger_by) < 32:
        larger_by.append(larger_by[-1] * larger_by[-1] >> 32)
    table = np.full(_KINDS, _ONE // 2, np.int64)
    table[_ZERO] = _bounded_ratio(larger_by[0], 1 << 32)
    for extra in range(32):
        table[_LENGTH + extra] = _bounded_ratio(larger_by[extra], 1 << 32)
        for depth in range(min(extra, _MODELLED_TAIL)):
            upper_half = larger_by[extra - 1 - depth]
            for prefix in range(1 << depth):
                kind = _TAIL + 8 * extra + (1 << depth | prefix)
                table[kind] = _bounded_ratio(upper_half, (1 << 32) + upper_half)
    return table


def _bounded_ratio(part: int, whole: int) -> int:
    return min(max((part << 16) // max(whole, 1), 1 << 8), _ONE - (1 << 8))


def encode_integers(encoder: Encoder, values: np.ndarray, layout: Layout, scale: int) -> None:
    """Codes a flat array of integers with magnitudes below 2^32.

    Args:
      encoder: The range coder.
      values: The integers.
      layout: The layout of the integers, see ``layout_of``.
      scale: The scale of the prior, see ``prior_table``.
    """
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
        raw_bits = _raw_bits(_bit_length(magnitudes))
        for begin, (first, last) in zip(range(0, len(block), layout.chunk), itertools.pairwise(bounds), strict=True):
            decisions, chunk = slice(first, last), slice(begin, begin + layout.chunk)
            probabilities, inputs = model.predict(kinds[decisions], cells[decisions])
            encoder.encode(bits[decisions].tolist(), probabilities.tolist())
            model.learn(kinds[decisions], bits[decisions], cells[decisions], probabilities, inputs)
            for magnitude, count in zip(magnitudes[chunk].tolist(), raw_bits[chunk].tolist(), strict=True):
                encoder.encode_raw(magnitude, count)


def _decisions(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The modelled decisions about some integers: their places, kinds and bits, step by step, and by place within a step."""
    magnitudes = abs(values)
    digits = _bit_length(magnitudes)
    places = np.arange(len(values))
    steps = [(places, np.full(len(places), _ZERO), digits > 0)]
    places = places[digits > 0]
    steps.append((places, np.full(len(places), _SIGN), values[places] < 0))
    for length in range(1, min(int(digits.max()), _MAX_DIGITS - 1) + 1):
        concerned = places[digits[places] >= length]
        steps.append((concerned, np.full(len(concerned), _LENGTH + length - 1), digits[concerned] > length))
    for depth in range(_MODELLED_TAIL):
        concerned = places[digits[places] - 1 > depth]
        after = digits[concerned] - 2 - depth  # The number of bits after the one of this step.
        kinds = _TAIL + 8 * (digits[concerned] - 1) + (magnitudes[concerned] >> after + 1)
        steps.append((concerned, kinds, magnitudes[concerned] >> after & 1))
    places, kinds, bits = map(np.concatenate, zip(*steps, strict=True))
    return places, kinds, bits.astype(np.int64)


def _raw_bits(digits: np.ndarray) -> np.ndarray:
    """The number of bits without a model in magnitudes of the given numbers of digits."""
    return np.maximum(digits - 1 - _MODELLED_TAIL, 0)


def decode_integers(decoder: Decoder, size: int, layout: Layout, scale: int) -> np.ndarray:
    """Decodes ``size`` integers that ``encode_integers`` coded with the same layout and scale.

    Returns:
      The integers, int64.
    """
    model = _Model(layout, scale)
    values = np.zeros(size, np.int64)
    for start in range(0, size, layout.chunk):
        stop = min(start + layout.chunk, size)
        values[start:stop] = _ChunkDecoder(decoder, model, model.contexts(values, start, stop)).decode()
    return values


class _ChunkDecoder:
    """Decodes one chunk, then updates the model with the decisions of that chunk."""

    def __init__(self, decoder: Decoder, model: _Model, contexts: np.ndarray) -> None:
        self._decoder, self._model, self._contexts = decoder, model, contexts
        self._steps: list[tuple[np.ndarray, ...]] = []

    def decode(self) -> np.ndarray:
        values, places = np.zeros(len(self._contexts), np.int64), np.arange(len(self._contexts))
        places = places[self._decide(places, np.full(len(places), _ZERO)) == 1]
        if len(places):
            negative = self._decide(places, np.full(len(places), _SIGN))
            digits = self._digits(places)
            magnitudes = self._magnitudes(places, digits)
            values[places] = np.where(negative == 1, -magnitudes, magnitudes)
        self._model.learn(*map(np.concatenate, zip(*self._steps, strict=True)))
        return values

    def _digits(self, places: np.ndarray) -> np.ndarray:
        digits, open_ = np.ones(len(places), np.int64), np.arange(len(places))
        while len(open_) and digits[open_[0]] < _MAX_DIGITS:
            longer = self._decide(places[open_], _LENGTH + digits[open_] - 1)
            digits[open_] += longer
            open_ = open_[longer == 1]
        return digits

    def _magnitudes(self, places: np.ndarray, digits: np.ndarray) -> np.ndarray:
        magnitudes = np.ones(len(places), np.int64)
        for depth in range(_MODELLED_TAIL):
            open_ = np.flatnonzero(digits - 1 > depth)
            if len(open_):
                bits = self._decide(places[open_], _TAIL + 8 * (digits[open_] - 1) + magnitudes[open_])
                magnitudes[open_] = magnitudes[open_] * 2 + bits
        counts = _raw_bits(digits)
        rest = [self._decoder.decode_raw(count) for count in counts.tolist()]
        return (magnitudes << counts) + np.array(rest, np.int64)

    def _decide(self, places: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """The bits of one step: a decision of the given kind at each place."""
        cells = self._model.cells(kinds, self._contexts[places])
        probabilities, inputs = self._model.predict(kinds, cells)
        bits = np.array(self._decoder.decode(probabilities.tolist()), np.int64)
        self._steps.append((kinds, bits, cells, probabilities, inputs))
        return bits
