"""Writing a file so that it is never half there."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes bytes under a temporary name beside the file, and renames it once it is complete.

    Raises:
      OSError: it cannot be written; nothing is left behind.
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
    except OSError as error:  # speaks of the temporary name
        raise type(error)(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Says early, before long work, what would keep a file from being written.

    Raises:
      FileNotFoundError, NotADirectoryError, IsADirectoryError: the directory does not exist, or the path is a directory.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not target.parent.is_dir():
        number = errno.ENOTDIR if target.parent.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(path))
