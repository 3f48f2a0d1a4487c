"""Measurements of the time to the first step: the compilations, and the time since the start of the program."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

# The start of the program, since the command line of the experiments imports this module before slower ones.
_IMPORTED = time.perf_counter()


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
