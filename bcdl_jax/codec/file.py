"""Params trees as compressed files: saving, loading, and the summary of a file."""

from __future__ import annotations

import dataclasses
import operator
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bcdl_jax._atomic_file import write_atomically
from bcdl_jax._tree import PyTree, array_names, check_arrays, is_key, layer_name, module_name
from bcdl_jax.codec.format import MAX_BYTES, CompressedFileError, LayerHeader, described, integers_of, nonzero_indices
from bcdl_jax.codec.reader import FileReader
from bcdl_jax.codec.writer import FileWriter
from bcdl_jax.compression.layers import is_layer
from bcdl_jax.compression.quantization import integer_bits
from bcdl_jax.compression.quantized_layer import QuantizedLayer
from bcdl_jax.priors.posterior import Posterior


@dataclasses.dataclass(frozen=True)
class RecordSummary:
    """The summary of one entry of a file, a layer or an array.

    Attributes:
      name: Path of the entry, or its number if the file has no names.
      shape: Shape of the kernel or the array.
      kept: Number of kept indices along each axis.
      bits: Bits of one integer of the kernel or of the array, or bits of the type of an array that is copied.
      bytes: Size of the entry in the file: kernel, bias, steps or levels, and sets of kept indices.
      biases: Number of biases of a layer, 0 for an array.
      dtype: The type of an array whose floats are copied, such as "float32". None for a layer or an array that is stored as integers.
    """

    name: str
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    bits: int
    bytes: float
    biases: int = 0
    dtype: str | None = None


def save(path: str | os.PathLike[str], params: PyTree, *, names: bool = False) -> int:
    """Writes a params tree to a compressed file.

    Integers are entropy-coded. Slices of zeros take almost no bytes. Floats are copied.

    Args:
      path: The file. It is written under a temporary name and then renamed.
      params: A tree of quantised layers (see ``reduce_precision``) and arrays of integers, floats or bools, shrunk or not.
      names: True to store the paths of the tree. Without them ``load`` needs a template.

    Returns:
      The number of bytes of the file.

    Raises:
      ValueError: The tree holds a posterior, or a layer, an array or a name that the format cannot hold.
      OSError: The file cannot be written.

    Warns:
      UserWarning: The tree takes more memory than ``load`` allows by default.
    """
    data = encode(params, names=names)
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def load(path: str | os.PathLike[str], like: PyTree | None = None, *, max_bytes: int = MAX_BYTES) -> PyTree:
    """Reads a file that ``save`` wrote.

    Args:
      path: The file.
      like: A template: a tree with the same layers and shapes, in the same order, such as the params from ``init``, or the small params
        from ``shrink``. Its layers may be posteriors or quantised layers. None for a file with names, which is read as nested dictionaries.
      max_bytes: The largest memory that the tree may take, 4 GiB by default. It is checked before memory is allocated: a file of a few
        bytes may hold billions of zeros.

    Returns:
      The tree with quantised layers and arrays of full shape, zero where pruned. ``shrink`` accepts it; if layers have levels, shrink
      the plain params from ``mean_weights`` instead.

    Raises:
      CompressedFileError: The file is damaged or of another kind, its content is larger than ``max_bytes``, it does not fit the template,
        or it has no names and there is no template.
      OSError: The file cannot be read.
    """
    return decode(Path(path).read_bytes(), like, max_bytes=max_bytes)


def encode(params: PyTree, *, names: bool = False) -> bytes:
    """The content of the file that ``save`` writes.

    Args:
      params: A params tree, see ``save``.
      names: True to store the paths of the tree.

    Returns:
      The bytes of the file.

    Raises:
      ValueError: The tree holds a posterior, or a layer, an array or a name that the format cannot hold.

    Warns:
      UserWarning: The tree takes more memory than ``decode`` allows by default.
    """
    check_arrays(params)
    writer = FileWriter()
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_layer):
        name = layer_name(path)
        if isinstance(node, Posterior):
            raise ValueError(f"params holds a posterior at {name}; call reduce_precision first.")
        if isinstance(node, QuantizedLayer):
            writer.add_layer(name, node)
        else:
            writer.add_array(name, _as_array(name, node))
    if writer.memory > MAX_BYTES:
        warnings.warn(
            f"params takes {writer.memory:,} bytes in memory; load needs max_bytes={writer.memory} to read the file.",
            stacklevel=2,
        )
    return writer.finish(_storable_names(params) if names else None)


def decode(data: bytes, like: PyTree | None = None, *, max_bytes: int = MAX_BYTES) -> PyTree:
    """The params tree of a file's content.

    Args:
      data: The bytes of the file.
      like: A template, or None for a file with names, see ``load``.
      max_bytes: The largest memory that the tree may take, see ``load``.

    Returns:
      The tree, see ``load``.

    Raises:
      CompressedFileError: The content is damaged or of another kind, it is larger than ``max_bytes``, it does not fit the template, or it
        has no names and there is no template.
    """
    reader = FileReader(data, max_bytes)
    if like is None:
        if reader.names is None:
            raise CompressedFileError(
                "The file holds no names; pass a template with like=params, or save the file with names=True."
            )
        return _nested(reader.names, [value for value, _ in reader.entries()])
    nodes, structure = jax.tree.flatten(like, is_leaf=is_layer)
    _check_template(reader, nodes, _names(like))
    return jax.tree.unflatten(structure, [value for value, _ in reader.entries()])


def summarize(data: bytes, *, max_bytes: int = MAX_BYTES) -> list[RecordSummary]:
    """Decodes the content of a file and summarises each entry.

    Args:
      data: The bytes of the file.
      max_bytes: The largest memory that the content may take, see ``load``.

    Returns:
      The summaries, in the order of the entries.

    Raises:
      CompressedFileError: The content is damaged or of another kind, or it is larger than ``max_bytes``.
    """
    reader = FileReader(data, max_bytes)
    names = reader.names or [str(number) for number in range(len(reader.headers))]
    return [_summary(name, value, size) for name, (value, size) in zip(names, reader.entries(), strict=True)]


def _summary(name: str, value: QuantizedLayer | np.ndarray, size: float) -> RecordSummary:
    if not isinstance(value, QuantizedLayer):
        kept = tuple(int(np.sum(flags)) for flags in nonzero_indices(value))
        integers = value if value.dtype.kind in "biu" else (integers_of(value) or (None,))[0]
        if integers is None:
            return RecordSummary(name, value.shape, kept, 8 * value.dtype.itemsize, size, dtype=value.dtype.name)
        return RecordSummary(name, value.shape, kept, int(integer_bits(integers.astype(np.int64))), size)
    *window, fan_in, _ = value.kernel_shape
    # The kernel of a grouped convolution has entries for all of its inputs.
    kept_inputs = int(np.sum(value.input_mask)) if value.feature_groups == 1 else fan_in
    kept = (*window, kept_inputs, int(np.sum(value.output_mask)))
    biases = 0 if value.bias is None else value.bias.size
    return RecordSummary(name, value.kernel_shape, kept, int(value.kernel_bits), size, biases)


def _check_template(reader: FileReader, nodes: Sequence[Any], names: Sequence[str]) -> None:
    """Raises CompressedFileError if the template's nodes or names differ from those of the file."""
    if len(nodes) != len(reader.headers):
        hint = ""
        if any(isinstance(header, LayerHeader) for header in reader.headers) and not any(map(is_layer, nodes)):
            hint = " The template must be the params of the variational network; mean_weights then makes the loaded params plain."
        raise CompressedFileError(
            f"The file holds {len(reader.headers)} layers and arrays; the template has {len(nodes)}.{hint}"
        )
    if reader.names is not None:
        # One of the two trees may store its layers without the entry of their modules.
        stored_names, wanted_names = map(module_name, reader.names), map(module_name, names)
        for number, (stored, wanted) in enumerate(zip(stored_names, wanted_names, strict=True)):
            if stored != wanted:
                raise CompressedFileError(f"Entry {number} of the file is called {stored}; the template has {wanted}.")
    for number, (header, node) in enumerate(zip(reader.headers, nodes, strict=True)):
        stored_kind, wanted_kind = isinstance(header, LayerHeader), is_layer(node)
        shape = node.kernel_shape if wanted_kind else np.shape(node)
        if stored_kind != wanted_kind or header.shape != shape:
            same_kind = stored_kind == wanted_kind and len(header.shape) == len(shape)
            fits_within = same_kind and all(map(operator.le, header.shape, shape))
            hint = " A file of shrunk params needs the small params from shrink as template." if fits_within else ""
            raise CompressedFileError(
                f"Entry {number} of the file is {described(stored_kind, header.shape)}; the template has "
                f"{described(wanted_kind, shape)}.{hint}"
            )


def _names(tree: PyTree) -> list[str]:
    return array_names([path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_layer)])


def _storable_names(tree: PyTree) -> list[str]:
    """The names of a tree. Raises ValueError for a name that a file cannot hold."""
    names = _names(tree)
    for name in names:
        if "\n" in name:
            raise ValueError(f"The name {name!r} in params holds a line feed; a stored name must be a single line.")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(
                f"The name {name!r} in params holds half of a surrogate pair; a stored name must be valid Unicode text."
            )
    return names


def _as_array(name: str, leaf: Any) -> np.ndarray:
    """A leaf as an array of this machine's byte order. Raises ValueError for PRNG keys."""
    if is_key(leaf):
        raise ValueError(
            f"The array at {name} holds PRNG keys ({leaf.dtype}); save their numbers, jax.random.key_data, instead."
        )
    array = np.asarray(leaf)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _nested(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        *parents, last = name.split("/")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise CompressedFileError(f"The names in the file do not form a tree: {name} lies below an array.")
        if last in part:
            raise CompressedFileError(f"The file holds the name {name} twice.")
        part[last] = value
    return tree
