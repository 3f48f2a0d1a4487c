import dataclasses
import functools
import gzip
import http.server
import io
import os
import socket
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from experiments.io import data, internet, prepared, tfds_builders
from experiments.io.dataset_table import names_of_shape
from experiments.runtime.errors import UserError


def test_embedded_digits_are_split_by_class_and_always_the_same():
    dataset = data.load("mnist_5k")
    assert dataset.summary() == {"name": "mnist_5k", "train": 3500, "validation": 500, "test": 1000}
    assert dataset.notice is None
    for split, per_class in ((dataset.train, 350), (dataset.validation, 50), (dataset.test, 100)):
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split), 28, 28, 1)
        np.testing.assert_array_equal(np.bincount(split.labels), per_class)
    seen = [image.tobytes() for split in (dataset.train, dataset.validation, dataset.test) for image in split.images]
    assert len(set(seen)) == len(seen) == 5000
    again = data.load("mnist_5k")
    np.testing.assert_array_equal(again.test.images, dataset.test.images)
    # Real digits: the mean picture of a one is a stroke in the middle, that of a zero is not.
    mean = {digit: dataset.train.images[dataset.train.labels == digit].mean(0)[14, 14, 0] for digit in (0, 1)}
    assert mean[1] > 150 > 50 > mean[0]


def test_unknown_data_set():
    with pytest.raises(UserError, match="--dataset is 'emnist'; allowed are mnist, mnist_5k, fashion_mnist"):
        data.load("emnist")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(internet, "is_reachable", lambda url: False)


def test_without_internet_connection_full_mnist_falls_back_and_says_so(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    dataset = data.load("mnist")
    assert dataset.name == "mnist_5k"
    assert "no prepared copy was found and there is no internet connection" in dataset.notice
    assert "uses the 5,000 embedded MNIST digits" in dataset.notice
    assert not (tmp_path / "none").exists()


def test_a_missing_data_set_without_replacement_is_refused(tmp_path, monkeypatch, offline):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--dataset fashion_mnist is not available: no prepared copy"):
        data.load("fashion_mnist")
    with pytest.raises(
        UserError, match=r"--data-dir .*empty holds no prepared mnist, and it could not be prepared there"
    ):
        data.load("mnist", str(tmp_path / "empty"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--data-dir .*file is a file; it must be a directory"):
        data.load("mnist", str(tmp_path / "file"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_new_data_set_is_one_entry(tmp_path, monkeypatch, offline):
    entry = dataclasses.replace(data.DATASETS["mnist"], name="kmnist", title_if_replaced=None)
    monkeypatch.setitem(data.DATASETS, "kmnist", entry)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--dataset kmnist is not available: no prepared copy was found"):
        data.load("kmnist")
    assert names_of_shape((28, 28, 1)) == ("mnist", "mnist_5k", "fashion_mnist", "kmnist")


def test_without_tensorflow_datasets_the_embedded_digits_are_used(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    dataset = data.load("mnist")
    assert dataset.name == "mnist_5k"
    assert "tensorflow-datasets is not installed" in dataset.notice


def test_a_host_that_refuses_or_never_answers_is_not_reachable():
    assert not internet.is_reachable("http://127.0.0.1:9/")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.perf_counter()
        assert not internet.is_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        assert time.perf_counter() - start < internet._TIMEOUT_SECONDS + 1


def test_a_copy_that_needs_tensorflow_is_skipped(tmp_path, monkeypatch, offline):
    """It is not called damaged, and it stays unchanged."""
    copy = tmp_path / "mnist" / "3.0.1"
    copy.mkdir(parents=True)
    (copy / "dataset_info.json").write_text('{"name": "mnist", "fileFormat": "tfrecord"}')
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data.load("mnist").name == "mnist_5k"
    assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


TRAIN, TEST, VALIDATION = 300, 60, 40


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The folder of a web server on this machine that offers small idx files in place of MNIST's."""
    folder = tmp_path / "web"
    folder.mkdir()
    embedded = data.load("mnist_5k")
    for prefix, count, split in (("train", TRAIN, embedded.train), ("t10k", TEST, embedded.test)):
        rows = np.random.default_rng(count).permutation(len(split))[:count]
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + split.images[rows].tobytes()))
        labels = split.labels[rows].astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tfds = pytest.importorskip("tensorflow_datasets")
        monkeypatch.setattr(tfds.builder_cls("mnist"), "URL", f"http://127.0.0.1:{server.server_address[1]}/")
        cifar = tfds.builder_cls("cifar10")
        own = cifar._cifar_info.fget

        def info(builder):
            stock = own(builder)
            return stock._replace(url=f"http://127.0.0.1:{server.server_address[1]}/cifar-10-binary.tar.gz")

        monkeypatch.setattr(cifar, "_cifar_info", property(info))
        for name in ("mnist", "cifar10"):
            small = dataclasses.replace(data.DATASETS[name], train=TRAIN, test=TEST, validation=VALIDATION)
            monkeypatch.setitem(data.DATASETS, name, small)
        yield folder
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("default")
def test_download_prepare_read_and_damage(served, tmp_path, capfd):
    directory = tmp_path / "tfds"
    dataset = data.load("mnist", str(directory))
    assert "Downloading and preparing mnist in" in capfd.readouterr().out
    assert dataset.summary() == {"name": "mnist", "train": TRAIN - VALIDATION, "validation": VALIDATION, "test": TEST}
    for prefix, parts in (("train", (dataset.train, dataset.validation)), ("t10k", (dataset.test,))):
        images = np.frombuffer(gzip.decompress((served / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
        labels = np.frombuffer(gzip.decompress((served / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
        expected = sorted((i.tobytes(), int(c)) for i, c in zip(images.reshape(-1, 784), labels, strict=True))
        assert expected == sorted((i.tobytes(), int(c)) for part in parts for i, c in zip(part.images, part.labels))

    # Prepared once, it is read without an internet connection, in the same order.
    for file in served.iterdir():
        file.unlink()
    again = data.load("mnist", str(directory))
    np.testing.assert_array_equal(again.train.images, dataset.train.images)
    np.testing.assert_array_equal(again.validation.labels, dataset.validation.labels)

    (record,) = (directory / "mnist").glob("*/mnist-train.array_record*")
    content = bytearray(record.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 2000] = bytes(2000)
    record.write_bytes(content)
    with pytest.raises(UserError, match=r"The data in .*mnist.* is damaged and cannot be read \(.*\); delete that dir"):
        data.load("mnist", str(directory))
    record.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged and cannot be read"):
        data.load("mnist", str(directory))
    next((directory / "mnist").glob("*/dataset_info.json")).write_text("{")
    with pytest.raises(UserError, match="is damaged and cannot be read"):
        data.load("mnist", str(directory))


@pytest.mark.filterwarnings("default")
def test_a_failed_download_is_reported_in_one_sentence(served, tmp_path):
    (served / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"could not be prepared there: downloading or preparing it failed, .*404"):
        data.load("mnist", str(tmp_path / "tfds"))


@pytest.mark.filterwarnings("default")
def test_cifar_is_prepared_without_tensorflow(served, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    records = random.integers(0, 256, (TRAIN + TEST, 1 + 3072)).astype(np.uint8)
    records[:, 0] = random.integers(0, 10, len(records))
    parts = np.split(records[:TRAIN], 5)
    content = {f"data_batch_{number}.bin": part.tobytes() for number, part in enumerate(parts, start=1)}
    content |= {
        "test_batch.bin": records[TRAIN:].tobytes(),
        "batches.meta.txt": b"\n".join(b"class%d" % i for i in range(10)),
    }
    with tarfile.open(served / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, value in content.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(value)
            archive.addfile(member, io.BytesIO(value))
    dataset = data.load("cifar10", str(tmp_path / "tfds"))
    assert dataset.summary() == {"name": "cifar10", "train": TRAIN - VALIDATION, "validation": VALIDATION, "test": TEST}
    for rows, splits in ((records[:TRAIN], (dataset.train, dataset.validation)), (records[TRAIN:], (dataset.test,))):
        found = {(image.tobytes(), int(label)) for split in splits for image, label in zip(split.images, split.labels)}
        planes = rows[:, 1:].reshape(-1, 3, 1024)
        expected = {(np.stack(list(image), -1).tobytes(), int(row[0])) for image, row in zip(planes, rows)}
        assert found == expected

    def jpeg(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG")
        return io.BytesIO(file.getvalue())

    # A copy that was stored with loss.
    monkeypatch.setattr(tfds_builders, "_png", jpeg)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):  # The second time reads the cache.
        lossy = data.load("cifar10", str(tmp_path / "lossy"))
        assert "stored as JPEG" in lossy.remark
        assert lossy.summary()["remark"] == lossy.remark
    assert list((tmp_path / "cache" / "bcdl_jax" / "data").glob("cifar10-*.npz"))


def test_images_are_padded_to_the_shape_that_the_network_takes():
    digits = data.load("mnist_5k")
    padded = digits.padded_to((32, 32, 3))
    assert padded.test.images.shape == (len(digits.test), 32, 32, 3)
    for channel in range(3):
        np.testing.assert_array_equal(padded.test.images[:, 2:-2, 2:-2, channel], digits.test.images[..., 0])
    assert padded.test.images.sum() == 3 * digits.test.images.sum(dtype=np.int64)
    assert padded.train.labels is digits.train.labels
    assert digits.padded_to((28, 28, 1)) is digits
    with pytest.raises(UserError, match="The images of mnist_5k are 32 x 32 x 3; the network takes 28 x 28 x 1"):
        padded.padded_to((28, 28, 1))


def test_a_missing_internet_connection_is_remembered_for_an_hour(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    tested = []
    monkeypatch.setattr(internet, "is_reachable", lambda url: bool(tested.append(url)))
    assert "there is no internet connection" in data.load("mnist").notice
    assert "no internet connection within the last hour" in data.load("mnist").notice
    assert len(tested) == 1
    # An explicit directory is tried again at once.
    with pytest.raises(UserError, match="there is no internet connection to download it"):
        data.load("mnist", str(tmp_path / "none"))
    assert len(tested) == 2
    remembered = tmp_path / "cache" / "bcdl_jax" / "internet" / "unreachable-mnist"
    os.utime(remembered, (time.time() - 3700,) * 2)
    assert "there is no internet connection" in data.load("mnist").notice
    assert len(tested) == 3


def test_arrays_are_cached_and_read_again_where_the_cache_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    record = tmp_path / "tfds" / "mnist" / "3.0.1" / "mnist-train.array_record"
    record.parent.mkdir(parents=True)
    record.write_bytes(b"some")
    whole, reads = data.load("mnist_5k"), []

    def read(name, download, directory):
        reads.append(directory)
        return dataclasses.replace(whole, name=name)

    monkeypatch.setattr(prepared, "read_prepared", read)

    def load():
        dataset = data.load("mnist", str(tmp_path / "tfds"))
        assert dataset.name == "mnist"
        for part in ("train", "validation", "test"):
            np.testing.assert_array_equal(getattr(dataset, part).images, getattr(whole, part).images)
            np.testing.assert_array_equal(getattr(dataset, part).labels, getattr(whole, part).labels)
        return len(reads)

    assert [load(), load()] == [1, 1]
    record.write_bytes(b"other")  # The data has changed.
    assert [load(), load()] == [2, 2]
    (copy,) = (tmp_path / "cache" / "bcdl_jax" / "data").iterdir()
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1  # The images are damaged.
    copy.write_bytes(content)
    assert [load(), load()] == [3, 3]
    copy.write_bytes(copy.read_bytes()[:1000])
    assert [load(), load()] == [4, 4]
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
