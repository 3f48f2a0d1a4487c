"""SIGTERM and Ctrl-C while a run trains: noted, so that the steps under way are finished and a checkpoint is written first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stop:
    """Asked by the training, ``stop()``, whether to end: True once a signal has come.

    Attributes:
      signal: which one, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def noted() -> Iterator[Stop]:
    """Within it SIGTERM and SIGINT are noted; a second one acts at once. Outside the main thread signals act as ever."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def note(number: int, _: Any) -> None:
        stop.signal = signal.Signals(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
