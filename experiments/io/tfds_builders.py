"""Builders of tensorflow-datasets that work without TensorFlow: they read the downloaded files with NumPy."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import logging
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.io.dataset import Unavailable
from experiments.runtime.errors import first_line

_DIGIT_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclasses.dataclass(frozen=True)
class DownloadFormat:
    """The form of the files that tensorflow-datasets downloads for a data set.

    Attributes:
      make_builder: A function (stock, name) that returns a subclass of the stock builder, which reads the files with NumPy.
      address: A function of the builder that returns the address of one of the files.
      manual_files: The pattern of the files that a user may download.
      manual_count: The number of these files.
    """

    make_builder: Callable[[Any, str], Any]
    address: Callable[[Any], str]
    manual_files: str
    manual_count: int


@contextlib.contextmanager
def quiet_tfds() -> Iterator[Any]:
    """The module tensorflow_datasets without its warnings and without retries of downloads, which take 200 seconds.

    Raises:
      Unavailable: The module cannot be imported.
    """
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader
    except ImportError as error:
        raise Unavailable(f"tensorflow-datasets cannot be loaded: {first_line(error)}") from error
    logger, retries = logging.getLogger("absl"), downloader.MAX_RETRIES
    level = logger.level
    logger.setLevel(logging.ERROR)
    downloader.MAX_RETRIES = 0
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        yield tfds
    finally:
        logger.setLevel(level)
        downloader.MAX_RETRIES = retries


def create_builder(tfds: Any, name: str, download: DownloadFormat, directory: Path) -> Any:
    """The builder of a data set. The stock builder needs TensorFlow to read the downloaded files.

    Args:
      tfds: The module tensorflow_datasets.
      name: The name of the data set.
      download: The form of its downloaded files.
      directory: The directory of the prepared data sets.
    """
    make = download.make_builder(tfds.builder_cls(name), name)
    return make(data_dir=directory, file_format="array_record")


def is_downloaded(directory: Path, download: DownloadFormat) -> bool:
    """Whether the user has put the files of a data set into the directory downloads/manual."""
    found = (directory / "downloads" / "manual").glob(download.manual_files)
    return len(list(found)) >= download.manual_count


def _digits_builder(stock: Any, builder_name: str) -> Any:
    """A subclass of the stock builder of MNIST or Fashion-MNIST, whose files have the idx format."""

    class NumpyBuilder(stock, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        name = builder_name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            addresses = {split: [self.URL + file for file in pair] for split, pair in _DIGIT_FILES.items()}
            paths = dl_manager.download(addresses)
            return {split: self._generate_examples(*pair) for split, pair in paths.items()}

        def _generate_examples(self, image_path: Any, label_path: Any) -> Any:
            pixels = np.frombuffer(gzip.decompress(Path(image_path).read_bytes()), np.uint8, offset=16)
            labels = np.frombuffer(gzip.decompress(Path(label_path).read_bytes()), np.uint8, offset=8)
            for row, (image, label) in enumerate(zip(pixels.reshape(-1, 28, 28), labels, strict=True)):
                yield row, {"image": _png(image), "label": int(label)}

    return NumpyBuilder


def _cifar_builder(stock: Any, builder_name: str) -> Any:
    """A subclass of the stock builder of CIFAR-10, whose files are in one archive."""

    class NumpyBuilder(stock, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        name = builder_name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            info = self._cifar_info
            archive = dl_manager.download(info.url)
            names = _archive_member(archive, info.prefix + info.label_files[0]).decode().split("\n")
            self.info.features["label"].names = [name for name in names if name]
            files = {"train": info.train_files, "test": info.test_files}
            return {
                split: self._generate_examples(archive, f"{split}_", [info.prefix + path for path in paths])
                for split, paths in files.items()
            }

        def _generate_examples(self, archive: Any, prefix: str, paths: list[str]) -> Any:
            records = b"".join(_archive_member(archive, path) for path in paths)
            # A record is one byte of the label, then the planes of red, green and blue.
            for row, record in enumerate(np.frombuffer(records, np.uint8).reshape(-1, 1 + 3 * 32 * 32)):
                image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield row, {"id": f"{prefix}{row:05d}", "image": _png(image), "label": int(record[0])}

    return NumpyBuilder


def _archive_member(archive: Any, path: str) -> bytes:
    with tarfile.open(archive) as tar:
        found = tar.extractfile(path)
        if found is None:
            raise ValueError(f"{path} in the archive is not a file")
        return found.read()


def _png(image: np.ndarray) -> io.BytesIO:
    """An image as a PNG file. The feature of the builder encodes arrays with TensorFlow, but stores encoded images unchanged."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    return io.BytesIO(png.getvalue())


# The idx files of MNIST and Fashion-MNIST, and the archive of CIFAR-10.
IDX_FILES = DownloadFormat(
    _digits_builder, lambda builder: builder.URL + _DIGIT_FILES["train"][1], "*-ubyte.gz", manual_count=4
)
CIFAR_ARCHIVE = DownloadFormat(
    _cifar_builder, lambda builder: builder._cifar_info.url, "cifar-10-binary.tar.gz", manual_count=1
)
