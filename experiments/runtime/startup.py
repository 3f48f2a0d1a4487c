"""The start of a run: a private cache directory, a cache of compiled programs in it, and measurements of the time to the first step."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A program that compiles faster is not worth a file.
_LEAST_COMPILE_SECONDS = 0.05
# The start of the program, since the command lines import this module before slower ones.
_IMPORTED = time.perf_counter()


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


@contextlib.contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Within the context Python searches for reference cycles a hundred times less often, since tracing makes millions of objects to keep."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def release_memory() -> None:
    """Frees unused objects and returns the free memory of the C library (glibc) to the system. Compiling leaves some hundred MB of it."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class CompileTime:
    """A context manager that measures the compilations within it.

    Attributes:
      seconds: The time that JAX has spent on tracing and compiling, in seconds.
      hits: The number of programs that were read from the cache.
      misses: The number of programs that were not in the cache.
    """

    _SECONDS = (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )
    _HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"

    def __init__(self) -> None:
        self.seconds, self.hits, self.misses = 0.0, 0, 0
        self._lock = threading.Lock()

    def __enter__(self) -> CompileTime:
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._add)
        jax.monitoring.register_event_listener(self._count)
        return self

    def __exit__(self, *_: Any) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._add)
        jax.monitoring.unregister_event_listener(self._count)

    def sentence(self) -> str:
        """A clause such as "compiled in 3.2 s", with the number of programs from the cache if there are any."""
        if not self.hits:
            return f"compiled in {self.seconds:.1f} s"
        which = "all programs" if not self.misses else f"{self.hits} of {self.hits + self.misses} programs"
        return f"compiled in {self.seconds:.1f} s, {which} from the cache"

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in self._SECONDS:
            with self._lock:
                self.seconds += duration_secs

    def _count(self, event: str, **_: Any) -> None:
        with self._lock:
            self.hits += event == self._HIT
            self.misses += event == self._MISS


class FirstStep:
    """A ``stop`` function for ``train_ensemble`` that measures the time to the first step, which ends at the second call."""

    def __init__(self, stop: Callable[[], bool] | None):
        self._stop, self._calls, self._seconds = stop, 0, 0.0

    def __call__(self) -> bool:
        self._calls += 1
        if self._calls == 2:
            self._seconds = time.perf_counter() - _IMPORTED
        return self._stop is not None and self._stop()

    def sentence(self) -> str:
        """A clause such as "first step after 6.9 s, ", counted from the start of the program; "" before the first step."""
        return f"first step after {self._seconds:.1f} s, " if self._seconds else ""
