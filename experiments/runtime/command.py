"""The frame of a command: its exit status, its errors, and its command line for result files."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec

from experiments.runtime.errors import UserError

_Arguments = ParamSpec("_Arguments")


def reporting_errors(*others: type[Exception]) -> Callable[[Callable[_Arguments, int]], Callable[_Arguments, int]]:
    """Decorates the main function of a command, which returns the exit status.

    A UserError ends the command with one line and status 2, Ctrl-C with one line and status 130.

    Args:
      others: Other errors that end the command like a UserError.
    """
    reported: tuple[type[Exception], ...] = (UserError, *others)

    def decorate(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
        @functools.wraps(main)
        def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except reported as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("Interrupted.", file=sys.stderr)
                return 130

        return run

    return decorate


def command_line(name: str, arguments: Sequence[str] | None) -> str:
    """The command line of ``experiments.NAME``, for result files.

    Args:
      name: The name of the command.
      arguments: The arguments that its main function was called with; None for the arguments of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", f"experiments.{name}", *given])
