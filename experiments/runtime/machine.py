"""A description of the machine and of the process, for result files and metrics."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import jax

# The packages that compute: the numbers of a run depend on their versions.
COMPUTING_PACKAGES = ("jax", "jaxlib", "flax", "optax")


def machine() -> str:
    """The system, the devices and the number of CPU cores, in one line."""
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{platform.system()} {platform.machine()}, {len(jax.devices())} x {devices}, {_cores()} CPU cores"


def versions(*others: str) -> dict[str, str]:
    """The versions of Python, of the computing packages, of NumPy and of other packages, for result files."""
    return {"python": platform.python_version()} | package_versions((*COMPUTING_PACKAGES, "numpy", *others))


def package_versions(names: Iterable[str] = COMPUTING_PACKAGES) -> dict[str, str]:
    """The versions of packages by name, without those that are not installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_process_bytes() -> int:
    """The peak resident memory of this process. On Linux it is read from /proc, since getrusage includes the parent process there."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_process_megabytes() -> int:
    """The peak resident memory of this process, in units of 2^20 bytes."""
    return round(peak_process_bytes() / 2**20)


def peak_device_bytes() -> int | None:
    """The largest peak memory of the devices of this process; None if no device reports its memory."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
