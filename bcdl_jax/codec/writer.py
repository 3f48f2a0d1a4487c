"""The writer of the compressed file: headers, the coded stream, and the copied part."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from bcdl_jax.codec.format import (
    ARRAY_DTYPES,
    MAGIC,
    MAX_AXES,
    MAX_CODED_MAGNITUDE,
    STEP_DTYPE_SHIFT,
    STEP_DTYPES,
    VERSION,
    ArrayFlag,
    ArrayHeader,
    EntryKind,
    FileFlag,
    LayerFlag,
    LayerHeader,
    integers_of,
    levels_fit,
    nonzero_indices,
)
from bcdl_jax.codec.stream_writer import StreamWriter
from bcdl_jax.compression.quantization import integer_bits
from bcdl_jax.compression.quantized_layer import QuantizedLayer


class FileWriter:
    """Collects the entries of a file, in order.

    Attributes:
      memory: The number of bytes that a reader takes for the entries so far.
    """

    def __init__(self) -> None:
        self._headers, self._copied = bytearray(), bytearray()
        self._stream = StreamWriter()
        self._count = 0
        self.memory = 0

    def add_layer(self, name: str, layer: QuantizedLayer) -> None:
        """Adds a layer. Raises ValueError, with the layer's name, if the format cannot hold the layer."""
        kernel, inputs, outputs = (np.asarray(value) for value in (layer.kernel, layer.input_mask, layer.output_mask))
        bias = None if layer.bias is None else np.asarray(layer.bias)
        kept_kernel = kernel[..., outputs] if layer.feature_groups != 1 else kernel[..., inputs, :][..., outputs]
        if np.count_nonzero(kept_kernel) != np.count_nonzero(kernel):
            raise ValueError(
                f"The kernel of layer {name} has nonzero integers at pruned inputs or outputs; allowed is 0."
            )
        if bias is not None and bias[~outputs].any():
            raise ValueError(f"The bias of layer {name} has nonzero integers at pruned outputs; allowed is 0.")
        header = _layer_header(name, layer)
        self._headers += _layer_header_bytes(header)
        self._count += 1
        self.memory += header.memory
        self._stream.write_set(inputs)
        self._stream.write_set(outputs)
        self._stream.write_integers(kept_kernel)
        if bias is not None:
            self._stream.write_integers(bias[outputs])

    def add_array(self, name: str, array: np.ndarray) -> None:
        """Adds an array. Raises ValueError, with the array's name, if the format cannot hold the array."""
        if array.dtype not in ARRAY_DTYPES or array.ndim > MAX_AXES:
            allowed = ", ".join(dtype.name for dtype in ARRAY_DTYPES)
            raise ValueError(
                f"The array at {name} is {array.dtype} with {array.ndim} axes; allowed are the types {allowed}, and at most "
                f"{MAX_AXES} axes."
            )
        sets, exponent = nonzero_indices(array), 0
        values: np.ndarray | None = None
        if array.dtype.kind in "biu":
            if all(abs(int(value)) <= MAX_CODED_MAGNITUDE for value in (array.min(initial=0), array.max(initial=0))):
                values = array
        elif (found := integers_of(array)) is not None:
            values, exponent = found
        if values is not None:
            # Coded zeros may take fewer bytes than the sets that leave them out.
            full = [np.ones(size, bool) for size in array.shape]
            sets = min((full, sets), key=lambda sets: self._stream.size_with(values, sets))
        header = ArrayHeader(array.shape, array.dtype, values is not None, exponent)
        self._headers += _array_header_bytes(header)
        self._count += 1
        self.memory += header.memory
        for flags in sets:
            self._stream.write_set(flags)
        if values is not None:
            self._stream.write_integers(_at(values, sets))
        else:
            self._copied += _little_endian(_at(array, sets))

    def finish(self, names: list[str] | None) -> bytes:
        """The content of the file. The writer cannot be used afterwards.

        Args:
          names: The names of the entries, or None to store no names.
        """
        copied = bytes(self._copied)
        flags = FileFlag(0)
        if names is not None:
            flags |= FileFlag.NAMES
            text = "\n".join(names).encode()
            copied = _varint(len(text)) + text + copied
        head = MAGIC + bytes([VERSION, flags]) + _varint(self._count) + _varint(len(copied))
        data = head + self._headers + self._stream.finish() + copied
        return data + zlib.crc32(data).to_bytes(4, "little")


def _layer_header(name: str, layer: QuantizedLayer) -> LayerHeader:
    kernel = np.asarray(layer.kernel)
    arrays, steps, bits = [kernel], [np.asarray(layer.kernel_step)], [int(layer.kernel_bits)]
    if layer.bias is not None:
        arrays.append(np.asarray(layer.bias))
        steps.append(np.asarray(layer.bias_step))
        if layer.bias_bits is not None:
            bits.append(int(layer.bias_bits))
    levels = None if layer.kernel_levels is None else np.asarray(layer.kernel_levels).astype(steps[0].dtype)
    if steps[0].dtype not in STEP_DTYPES:
        allowed = ", ".join(dtype.name for dtype in STEP_DTYPES)
        raise ValueError(f"The step of layer {name} has type {steps[0].dtype}; allowed are {allowed}.")
    if levels is not None and not levels_fit(levels, kernel):
        raise ValueError(
            f"The levels of layer {name} are not ascending finite numbers without 0, one for each integer of the kernel."
        )
    bits_stored = bits != [int(integer_bits(array.astype(np.int64))) for array in arrays]
    flags = LayerFlag(0)
    for flag, condition in (
        (LayerFlag.BIAS, layer.bias is not None),
        (LayerFlag.OUTPUT_GROUPS, layer.group_axis == "output"),
        (LayerFlag.FEATURE_GROUPS, layer.feature_groups != 1),
        (LayerFlag.BITS, bits_stored),
        (LayerFlag.PRUNED_WEIGHTS, layer.prunes_weights),
        (LayerFlag.LEVELS, levels is not None),
    ):
        if condition:
            flags |= flag
    stored_bits = tuple(bits) if bits_stored else None
    return LayerHeader(kernel.shape, flags, layer.feature_groups, stored_bits, tuple(steps), levels)


def _layer_header_bytes(header: LayerHeader) -> bytes:
    step_type = STEP_DTYPES.index(header.steps[0].dtype)
    data = bytes([EntryKind.LAYER << 4 | len(header.shape), int(header.flags) | step_type << STEP_DTYPE_SHIFT])
    data += b"".join(map(_varint, header.shape))
    if LayerFlag.FEATURE_GROUPS in header.flags:
        data += _varint(header.feature_groups)
    data += bytes(header.bits or ())
    if header.levels is not None:
        data += _varint(header.levels.size)
    return data + b"".join(map(_little_endian, header.stored_numbers))


def _array_header_bytes(header: ArrayHeader) -> bytes:
    dtype = ARRAY_DTYPES.index(header.dtype)
    data = bytes([EntryKind.ARRAY << 4 | len(header.shape), dtype | ArrayFlag.CODED * header.coded])
    data += b"".join(map(_varint, header.shape))
    if header.coded and header.dtype.kind not in "biu":
        data += header.exponent.to_bytes(1, "little", signed=True)
    return data


def _at(array: np.ndarray, sets: Sequence[np.ndarray]) -> np.ndarray:
    """The elements at the kept indices of each axis."""
    return array[np.ix_(*sets)] if array.ndim else array


def _little_endian(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
