"""Short runs of all methods, for a table whose only purpose is to show that every method works."""

from __future__ import annotations

import concurrent.futures
import shlex
import subprocess
import sys
import time
from pathlib import Path

from experiments.io.data import EMBEDDED
from experiments.registry import method_names
from experiments.runtime.errors import UserError

_EXPERIMENTS = ("lenet300", "lenet5")


def run_quick(out: Path) -> None:
    """Runs every method on the embedded digits with ``--quick``, two runs at a time. Prints a line after each run.

    Args:
      out: The directory for the runs, one directory each.

    Raises:
      UserError: A run failed; the message ends with the last characters of its output.
    """
    start = time.perf_counter()
    pairs = [(experiment, method) for experiment in _EXPERIMENTS for method in method_names()]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(_run, out, *pair) for pair in pairs]
        try:
            for number, future in enumerate(concurrent.futures.as_completed(waiting), start=1):
                seconds = time.perf_counter() - start
                print(f"{number} of {len(pairs)} runs, after {seconds:.0f} s: {future.result()}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(out: Path, experiment: str, method: str) -> str:
    """Runs a method; returns the run's name."""
    options = ["--method", method, "--dataset", EMBEDDED, "--quick", "--overwrite"]
    options += ["--out", str(out / f"{experiment}_{method}")]
    command = [sys.executable, "-m", f"experiments.{experiment}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise UserError(f"{shlex.join(command[1:])} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return f"{experiment} --method {method}"
