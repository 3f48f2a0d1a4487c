"""A description of the machine, for result files."""

from __future__ import annotations

import os
import platform

import jax


def machine() -> str:
    """The system, the devices and the number of CPU cores, in one line."""
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{platform.system()} {platform.machine()}, {len(jax.devices())} x {devices}, {_cores()} CPU cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
