"""Atomic writing of files: a file is complete or absent."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Writes a temporary file in the same directory, and renames it when it is complete. No temporary file remains after an error.

    Args:
      path: The file.
      write: A function that writes the content to an open binary file.

    Raises:
      OSError: The file cannot be written.
    """
    check_writable(path)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            write(file)
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
