"""The memory of the process: fewer searches for garbage while JAX traces, and the release of free memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator


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
