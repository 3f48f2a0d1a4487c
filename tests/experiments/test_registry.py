"""A prior, a plain method and an experiment that are added here, one entry each, and run through the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import pytest

import bcdl_jax
from experiments import registry, table
from experiments.cli import run
from experiments.io import data
from experiments.registry.experiments import EXPERIMENTS
from experiments.report import scoring
from tests.experiments.small_data import few_digits


class FixedScalePosterior(bcdl_jax.Posterior):
    """q(z) is a log-normal with a fixed spread, and its location is learned under a standard normal prior of log z."""

    log_scale: jax.Array = flax.struct.field(metadata={"kind": "scale", "axis": "group"})

    @property
    def default_threshold(self) -> float:
        return 0.5

    def kl_divergence(self) -> jax.Array:
        return jnp.sum(jnp.where(self.group_mask > 0, self.log_scale**2 / 2, 0)) + self.gaussian_kl()

    def log_dropout_rate(self) -> jax.Array:
        return -self.log_scale

    def scale_moments(self) -> tuple[jax.Array, jax.Array]:
        return jnp.exp(self.log_scale), jnp.zeros_like(self.log_scale)

    def sample_scale(self, key: jax.Array, num_examples: int) -> jax.Array:
        return jnp.broadcast_to(jnp.exp(self.log_scale), (num_examples, *self.log_scale.shape))


@dataclasses.dataclass(frozen=True)
class FixedScale(bcdl_jax.Family):
    posterior_type = FixedScalePosterior
    start_keys = 1

    def start_fields(self, keys: Sequence[jax.Array], kernel: jax.Array, groups: int) -> dict[str, jax.Array | float]:
        return {"log_scale": 0.1 * jax.random.normal(keys[0], (groups,), kernel.dtype)}


def keep_half(work, params, key):
    """A plain method: keeps the larger half of the weights, without retraining."""
    masks = bcdl_jax.baselines.magnitude_masks(params, 0.5)
    return bcdl_jax.baselines.apply_masks(params, masks), masks, None


PRIOR = registry.Prior("fixed", "fixed scales", lambda recipe: FixedScale())
METHOD = registry.PlainMethod("half", "the larger half", lambda: keep_half)


@contextlib.contextmanager
def added(entries, entry):
    """Adds an entry to a registry for the length of a ``with`` block."""
    entries.add(entry)
    try:
        yield
    finally:
        del entries._entries[entry.name]


@pytest.fixture
def digits(monkeypatch):
    dataset = few_digits(96, 32, 64)
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    # Scored here, and not in a process of its own, which takes seconds to start.
    monkeypatch.setattr(scoring, "in_fresh_process", scoring.test_errors)


def result_of(experiment, method, out):
    assert run.main(experiment, ["--method", method, "--dataset", "mnist_5k", "--quick", "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_a_new_prior_is_one_entry(digits, tmp_path, capsys):
    with added(registry.PRIORS, PRIOR):
        result = result_of(EXPERIMENTS["lenet300"], "fixed", tmp_path)
    assert result["method"] == "fixed"
    assert "LeNet-300-100, fixed scales, mnist_5k" in capsys.readouterr().out
    assert result["runs"][0]["rate_paper"]["reduced"] > 1


@pytest.mark.slow
def test_a_new_plain_method_is_one_entry(digits, tmp_path, capsys):
    recipe = dataclasses.replace(
        EXPERIMENTS["lenet300"].recipe("mnist_5k", method="sws"), batch_size=32, levels=(8, 8, 8)
    )
    recipes = EXPERIMENTS["lenet300"].recipes | {"half": {"mnist": recipe}}
    experiment = dataclasses.replace(EXPERIMENTS["lenet300"], recipes=recipes)
    with added(registry.PLAIN_METHODS, METHOD):
        result = result_of(experiment, "half", tmp_path)
    assert result["method"] == "half"
    assert result["runs"][0]["kept_weights"] == pytest.approx(266_200 / 2, rel=0.01)


@pytest.mark.slow
def test_a_new_experiment_is_one_entry(digits, tmp_path, capsys):
    small = registry.Experiment(
        "small", "lenet300", (), EXPERIMENTS["lenet300"].recipes, {"epochs": 1, "fine_tune_epochs": 0}
    )
    with added(EXPERIMENTS, small):
        result = result_of(EXPERIMENTS["small"], "gnj", tmp_path / "run")
        assert result["command"].startswith("python -m experiments.small")
        arguments = ["--results", str(tmp_path), "--dataset", "mnist_5k", "--out", str(tmp_path / "table")]
        assert table.main(arguments) == 0
        assert "comes from a --quick run, whose figures mean nothing" in capsys.readouterr().out
    assert "small" not in EXPERIMENTS


def test_names_must_differ():
    with pytest.raises(ValueError, match="There is a prior called gnj already"):
        registry.PRIORS.add(dataclasses.replace(PRIOR, name="gnj"))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match="There is no network called alexnet; there are lenet300, lenet5, vgg"):
        registry.NETWORKS["alexnet"]
