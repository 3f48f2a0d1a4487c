"""The internet connection: a short test of it, and a record of failed tests that is valid for an hour."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from pathlib import Path

from experiments.runtime import caches

_TIMEOUT_SECONDS = 2.5
_RECORD_SECONDS = 3600


def is_reachable(url: str) -> bool:
    """Whether the host answers a request for ``url`` within 2.5 seconds."""
    answers: list[bool] = []

    def request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT_SECONDS)
            answers.append(True)
        except Exception:  # The download would fail too after any answer but success.
            answers.append(False)

    # A thread, since the lookup of a host name has no time limit.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_SECONDS)
    return any(answers)


def was_unreachable(name: str) -> bool:
    """Whether the host of a data set was recorded as unreachable within the last hour."""
    record = _record(name)
    try:
        return record is not None and 0 <= time.time() - record.stat().st_mtime < _RECORD_SECONDS
    except OSError:
        return False


def record_unreachable(name: str) -> None:
    """Records that the host of a data set is unreachable now."""
    record = _record(name)
    if record is not None:
        with contextlib.suppress(OSError):
            record.touch()


def _record(name: str) -> Path | None:
    directory = caches.cache_directory("internet")
    return None if directory is None else directory / f"unreachable-{name}"
