"""The compressed file: all that a reduced params tree holds, in as few bytes as its integers can be coded in.

FORMAT.md beside this file specifies it byte by byte.
"""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._atomic_file import write_atomically
from bcdl_jax._tree import PyTree, array_names, layer_name, module_name
from bcdl_jax.codec.integer_coding import decode_integers, encode_integers, layout_of
from bcdl_jax.codec.range_coder import Decoder, Encoder
from bcdl_jax.compression.quantization import QuantizedLayer, integer_bits
from bcdl_jax.priors.posterior import Posterior

MAGIC, VERSION = b"BCDL", 1
_HAS_NAMES = 1
_LAYER, _ARRAY = 0, 1  # kinds of records
_HAS_BIAS, _OUTPUT_GROUPS, _FEATURE_GROUPS, _OWN_BITS = (
    1,
    2,
    4,
    8,
)  # flags of a layer; its step's type stands above them
_PRUNES_WEIGHTS = 64  # a flag of a layer above its step's type
_LEVELS = 128  # likewise: its kernel has levels in place of a step
_CODED = 128  # flag of an array: its integers are coded, not copied
_DTYPES = tuple(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", jnp.bfloat16, "float32", "float64"),
    )
)
_STEP_DTYPES = tuple(np.dtype(name) for name in ("float32", "float16", jnp.bfloat16, "float64"))
_RAW, _WITH_NEIGHBOURS, _PLAIN, _SPARSE = range(4)  # ways to code integers
_ALL, _BITMAP, _REMOVED, _KEPT = range(4)  # ways to code a set of kept indices
_LARGEST = 2**32 - 1

_SAMPLE = 2**14

# What a file of some bytes may ask for, so that a damaged one can't ask for everything. The writer keeps to it.
_CODED_PER_BYTE, _CODED_AT_LEAST = 32, 2**12
_WHOLE_PER_BYTE, _WHOLE_AT_LEAST = 4096, 2**22


class CompressedFileError(ValueError):
    """A file that can't be read: what is wrong with it, in one sentence."""


@dataclasses.dataclass(frozen=True)
class RecordSummary:
    """What a file holds of one layer or array.

    Attributes:
      name: its path if names are stored, else its number.
      shape: of the kernel or array.
      kept: how many indices are kept along each axis.
      bits: of the widest integer of a layer's kernel; of the type for an array.
      bytes: of the file that it takes: kernel, bias, steps or levels, and kept indices.
      biases: how many a layer has beside its kernel.
    """

    name: str
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    bits: int
    bytes: float
    biases: int = 0


def save(path: str | os.PathLike[str], params: PyTree, *, names: bool = False) -> int:
    """Writes a params tree as a compressed file.

    Args:
      path: the file. It is written under a temporary name and then renamed.
      params: tree of quantised layers (see ``reduce_precision``) and arrays of integers, floats or bools. Integers are entropy-coded;
        slices of zeros take next to nothing; floats are stored as they are.
      names: whether to store the paths of the tree. Without them ``load`` needs a template, whose layers it takes in their order.

    Returns:
      The number of bytes of the file.

    Raises:
      ValueError: the tree holds variational_layers, or an array that can't be stored.
    """
    data = encode(params, names=names)
    write_atomically(path, data)
    return len(data)


def load(path: str | os.PathLike[str], like: PyTree | None = None) -> PyTree:
    """Reads a file of ``save``.

    Args:
      path: the file.
      like: a tree of the same layers and shapes, such as the params that ``init`` gives, with variational_layers or quantised layers. May be left
        out if the file holds names: then nested dictionaries come back.

    Returns:
      The tree with quantised layers and arrays in full shape, zero where pruned; ready for ``shrink`` (where layers have levels, shrink the
      twin, see ``mean_weights``).

    Raises:
      CompressedFileError: the file is damaged or of another kind, does not fit the template, or holds no names and there is none.
      OSError: it cannot be read.
    """
    return decode(Path(path).read_bytes(), like)


def encode(params: PyTree, *, names: bool = False) -> bytes:
    """The content of the file that ``save`` writes."""
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_layer)
    writer = _FileWriter()
    for path, node in flat:
        where = layer_name(path)
        if isinstance(node, Posterior):
            raise ValueError(f"params hold a posterior at {where}; call reduce_precision first.")
        if isinstance(node, QuantizedLayer):
            writer.layer(where, node)
        else:
            writer.array(where, np.asarray(node))
    paths = _names(params) if names else None
    if paths and any("\n" in path for path in paths):
        raise ValueError("A name in params holds a line feed; such names can't be stored.")
    return writer.finish(len(flat), paths)


def decode(data: bytes, like: PyTree | None = None) -> PyTree:
    """Reads the content of a file, see ``load``."""
    reader = _FileReader(data)
    if like is None:
        if reader.names is None:
            raise CompressedFileError(
                "The file holds no names; give load a template with like=params, or save it with names=True."
            )
        return _nested(reader.names, [value for value, _ in reader.records()])
    flat, structure = jax.tree.flatten(like, is_leaf=_is_layer)
    if len(flat) != len(reader.headers):
        plain = any(header.kind == _LAYER for header in reader.headers) and not any(map(_is_layer, flat))
        raise CompressedFileError(
            f"The file holds {len(reader.headers)} layers and arrays; the template has {len(flat)}."
            + " It must be params of the variational network; mean_weights makes the plain one's of what is loaded."
            * plain
        )
    for number, (held, wanted) in enumerate(zip(reader.names or (), _names(like), strict=reader.names is not None)):
        # A layer may be an entry of its module, and an array of a variable, in one of the two alone.
        held, wanted = (module_name(name).removesuffix("/value") for name in (held, wanted))
        if held != wanted:
            raise CompressedFileError(f"Entry {number} of the file is called {held}; the template has {wanted}.")
    for number, (header, node) in enumerate(zip(reader.headers, flat, strict=True)):
        wants_layer = _is_layer(node)
        shape = node.kernel_shape if wants_layer else np.shape(node)
        if wants_layer != (header.kind == _LAYER) or shape != header.shape:
            raise CompressedFileError(
                f"Entry {number} of the file is {_described(header.kind == _LAYER, header.shape)}; the template has "
                f"{_described(wants_layer, shape)}."
            )
    return jax.tree.unflatten(structure, [value for value, _ in reader.records()])


def summarize(data: bytes) -> list[RecordSummary]:
    """Decodes a file's content and says what it holds. Raises CompressedFileError if it is damaged."""
    reader = _FileReader(data)
    names = reader.names or [str(number) for number in range(len(reader.headers))]
    summaries = []
    for name, (value, size) in zip(names, reader.records(), strict=True):
        if isinstance(value, QuantizedLayer):
            kernel = np.asarray(value.kernel)
            kept_in = int(np.sum(value.input_mask)) if kernel.shape[-2] == value.input_mask.size else kernel.shape[-2]
            kept: tuple[int, ...] = (*kernel.shape[:-2], kept_in, int(np.sum(value.output_mask)))
            biases = 0 if value.bias is None else value.bias.size
            summaries.append(RecordSummary(name, kernel.shape, kept, int(value.kernel_bits), size, biases))
        else:
            kept = tuple(int(np.sum(flags)) for flags in _kept_of(value))
            summaries.append(RecordSummary(name, value.shape, kept, 8 * value.dtype.itemsize, size))
    return summaries


def _described(is_layer: bool, shape: Sequence[int]) -> str:
    return f"{'a layer' if is_layer else 'an array'} of shape {tuple(shape)}"


def _names(tree: PyTree) -> list[str]:
    return array_names([path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_layer)])


def _is_layer(node: Any) -> bool:
    return isinstance(node, Posterior | QuantizedLayer)


def _nested(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *parents, last = name.split("/")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise CompressedFileError(f"The file's names do not make a tree: {name} lies below an array.")
        if last in part:
            raise CompressedFileError(f"The file holds the name {name} twice.")
        part[last] = value
    return tree


def _kept_of(array: np.ndarray) -> list[np.ndarray]:
    """Per axis, which indices hold anything but zeros (bits and all: -0.0 is not zero)."""
    if not array.ndim:
        return []
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    axes = range(array.ndim)
    return [(bits != 0).any(tuple(other for other in axes if other != axis)) for axis in axes]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# The stream: sets of kept indices and integers, all in one run of the range coder.


class _FileWriter:
    def __init__(self) -> None:
        self._header, self._copied, self._coder = bytearray(), bytearray(), Encoder()
        self._flags: dict[int, np.ndarray] = {}

    def layer(self, where: str, layer: QuantizedLayer) -> None:
        kernel, inputs, outputs = (np.asarray(value) for value in (layer.kernel, layer.input_mask, layer.output_mask))
        fan_in = kernel.shape[-2]
        groups = inputs.size // fan_in if fan_in else 1
        part = kernel[..., outputs] if groups != 1 else kernel[..., inputs, :][..., outputs]
        own = [layer.kernel_bits] if layer.bias is None else [layer.kernel_bits, layer.bias_bits]
        arrays = [kernel] if layer.bias is None else [kernel, np.asarray(layer.bias)]
        steps = [np.asarray(step) for step in ([layer.kernel_step, layer.bias_step][: len(arrays)])]
        levels = None if layer.kernel_levels is None else np.asarray(layer.kernel_levels).astype(steps[0].dtype)
        if np.count_nonzero(part) != np.count_nonzero(kernel):
            raise ValueError(f"The kernel of layer {where} is not zero where its masks say it is pruned.")
        if layer.bias is not None and np.asarray(layer.bias)[~outputs].any():
            raise ValueError(f"The bias of layer {where} is not zero where its mask says it is pruned.")
        if steps[0].dtype not in _STEP_DTYPES:
            raise ValueError(f"The step of layer {where} is {steps[0].dtype}; it must be a float.")
        if levels is not None and not _are_levels(levels, kernel):
            raise ValueError(
                f"The levels of layer {where} are not ascending finite numbers without 0, one for each integer of its kernel."
            )
        counted = [int(integer_bits(jnp.asarray(array))) for array in arrays]
        own_bits = [int(bits) for bits in own if bits is not None]
        flags = _HAS_BIAS * (layer.bias is not None) | _OUTPUT_GROUPS * (layer.group_axis == "output")
        flags |= _FEATURE_GROUPS * (groups != 1) | _OWN_BITS * (own_bits != counted)
        flags |= _STEP_DTYPES.index(steps[0].dtype) << 4 | _PRUNES_WEIGHTS * layer.prunes_weights
        flags |= _LEVELS * (levels is not None)
        self._header += bytes([_LAYER << 4 | kernel.ndim, flags]) + b"".join(map(_varint, kernel.shape))
        if groups != 1:
            self._header += _varint(groups)
        if own_bits != counted:
            self._header += bytes(own_bits)
        if levels is not None:
            self._header += _varint(levels.size)
            steps[0] = levels
        self._header += b"".join(step.astype(step.dtype.newbyteorder("<")).tobytes() for step in steps)
        self._kept(inputs)
        self._kept(outputs)
        self._integers(part)
        if layer.bias is not None:
            self._integers(np.asarray(layer.bias)[outputs])

    def array(self, where: str, array: np.ndarray) -> None:
        if array.dtype not in _DTYPES or array.ndim > 15:
            allowed = ", ".join(dtype.name for dtype in _DTYPES)
            raise ValueError(
                f"The array at {where} is {array.dtype} with {array.ndim} axes; allowed are {allowed}, and 15 axes."
            )
        kept = _kept_of(array)
        whole = array.dtype.kind in "biu"
        coded = whole and all(abs(int(value)) <= _LARGEST for value in (array.min(initial=0), array.max(initial=0)))
        if coded:
            # Zeros may cost less than the sets that say where they are.
            everything = [np.ones(size, bool) for size in array.shape]
            kept = min((everything, kept), key=lambda sets: self._size_with(array, sets))
        part = array[np.ix_(*kept)] if array.ndim else array
        self._header += bytes([_ARRAY << 4 | array.ndim, _DTYPES.index(array.dtype) | _CODED * coded])
        self._header += b"".join(map(_varint, array.shape))
        for flags in kept:
            self._kept(flags)
        if coded:
            self._integers(part)
        else:
            self._copied += part.astype(part.dtype.newbyteorder("<")).tobytes()

    def _size_with(self, array: np.ndarray, kept: Sequence[np.ndarray]) -> int:
        trial = _FileWriter()
        trial._flags = dict(self._flags)
        for flags in kept:
            trial._kept(flags)
        trial._integers(array[np.ix_(*kept)] if array.ndim else array)
        return len(trial._coder.finish())

    def finish(self, count: int, names: list[str] | None) -> bytes:
        if names is not None:
            text = "\n".join(names).encode()
            self._copied[:0] = _varint(len(text)) + text
        head = MAGIC + bytes([VERSION, _HAS_NAMES * (names is not None)]) + _varint(count) + _varint(len(self._copied))
        data = head + self._header + self._coder.finish() + self._copied
        return bytes(data) + zlib.crc32(data).to_bytes(4, "little")

    def _kept(self, flags: np.ndarray) -> None:
        ways: list[tuple[int, Callable[[Encoder], None]]] = []
        before = self._flags.get(flags.size)
        if flags.all():
            ways.append((_ALL, lambda _: None))
        else:
            removed, kept = np.flatnonzero(~flags), np.flatnonzero(flags)
            ways.append((_REMOVED, lambda coder: _write_gaps(coder, removed)))
            ways.append((_KEPT, lambda coder: _write_gaps(coder, kept)))
            ways.append((_BITMAP, lambda coder: _write_bitmap(coder, flags, before)))
        found = _smallest(ways, {_BITMAP: flags.size})
        assert found is not None  # lists of indices always keep to it
        way, write = found
        self._coder.encode_raw(way, 2)
        write(self._coder)
        self._flags[flags.size] = flags

    def _integers(self, values: np.ndarray) -> None:
        if not values.size:
            return
        row = values.shape[-1] if values.ndim > 1 and values.size > values.shape[-1] else 0
        flat = values.ravel().astype(np.int64)
        places = np.flatnonzero(flat)
        width = _width(flat)
        ways: list[tuple[int, Callable[[Encoder], None]]] = []
        if flat.size > 1:
            # Whether neighbours help shows on a part.
            sample = flat[:_SAMPLE]
            with_neighbours = row and _size(lambda coder: _write_scaled(coder, sample, row)) < _size(
                lambda coder: _write_scaled(coder, sample, 0)
            )
            way, chosen = (_WITH_NEIGHBOURS, row) if with_neighbours else (_PLAIN, 0)
            ways.append((way, lambda coder: _write_scaled(coder, flat, chosen)))
        if 4 * len(places) < flat.size:

            def write_sparse(coder: Encoder) -> None:
                _write_gaps(coder, places)
                if len(places):
                    _write_scaled(coder, flat[places], 0)

            ways.append((_SPARSE, write_sparse))
        dense = {_PLAIN: flat.size, _WITH_NEIGHBOURS: flat.size}
        if flat.size > 1 and (flat == flat[0]).all():
            width, ways = 0, []
        below = 6 + width * flat.size
        if len(ways) > 1:
            ways = [found] if (found := _smallest(ways, dense, below)) else []
        for way, write in ways:
            before = self._coder.copy()
            self._coder.encode_raw(way, 2)
            write(self._coder)
            bits = self._coder.bits_written - before.bits_written - 2
            if bits < below and dense.get(way, 0) <= _CODED_PER_BYTE * bits / 8:
                return
            self._coder = before
        self._coder.encode_raw(_RAW, 2)
        _write_raw(self._coder, flat, width)


def _size(write: Callable[[Encoder], None]) -> int:
    coder = Encoder()
    write(coder)
    return len(coder.finish())


def _smallest(
    ways: list[tuple[int, Callable[[Encoder], None]]], coded: dict[int, int], below: float = math.inf
) -> tuple[int, Callable[[Encoder], None]] | None:
    """The way that takes the fewest bytes, of those that keep to what a file may ask for; None if none takes fewer bits than ``below``."""
    sizes = []
    for way, write in ways:
        size = _size(write)
        if coded.get(way, 0) <= _CODED_PER_BYTE * size and 8 * size < below:
            sizes.append((size, way, write))
    if not sizes:
        return None
    _, way, write = min(sizes, key=lambda entry: entry[:2])
    return way, write


def _width(values: np.ndarray) -> int:
    """Bits of a two's complement that holds all values."""
    largest = max(int(values.max(initial=0)), -int(values.min(initial=0)) - 1)
    return largest.bit_length() + 1


def _write_raw(coder: Encoder, values: np.ndarray, width: int) -> None:
    coder.encode_raw(width, 6)
    if not width:
        coder.encode_raw(int(values[0]) & (2**33 - 1), 33)
        return
    for value in values.tolist():
        coder.encode_raw(value & ((1 << width) - 1), width)


def _write_scaled(coder: Encoder, values: np.ndarray, row: int) -> None:
    scale = int(np.clip(np.rint(8 * np.log2(1 + np.abs(values).mean())), 0, 255))
    coder.encode_raw(scale, 8)
    encode_integers(coder, values, layout_of(row), scale)


def _write_gaps(coder: Encoder, indices: np.ndarray) -> None:
    coder.encode_raw(len(indices), 32)
    if len(indices):
        _write_scaled(coder, np.diff(indices, prepend=-1) - 1, 0)


class _BitmapModel:
    """Counts of kept and removed indices by what the index before is, and what this index was in an earlier set of that size."""

    def __init__(self, before: np.ndarray | None):
        self._before = [] if before is None else before.astype(int).tolist()
        self._counts = [[1, 1] for _ in range(9)]

    def context(self, place: int, last: int) -> list[int]:
        return self._counts[3 * last + (self._before[place] if self._before else 2)]

    @staticmethod
    def probability(counts: list[int]) -> int:
        return min(max((counts[1] << 16) // (counts[0] + counts[1]), 1), 65535)


def _write_bitmap(coder: Encoder, flags: np.ndarray, before: np.ndarray | None) -> None:
    model, last = _BitmapModel(before), 2
    for place, bit in enumerate(flags.astype(int).tolist()):
        counts = model.context(place, last)
        coder.encode([bit], [model.probability(counts)])
        counts[bit] += 2
        last = bit


@dataclasses.dataclass(frozen=True)
class _Header:
    kind: int
    shape: tuple[int, ...]
    dtype: np.dtype
    flags: int = 0
    groups: int = 1
    own_bits: tuple[int, ...] | None = None
    steps: tuple[np.ndarray, ...] = ()
    levels: np.ndarray | None = None


class _FileReader:
    """Checks a file's content, reads its headers, and then its records one by one."""

    def __init__(self, data: bytes):
        if len(data) < 12 or data[:4] != MAGIC:
            raise CompressedFileError("This is not a compressed params file: it does not begin with BCDL.")
        if data[4] != VERSION:
            raise CompressedFileError(f"The file has format version {data[4]}; this library reads version {VERSION}.")
        if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            raise CompressedFileError("The file is damaged: its checksum does not match.")
        if data[5] & ~_HAS_NAMES:
            raise CompressedFileError("The file is damaged: it has unknown flags.")
        self._data, self._place, self._end = data, 6, len(data) - 4
        self._coded_left = _CODED_AT_LEAST + _CODED_PER_BYTE * len(data)
        self._whole_left = _WHOLE_AT_LEAST + _WHOLE_PER_BYTE * len(data)
        count, copied = self._varint(), self._varint()
        if copied > self._end - self._place or count > self._end - self._place:
            raise CompressedFileError("The file is damaged: it is shorter than it says.")
        self._end -= copied
        self._copied = data[self._end : len(data) - 4]
        self.names = self._read_names(count) if data[5] & _HAS_NAMES else None
        self.headers = [self._header() for _ in range(count)]
        self._coder = Decoder(data[self._place : self._end])
        self._flags: dict[int, np.ndarray] = {}

    def records(self) -> list[tuple[Any, float]]:
        """Every layer or array, with the bytes it takes."""
        found = []
        for header in self.headers:
            before = self._coder.bits_read
            value, copied = self._layer(header) if header.kind == _LAYER else self._array(header)
            # Levels stand in place of the kernel's step.
            steps = sum(step.nbytes for step in header.steps[header.levels is not None :])
            steps += 0 if header.levels is None else header.levels.nbytes
            found.append((value, (self._coder.bits_read - before) / 8 + copied + steps))
        if self._copied or self._coder.bytes_left > 0:
            raise CompressedFileError("The file is damaged: it holds more than it says.")
        return found

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 42, 7):
            if self._place >= self._end:
                raise CompressedFileError("The file is damaged: it ends within its header.")
            byte = self._data[self._place]
            self._place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise CompressedFileError("The file is damaged: a number in its header is too large.")

    def _bytes(self, count: int) -> bytes:
        if self._place + count > self._end:
            raise CompressedFileError("The file is damaged: it ends within its header.")
        self._place += count
        return self._data[self._place - count : self._place]

    def _read_names(self, count: int) -> list[str]:
        place, self._place, end = self._place, self._end, self._end
        self._end = len(self._data) - 4
        length = self._varint()
        try:
            names = self._bytes(length).decode().split("\n")
        except UnicodeDecodeError:
            raise CompressedFileError("The file is damaged: its names are no text.") from None
        self._copied = self._data[self._place : self._end]
        self._place, self._end = place, end
        if len(names) != count and (count or names != [""]):
            raise CompressedFileError(f"The file is damaged: it has {len(names)} names for {count} entries.")
        return names if count else []

    def _header(self) -> _Header:
        first, second = self._bytes(2)
        kind, rank = first >> 4, first & 15
        shape = tuple(self._varint() for _ in range(rank))
        whole = math.prod(shape)
        if whole > self._whole_left or max(shape, default=0) > self._whole_left:
            raise CompressedFileError(
                f"The file is damaged: {_described(kind == _LAYER, shape)} is more than it can hold."
            )
        self._whole_left -= whole
        if kind == _ARRAY:
            number = second & ~_CODED
            if number >= len(_DTYPES) or (second & _CODED and _DTYPES[number].kind not in "biu"):
                raise CompressedFileError("The file is damaged: an array is of an unknown type.")
            return _Header(kind, shape, _DTYPES[number], second & _CODED)
        flags, step = second & ~(3 << 4), (second >> 4) & 3
        if kind != _LAYER or rank < 2:
            raise CompressedFileError("The file is damaged: an entry is of an unknown kind.")
        groups = self._varint() if flags & _FEATURE_GROUPS else 1
        if not 1 <= groups <= max(1, self._whole_left // max(1, shape[-2])) or (
            flags & _FEATURE_GROUPS and groups == 1
        ):
            raise CompressedFileError("The file is damaged: a layer has an impossible number of feature groups.")
        parts = 1 + bool(flags & _HAS_BIAS)
        own_bits = tuple(self._bytes(parts)) if flags & _OWN_BITS else None
        dtype = _STEP_DTYPES[step]
        count = self._varint() if flags & _LEVELS else 1
        numbers = np.frombuffer(self._bytes((count + parts - 1) * dtype.itemsize), dtype.newbyteorder("<")).astype(
            dtype
        )
        if not np.isfinite(numbers).all():
            raise CompressedFileError("The file is damaged: a step is not a finite number.")
        if not flags & _LEVELS:
            return _Header(kind, shape, dtype, flags, groups, own_bits, tuple(numbers))
        return _Header(kind, shape, dtype, flags, groups, own_bits, (dtype.type(1), *numbers[count:]), numbers[:count])

    def _layer(self, header: _Header) -> tuple[QuantizedLayer, int]:
        inputs = self._kept(header.shape[-2] * header.groups)
        outputs = self._kept(header.shape[-1])
        rows = inputs if header.groups == 1 else np.ones(header.shape[-2], bool)
        grid = np.ix_(*(np.ones(size, bool) for size in header.shape[:-2]), rows, outputs)
        kernel = np.zeros(header.shape, np.int16)
        kernel[grid] = self._integers(tuple(len(axis.ravel()) for axis in grid), np.dtype(np.int16))
        bias = None
        if header.flags & _HAS_BIAS:
            bias = np.zeros(header.shape[-1:], np.int16)
            bias[outputs] = self._integers((int(outputs.sum()),), np.dtype(np.int16))
        arrays = [kernel] if bias is None else [kernel, bias]
        if header.levels is not None and not _are_levels(header.levels, kernel):
            raise CompressedFileError("The file is damaged: the levels of a layer do not fit its integers.")
        bits = header.own_bits or tuple(int(_two_complement_bits(array)) for array in arrays)
        return QuantizedLayer(
            kernel=jnp.asarray(kernel),
            kernel_step=_exactly(header.steps[0]),
            kernel_bits=jnp.asarray(bits[0], jnp.int32),
            bias=None if bias is None else jnp.asarray(bias),
            bias_step=None if bias is None else _exactly(header.steps[1]),
            bias_bits=None if bias is None else jnp.asarray(bits[1], jnp.int32),
            input_mask=jnp.asarray(inputs),
            output_mask=jnp.asarray(outputs),
            group_axis="output" if header.flags & _OUTPUT_GROUPS else "input",
            prunes_weights=bool(header.flags & _PRUNES_WEIGHTS),
            kernel_levels=None if header.levels is None else _exactly(header.levels),
        ), 0

    def _array(self, header: _Header) -> tuple[np.ndarray, int]:
        kept = [self._kept(size) for size in header.shape]
        shape = tuple(int(flags.sum()) for flags in kept)
        copied = 0
        if header.flags & _CODED:
            part = self._integers(shape, header.dtype)
        else:
            copied = math.prod(shape) * header.dtype.itemsize
            if copied > len(self._copied):
                raise CompressedFileError("The file is damaged: it is shorter than it says.")
            part = (
                np.frombuffer(self._copied[:copied], header.dtype.newbyteorder("<")).astype(header.dtype).reshape(shape)
            )
            self._copied = self._copied[copied:]
            if header.dtype.kind == "b" and (part.view(np.uint8) > 1).any():
                raise CompressedFileError("The file is damaged: a bool is neither 0 nor 1.")
        if not header.shape:
            return part, copied
        array = np.zeros(header.shape, header.dtype)
        array[np.ix_(*kept)] = part
        return array, copied

    def _ask_for(self, count: int) -> int:
        self._coded_left -= count
        if self._coded_left < 0:
            raise CompressedFileError("The file is damaged: it asks for more numbers than it can hold.")
        return count

    def _whole(self, count: int) -> None:
        self._whole_left -= count
        if self._whole_left < 0:
            raise CompressedFileError("The file is damaged: it asks for more numbers than it can hold.")

    def _check_end(self) -> None:
        if self._coder.bytes_beyond_the_end > 4:
            raise CompressedFileError("The file is damaged: it ends within its numbers.")

    def _kept(self, size: int) -> np.ndarray:
        way = self._coder.decode_raw(2)
        if way == _ALL:
            flags = np.ones(size, bool)
        elif way == _BITMAP:
            model, last, bits = _BitmapModel(self._flags.get(size)), 2, []
            for place in range(self._ask_for(size)):
                counts = model.context(place, last)
                (last,) = self._coder.decode([model.probability(counts)])
                counts[last] += 2
                bits.append(last)
            flags = np.array(bits, bool)
        else:
            flags = np.full(size, way == _REMOVED)
            flags[self._gaps(size)] = way == _KEPT
        self._check_end()
        self._flags[size] = flags
        return flags

    def _gaps(self, size: int) -> np.ndarray:
        count = self._coder.decode_raw(32)
        if count > size:
            raise CompressedFileError("The file is damaged: it names more indices than there are.")
        if not count:
            return np.zeros(0, int)
        gaps = self._scaled(count, 0)
        indices = np.cumsum(gaps + 1) - 1
        if (gaps < 0).any() or indices[-1] >= size:
            raise CompressedFileError("The file is damaged: it names an index that is out of range.")
        return indices

    def _scaled(self, count: int, row: int) -> np.ndarray:
        self._ask_for(count)
        scale = self._coder.decode_raw(8)
        values = decode_integers(self._coder, count, layout_of(row), scale)
        self._check_end()
        return values

    def _integers(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape)
        if not size:
            return np.zeros(shape, dtype)
        way = self._coder.decode_raw(2)
        row = shape[-1] if len(shape) > 1 else 0
        if way == _RAW:
            width = self._coder.decode_raw(6)
            if width:
                self._ask_for(size)
            else:
                self._whole(size)
            if width > 33 or size * width > 8 * (self._end + 8):
                raise CompressedFileError("The file is damaged: it is shorter than it says.")
            sign = 1 << (width - 1 if width else 32)
            raw = np.array([self._coder.decode_raw(width or 33) for _ in range(size if width else 1)], np.int64)
            values = np.broadcast_to((raw ^ sign) - sign, size)
        elif way == _WITH_NEIGHBOURS and len(shape) < 2:
            raise CompressedFileError("The file is damaged: a sequence has no rows.")
        elif way == _SPARSE:
            places = self._gaps(size)
            self._whole(size)
            values = np.zeros(size, np.int64)
            if len(places):
                values[places] = self._scaled(len(places), 0)
                if not values[places].all():
                    raise CompressedFileError("The file is damaged: a zero stands among what is not zero.")
        else:
            values = self._scaled(size, row if way == _WITH_NEIGHBOURS else 0)
        self._check_end()
        if dtype.kind == "b":
            low, high = 0, 1
        else:
            low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        if values.min() < low or values.max() > high:
            raise CompressedFileError(f"The file is damaged: an integer is out of the range of {dtype.name}.")
        return values.astype(dtype).reshape(shape)


def _exactly(step: np.ndarray) -> Any:
    """As a JAX array, if that can hold it: without x64, JAX has no float64."""
    return jnp.asarray(step) if jax.dtypes.canonicalize_dtype(step.dtype) == step.dtype else step


def _are_levels(levels: np.ndarray, kernel: np.ndarray) -> bool:
    """Whether the levels are ascending finite numbers without 0, and there is one for each integer of the kernel."""
    negative = int((levels < 0).sum())
    fit = -negative <= int(kernel.min(initial=0)) and int(kernel.max(initial=0)) <= levels.size - negative
    return fit and bool(np.isfinite(levels).all() and (levels != 0).all() and (levels[:-1] < levels[1:]).all())


def _two_complement_bits(values: np.ndarray) -> int:
    return _width(values.astype(np.int64)) if values.any() else 0
