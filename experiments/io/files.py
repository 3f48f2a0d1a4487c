"""The files of a run. Each is written under a temporary name and then renamed, so that no file is ever incomplete. Only metrics.jsonl
grows, by whole lines."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bcdl_jax
from experiments.runtime.errors import UserError


def prepare_out(out: str, overwrite: bool, names: list[str]) -> Path:
    """Makes the output directory, or removes an earlier run's files from it.

    Args:
      out: The output directory.
      overwrite: True to replace the files of an earlier run, False to refuse a directory that is not empty.
      names: Patterns of the files that a run writes. No other file is ever removed.

    Raises:
      UserError: The directory is not empty and ``overwrite`` is False, it is a file, or it cannot be written.
    """
    check_out(out, overwrite)
    directory = Path(out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
        remove(directory, names)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error
    return directory


def remove(directory: Path, names: list[str]) -> None:
    """Removes the files of a directory whose names fit one of the patterns, and their incomplete temporary files."""
    for name in names:
        for old in [*directory.glob(name), *directory.glob(f".{name}.{'[0-9a-f]' * 32}")]:
            old.unlink()


def check_out(out: str, overwrite: bool) -> None:
    """Raises UserError if ``prepare_out`` would refuse the directory in its present state. Makes nothing."""
    directory = Path(out)
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out {out} is a file; it must be a directory.")
        if directory.is_dir() and any(directory.iterdir()) and not overwrite:
            raise UserError(f"--out {out} exists and is not empty; name another directory or add --overwrite.")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value. Raises ValueError for a number that is not finite."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    bcdl_jax.codec.write_atomically(path, lambda file: file.write(text.encode()))


def append_json_lines(path: Path, values: Sequence[Any]) -> None:
    """Adds one line for each value. If that fails, none of the lines stays in the file."""
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(text.encode()) != len(text.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def write_arrays(path: Path, tree: Any) -> None:
    """Writes the arrays of a tree to an .npz file under their names, see ``arrays_by_layer_field``. Integers get the smallest type that holds them."""
    arrays = arrays_by_layer_field(tree)
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.signedinteger):
            arrays[name] = array.astype(_smallest_type(array))
    bcdl_jax.codec.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def arrays_by_layer_field(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by the layer's name and the field of its node, such as "Dense_0/kernel_mean"; other arrays by path."""
    named = {}
    for path, part in jax.tree_util.tree_leaves_with_path(tree, is_leaf=bcdl_jax.compression.is_layer):
        layer = path[:-1] if bcdl_jax.compression.is_layer(part) else path
        for field, leaf in jax.tree_util.tree_leaves_with_path(part):
            named[jax.tree_util.keystr((*layer, *field), simple=True, separator="/")] = np.asarray(leaf)
    return named


def _smallest_type(integers: np.ndarray) -> type[np.signedinteger]:
    low, high = (int(integers.min()), int(integers.max())) if integers.size else (0, 0)
    types = (np.int8, np.int16, np.int32, np.int64)
    return next(kind for kind in types if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)


# The entry of a file of weights that names the data set they were trained on.
TRAINED_ON = "trained_on"


def read_pretrained(path: str, dataset: str, overlapping: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads pre-trained weights from an .npz file.

    Args:
      path: The file. Its optional entry "trained_on" is the name of the data set that the weights were trained on.
      dataset: The name of the data set of this run.
      overlapping: The data sets whose test images are training images of another data set. On these only a network that was trained on
        the same data set is accepted.

    Returns:
      The weights by name: "layer/kernel" and "layer/bias".

    Raises:
      UserError: The file cannot be read, holds an entry that is not a finite number, or the network may have been trained on test images
        of this run.
    """
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UserError(f"--pretrained {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # NumPy reports other files as pickles, which would mislead the user.
        raise UserError(f"--pretrained {path} cannot be read as an .npz file of arrays.") from error
    trained_on = str(arrays.pop(TRAINED_ON)) if TRAINED_ON in arrays else None
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.number):
            raise UserError(f"--pretrained {path} has {name} of type {array.dtype}; it must be an array of numbers.")
        if not np.isfinite(array).all():
            raise UserError(f"--pretrained {path} has {name} with a value that is not a finite number.")
    if dataset in overlapping and trained_on != dataset:
        found = f"was trained on {trained_on}" if trained_on else f'has no entry "{TRAINED_ON}"'
        raise UserError(
            f'--pretrained {path} {found}; --dataset {dataset} takes only a network whose entry "{TRAINED_ON}" is {dataset}, '
            "since all its digits, the test digits too, are training images of full MNIST."
        )
    return arrays
