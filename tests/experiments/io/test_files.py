import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from experiments.io import files
from experiments.runtime.errors import UserError


def test_no_incomplete_file_stays(tmp_path):
    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk full")

    target = tmp_path / "result.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(RuntimeError):
        bcdl_jax.codec.write_atomically(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(target.read_text()) == {"a": 1}


def test_out_directory(tmp_path):
    out = files.prepare_out(str(tmp_path / "a" / "b"), False, ["result.json"])
    assert out.is_dir()
    files.prepare_out(str(out), False, ["result.json"])
    (out / "result.json").write_text("old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out .* exists and is not empty; name another directory or add --overwrite"):
        files.prepare_out(str(out), False, ["result.json"])
    files.prepare_out(str(out), True, ["result.json"])
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "trained_seed7.npz").touch()
    files.prepare_out(str(out), True, ["trained_seed*.npz"])
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"--out .* cannot be written"):
        files.check_out(str(tmp_path / ("n" * 300)), False)
    with pytest.raises(UserError, match=r"--out .* is a file; it must be a directory"):
        files.prepare_out(str(out / "notes.txt"), True, [])
    with pytest.raises(UserError, match=r"--out .* cannot be written"):
        files.prepare_out(str(out / "notes.txt" / "below"), False, [])
    with pytest.raises(UserError, match=r"--out /proc/no cannot be written"):
        files.prepare_out("/proc/no", False, [])


def test_arrays_are_written_by_path_and_integers_in_the_smallest_type(tmp_path, net):
    _, params, _ = net
    reduced = bcdl_jax.reduce_precision(params, 0.25)
    files.write_arrays(tmp_path / "params.npz", params)
    files.write_arrays(tmp_path / "reduced.npz", reduced)
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["Dense_1/kernel_mean"], params["Dense_1"]["posterior"].kernel_mean)
        assert "Dense_2/input_mask" in file.files
    with np.load(tmp_path / "reduced.npz", allow_pickle=False) as file:
        assert file["Dense_0/kernel"].dtype == np.int8
        np.testing.assert_array_equal(file["Dense_0/kernel"], reduced["Dense_0"]["posterior"].kernel)
        assert file["Dense_0/input_mask"].dtype == bool
    files.write_arrays(tmp_path / "wide.npz", {"a": jnp.array([0, 200], jnp.int16), "b": jnp.array([-1], jnp.int16)})
    with np.load(tmp_path / "wide.npz") as file:
        assert (file["a"].dtype, file["b"].dtype) == (np.int16, np.int8)
        assert file["a"].tolist() == [0, 200]


def test_pretrained_files(tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, **{"Dense_0/kernel": np.ones((2, 3))}, trained_on="mnist_5k")
    assert set(files.read_pretrained(str(path), "mnist_5k", ("mnist_5k",))) == {"Dense_0/kernel"}
    assert set(files.read_pretrained(str(path), "mnist", ("mnist_5k",))) == {"Dense_0/kernel"}
    for trained_on in ({"trained_on": "mnist"}, {}):
        np.savez(path, **{"Dense_0/kernel": np.ones((2, 3))}, **trained_on)
        with pytest.raises(UserError, match='mnist_5k takes only a network whose entry "trained_on" is mnist_5k'):
            files.read_pretrained(str(path), "mnist_5k", ("mnist_5k",))
    np.savez(path, **{"Dense_0/kernel": np.array([{}], dtype=object)})
    with pytest.raises(UserError, match=r"--pretrained .* cannot be read as an .npz file of arrays"):
        files.read_pretrained(str(path), "mnist", ())
    np.savez(path, **{"Dense_0/kernel": np.array(["a"])})
    with pytest.raises(UserError, match="Dense_0/kernel of type <U1; it must be an array of numbers"):
        files.read_pretrained(str(path), "mnist", ())
    for value in (np.nan, np.inf):
        np.savez(path, **{"Dense_0/kernel": np.array([1, value])})
        with pytest.raises(UserError, match="Dense_0/kernel with a value that is not a finite number"):
            files.read_pretrained(str(path), "mnist", ())
    for content in (b"", b"no zip", path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"--pretrained .* cannot be read as an .npz file of arrays"):
            files.read_pretrained(str(path), "mnist", ())
    with pytest.raises(UserError, match=r"--pretrained .*gone.npz cannot be read"):
        files.read_pretrained(str(tmp_path / "gone.npz"), "mnist", ())


def test_lines_that_cannot_be_written_leave_nothing_behind(tmp_path, monkeypatch):
    """A disk takes half of a write: no line stays, and the file can be continued."""
    path = tmp_path / "metrics.jsonl"
    files.append_json_lines(path, [{"epoch": 1}])
    real = Path.open

    def half_full(self, *arguments, **options):
        file = real(self, *arguments, **options)

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                return file.write(data[: len(data) // 2])

            def __getattr__(self, name):
                return getattr(file, name)

        return Half()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", half_full)
        with pytest.raises(OSError, match="No space left"):
            files.append_json_lines(path, [{"epoch": 2}, {"epoch": 3}])
    files.append_json_lines(path, [{"epoch": 2}, {"epoch": 3}])
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n'
