"""Progress bars on a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

import bcdl_jax

# The start of each line about a network that has become smaller.
SHRUNK = "shrunk: "


def bar(total: int, title: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar with the time left, on a terminal only."""
    hidden = not sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=title, unit=unit, disable=hidden, dynamic_ncols=True)


class Progress:
    """A progress bar over the epochs of all seeds, with messages above it."""

    def __init__(self, total: int, title: str, done: int = 0):
        self._bar = bar(total, title, "epoch", done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def write(self, message: str) -> None:
        """Prints a message above the bar."""
        self._bar.write(message)
        sys.stdout.flush()

    def advance(self, state: str) -> None:
        """Adds an epoch, and shows the state after it."""
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update()

    def show(self, report: bcdl_jax.train.EnsembleReport) -> None:
        """Adds an epoch, and shows its messages, the kept groups and the validation errors."""
        for message in report.messages:
            self._bar.write(f"warning: {message}", file=sys.stderr)
        for message in report.shrink_messages:
            self._bar.write(f"{SHRUNK}{message}", file=sys.stderr)
        kept = " ".join("-".join(map(str, seed.kept.values())) for seed in report.reports)
        error = " ".join(f"{seed.validation_error:.2f}" for seed in report.reports)
        self.advance(f"kept {kept}, validation error {error} %")
