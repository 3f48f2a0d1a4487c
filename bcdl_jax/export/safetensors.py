"""Weights as safetensors, under the names of their arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np

from bcdl_jax._atomic_file import write_atomically
from bcdl_jax._tree import PyTree, named_arrays
from bcdl_jax.compression.plain_twin import mean_weights

# The name of the format's own entry, and the types that the format and NumPy share.
_RESERVED = "__metadata__"
_TYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
)


def export_safetensors(
    path: str | os.PathLike[str], params: PyTree, *, metadata: Mapping[str, str] | None = None
) -> int:
    """Writes the arrays of a tree under their names. Needs ``safetensors`` (``pip install -e '.[export]'``).

    Args:
      path: The file. It is written under a temporary name and then renamed.
      params: A tree of arrays, such as the small params from ``shrink`` or the result of ``torch_state_dict``. Posteriors and quantised
        layers are written as their mean weights. The name of an array is its path, joined by dots.
      metadata: Further strings for the header of the file.

    Returns:
      The number of bytes of the file.

    Raises:
      ValueError: Two arrays have the same name, an array has a name or a type that the format cannot hold, or ``metadata`` has an entry
        that is not a string.
      OSError: The file cannot be written.
      ModuleNotFoundError: The package safetensors is not installed.
    """
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("export_safetensors needs safetensors: pip install -e '.[export]'.") from error
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata has the entry {key!r}: {value!r}; the key and the value must be strings.")
    arrays = numpy_arrays(mean_weights(params), ".")
    for name, array in arrays.items():
        if name == _RESERVED:
            raise ValueError(f"An array has the name {name}, which the format reserves; rename it.")
        if array.dtype.name not in _TYPES:
            raise ValueError(f"{name} has the type {array.dtype.name}; allowed are {', '.join(_TYPES)}.")
    data = save(arrays, dict(metadata or {}))
    write_atomically(path, lambda file: file.write(data))
    return len(data)


def numpy_arrays(tree: PyTree, separator: str) -> dict[str, np.ndarray]:
    """The arrays of a tree by name, in the order of its leaves.

    Args:
      tree: A tree of arrays.
      separator: The string between the parts of a name.

    Raises:
      ValueError: Two arrays have the same name, or an array does not hold plain numbers.
    """
    named: dict[str, np.ndarray] = {}
    for name, leaf in named_arrays(tree, separator):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.extended):
            raise ValueError(f"{name} has the type {leaf.dtype}; only arrays of plain numbers can be written.")
        if name in named:
            raise ValueError(f"Two arrays have the name {name}; each name must be unique.")
        named[name] = np.array(leaf, order="C")
    return named
