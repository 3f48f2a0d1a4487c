"""Loading data sets: MNIST, Fashion-MNIST and CIFAR-10 from tensorflow-datasets, without TensorFlow, and the embedded digits."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np

from experiments import embedded
from experiments.io import dataset_cache, internet, prepared, tfds_builders
from experiments.io.dataset import Dataset, Split, Unavailable, chunks
from experiments.io.dataset_table import DATASETS, EMBEDDED
from experiments.io.tfds_builders import DownloadFormat
from experiments.runtime.errors import UserError, first_line

__all__ = ["DATASETS", "EMBEDDED", "Dataset", "Split", "chunks", "load"]

_DEFAULT_DIRECTORY = "~/tensorflow_datasets"
_SPLIT_SEED = 0


def load(name: str, data_dir: str | None = None, *, replaceable: bool = True) -> Dataset:
    """Loads a data set.

    The embedded digits are read from the project. Every other data set is read from a directory of prepared data sets; it is downloaded
    and prepared there first if it is missing. If that is impossible, ``data_dir`` is None and ``replaceable`` is True, the embedded digits replace
    the data sets whose entry allows it. The ``notice`` of the returned data set then contains the reason.

    Args:
      name: The name of the data set, one of ``DATASETS``.
      data_dir: The directory of tensorflow-datasets; None for TFDS_DATA_DIR, or the default directory if that is not set.
      replaceable: True to accept the embedded digits in place of another data set.

    Raises:
      UserError: The name is unknown, the data is damaged, or the data set is not available and has no replacement.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset is {name!r}; allowed are {', '.join(DATASETS)}.")
    entry = DATASETS[name]
    if entry.download is None:
        return _load_embedded(None)
    try:
        return _load_full(name, entry.download, data_dir)
    except Unavailable as reason:
        if data_dir is not None:
            raise UserError(
                f"--data-dir {data_dir} holds no prepared {name}, and it could not be prepared there: {reason}. Give the directory that "
                f"contains {name}/, or use --dataset {EMBEDDED}."
            ) from None
        if not replaceable or entry.title_if_replaced is None:
            raise UserError(
                f"--dataset {name} is not available: {reason}. Give --data-dir or set TFDS_DATA_DIR, or use --dataset {EMBEDDED}."
            ) from None
        return _load_embedded(
            f"{entry.title_if_replaced} is not available ({reason}): this run uses the 5,000 embedded MNIST digits instead."
        )


def _load_embedded(notice: str | None) -> Dataset:
    """The embedded digits, split by class with a fixed seed, since the file is sorted by class."""
    try:
        with embedded.FILE.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            images, labels = file["images"][..., None], file["labels"].astype(np.int32)
    except Exception as error:
        raise UserError(
            f"The embedded digits cannot be read ({first_line(error)}); restore {embedded.FILE}."
        ) from error
    generator = np.random.default_rng(_SPLIT_SEED)
    rows: list[list[np.ndarray]] = [[], [], []]
    entry, classes = DATASETS[EMBEDDED], np.unique(labels)
    ends = [(entry.train - entry.validation) // len(classes), entry.train // len(classes)]
    for label in classes:
        of_class = generator.permutation(np.flatnonzero(labels == label))
        parts = np.split(of_class, ends)
        for split, part in zip(rows, parts, strict=True):
            split.append(part)
    train, validation, test = (Split(images[chosen], labels[chosen]) for chosen in map(np.concatenate, rows))
    return Dataset(EMBEDDED, train, validation, test, notice)


def _load_full(name: str, download: DownloadFormat, data_dir: str | None) -> Dataset:
    """A full data set from the cache, or from the directory of prepared data sets."""
    directory = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or _DEFAULT_DIRECTORY).expanduser()
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--data-dir {directory} is a file; it must be a directory.")
        if prepared.needs_tensorflow(directory / name):
            # A second copy is prepared in a directory of its own, and the first one stays unchanged.
            directory = directory / "array_record"
        fingerprint = dataset_cache.directory_fingerprint(directory / name)
    except OSError as error:
        raise UserError(f"--data-dir {directory} cannot be read: {error.strerror}.") from error
    cached = dataset_cache.cache_file(name, directory)
    if cached is not None and (dataset := dataset_cache.read_cached(cached, name, fingerprint)) is not None:
        return dataset
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise Unavailable("tensorflow-datasets is not installed")
    # Without --data-dir, a failed connection test within the last hour ends the attempt before the slow import of tensorflow-datasets.
    is_here = bool(fingerprint) or tfds_builders.is_downloaded(directory, download)
    if data_dir is None and not is_here and internet.was_unreachable(name):
        raise Unavailable(
            "no prepared copy was found and there was no internet connection within the last hour to download it"
        )
    dataset = prepared.read_prepared(name, download, directory)
    if cached is not None:
        # The fingerprint is taken again, since the files may have been prepared just now.
        dataset_cache.write_cached(cached, dataset, dataset_cache.directory_fingerprint(directory / name))
    return dataset
