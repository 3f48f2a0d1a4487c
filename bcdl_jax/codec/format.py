"""The constants, headers and limits of the compressed file, which the writer and the reader share. FORMAT.md specifies them."""

from __future__ import annotations

import dataclasses
import enum
import math

import jax.numpy as jnp
import numpy as np

MAGIC = b"BCDL"
VERSION = 1


class FileFlag(enum.IntFlag):
    """Flags of the whole file."""

    NAMES = 1


class EntryKind(enum.IntEnum):
    """The kind of an entry: a quantised layer or an array."""

    LAYER = 0
    ARRAY = 1


class LayerFlag(enum.IntFlag):
    """Flags of a layer. The bits between ``BITS`` and ``PRUNED_WEIGHTS`` hold the type of the steps, see ``STEP_DTYPE_SHIFT``."""

    BIAS = 1
    OUTPUT_GROUPS = 2
    FEATURE_GROUPS = 4
    BITS = 8
    PRUNED_WEIGHTS = 64
    LEVELS = 128


class ArrayFlag(enum.IntFlag):
    """Flags of an array. The lower bits hold the type of the array, an index into ``ARRAY_DTYPES``."""

    CODED = 128


class IntegerCoding(enum.IntEnum):
    """The codings of an array of integers."""

    RAW = 0
    WITH_NEIGHBOURS = 1
    PLAIN = 2
    SPARSE = 3


class SetCoding(enum.IntEnum):
    """The codings of a set of kept indices."""

    ALL = 0
    BITMAP = 1
    REMOVED = 2
    KEPT = 3


ARRAY_DTYPES = tuple(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", jnp.bfloat16, "float32", "float64"),
    )
)
STEP_DTYPES = tuple(np.dtype(name) for name in ("float32", "float16", jnp.bfloat16, "float64"))
# The index into STEP_DTYPES takes two bits among the flags of a layer.
STEP_DTYPE_SHIFT, STEP_DTYPE_MASK = 4, 3 << 4

MAX_AXES = 15
# The exponents of the steps of coded floats fit into a byte.
MIN_EXPONENT, MAX_EXPONENT = -128, 127
_DOUBLE_DIGITS = 53
# Coding the integers of floats that were not rounded would save little.
_MOST_FLOAT_DIGITS = 16
MAX_CODED_MAGNITUDE = 2**32 - 1  # Arrays with larger integers are copied.

# The limit on coded numbers for a file of a given length. It bounds the time that a damaged file can take. The writer keeps to it.
CODED_PER_BYTE, MIN_CODED_LIMIT = 32, 2**12
# The value of the length field that announces one raw bit per index instead of a list.
RAW_FLAGS = 2**32 - 1
# The raw bits of the one integer of a constant array.
CONSTANT_WIDTH = 33
# The default limit on the memory that the content of a file takes.
MAX_BYTES = 2**32


class CompressedFileError(ValueError):
    """An error of a compressed file that cannot be read. Its message names the cause in one sentence."""


def damaged(cause: str) -> CompressedFileError:
    """The error of a file that contradicts the format."""
    return CompressedFileError(f"The file is damaged: {cause}.")


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """The header of an array.

    Attributes:
      shape: Shape of the array.
      dtype: Type of the array.
      coded: True if the values are in the coded stream, False if they are in the copied part.
      exponent: The exponent of the step of coded floats: a value is an integer times 2 ** exponent.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    coded: bool
    exponent: int = 0

    @property
    def memory(self) -> int:
        """The bytes of the array in memory, and a byte for each index of each axis."""
        return math.prod(self.shape) * self.dtype.itemsize + sum(self.shape)


@dataclasses.dataclass(frozen=True)
class LayerHeader:
    """The header of a quantised layer.

    Attributes:
      shape: Shape of the kernel, [*window, in / feature groups, out].
      flags: Flags of the layer, without the type of the steps.
      feature_groups: Number of feature groups.
      bits: Bits of the kernel and of the bias, if the file stores them, else None.
      steps: Step of the kernel and, for a layer with bias, step of the bias. They have the same type. With levels, the first one is 1.
      levels: Levels of the kernel, or None.
    """

    shape: tuple[int, ...]
    flags: LayerFlag
    feature_groups: int
    bits: tuple[int, ...] | None
    steps: tuple[np.ndarray, ...]
    levels: np.ndarray | None

    @property
    def memory(self) -> int:
        """The bytes of the layer in memory: two for each integer, and one for each index of a set or of a window axis."""
        *window, fan_in, features = self.shape
        biases = features if LayerFlag.BIAS in self.flags else 0
        return 2 * (math.prod(self.shape) + biases) + sum(window) + fan_in * self.feature_groups + features

    @property
    def stored_numbers(self) -> tuple[np.ndarray, ...]:
        """The floats of the header: the step or the levels of the kernel, then the step of the bias."""
        return self.steps if self.levels is None else (self.levels, *self.steps[1:])


@dataclasses.dataclass
class CodedLimit:
    """The number of coded numbers that a reader may still decode: scaled and raw integers, and bits of bitmaps.

    Attributes:
      left: The number.
    """

    left: float

    @classmethod
    def of_file(cls, length: float) -> CodedLimit:
        """The limit of a file of ``length`` bytes. The writer passes a fraction of a byte too."""
        return cls(MIN_CODED_LIMIT + CODED_PER_BYTE * length)

    def use(self, count: int) -> None:
        """Subtracts ``count`` coded numbers. Raises CompressedFileError if fewer are left."""
        self.left -= count
        if self.left < 0:
            raise damaged("it has more coded numbers than its length allows")


def described(is_layer: bool, shape: tuple[int, ...]) -> str:
    """The words for an entry in error messages."""
    return f"{'a layer' if is_layer else 'an array'} of shape {tuple(shape)}"


def nonzero_indices(array: np.ndarray) -> list[np.ndarray]:
    """For each axis, the indices whose slice has a nonzero bit, as an array of bool. The float -0.0 has one."""
    if not array.ndim:
        return []
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    axes = range(array.ndim)
    return [(bits != 0).any(tuple(other for other in axes if other != axis)) for axis in axes]


def levels_fit(levels: np.ndarray, kernel: np.ndarray) -> bool:
    """Whether the levels are ascending finite numbers without 0, one for each integer of the kernel."""
    negative = int((levels < 0).sum())
    enough = -negative <= int(kernel.min(initial=0)) and int(kernel.max(initial=0)) <= levels.size - negative
    return enough and bool(np.isfinite(levels).all() and (levels != 0).all() and (levels[:-1] < levels[1:]).all())


def integers_of(array: np.ndarray) -> tuple[np.ndarray, int] | None:
    """The integers, int64, and the exponent of the coarsest step 2 ** exponent whose multiples the floats of an array are.

    Returns:
      None if an integer would have more than 16 binary digits, or as many as a float has bits, or if all are 0 and need no integers.
    """
    with np.errstate(invalid="ignore"):  # Signalling NaN.
        wide = array.astype(np.float64)
    if not wide.any() or not np.isfinite(wide).all() or (np.signbit(wide) & (wide == 0)).any():
        return None
    fractions, exponents = np.frexp(wide[wide != 0])
    whole = np.abs(np.ldexp(fractions, _DOUBLE_DIGITS)).astype(np.int64)
    # The lowest bit that is set.
    lowest = exponents - _DOUBLE_DIGITS + np.frexp((whole & -whole).astype(np.float64))[1] - 1
    exponent = min(int(lowest.min()), MAX_EXPONENT)
    largest = int(exponents.max()) - exponent  # The number of digits of the largest integer.
    if exponent < MIN_EXPONENT or largest > _MOST_FLOAT_DIGITS or largest >= 8 * array.dtype.itemsize:
        return None
    return np.ldexp(wide, -exponent).astype(np.int64), exponent


def floats_of(integers: np.ndarray, exponent: int, dtype: np.dtype) -> np.ndarray:
    """The floats integer * 2 ** exponent. Raises CompressedFileError if the type cannot hold them exactly."""
    wide = np.ldexp(integers.astype(np.float64), exponent)
    with np.errstate(over="ignore"):
        floats = wide.astype(dtype)
    if (floats.astype(np.float64) != wide).any():
        raise damaged("a float is not a number of its type")
    return floats
