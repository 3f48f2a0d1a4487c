"""Atomic writing of files: a file is complete or absent."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes bytes to a temporary file in the same directory, and renames it when it is complete.

    Args:
      path: The file.
      data: The bytes.

    Raises:
      OSError: The file cannot be written. No temporary file remains.
    """
    check_writable(path)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:  # This error names the temporary file.
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Checks before long work that a file can be written.

    Args:
      path: The file.

    Raises:
      FileNotFoundError: The directory of the file does not exist.
      NotADirectoryError: The parent of the file is not a directory.
      IsADirectoryError: The path is a directory.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not target.parent.is_dir():
        number = errno.ENOTDIR if target.parent.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(path))
