"""Full data sets in a directory of tensorflow-datasets: reading them, and preparing them first where needed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from experiments.io import internet, tfds_builders
from experiments.io.dataset import Dataset, Split, Unavailable
from experiments.io.dataset_table import DATASETS
from experiments.io.tfds_builders import DownloadFormat
from experiments.runtime.errors import UserError, first_line


def needs_tensorflow(directory: Path) -> bool:
    """Whether a directory holds prepared copies of a data set, but none in the format that is read without TensorFlow."""
    infos = [path.read_text(errors="replace") for path in directory.glob("*/dataset_info.json")]
    # A damaged file has no format here. It is reported when the data is read.
    formats = [re.search(r'"fileFormat":\s*"(\w+)"', info) for info in infos]
    return bool(infos) and all(found is not None and found[1] != "array_record" for found in formats)


def read_prepared(name: str, download: DownloadFormat, directory: Path) -> Dataset:
    """Reads a full data set, which takes some ten seconds. Prepares it first if the directory does not hold it.

    Args:
      name: The name of the data set.
      download: The form of its downloaded files.
      directory: The directory of the prepared data sets.

    Raises:
      Unavailable: The data set cannot be prepared.
      UserError: The prepared files are damaged.
    """
    entry = DATASETS[name]
    with tfds_builders.quiet_tfds() as tfds:
        try:
            builder = tfds_builders.create_builder(tfds, name, download, directory)
            prepared = builder.is_prepared()
        except Exception as error:
            raise _damaged(directory / name, error) from error
        if not prepared:
            _prepare(builder, download, directory)
        print(f"Reading {name} from {directory} ...", flush=True)
        try:
            train = _read(builder, "train", entry.train, entry.shape)
            test = _read(builder, "test", entry.test, entry.shape)
            lossy = _is_jpeg(tfds, builder)
        except Exception as error:
            raise _damaged(builder.data_dir, error) from error
    # The order of the records depends on their preparation. Sorted by content, the split is the same on every machine.
    order = np.argsort([hashlib.sha256(image.tobytes()).hexdigest() for image in train.images], kind="stable")
    chosen, held_out = order[entry.validation :], order[: entry.validation]
    remark = f"The images of this copy of {name} are stored as JPEG, which has changed them a little."
    return Dataset(
        name,
        Split(train.images[chosen], train.labels[chosen]),
        Split(train.images[held_out], train.labels[held_out]),
        test,
        remark=remark if lossy else None,
    )


def _prepare(builder: Any, download: DownloadFormat, directory: Path) -> None:
    if not tfds_builders.is_downloaded(directory, download) and not internet.is_reachable(download.address(builder)):
        internet.record_unreachable(builder.name)
        raise Unavailable("no prepared copy was found and there is no internet connection to download it")
    print(f"Downloading and preparing {builder.name} in {directory} ...", flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise Unavailable(f"downloading or preparing it failed, {first_line(error)}") from error


def _read(builder: Any, split: str, count: int, shape: tuple[int, int, int]) -> Split:
    source = builder.as_data_source(split=split)
    images, labels = np.zeros((len(source), *shape), np.uint8), np.zeros(len(source), np.int32)
    for row, record in enumerate(source):
        images[row], labels[row] = record["image"], record["label"]
    if len(source) != count:
        raise ValueError(f"split {split} has {len(source)} images, not {count}")
    return Split(images, labels)


def _is_jpeg(tfds: Any, builder: Any) -> bool:
    """Whether the first test image is stored as JPEG, a format with loss."""
    skip = {"image": tfds.decode.SkipDecoding()}
    return bytes(builder.as_data_source(split="test", decoders=skip)[0]["image"]).startswith(b"\xff\xd8")


def _damaged(directory: Any, error: Exception) -> UserError:
    return UserError(
        f"The data in {directory} is damaged and cannot be read ({first_line(error)}); delete that directory to have it prepared again."
    )
