import errno
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bcdl_jax
from bcdl_jax import train
from bcdl_jax.train.checkpoints import Checkpoints, restored

EXAMPLES, BATCH = 60, 10
CONFIG = train.FitConfig(
    steps=14,
    rounds=2,
    round_steps=8,
    fine_tune_steps=7,
    batch_size=BATCH,
    steps_per_report=3,
    pruning_rise=0.5,
    least_rise=2.0,
    check_steps=6,
    check_rise=0.2,
)


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["last"]


@pytest.fixture(scope="module")
def problem(key):
    """(model, arrays, validation); the first rounds of pruning count, since the limit is large."""
    x = jax.random.normal(key, (EXAMPLES + 20, 6))
    keys = jax.random.split(key)
    params = {
        "first": jax.random.normal(keys[0], (6, 5)).at[3:].multiply(0.01),
        "last": jax.random.normal(keys[1], (5, 2)),
    }
    y = network(params, x) + 0.5 * jax.random.normal(key, (EXAMPLES + 20, 2))
    return bcdl_jax.variational(network, params, x[:2]), (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])


class Loader:
    """An iterable whose iterators have a position, as those of grain have."""

    def __init__(self, data, as_bytes):
        self.data, self.as_bytes = data, as_bytes

    def __iter__(self):
        return LoaderIterator(self)


class LoaderIterator:
    def __init__(self, loader):
        self.loader, self.place = loader, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.place >= EXAMPLES:
            raise StopIteration
        rows = slice(self.place, self.place + BATCH)
        self.place += BATCH
        return tuple(np.asarray(array[rows]) for array in self.loader.data)

    def get_state(self):
        return str(self.place).encode() if self.loader.as_bytes else {"place": self.place}

    def set_state(self, state):
        self.place = int(state) if self.loader.as_bytes else state["place"]


def in_form(data, form):
    """The training data as arrays, a list, a function of the epoch, or an iterable."""
    batches = [tuple(np.asarray(array[i : i + BATCH]) for array in data) for i in range(0, EXAMPLES, BATCH)]
    if form == "arrays":
        return data
    if form == "list":
        return batches
    if form == "function":
        return lambda epoch: iter(batches[epoch % 6 :] + batches[: epoch % 6])
    return Loader(data, as_bytes=form == "iterable with bytes")


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("form", ["arrays", "list", "function", "iterable", "iterable with bytes"])
def test_a_killed_fit_goes_on_bit_by_bit(problem, form, tmp_path, monkeypatch):
    model, arrays, validation = problem
    data = in_form(arrays, form)
    options = {"config": CONFIG, "key": jax.random.key(3), "progress": False}
    expected = train.fit(model, train.GaussianLoss(), data, validation, **options)
    assert expected.kept_weights[0] < expected.kept_weights[1]

    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "are_due", True)
    for kill in itertools.count():
        left = [kill % 3 + 1]

        def killed(self, facts, tree, left=left):
            save(self, facts, tree)
            left[0] -= 1
            if not left[0]:
                raise Killed

        monkeypatch.setattr(Checkpoints, "save", killed)
        try:
            result = train.fit(
                model, train.GaussianLoss(), in_form(arrays, form), validation, checkpoints=tmp_path / "run", **options
            )
        except Killed:
            continue
        break
    assert kill > 5
    jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)
    assert (result.losses, result.thresholds, result.reports) == (
        expected.losses,
        expected.thresholds,
        expected.reports,
    )
    assert len(list((tmp_path / "run").iterdir())) == 2


def test_an_iterable_without_a_position_is_refused(problem, tmp_path):
    model, arrays, validation = problem

    class Plain:
        def __iter__(self):
            return iter(in_form(arrays, "list"))

    with pytest.raises(
        ValueError, match=r"data is an iterable whose position cannot be saved\. With checkpoints, it must be"
    ):
        train.fit(model, train.GaussianLoss(), Plain(), validation, checkpoints=tmp_path, config=CONFIG)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    Checkpoints(tmp_path, {"config": {"steps": 3}, "key": "a"}).save({"phase": 0}, {"x": jnp.ones(2)})
    assert Checkpoints(tmp_path, {"config": {"steps": 3}, "key": "a"}).newest()[0] == {"phase": 0}
    with pytest.raises(
        ValueError, match=r"checkpoints holds fit-000001\.npz of a run with another key: a there, b here"
    ):
        Checkpoints(tmp_path, {"config": {"steps": 3}, "key": "b"}).newest()


def test_the_newest_undamaged_checkpoint_counts(tmp_path):
    tree = {"key": jax.random.key(4), "half": jnp.ones(3, jnp.bfloat16), "whole": jnp.arange(4)}
    checkpoints = Checkpoints(tmp_path, {})
    assert checkpoints.newest() is None
    for number in range(3):
        checkpoints.save({"number": number}, tree)
    first, last = sorted(tmp_path.iterdir())
    last.write_bytes(last.read_bytes()[:-200])
    facts, arrays = checkpoints.newest()
    assert facts == {"number": 1}
    back = restored(tree, arrays)
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda leaf: leaf.dtype, tree)
    assert bool((jax.random.key_data(back["key"]) == jax.random.key_data(tree["key"])).all())
    np.testing.assert_array_equal(back["half"], tree["half"])
    first.write_bytes(b"")
    assert checkpoints.newest() is None


def test_a_checkpoint_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save({"number": 0}, {"x": jnp.ones(2)})

    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("bcdl_jax.train.checkpoints.write_atomically", full)
    with pytest.warns(
        UserWarning,
        match=r"could not be written \(No space left on device\); training goes on, and the last checkpoint is fit-000001",
    ):
        checkpoints.save({"number": 1}, {"x": jnp.ones(2)})
    assert checkpoints.newest()[0] == {"number": 0}
