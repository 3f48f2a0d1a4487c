"""The files of a checkpoint: training states, which Orbax writes, arrays, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bcdl_jax.train import is_key

Arrays = dict[str, np.ndarray]


def write_state(path: Path, state: Any) -> None:
    """Writes a training state as a directory."""
    with _quiet(), _checkpointer() as checkpointer:
        checkpointer.save(path, jax.tree.map(_key_data, state))
        checkpointer.wait_until_finished()


def read_state(path: Path, like: Any) -> Any:
    """Reads a training state.

    Args:
      path: The directory that ``write_state`` wrote.
      like: A state with the shapes and dtypes of the written one, on the devices of the result.
    """
    with _quiet(), _checkpointer() as checkpointer:
        found = checkpointer.restore(path, jax.tree.map(_template, like))
    return jax.tree.map(
        lambda leaf, data: jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf)) if is_key(leaf) else data,
        like,
        found,
    )


def read_arrays(path: Path) -> Arrays:
    """Reads the arrays of an .npz file."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def directory_checksums(directory: Path, manifest: str) -> dict[str, str]:
    """The checksums of all files below a directory but the manifest, by path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / manifest)
    return {str(path.relative_to(directory)): file_checksum(path) for path in paths}


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(*paths: Path) -> None:
    """Forces files, and directories with all their files, onto the disk."""
    for path in paths:
        for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's log, which prints every error with the stacks of all its threads. The caller reports the error."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _checkpointer() -> Any:
    """An Orbax checkpointer that does not wait for other processes: process 0 alone writes and reads."""
    import orbax.checkpoint as orbax

    alone = orbax.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="bcdl_jax")
    options = {"multiprocessing_options": alone} if jax.process_count() > 1 else {}
    return orbax.StandardCheckpointer(**options)


def _key_data(leaf: Any) -> Any:
    """The numbers of a key, since Orbax does not write keys from one of several processes; any other array unchanged."""
    if not is_key(leaf):
        return leaf
    data = jax.random.key_data(leaf)
    return data if jax.process_count() == 1 else np.asarray(data)


def _template(leaf: Any) -> Any:
    """The shape, dtype and sharding with which Orbax restores an array."""
    data = _key_data(leaf)
    if isinstance(data, np.ndarray):
        return data
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=data.sharding)
