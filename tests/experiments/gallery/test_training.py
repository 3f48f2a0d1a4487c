"""The plain training of gallery networks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.gallery import GALLERY, Examples, Splits, arguments, store, train_command
from experiments.gallery.losses import LOSSES
from experiments.gallery.training import Training, make_optimizer


def small_splits(_=None):
    """Rows of noise with prices that depend on their first column."""
    generator = np.random.default_rng(0)

    def part(count):
        rows = generator.normal(size=(count, 26)).astype(np.float32)
        return Examples(rows, 3000 + 2000 * rows[:, :1])

    return Splits(part(40), part(20), part(20))


@pytest.fixture
def network():
    """The tabular network with few examples and two epochs of four steps."""
    entry = GALLERY["tabular"]
    recipe = dataclasses.replace(entry.recipe, epochs=2, batch_size=10)
    return dataclasses.replace(entry, load=small_splits, recipe=recipe, packages=())


@pytest.fixture
def gallery(network, monkeypatch, tmp_path):
    """The command with this network alone, which keeps trained networks in a directory of the test."""
    monkeypatch.setattr(arguments, "GALLERY", {network.name: network})
    monkeypatch.setattr(store, "TRAINED", tmp_path / "trained")
    return tmp_path


def test_two_steps_change_the_variables(network):
    training = Training(network, network.recipe, small_splits())
    state = training.first_state()
    start = jax.tree.map(np.array, state.variables)
    for step in range(2):
        state = training.take_step(state, np.arange(40), step)
    assert np.isfinite(state.loss_sum)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.variables), strict=True))


def test_a_mask_removes_targets_from_the_loss():
    loss = LOSSES["token_softmax"]
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    targets, mask = jnp.array([[1, 2, 0], [3, 0, 0]]), jnp.array([[1.0, 1, 0], [1, 0, 0]])
    values = -jax.nn.log_softmax(logits)[mask > 0, targets[mask > 0]]
    examples = Examples(logits, targets, mask)
    assert float(loss.mean(logits, examples)) == pytest.approx(float(values.mean()), rel=1e-6)
    measure = loss.measure_of(lambda variables, inputs: inputs)
    assert measure(None, examples) == pytest.approx(float(values.mean()), rel=1e-6)


def test_measures():
    def measure(name, outputs, targets):
        return LOSSES[name].measure_of(lambda variables, inputs: inputs)(None, Examples(outputs, targets))

    assert measure("softmax", jnp.eye(4), jnp.array([0, 1, 2, 0])) == 25
    outputs = jnp.arange(2400.0).reshape(1200, 2)
    assert measure("squared_error", outputs, outputs + jnp.array([3.0, 4.0])) == pytest.approx(12.5**0.5)


def test_an_unknown_optimizer_is_an_error(network):
    with pytest.raises(ValueError, match="optimizer is 'rms'"):
        make_optimizer(dataclasses.replace(network.recipe, optimizer="rms"), 3)


def test_an_unknown_network_is_an_error(capsys):
    assert train_command.main(["lenet"]) == 2
    assert "NAME is 'lenet'; allowed are resnet20," in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_writes_its_files(gallery, network):
    assert train_command.main(["tabular", "--out", str(gallery / "run")]) == 0
    result = json.loads((gallery / "trained/tabular.json").read_text())
    assert result["examples"] == {"train": 40, "validation": 20, "test": 20}
    assert result["measure"] == "root mean squared error in dollars"
    apply, variables = store.load_trained(network)
    test = small_splits().test
    error = float(np.sqrt(np.mean((apply(variables, test.inputs) - test.targets) ** 2)))
    assert error == pytest.approx(result["test"], rel=1e-4)
    assert train_command.main(["tabular", "--out", str(gallery / "run")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_resumed_run_ends_with_the_same_bytes(gallery, monkeypatch, stopped_at):
    def train(out, *more):
        status = train_command.main(["tabular", "--epochs", "2", "--out", str(gallery / out), *more])
        return status, (gallery / out / "tabular.bcdl").read_bytes()

    _, expected = train("whole")
    take_step = Training.take_step

    def stopping(self, state, order, step):
        if step + 1 == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, state, order, step)

    monkeypatch.setattr(Training, "take_step", stopping)
    with pytest.raises(SystemExit):
        train("stopped")
    monkeypatch.setattr(Training, "take_step", take_step)
    assert train("stopped", "--resume") == (0, expected)
    assert not (gallery / "trained").exists()
