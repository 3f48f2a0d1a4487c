import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bcdl_jax
from experiments.io import checkpoint_storage, checkpoints, data, run_settings
from experiments.runtime.errors import UserError
from tests.conftest import SmallNet, assert_trees_close

SETTINGS = {"epochs": 4, "seeds": [0, 1], "rate": 0.1}
METRICS = "metrics.jsonl"


@pytest.fixture(scope="module")
def states():
    """Two states of a small network, of two seeds each, with typed keys and the state of an optimiser."""
    optimizer = optax.chain(optax.adam(1e-3), bcdl_jax.train.params_ema(0.9))

    @jax.jit
    @jax.vmap
    def create(seed):
        key = jax.random.key(seed)
        return bcdl_jax.train.create_train_state(SmallNet().init(key, jnp.ones((1, 6)))["params"], optimizer, key)

    return create(jnp.arange(2)), create(jnp.arange(2, 4)).replace(step=jnp.array([7, 7]))


def frame(epoch):
    return {"kernels/Dense_0": np.full((6, 5), epoch, np.float16), "rates/Dense_0": np.full(6, epoch, np.float32)}


def begin(out, settings=SETTINGS, *, resume=False, overwrite=False, every=1):
    return checkpoints.begin(
        str(out), settings, [METRICS, "trained_*.npz"], METRICS, every=every, resume=resume, overwrite=overwrite
    )[1]


def save(kept, out, phase, state, epoch, **options):
    with (out / METRICS).open("a") as file:
        file.write(f'{{"epoch": {epoch}}}\n')
    frames = {number: frame(number) for number in range(epoch + 1)} if phase == "train" else {}
    return kept.save(phase, state, facts={"failures": [None, "stopped"]}, frames=frames, **options)


def test_a_saved_state_is_restored_bit_by_bit(states, tmp_path, capsys):
    out = tmp_path / "run"
    kept = begin(out)
    for epoch in (1, 2, 3):
        path = save(kept, out, "train", states[epoch == 3], epoch)
    assert path == out / "checkpoints" / "000003"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["000002", "000003", "frames"]
    # Lines after the checkpoint, the last one incomplete, and files of a killed process.
    with (out / METRICS).open("a") as file:
        file.write('{"epoch": 4}\n{"epo')
    (out / f".trained_seed0.npz.{'0f' * 16}").touch()
    (out / "trained_seed0.npz").touch()
    again = begin(out, resume=True)
    assert f"Resumes the run in {out} from {path}" in capsys.readouterr().out
    assert (again.resumed, again.earlier_seconds > 0) == (1, True)
    assert sorted(entry.name for entry in out.iterdir()) == ["checkpoints", METRICS]
    assert (out / METRICS).read_text() == '{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n'
    restored = again.restore("train", states[0])
    assert_trees_close(restored.state, states[1], rtol=0)
    assert (restored.complete, restored.facts) == (False, {"failures": [None, "stopped"]})
    assert list(restored.frames) == [0, 1, 2, 3]
    for epoch, arrays in restored.frames.items():
        assert_trees_close(arrays, frame(epoch), rtol=0)
    assert again.restore("fine_tune", states[0]) is None
    again.remove()
    assert [entry.name for entry in out.iterdir()] == [METRICS]


@pytest.mark.parametrize("damage", ["state", "cut", "about", "manifest", "no manifest", "frame", "extra"])
def test_a_damaged_checkpoint_is_skipped(states, tmp_path, capsys, damage):
    kept = begin(tmp_path)
    save(kept, tmp_path, "train", states[0], 1)
    newest = save(kept, tmp_path, "train", states[1], 2)
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    target = {
        "about": newest / "about.json",
        "manifest": newest / "manifest.json",
        "frame": newest.parent / "frames" / "train-0002.npz",
    }.get(damage, largest)
    content = bytearray(target.read_bytes())
    if damage == "cut":
        target.write_bytes(content[:-1])
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "extra":
        (newest / "state" / "extra").touch()
    else:
        content[len(content) // 2] ^= 1
        target.write_bytes(content)
    again = begin(tmp_path, resume=True)
    restored = again.restore("train", states[0])
    assert_trees_close(restored.state, states[0], rtol=0)
    assert list(restored.frames) == [0, 1]
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert f"warning: Checkpoint {newest} is damaged (" in error
    assert (tmp_path / METRICS).read_text() == '{"epoch": 1}\n'
    # The frame of the removed checkpoint is written again.
    assert save(again, tmp_path, "train", states[1], 2) is not None
    assert_trees_close(begin(tmp_path, resume=True).restore("train", states[0]).frames[2], frame(2), rtol=0)


def test_without_an_undamaged_checkpoint_the_run_starts_from_the_beginning(states, tmp_path, capsys):
    path = save(begin(tmp_path), tmp_path, "train", states[0], 1)
    (path / "manifest.json").write_text("{")
    again = begin(tmp_path, resume=True)
    assert again.restore("train", states[0]) is None
    assert f"There is no checkpoint in {tmp_path}; the run starts from the beginning." in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoints"]
    # The empty directory marks a run that was killed before its first checkpoint.
    (tmp_path / METRICS).touch()
    assert begin(tmp_path, resume=True).resumed == 0
    # The files of a finished run are not an unfinished run.
    begin(tmp_path, resume=True).remove()
    (tmp_path / METRICS).touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        begin(tmp_path, resume=True)
    begin(tmp_path, resume=True, overwrite=True)


def test_later_phases_are_forgotten_where_an_earlier_one_is_resumed(states, tmp_path):
    """A complete phase is restored at its end. An incomplete one removes the checkpoints of later phases."""
    kept = begin(tmp_path)
    save(kept, tmp_path, "train", states[0], 1)
    save(kept, tmp_path, "train", states[1], 2, complete=True)
    save(kept, tmp_path, "fine_tune", states[0], 3)
    again = begin(tmp_path, resume=True)
    assert again.restore("train", states[0]).complete
    assert not again.restore("fine_tune", states[0]).complete
    assert (tmp_path / METRICS).read_text().count("\n") == 3
    # The checkpoint at the end of the training is damaged.
    (tmp_path / "checkpoints" / "000002" / "about.json").write_text("{}")
    last = begin(tmp_path, resume=True)
    assert not last.restore("train", states[0]).complete
    assert last.restore("fine_tune", states[0]) is None
    assert (tmp_path / METRICS).read_text() == '{"epoch": 1}\n'


def test_other_settings_are_refused_one_by_one(states, tmp_path):
    path = save(begin(tmp_path), tmp_path, "train", states[0], 1)
    requested = {"epochs": 5, "seeds": [0, 1], "more": None}
    with pytest.raises(UserError) as refused:
        begin(tmp_path, requested, resume=True)
    assert str(refused.value) == (
        f"--resume cannot continue from {path}, since epochs was 4 and is now 5; rate was 0.1 and is now not set; "
        "more was not set and is now null."
    )
    begin(tmp_path, resume=True)


def test_settings_depend_on_the_content_of_the_dataset():
    digits = data.load(data.EMBEDDED)

    @dataclasses.dataclass(frozen=True)
    class Recipe:
        epochs: int = 3

    settings = run_settings.settings("lenet300", Recipe(), digits, [0], thresholds=None)
    assert {"experiment", "epochs", "dataset", "seeds", "thresholds", "devices", "jax", "jaxlib"} <= set(settings)
    labels = digits.validation.labels.copy()
    labels[0] += 1
    other = dataclasses.replace(digits, validation=data.Split(digits.validation.images, labels))
    differing = run_settings.settings("lenet300", Recipe(), other, [0], thresholds=None)
    assert [name for name in settings if settings[name] != differing[name]] == ["content of the dataset"]


def test_a_full_disk_leaves_the_earlier_checkpoint(states, tmp_path, monkeypatch, capsys):
    kept = begin(tmp_path)
    path = save(kept, tmp_path, "train", states[0], 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("write_state", "sync"):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint_storage, name, full)
            assert save(kept, tmp_path, "train", states[1], 2) is None
        error = capsys.readouterr().err
        assert "warning: A checkpoint could not be written (No space left on device)" in error
        assert "training continues, and the last checkpoint is 000001" in error
        assert not list(path.parent.glob(".*"))
    assert_trees_close(begin(tmp_path, resume=True).restore("train", states[0]).state, states[0], rtol=0)


@pytest.mark.slow
def test_killed_at_every_point_of_a_write(states, tmp_path, monkeypatch):
    """The process ends at the first, second, ... access to the disk. The checkpoint before stays usable."""

    class Killed(BaseException):
        pass

    kept = begin(tmp_path)
    save(kept, tmp_path, "train", states[0], 1)
    left, points, path = 0, 0, None
    names = ("write_state", "sync", "directory_checksums", "file_checksum")
    real = {name: getattr(checkpoint_storage, name) for name in names}

    def counted(name):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](*arguments)

        return call

    while path is None:
        left = points
        with monkeypatch.context() as patched:
            for name in real:
                patched.setattr(checkpoint_storage, name, counted(name))
            try:
                path = kept.save("train", states[1], facts={}, frames={0: frame(0), 1: frame(1)})
            except Killed:
                points += 1
        if path is None:
            again = begin(tmp_path, resume=True)
            newest = json.loads((again.newest() / "about.json").read_text())
            # Once renamed, the new checkpoint is complete.
            expected = states[1] if newest["facts"] == {} else states[0]
            assert_trees_close(again.restore("train", states[0]).state, expected, rtol=0)
    assert points >= 6
