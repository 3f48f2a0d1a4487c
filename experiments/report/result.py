"""The figures of a run: the test set is read once, and everything goes into result.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

import bcdl_jax
from experiments.io.data import Dataset
from experiments.pipeline import uncertainty
from experiments.pipeline.context import PRETRAINED, STAGES, RunContext, RunNetworks
from experiments.pipeline.measures import Batch, error_in_chunks, on_device
from experiments.pipeline.recipe import Training
from experiments.runtime import machine

_AVERAGED = ("test_error", "rate", "rate_paper", "kept_weights", "uncertainty", "file_bytes", "ratio_file")


def score(context: RunContext, run: RunNetworks, file_errors: Sequence[float]) -> list[dict[str, Any]]:
    """Reads the test set, once, and collects the figures of every seed.

    Args:
      context: The context of the run.
      run: The networks of the run.
      file_errors: The test errors of the compressed files, in percent.

    Returns:
      The entries "runs" of result.json.
    """
    test = on_device(context.dataset.test)
    measures = _Measures(context, run, test)
    return [measures.of_seed(index, file_errors[index]) for index in range(len(context.seeds))]


class _Measures:
    """Figures of the networks of a run on the test set."""

    def __init__(self, context: RunContext, run: RunNetworks, test: Batch):
        self.context, self.run, self.test = context, run, test
        self.error = error_in_chunks(context.model)
        self.plain_error = error_in_chunks(context.plain_model)
        self.probabilities = uncertainty.mean_probabilities(context.model)

    def of_seed(self, index: int, file_error: float) -> dict[str, Any]:
        context, run = self.context, self.run
        errors = {} if run.pretrained is None else {PRETRAINED: self.plain_error(run.pretrained[index], self.test)}
        errors |= {stage: self.error(run.params[stage][index], self.test) for stage in STAGES}
        trained, pruned, reduced = (run.params[stage][index] for stage in STAGES)
        layers = bcdl_jax.variational_layers(pruned)
        masks = {name: layer.group_mask for name, layer in layers.items()}
        file_bytes = run.files[index].stat().st_size
        shrunk = _shrink_report(context.plain_model, reduced, self.test[0][:2])
        float32_bytes = 4 * sum(
            math.prod(layer.kernel_shape) + layer.bias_size for layer in bcdl_jax.variational_layers(trained).values()
        )
        maximum = {"maximum": _finite(float(bcdl_jax.compression.rate_paper_maximum(reduced)))}
        return {
            "seed": context.seeds[index],
            "failure": run.failures[index],
            "test_error": {stage: round(float(error), 4) for stage, error in errors.items()}
            | {"file": round(file_error, 4)},
            "float32_bytes": float32_bytes,
            "shrunk_float32_bytes": shrunk.bytes[1],
            "multiply_adds": [count // 2 for count in shrunk.multiply_adds],
            "file_bytes": file_bytes,
            "ratio_file": round(float32_bytes / file_bytes, 2),
            "kept_units": self.in_order({name: int((mask > 0).sum()) for name, mask in masks.items()}),
            "total_units": self.in_order({name: mask.size for name, mask in masks.items()}),
            "bits": self.bits(reduced),
            "rate": self.rates(bcdl_jax.rate, index),
            "rate_paper": self.rates(bcdl_jax.compression.rate_paper, index) | maximum,
            "kept_weights": sum(int(layer.kept_weights()) for layer in layers.values()),
            "total_weights": sum(math.prod(layer.kernel_shape) for layer in layers.values()),
            "uncertainty": self.qualities(index),
            "seconds": round(run.seconds / len(context.seeds), 1),
            "thresholds": run.thresholds
            and self.in_order({name: _finite(value) for name, value in run.thresholds[index].items()}),
            "relative_step": run.relative_steps and run.relative_steps[index],
            "round_off_rule": run.by_round_off and self.of_round_off(run.by_round_off[index]),
        }

    def in_order(self, by_layer: dict[str, Any]) -> list[Any]:
        return [by_layer[name] for name in self.context.chain]

    def bits(self, net: Any) -> list[int]:
        return self.in_order({name: int(bits) for name, bits in bcdl_jax.compression.layer_bits(net).items()})

    def rates(self, rate: Callable[[Any], jax.Array], index: int) -> dict[str, float | None]:
        return {stage: _finite(float(rate(self.run.params[stage][index]))) for stage in STAGES[1:]}

    def of_round_off(self, net: Any) -> dict[str, Any]:
        """The figures of the rule of the paper's public code."""
        return {
            "test_error": round(float(self.error(net, self.test)), 4),
            "bits": self.bits(net),
            "rate_paper": _finite(float(bcdl_jax.compression.rate_paper(net))),
        }

    def qualities(self, index: int) -> dict[str, dict[str, float]]:
        """Error, cross-entropy and calibration of the sampled, the mean and the compressed predictions."""
        images, labels = self.test
        pruned = self.run.params["pruned"][index]
        found = {
            "mean": self.probabilities(pruned, images),
            "compressed": self.probabilities(self.run.params["reduced"][index], images),
        }
        if self.context.recipe.variational:
            key = jax.random.fold_in(jax.random.key(self.context.seeds[index]), 5)
            found = {"sampled": uncertainty.sampled_probabilities(self.context.model, pruned, images, key)} | found
        return {
            way: {name: round(float(value), 5) for name, value in uncertainty.quality(predicted, labels).items()}
            for way, predicted in found.items()
        }


def _shrink_report(plain_model: nn.Module, reduced: Any, images: jax.Array) -> bcdl_jax.shrinking.ShrinkReport:
    _, _, report = bcdl_jax.shrink(
        lambda weights, images: plain_model.apply({"params": weights}, images),
        bcdl_jax.mean_weights(reduced),
        images,
    )
    return report


def result(
    context: RunContext,
    runs: list[dict[str, Any]],
    *,
    experiment: str,
    method: str,
    command: str,
    seconds: float,
    width: float | None = None,
) -> dict[str, Any]:
    """The content of result.json.

    The time is that of all starts of the run, and the peak memory that of the last process. The seeds share both.

    Args:
      context: The context of the run.
      runs: The entries from ``score``.
      experiment: The name of the experiment.
      method: The name of the method.
      command: The command that started the run.
      seconds: The time of all starts of the run.
      width: The width of the network, a factor of the paper's; None where the network has one width.
    """
    dataset: Dataset = context.dataset
    recipe: Training = context.recipe
    runs = [run | {"peak_memory_mb": machine.peak_process_megabytes()} for run in runs]
    averaged = [{key: run[key] for key in _AVERAGED} for run in runs if not run["failure"]]
    return {
        "experiment": experiment,
        "method": method,
        **({} if width is None else {"width": width}),
        "dataset": dataset.summary(),
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "seconds": round(seconds, 1),
        "resumed": context.checkpoints.resumed,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "runs": runs,
        "mean": _combine(averaged, lambda values: sum(values) / len(values)) if averaged else None,
        "range": _combine(averaged, lambda values: [min(values), max(values)]) if averaged else None,
    }


def _finite(value: float) -> float | None:
    """The value, or None where it is infinite: JSON has no infinity. A network without weights has an infinite rate."""
    return value if math.isfinite(value) else None


def _combine(trees: list[Any], combine: Callable[[list[float]], Any]) -> Any:
    if isinstance(trees[0], dict):
        return {key: _combine([tree[key] for tree in trees], combine) for key in trees[0]}
    values = [value for value in trees if value is not None]
    return combine(values) if values else None
