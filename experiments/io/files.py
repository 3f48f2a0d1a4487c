"""The files of a run. Each is written under a temporary name and then renamed, so that none is ever half there; only
metrics.jsonl grows, by whole lines."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from experiments.runtime.errors import UserError


def prepare_out(out: str, overwrite: bool, names: list[str]) -> Path:
    """Makes the output directory, or clears it of an earlier run's files.

    Args:
      out: the directory.
      overwrite: whether an earlier run's files may be replaced.
      names: patterns of the files that a run writes; no other file is ever removed.

    Raises:
      UserError: it is not empty and ``overwrite`` is False, it is a file, or it cannot be written.
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
    """Removes files by patterns of their names, and what a killed process left half-written of them."""
    for name in names:
        for old in [*directory.glob(name), *directory.glob(f".{name}.{'[0-9a-f]' * 32}")]:
            old.unlink()


def check_out(out: str, overwrite: bool) -> None:
    """Raises UserError where ``prepare_out`` would refuse the directory as it stands; makes nothing."""
    directory = Path(out)
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--out {out} is a file; it must be a directory.")
        if directory.is_dir() and any(directory.iterdir()) and not overwrite:
            raise UserError(f"--out {out} exists and is not empty; name another directory or add --overwrite.")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls ``write`` with an open file that becomes ``path`` only once it is complete."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def append_json_lines(path: Path, values: Sequence[Any]) -> None:
    """Adds lines in a single write; where that fails, none of them is there."""
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
    """Writes a tree of arrays as .npz, under their paths: "Dense_0/kernel_mean". Integers take the smallest type that holds them."""
    arrays = named_arrays(tree)
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.signedinteger):
            arrays[name] = array.astype(_smallest_type(array))
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by their paths: "Dense_0/kernel_mean"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").replace("posterior/", ""): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _smallest_type(integers: np.ndarray) -> type[np.signedinteger]:
    low, high = (int(integers.min()), int(integers.max())) if integers.size else (0, 0)
    types = (np.int8, np.int16, np.int32, np.int64)
    return next(kind for kind in types if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)


TRAINED_ON = "trained_on"


def read_pretrained(path: str, dataset: str, full_train_sets: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads weights by "layer/kernel" and "layer/bias" from an .npz file.

    Args:
      path: the file; its optional entry "trained_on" names the data set that the weights were trained on.
      dataset: the data set of this run.
      full_train_sets: data sets of which this run's test images may be training images of the pretrained net.

    Raises:
      UserError: it cannot be read, holds what is not a finite number, or may have seen this run's test images.
    """
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise UserError(f"--pretrained {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # of other kinds of files NumPy says that they might be unpickled
        raise UserError(f"--pretrained {path} cannot be read as an .npz file of arrays.") from error
    trained_on = str(arrays.pop(TRAINED_ON)) if TRAINED_ON in arrays else None
    for name, array in arrays.items():
        if not np.issubdtype(array.dtype, np.number):
            raise UserError(f"--pretrained {path} has {name} of type {array.dtype}; it must be an array of numbers.")
        if not np.isfinite(array).all():
            raise UserError(f"--pretrained {path} has {name} with a value that is not a finite number.")
    if dataset in full_train_sets and trained_on != dataset:
        says = f"says it was trained on {trained_on}" if trained_on else "does not say what it was trained on"
        raise UserError(
            f"--pretrained {path} {says}; on {dataset} only a net trained on {dataset} "
            f'(entry "{TRAINED_ON}" in the file) is accepted, since all its digits, test digits too, are training images of full MNIST.'
        )
    return arrays
