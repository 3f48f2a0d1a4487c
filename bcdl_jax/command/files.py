"""Reads params and data from files of arrays under names."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bcdl_jax._tree import PyTree

_INPUTS, _TARGETS = "inputs", "targets"


class CommandError(Exception):
    """A command that cannot be carried out. Its message is one sentence."""


def read_arrays(path: str, option: str) -> dict[str, np.ndarray]:
    """The arrays of a file by their names.

    Args:
      path: A file of the type .npz or .safetensors.
      option: The option that names the file, for errors.

    Raises:
      CommandError: The file is of another type or damaged, or a package is missing.
      OSError: The file cannot be read.
    """
    kind = Path(path).suffix
    if kind == ".npz":
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise CommandError(f"{option} {path} is not a file of numpy.savez.") from error
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise CommandError(
                    f"{option} {path} holds {name} of type {array.dtype}; it must hold numbers. Bfloat16 goes into a safetensors file."
                )
        return arrays
    if kind == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.flax import load
        except ModuleNotFoundError as error:
            raise CommandError(f"{option} {path} needs safetensors: pip install -e '.[export]'.") from error
        content = Path(path).read_bytes()
        try:
            return {name: np.asarray(array) for name, array in load(content).items()}
        except SafetensorError as error:
            raise CommandError(f"{option} {path} is not a safetensors file: {error}.") from error
    raise CommandError(f"{option} is {path}; it must be a file of the type .npz or .safetensors.")


def read_params(path: str, option: str = "--params") -> PyTree:
    """The params of a file, as nested dictionaries. Names are paths, joined by "/" or by ".".

    Args:
      path: The file, see ``read_arrays``.
      option: The option that names the file, for errors.

    Raises:
      CommandError: The names do not form a tree, or the file cannot be understood.
      OSError: The file cannot be read.
    """
    tree: dict[str, Any] = {}
    for name, array in sorted(read_arrays(path, option).items()):
        *parents, last = name.split("/") if "/" in name else name.split(".")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise CommandError(f"The names in {option} {path} do not form a tree: {name} lies below an array.")
        part[last] = array
    if not tree:
        raise CommandError(f"{option} {path} holds no array.")
    return tree


def read_data(path: str, option: str) -> tuple[Any, np.ndarray]:
    """The inputs and the targets of a file: the arrays "inputs", or "inputs_0", "inputs_1" and so on, and "targets".

    Args:
      path: The file, see ``read_arrays``.
      option: The option that names the file, for errors.

    Returns:
      The inputs, an array or a tuple of arrays, and the targets.

    Raises:
      CommandError: An array is missing, or their numbers of examples differ.
      OSError: The file cannot be read.
    """
    arrays = read_arrays(path, option)
    numbered = sorted(
        (name for name in arrays if re.fullmatch(rf"{_INPUTS}_\d+", name)), key=lambda name: int(name[7:])
    )
    names = [_INPUTS] if _INPUTS in arrays else numbered
    if not names or _TARGETS not in arrays:
        raise CommandError(
            f'{option} {path} holds {", ".join(sorted(arrays)) or "no arrays"}; it must hold "inputs", or "inputs_0", "inputs_1" and so on, '
            'and "targets".'
        )
    counts = {name: len(arrays[name]) if arrays[name].ndim else 0 for name in (*names, _TARGETS)}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise CommandError(f"The arrays of {option} {path} have different numbers of examples: {listed}.")
    inputs = tuple(arrays[name] for name in names)
    return (inputs[0] if names == [_INPUTS] else inputs), arrays[_TARGETS]
