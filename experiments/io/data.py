"""Data sets: MNIST, Fashion-MNIST and CIFAR-10 through tensorflow-datasets without TensorFlow, and the embedded digits."""

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
import tarfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runtime import startup
from experiments.runtime.errors import UserError

NAMES = ("mnist", "mnist_5k", "fashion_mnist", "cifar10")
DIGIT_NAMES = NAMES[:3]
EMBEDDED = "mnist_5k"
_EMBEDDED_FILE = Path(__file__).parents[1] / "embedded" / "mnist_5k.npz"
_SPLIT_SEED = 0
# Of each class: the embedded digits hold 500 of each.
_EMBEDDED_TRAIN, _EMBEDDED_VALIDATION = 350, 50
_OFFLINE_SECONDS = 2.5
_OFFLINE_FILE, _OFFLINE_HOLDS = "unreachable", 3600
_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_TFDS_DEFAULT = "~/tensorflow_datasets"
_PARTS = ("train", "validation", "test")
_AT_A_TIME = 2500


@dataclasses.dataclass(frozen=True)
class _Full:
    """What a whole data set is: the shape of its images, how many there are, and how many of the training images are held out to choose on."""

    shape: tuple[int, int, int]
    train: int
    test: int
    validation: int = 5_000


_FULL = {
    "mnist": _Full((28, 28, 1), 60_000, 10_000),
    "fashion_mnist": _Full((28, 28, 1), 60_000, 10_000),
    "cifar10": _Full((32, 32, 3), 50_000, 10_000),
}
# Whose absence is made up for by the embedded digits.
_WITH_FALLBACK = ("mnist", "cifar10")
_TITLES = {"mnist": "Full MNIST", "cifar10": "CIFAR-10"}


@dataclasses.dataclass(frozen=True)
class Split:
    """images [n, height, width, channels] of uint8 and labels [n] of int32."""

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
      remark: one sentence on what sets its images apart from the original ones, else None.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    notice: str | None = None
    remark: str | None = None

    def summary(self) -> dict[str, Any]:
        sizes = {part: len(getattr(self, part)) for part in _PARTS}
        said = {name: getattr(self, name) for name in ("notice", "remark") if getattr(self, name)}
        return {"name": self.name} | sizes | said

    def padded_to(self, shape: tuple[int, int, int]) -> Dataset:
        """The images with an even margin of zeros and their one channel repeated, where their shape is not the one that is asked for.

        Raises:
          UserError: they are larger than that.
        """
        given = self.train.images.shape[1:]
        if given == shape:
            return self
        if any(size > most for size, most in zip(given, shape, strict=True)):
            raise UserError(f"The images of {self.name} are {_sizes(given)}; the network takes {_sizes(shape)}.")
        train, validation, test = (_pad(getattr(self, part), shape) for part in _PARTS)
        return dataclasses.replace(self, train=train, validation=validation, test=test)


def pieces(count: int) -> list[slice]:
    """Of so many images, those that are looked at as one: all at once, the activations of a large network take gigabytes."""
    return [slice(first, first + _AT_A_TIME) for first in range(0, count, _AT_A_TIME)]


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _pad(split: Split, shape: tuple[int, int, int]) -> Split:
    height, width, channels = split.images.shape[1:]
    margins = [
        ((full - size) // 2, full - size - (full - size) // 2) for size, full in ((height, shape[0]), (width, shape[1]))
    ]
    images = np.pad(split.images, [(0, 0), *margins, (0, 0)])
    return Split(np.repeat(images, shape[2] // channels, axis=-1), split.labels)


class _Unavailable(Exception):
    """The full data set cannot be had; the message says why."""


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set.

    All but the embedded digits are read from a prepared directory, else downloaded and prepared there. Without an explicit ``data_dir``,
    "mnist" and "cifar10" fall back on the embedded digits where that is impossible, and say so in ``notice``.

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
        if name not in _WITH_FALLBACK:
            raise UserError(
                f"--dataset {name} cannot be had: {reason}. Give --data-dir, or use --dataset {EMBEDDED}."
            ) from None
        return _load_embedded(
            f"{_TITLES[name]} is not at hand ({reason}): this run uses the 5,000 embedded MNIST digits instead."
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
    if data_dir is None and not fingerprint and not _downloaded(directory, name) and _was_offline(name):
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
            full = _FULL[name]
            train = _read(builder, "train", full.train, full.shape)
            test = _read(builder, "test", full.test, full.shape)
            lossy = _is_jpeg(tfds, builder)
        except Exception as error:
            raise _damaged(builder.data_dir, error) from error
    # The order of the records depends on who prepared them; by content, the split is the same everywhere.
    order = np.argsort([hashlib.sha256(image.tobytes()).hexdigest() for image in train.images], kind="stable")
    chosen, held_out = order[full.validation :], order[: full.validation]
    return Dataset(
        name,
        Split(train.images[chosen], train.labels[chosen]),
        Split(train.images[held_out], train.labels[held_out]),
        test,
        remark=f"The images of this copy of {name} are stored as JPEG, which has changed them a little."
        if lossy
        else None,
    )


def _is_jpeg(tfds: Any, builder: Any) -> bool:
    """Whether the images were stored with loss, going by the first."""
    skip = {"image": tfds.decode.SkipDecoding()}
    return bytes(builder.as_data_source(split="test", decoders=skip)[0]["image"]).startswith(b"\xff\xd8")


def _fingerprint(directory: Path) -> str:
    """Changes with the names, sizes and times of the files below a directory; empty if there are none."""
    stats = sorted((str(path), path.stat()) for path in directory.rglob("*") if path.is_file())
    listing = "".join(f"{path} {found.st_size} {found.st_mtime_ns}\n" for path, found in stats)
    return hashlib.sha256(listing.encode()).hexdigest() if listing else ""


def _read_copy(path: Path, name: str, fingerprint: str) -> Dataset | None:
    """The arrays as they were kept; None unless they are whole (a zip file has checksums) and those of the files."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            if not fingerprint or str(file["fingerprint"]) != fingerprint:
                return None
            train, validation, test = (Split(file[f"{part}/images"], file[f"{part}/labels"]) for part in _PARTS)
            return Dataset(name, train, validation, test, remark=str(file["remark"]) or None)
    except Exception:  # missing, damaged or of another form: the data is read from where it came
        return None


def _write_copy(path: Path, dataset: Dataset, fingerprint: str) -> None:
    from experiments.io.files import write_atomically

    arrays = {"fingerprint": np.array(fingerprint), "remark": np.array(dataset.remark or "")}
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


def _read(builder: Any, split: str, count: int, shape: tuple[int, int, int]) -> Split:
    source = builder.as_data_source(split=split)
    images, labels = np.zeros((len(source), *shape), np.uint8), np.zeros(len(source), np.int32)
    for row, record in enumerate(source):
        images[row], labels[row] = record["image"], record["label"]
    if len(source) != count:
        raise ValueError(f"split {split} has {len(source)} images, not {count}")
    return Split(images, labels)


def _builder(tfds: Any, name: str, directory: Path) -> Any:
    """The stock builder, reading the downloaded files with numpy: the stock one needs TensorFlow for that."""
    make = _cifar_builder if name == "cifar10" else _digits_builder
    return make(tfds.builder_cls(name), name)(data_dir=directory, file_format="array_record")


def _png(image: np.ndarray) -> io.BytesIO:
    """An encoded image: the feature encodes arrays with TensorFlow, but takes PNG bytes as they are."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image).save(png, format="PNG")
    return io.BytesIO(png.getvalue())


def _digits_builder(stock: Any, builder_name: str) -> Any:
    files = {
        "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    }

    class NumpyBuilder(stock, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        name = builder_name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            paths = dl_manager.download({split: [self.URL + file for file in pair] for split, pair in files.items()})
            return {split: self._generate_examples(*pair) for split, pair in paths.items()}

        def _generate_examples(self, image_path: Any, label_path: Any) -> Any:
            images = np.frombuffer(gzip.decompress(Path(image_path).read_bytes()), np.uint8, offset=16).reshape(
                -1, 28, 28
            )
            labels = np.frombuffer(gzip.decompress(Path(label_path).read_bytes()), np.uint8, offset=8)
            for row, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield row, {"image": _png(image), "label": int(label)}

    return NumpyBuilder


def _cifar_builder(stock: Any, builder_name: str) -> Any:
    def member(archive: Any, path: str) -> bytes:
        with tarfile.open(archive) as tar:
            found = tar.extractfile(path)
            if found is None:
                raise ValueError(f"{path} in the archive is not a file")
            return found.read()

    class NumpyBuilder(stock, skip_registration=True):  # type: ignore[misc, valid-type, call-arg]
        name = builder_name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            info = self._cifar_info
            archive = dl_manager.download(info.url)
            names = member(archive, info.prefix + info.label_files[0]).decode().split("\n")
            self.info.features["label"].names = [name for name in names if name]
            files = {"train": info.train_files, "test": info.test_files}
            return {
                split: self._generate_examples(archive, f"{split}_", [info.prefix + path for path in paths])
                for split, paths in files.items()
            }

        def _generate_examples(self, archive: Any, prefix: str, paths: list[str]) -> Any:
            records = b"".join(member(archive, path) for path in paths)
            # A byte of the label, then the planes of red, green and blue.
            for row, record in enumerate(np.frombuffer(records, np.uint8).reshape(-1, 1 + 3 * 32 * 32)):
                image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield row, {"id": f"{prefix}{row:05d}", "image": _png(image), "label": int(record[0])}

    return NumpyBuilder


def _prepare(builder: Any, directory: Path) -> None:
    address = builder._cifar_info.url if builder.name == "cifar10" else builder.URL + "train-labels-idx1-ubyte.gz"
    if not _downloaded(directory, builder.name) and not _reachable(address):
        _remember_offline(builder.name)
        raise _Unavailable("no prepared copy was found and there is no network to download it")
    print(f"Downloading and preparing {builder.name} in {directory} ...", flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise _Unavailable(f"downloading or preparing it failed, {_first_line(error)}") from error


def _downloaded(directory: Path, name: str) -> bool:
    pattern, count = (_CIFAR_ARCHIVE, 1) if name == "cifar10" else ("*-ubyte.gz", 4)
    return len(list((directory / "downloads" / "manual").glob(pattern))) >= count


def _was_offline(name: str) -> bool:
    """Whether there was no network within the last hour."""
    directory = startup.cache_directory("network")
    try:
        return (
            directory is not None
            and 0 <= time.time() - (directory / f"{_OFFLINE_FILE}-{name}").stat().st_mtime < _OFFLINE_HOLDS
        )
    except OSError:
        return False


def _remember_offline(name: str) -> None:
    directory = startup.cache_directory("network")
    if directory is not None:
        with contextlib.suppress(OSError):
            (directory / f"{_OFFLINE_FILE}-{name}").touch()


def _reachable(url: str) -> bool:
    """Whether the host answers at all, within some seconds; in a thread, since looking up a name has no time limit."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_OFFLINE_SECONDS)
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
