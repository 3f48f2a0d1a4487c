"""The private cache directory, and the cache of compiled programs in it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A program that compiles faster is not worth a file.
_LEAST_COMPILE_SECONDS = 0.05


def cache_directory(name: str) -> Path | None:
    """The directory bcdl_jax/``name`` in XDG_CACHE_HOME, or in ~/.cache if that is not set. It is made if it is missing.

    The programs and arrays in it are used without further checks, so no other user may write to it.

    Returns:
      The directory; None if it cannot be made, or if other users can access it.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "bcdl_jax"
        directory = root / name
        directory.parent.parent.mkdir(parents=True, exist_ok=True)
        for level in (root, directory):
            level.mkdir(mode=0o700, exist_ok=True)
            found = level.lstat()
            foreign = hasattr(os, "getuid") and found.st_uid != os.getuid()
            if not stat.S_ISDIR(found.st_mode) or foreign or (os.name == "posix" and found.st_mode & 0o077):
                return None
    except (OSError, RuntimeError):  # There is no home directory, or it cannot be written.
        return None
    return directory if os.access(directory, os.W_OK) else None


@contextlib.contextmanager
def compilation_cache(enabled: bool) -> Iterator[None]:
    """Keeps programs that are compiled within the context on disk, in JAX_COMPILATION_CACHE_DIR or in the private cache directory.

    Args:
      enabled: True to use the cache, False to turn JAX's own cache off too.
    """
    import jax

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    directory = before["jax_compilation_cache_dir"] or cache_directory("compiled")
    changes: dict[str, Any] = {"jax_enable_compilation_cache": before["jax_enable_compilation_cache"] and enabled}
    if enabled and directory is not None:
        changes["jax_compilation_cache_dir"] = str(directory)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            changes["jax_persistent_cache_min_compile_time_secs"] = _LEAST_COMPILE_SECONDS
    _configure(changes)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache as cache

    for name, value in settings.items():
        jax.config.update(name, value)
    cache.reset_cache()  # JAX reads the settings only once.
