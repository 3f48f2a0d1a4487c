"""The end of a run that a signal stops."""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def stop_for(received: signal.Signals | None, saved: Path | None) -> None:
    """Ends the run for a received signal; does nothing without one.

    Args:
      received: The signal.
      saved: The checkpoint that was written for it, or None.

    Raises:
      KeyboardInterrupt: The signal is SIGINT.
      SystemExit: The signal is SIGTERM; the status is 143.
    """
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    if received == signal.SIGTERM:
        advice = "could not be saved" if saved is None else f"is saved in {saved}; --resume continues from there"
        print(f"\nStopped by SIGTERM; the training so far {advice}.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)
