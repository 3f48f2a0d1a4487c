"""A cache of the arrays of full data sets. tensorflow-datasets takes some ten seconds to read one, the cache a fraction of a second."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from experiments.io.dataset import PARTS, Dataset, Split
from experiments.runtime import caches


def directory_fingerprint(directory: Path) -> str:
    """A checksum of the names, sizes and times of the files below a directory; empty if there are none."""
    stats = sorted((str(path), path.stat()) for path in directory.rglob("*") if path.is_file())
    listing = "".join(f"{path} {found.st_size} {found.st_mtime_ns}\n" for path, found in stats)
    return hashlib.sha256(listing.encode()).hexdigest() if listing else ""


def cache_file(name: str, directory: Path) -> Path | None:
    """The file in the cache for the data set ``name`` of a directory; None where there is no cache directory."""
    cache = caches.cache_directory("data")
    if cache is None:
        return None
    return cache / f"{name}-{hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]}.npz"


def read_cached(path: Path, name: str, fingerprint: str) -> Dataset | None:
    """The data set of a cache file.

    Args:
      path: The file in the cache.
      name: The name of the data set.
      fingerprint: The fingerprint of the prepared files; an empty one matches nothing.

    Returns:
      The data set; None if the file is missing or damaged (a zip file has checksums), or has another fingerprint.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            if not fingerprint or str(file["fingerprint"]) != fingerprint:
                return None
            train, validation, test = (Split(file[f"{part}/images"], file[f"{part}/labels"]) for part in PARTS)
            return Dataset(name, train, validation, test, remark=str(file["remark"]) or None)
    except Exception:  # NumPy reports damage by errors of many types.
        return None


def write_cached(path: Path, dataset: Dataset, fingerprint: str) -> None:
    """Writes a data set to the cache with the fingerprint of its prepared files. A full disk leaves the cache without it."""
    # Importing JAX takes seconds, and --help should appear at once.
    from bcdl_jax.codec import write_atomically

    arrays = {"fingerprint": np.array(fingerprint), "remark": np.array(dataset.remark or "")}
    for part in PARTS:
        split = getattr(dataset, part)
        arrays |= {f"{part}/images": split.images, f"{part}/labels": split.labels}
    with contextlib.suppress(OSError):
        write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
