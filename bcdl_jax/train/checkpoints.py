"""The checkpoints of ``fit``: files from which a later process goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcdl_jax._atomic_file import write_atomically
from bcdl_jax._tree import PyTree, is_key

_PREFIX, _SUFFIX, _FACTS = "fit-", ".npz", "facts"
# The newest checkpoints that stay. The second one serves if the first one is damaged.
_KEPT = 2
# The share of the time that writing may take.
_WRITING_SHARE = 0.02


class Checkpoints:
    """The checkpoints of one call of ``fit``, in a directory.

    Each one is a file of arrays and of facts in JSON. It is complete or absent. The newest two stay.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Makes the directory if it does not exist.

        Args:
          directory: The directory.
          settings: The facts that determine the result, as JSON values. A run continues only with equal settings.

        Raises:
          NotADirectoryError: The path is a file.
          FileNotFoundError: The parent of the directory does not exist.
        """
        self._directory = Path(directory)
        self._directory.mkdir(exist_ok=True)
        self._settings = json.loads(json.dumps(settings))
        self._last, self._seconds = 0.0, 0.0

    def newest(self) -> tuple[dict[str, Any], list[np.ndarray]] | None:
        """The facts and the arrays of the newest undamaged checkpoint, or None if there is none.

        Raises:
          ValueError: The checkpoint belongs to a run with other settings.
        """
        for path in self._paths():
            try:
                with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                    content = json.loads(file[_FACTS].tobytes())
                    arrays = [file[str(number)] for number in range(content["arrays"])]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            self._check_settings(path, content["settings"])
            return content["facts"], arrays
        return None

    def save(self, facts: Mapping[str, Any], tree: PyTree) -> None:
        """Writes a checkpoint. If that fails, such as on a full disk, a warning says so, and the earlier checkpoints stay.

        Args:
          facts: JSON values.
          tree: A tree of arrays.

        Warns:
          UserWarning: The checkpoint could not be written.
        """
        start = time.perf_counter()
        leaves = jax.tree.leaves(tree)
        content = {"settings": self._settings, "facts": facts, "arrays": len(leaves)}
        arrays = {str(number): np.asarray(_numbers(leaf)) for number, leaf in enumerate(leaves)}
        arrays[_FACTS] = np.frombuffer(json.dumps(content).encode(), np.uint8)
        existing = self._paths()
        number = 1 + (int(existing[0].stem.removeprefix(_PREFIX)) if existing else 0)
        path = self._directory / f"{_PREFIX}{number:06d}{_SUFFIX}"
        try:
            write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
        except OSError as error:
            last = f"the last checkpoint is {existing[0].name}" if existing else "there is no checkpoint yet"
            warnings.warn(
                f"The checkpoint {path} could not be written ({error.strerror}); training goes on, and {last}.",
                stacklevel=2,
            )
        for path in self._paths()[_KEPT:]:
            path.unlink(missing_ok=True)
        self._last = time.perf_counter()
        self._seconds = self._last - start

    @property
    def are_due(self) -> bool:
        """Whether the last checkpoint is so old that writing the next one costs little."""
        return time.perf_counter() - self._last >= self._seconds / _WRITING_SHARE

    def _paths(self) -> list[Path]:
        """The files of all checkpoints, the newest first."""
        return sorted(self._directory.glob(f"{_PREFIX}[0-9]*{_SUFFIX}"), reverse=True)

    def _check_settings(self, path: Path, found: Mapping[str, Any]) -> None:
        for name, value in self._settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"checkpoints holds {path.name} of a run with another {name}: {found.get(name)} there, {value} here. Give another directory "
                    "for a new run."
                )


def restored(like: PyTree, arrays: list[np.ndarray]) -> PyTree:
    """The tree that ``save`` wrote.

    Args:
      like: A tree of the same structure, shapes and types.
      arrays: The arrays of the checkpoint.
    """
    leaves, structure = jax.tree.flatten(like)

    def leaf_of(leaf: Any, numbers: np.ndarray) -> jax.Array:
        if is_key(leaf):
            return jax.random.wrap_key_data(jnp.asarray(numbers), impl=jax.random.key_impl(leaf))
        # A file holds types that NumPy does not know, such as bfloat16, as raw bytes.
        return jnp.asarray(numbers.view(leaf.dtype) if numbers.dtype.kind == "V" else numbers)

    return jax.tree.unflatten(structure, [leaf_of(*each) for each in zip(leaves, arrays, strict=True)])


def checksum(tree: PyTree) -> str:
    """The SHA-256 of the arrays of a tree and of their shapes and types."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(_numbers(leaf))
        digest.update(f"{array.shape} {array.dtype};".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _numbers(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf
