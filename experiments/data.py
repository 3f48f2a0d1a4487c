"""Data sets: MNIST and Fashion-MNIST through tensorflow-datasets without TensorFlow, and the embedded digits."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import logging
import os
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from experiments import startup
from experiments.errors import UserError

NAMES = ("mnist", "mnist_5k", "fashion_mnist")
EMBEDDED = "mnist_5k"
_EMBEDDED_FILE = Path(__file__).parent / "embedded" / "mnist_5k.npz"
_SPLIT_SEED = 0
# Of each class: the embedded digits hold 500 of each.
_EMBEDDED_TRAIN, _EMBEDDED_VALIDATION = 350, 50
_FULL_TRAIN, _FULL_TEST, _FULL_VALIDATION = 60_000, 10_000, 5_000
_OFFLINE_SECONDS = 2.5
_OFFLINE_FILE, _OFFLINE_HOLDS = "unreachable", 3600
_TFDS_DEFAULT = "~/tensorflow_datasets"


@dataclasses.dataclass(frozen=True)
class Split:
    """images [n, 28, 28, 1] of uint8 and labels [n] of int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in three parts: train on the first, choose on the second, score on the third.

    Attributes:
      name: one of ``NAMES``; what was really loaded.
      notice: one sentence where this is not what was asked for, else None.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    notice: str | None = None

    def summary(self) -> dict[str, Any]:
        return {"name": self.name, "train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


class _Unavailable(Exception):
    """The full data set cannot be had; the message says why."""


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set.

    "mnist" and "fashion_mnist" are read from a prepared directory, else downloaded and prepared there. Without an explicit ``data_dir``,
    "mnist" falls back on the embedded digits where that is impossible, and says so in ``notice``.

    Args:
      name: one of ``NAMES``.
      data_dir: where tensorflow-datasets keeps its data; TFDS_DATA_DIR, then its default, if None.

    Raises:
      UserError: an unknown name, a directory that neither holds the data nor can be given it, or damaged data.
    """
    if name not in NAMES:
        raise UserError(f"--dataset is {name!r}; allowed are {', '.join(NAMES)}.")
    if name == EMBEDDED:
        return _load_embedded(None)
    try:
        return _load_full(name, data_dir)
    except _Unavailable as reason:
        if data_dir is not None:
            raise UserError(
                f"--data-dir {data_dir} holds no prepared {name}, and it could not be put there: {reason}. Give the directory that contains "
                f"{name}/, or use --dataset {EMBEDDED}."
            ) from None
        if name != "mnist":
            raise UserError(
                f"--dataset {name} cannot be had: {reason}. Give --data-dir, or use --dataset {EMBEDDED}."
            ) from None
        return _load_embedded(
            f"Full MNIST is not at hand ({reason}): this run uses the 5,000 embedded MNIST digits instead."
        )


def _load_embedded(notice: str | None) -> Dataset:
    """A stratified split with a fixed seed: the file is sorted by class."""
    try:
        with _EMBEDDED_FILE.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            images, labels = file["images"][..., None], file["labels"].astype(np.int32)
    except Exception as error:
        raise UserError(
            f"The embedded digits cannot be read ({_first_line(error)}); restore {_EMBEDDED_FILE}."
        ) from error
    generator = np.random.default_rng(_SPLIT_SEED)
    rows: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(labels):
        of_class = generator.permutation(np.flatnonzero(labels == label))
        parts = np.split(of_class, [_EMBEDDED_TRAIN, _EMBEDDED_TRAIN + _EMBEDDED_VALIDATION])
        for split, part in zip(rows, parts, strict=True):
            split.append(part)
    train, validation, test = (Split(images[chosen], labels[chosen]) for chosen in map(np.concatenate, rows))
    return Dataset(EMBEDDED, train, validation, test, notice)


def _load_full(name: str, data_dir: str | None) -> Dataset:
    directory = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or _TFDS_DEFAULT).expanduser()
    try:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--data-dir {directory} is a file; it must be a directory.")
        if _other_format(directory / name):
            # What was prepared as tfrecord takes TensorFlow to read; a second copy stands apart from it.
            directory = directory / "array_record"
        fingerprint = _fingerprint(directory / name)
    except OSError as error:
        raise UserError(f"--data-dir {directory} cannot be read: {error.strerror}.") from error
    copy = startup.cache_directory("data")
    if copy is not None:
        copy = copy / f"{name}-{hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]}.npz"
        if (dataset := _read_copy(copy, name, fingerprint)) is not None:
            return dataset
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise _Unavailable("tensorflow-datasets is not installed")
    # The answer of the last hour is good enough where nobody asked for a directory; there is no need to load tensorflow-datasets.
    if data_dir is None and not fingerprint and not _downloaded(directory) and _was_offline():
        raise _Unavailable("no prepared copy was found and there was no network within the last hour to download it")
    dataset = _read_prepared(name, directory)
    if copy is not None:
        # Anew: preparing may have made the files that the copy stands for.
        _write_copy(copy, dataset, _fingerprint(directory / name))
    return dataset


def _read_prepared(name: str, directory: Path) -> Dataset:
    """Reads full data through tensorflow-datasets, which takes some ten seconds; prepares it first where that is needed."""
    with _quiet_tfds() as tfds:
        try:
            builder = _builder(tfds, name, directory)
            prepared = builder.is_prepared()
        except Exception as error:
            raise _damaged(directory / name, error) from error
        if not prepared:
            _prepare(builder, directory)
        print(f"Reading {name} from {directory} ...", flush=True)
        try:
            train = _read(builder, "train", _FULL_TRAIN)
            test = _read(builder, "test", _FULL_TEST)
        except Exception as error:
            raise _damaged(builder.data_dir, error) from error
    # The order of the records depends on who prepared them; by content, the split is the same everywhere.
    order = np.argsort([hashlib.sha256(image.tobytes()).hexdigest() for image in train.images], kind="stable")
    chosen, held_out = order[_FULL_VALIDATION:], order[:_FULL_VALIDATION]
    return Dataset(
        name,
        Split(train.images[chosen], train.labels[chosen]),
        Split(train.images[held_out], train.labels[held_out]),
        test,
    )


def _fingerprint(directory: Path) -> str:
    """Changes with the names, sizes and times of the files below a directory; empty if there are none."""
    stats = sorted((str(path), path.stat()) for path in directory.rglob("*") if path.is_file())
    listing = "".join(f"{path} {found.st_size} {found.st_mtime_ns}\n" for path, found in stats)
    return hashlib.sha256(listing.encode()).hexdigest() if listing else ""


_PARTS = ("train", "validation", "test")


def _read_copy(path: Path, name: str, fingerprint: str) -> Dataset | None:
    """The arrays as they were kept; None unless they are whole (a zip file has checksums) and those of the files."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            if not fingerprint or str(file["fingerprint"]) != fingerprint:
                return None
            train, validation, test = (Split(file[f"{part}/images"], file[f"{part}/labels"]) for part in _PARTS)
            return Dataset(name, train, validation, test)
    except Exception:  # missing, damaged or of another form: the data is read from where it came
        return None


def _write_copy(path: Path, dataset: Dataset, fingerprint: str) -> None:
    from experiments.files import write_atomically  # takes JAX along

    arrays = {"fingerprint": np.array(fingerprint)}
    for part in _PARTS:
        split = getattr(dataset, part)
        arrays |= {f"{part}/images": split.images, f"{part}/labels": split.labels}
    with contextlib.suppress(OSError):  # a full disk: then it is read slowly the next time too
        write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _other_format(directory: Path) -> bool:
    """Whether there are prepared copies, none of them in the format that can be read without TensorFlow."""
    infos = [path.read_text(errors="replace") for path in directory.glob("*/dataset_info.json")]
    # A damaged file is not of another format: it is reported when the data is read.
    formats = [re.search(r'"fileFormat":\s*"(\w+)"', info) for info in infos]
    return bool(infos) and all(found is not None and found[1] != "array_record" for found in formats)


def _damaged(directory: Any, error: Exception) -> UserError:
    return UserError(
        f"The data in {directory} is damaged and cannot be read ({_first_line(error)}); delete that directory to have it prepared again."
    )


def _read(builder: Any, split: str, count: int) -> Split:
    source = builder.as_data_source(split=split)
    images, labels = np.zeros((len(source), 28, 28, 1), np.uint8), np.zeros(len(source), np.int32)
    for row, record in enumerate(source):
        images[row], labels[row] = record["image"], record["label"]
    if len(source) != count:
        raise ValueError(f"split {split} has {len(source)} images, not {count}")
    return Split(images, labels)


def _builder(tfds: Any, name: str, directory: Path) -> Any:
    """The stock builder, reading the downloaded files with numpy: the stock one needs TensorFlow for that."""
    stock = tfds.builder_cls(name)
    files = {
        "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    }
    builder_name = name

    class NumpyBuilder(stock, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        name = builder_name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            paths = dl_manager.download({split: [self.URL + file for file in pair] for split, pair in files.items()})
            return {split: self._generate_examples(*pair) for split, pair in paths.items()}

        def _generate_examples(self, image_path: Any, label_path: Any) -> Any:
            from PIL import Image

            images = np.frombuffer(gzip.decompress(Path(image_path).read_bytes()), np.uint8, offset=16).reshape(
                -1, 28, 28
            )
            labels = np.frombuffer(gzip.decompress(Path(label_path).read_bytes()), np.uint8, offset=8)
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                # An encoded image: the feature encodes arrays with TensorFlow, but takes PNG bytes as they are.
                png = io.BytesIO()
                Image.fromarray(image).save(png, format="PNG")
                yield row, {"image": io.BytesIO(png.getvalue()), "label": int(label)}

    return NumpyBuilder(data_dir=directory, file_format="array_record")


def _prepare(builder: Any, directory: Path) -> None:
    if not _downloaded(directory) and not _reachable(builder.URL):
        _remember_offline()
        raise _Unavailable("no prepared copy was found and there is no network to download it")
    print(f"Downloading and preparing {builder.name} in {directory} ...", flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise _Unavailable(f"downloading or preparing it failed, {_first_line(error)}") from error


def _downloaded(directory: Path) -> bool:
    return len(list((directory / "downloads" / "manual").glob("*.gz"))) >= 4


def _was_offline() -> bool:
    """Whether there was no network within the last hour."""
    directory = startup.cache_directory("network")
    try:
        return directory is not None and 0 <= time.time() - (directory / _OFFLINE_FILE).stat().st_mtime < _OFFLINE_HOLDS
    except OSError:
        return False


def _remember_offline() -> None:
    directory = startup.cache_directory("network")
    if directory is not None:
        with contextlib.suppress(OSError):
            (directory / _OFFLINE_FILE).touch()


def _reachable(url: str) -> bool:
    """Whether the host answers at all, within some seconds; in a thread, since looking up a name has no time limit."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(url + "train-labels-idx1-ubyte.gz", method="HEAD"), timeout=_OFFLINE_SECONDS
            )
            answers.append(True)
        except Exception:  # any answer but success means that the download would fail too
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_OFFLINE_SECONDS)
    return any(answers)


@contextlib.contextmanager
def _quiet_tfds() -> Any:
    """tensorflow-datasets without its warnings and without 200 seconds of retries."""
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader
    except ImportError as error:
        raise _Unavailable(f"tensorflow-datasets cannot be loaded: {_first_line(error)}") from error
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
