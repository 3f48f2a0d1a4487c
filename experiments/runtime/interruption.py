"""SIGTERM and Ctrl-C during training: the signal is recorded, so that the run can finish its steps and write a checkpoint first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stop:
    """A flag for the training: calling it returns True once a signal has arrived.

    Attributes:
      signal: The signal that has arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def noted() -> Iterator[Stop]:
    """Records SIGTERM and SIGINT within the context. A second signal acts at once. Outside the main thread no signal is recorded."""
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
