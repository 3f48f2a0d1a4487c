"""The road of every experiment: train many seeds, prune, fine-tune the means, reduce precision, score, write the files."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import bcdl_jax
from experiments import files
from experiments.data import Dataset, Split
from experiments.errors import UserError

STAGES = ("trained", "pruned", "reduced")
METRICS, RESULT = "metrics.jsonl", "result.json"
_MOST_FRAMES = 60
_KEPT_VARIANCE_FACTORS = {"kernel_log_variance": 0.0, "bias_log_variance": 0.0, "scale_log_variance": 0.0}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train and compress; every value was chosen on validation data.

    Attributes:
      epochs: of variational training.
      fine_tune_epochs: of the means, after pruning.
      batch_size: examples per step.
      learning_rate: of Adam at the start; falls to 0 along a cosine.
      fine_tune_learning_rate: likewise for the fine-tuning.
      log_variance_factor: how many times larger the steps of all log-variances are.
      warmup_epochs: over which the weight of the KL rises from 0 to 1.
      max_increase: points of validation error that pruning may cost before fine-tuning.
      max_rounding_increase: points of validation error that rounding may cost.
    """

    epochs: int
    fine_tune_epochs: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    fine_tune_learning_rate: float = 1e-3
    log_variance_factor: float = 4.0
    warmup_epochs: int = 0
    max_increase: float = 0.4
    max_rounding_increase: float = 0.1


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One frame of the pictures: an epoch, the mean kernels and the log dropout rates of one seed, by layer name."""

    epoch: int
    kernels: dict[str, np.ndarray]
    log_dropout_rates: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that was made: stacked params after each stage, thresholds per seed, and the frames of the first seed."""

    params: dict[str, list[Any]]
    thresholds: list[dict[str, float]]
    relative_steps: list[float]
    by_round_off: list[Any]
    snapshots: list[Snapshot]
    seconds: float


class Progress:
    """A progress bar with the time left, on a terminal only; messages go above it."""

    def __init__(self, total: int, title: str):
        self._bar = tqdm(total=total, desc=title, unit="epoch", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def show(self, report: bcdl_jax.EnsembleReport) -> None:
        for message in report.messages:
            self._bar.write(f"warning: {message}", file=sys.stderr)
        kept = " ".join("-".join(map(str, seed.kept.values())) for seed in report.reports)
        error = " ".join(f"{seed.validation_error:.2f}" for seed in report.reports)
        self._bar.set_postfix_str(f"kept {kept}, validation error {error} %", refresh=False)
        self._bar.update()


def error_percent(model: nn.Module, params: Any, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Share of wrong predictions at the mean weights, in percent."""
    images, labels = data
    wrong = jnp.argmax(model.apply({"params": params}, images), axis=-1) != labels
    return 100 * jnp.mean(wrong)


def sampled_cross_entropy(model: nn.Module, params: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
    """Mean cross-entropy of a batch in nats, with weights sampled per example."""
    images, labels = batch
    logits = model.apply({"params": params}, images, deterministic=False, rngs={"noise": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_epoch(model: nn.Module, recipe: Recipe, epochs: int, num_examples: int, learning_rate: float, factors: dict[str, float], warmup: int):
    """The optimiser and the epoch function of one phase: Adam with a cosine schedule and a step size per kind of parameter."""
    steps = num_examples // recipe.batch_size
    schedule = optax.cosine_decay_schedule(learning_rate, max(1, epochs * steps))
    optimizer = optax.chain(optax.adam(schedule), bcdl_jax.scale_by_kind(factors))
    step = bcdl_jax.make_train_step(
        functools.partial(sampled_cross_entropy, model),
        optimizer,
        num_examples=num_examples,
        kl_weight=bcdl_jax.kl_warmup(warmup * steps) if warmup else 1.0,
    )
    return optimizer, bcdl_jax.make_train_epoch(step, batch_size=recipe.batch_size)


def compress(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    chain: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    thresholds: dict[str, float] | None,
    pretrained: dict[str, np.ndarray] | None,
) -> Run:
    """Trains, prunes, fine-tunes and reduces the precision of one net per seed.

    Args:
      model: variational, called with images of uint8.
      dataset: only its training and validation parts are used.
      recipe: see ``Recipe``.
      chain: layer names in the order of the data flow.
      seeds: one run each, all trained at once.
      out: directory for metrics.jsonl; where Ctrl-C leaves the last parameters.
      thresholds: by layer name, or None to choose them on the validation data.
      pretrained: weights to start from, by "layer/kernel" and "layer/bias".

    Raises:
      UserError: pretrained weights that do not fit the model, or seeds that were all stopped by values that are not finite.
    """
    start = time.perf_counter()
    train, validation = (_on_device(split) for split in (dataset.train, dataset.validation))
    num_examples = len(dataset.train)
    variance_factors = dict.fromkeys(_KEPT_VARIANCE_FACTORS, recipe.log_variance_factor)
    optimizer, epoch = make_epoch(
        model, recipe, recipe.epochs, num_examples, recipe.learning_rate, variance_factors, recipe.warmup_epochs
    )

    @jax.jit
    @jax.vmap
    def create(seed: jax.Array) -> bcdl_jax.TrainState:
        init_key, train_key = jax.random.split(jax.random.key(seed))
        params = model.init(init_key, train[0][:1])["params"]
        if pretrained is not None:
            params = bcdl_jax.from_trained(params, pretrained)
        return bcdl_jax.create_train_state(params, optimizer, train_key)

    try:
        states = create(jnp.array(seeds))
    except ValueError as error:
        if pretrained is None:
            raise
        raise UserError(f"--pretrained does not fit: {error}") from error

    evaluate = functools.partial(error_percent, model)
    measure = jax.jit(evaluate)
    snapshots = [_snapshot(0, states.params)]
    every = math.ceil(recipe.epochs / (_MOST_FRAMES - 1))

    def train_phase(states, title: str, phase: str, epoch_function, epochs: int, first_epoch: int):
        with Progress(epochs, title) as progress:
            try:
                for states, report in bcdl_jax.train_ensemble(
                    states,
                    train,
                    train_epoch=epoch_function,
                    epochs=epochs,
                    validation_error=evaluate,
                    validation_data=validation,
                    seeds=seeds,
                    first_epoch=first_epoch,
                ):
                    progress.show(report)
                    for seed_report in report.reports:
                        files.append_json_line(out / METRICS, {"phase": phase} | _without_nan(dataclasses.asdict(seed_report)))
                    number = report.reports[0].epoch
                    if phase == "train" and (number % every == 0 or number == epochs):
                        snapshots.append(_snapshot(number, states.params))
                    if all(seed_report.failure for seed_report in report.reports):
                        break
            except KeyboardInterrupt:
                files.write_arrays(out / "interrupted.npz", states.params)
                raise
        return states, report

    states, report = train_phase(states, "train", "train", epoch, recipe.epochs, 1)
    if all(seed_report.failure for seed_report in report.reports):
        raise UserError(f"No seed could be trained to the end. {report.reports[0].failure}")
    trained = [bcdl_jax.unstack(states.params, index) for index in range(len(seeds))]

    def error(params: Any) -> float:
        return float(measure(params, validation))

    chosen = [
        thresholds or bcdl_jax.choose_thresholds(params, error, max_increase=recipe.max_increase, chain=chain)
        for params in tqdm(trained, desc="choose thresholds", unit="seed", disable=not sys.stderr.isatty())
    ]
    pruned = [bcdl_jax.prune(params, by_layer, chain) for params, by_layer in zip(trained, chosen, strict=True)]
    if recipe.fine_tune_epochs:
        optimizer, epoch = make_epoch(
            model, recipe, recipe.fine_tune_epochs, num_examples, recipe.fine_tune_learning_rate, _KEPT_VARIANCE_FACTORS, 0
        )
        keys = [jax.random.fold_in(jax.random.key(seed), 1) for seed in seeds]
        states = bcdl_jax.stack_states([bcdl_jax.create_train_state(params, optimizer, key) for params, key in zip(pruned, keys, strict=True)])
        states, _ = train_phase(states, "fine-tune", "fine_tune", epoch, recipe.fine_tune_epochs, recipe.epochs + 1)
        pruned = [bcdl_jax.unstack(states.params, index) for index in range(len(seeds))]

    steps = [bcdl_jax.choose_relative_step(params, error, max_increase=recipe.max_rounding_increase) for params in pruned]
    reduced = [bcdl_jax.reduce_precision(params, step) for params, step in zip(pruned, steps, strict=True)]
    by_round_off = [bcdl_jax.reduce_precision_by_round_off(params) for params in pruned]
    return Run(
        params={"trained": trained, "pruned": pruned, "reduced": reduced},
        thresholds=chosen,
        relative_steps=steps,
        by_round_off=by_round_off,
        snapshots=snapshots,
        seconds=time.perf_counter() - start,
    )


def score(model: nn.Module, run: Run, dataset: Dataset, seeds: Sequence[int], chain: Sequence[str]) -> list[dict[str, Any]]:
    """Reads the test set, once, and collects the figures of every seed."""
    test = _on_device(dataset.test)
    measure = jax.jit(functools.partial(error_percent, model))

    def rates(measured: Callable[[Any], jax.Array], index: int) -> dict[str, float | None]:
        return {stage: _finite(float(measured(run.params[stage][index]))) for stage in STAGES[1:]}

    def in_order(by_layer: dict[str, Any]) -> list[Any]:
        return [by_layer[name] for name in chain]

    results = []
    for index, seed in enumerate(seeds):
        masks = {name: posterior.group_mask for name, posterior in bcdl_jax.posteriors(run.params["pruned"][index]).items()}
        round_off = run.by_round_off[index]
        results.append(
            {
                "seed": seed,
                "test_error": {stage: round(float(measure(run.params[stage][index], test)), 4) for stage in STAGES},
                "kept_units": in_order({name: int((mask > 0).sum()) for name, mask in masks.items()}),
                "total_units": in_order({name: mask.size for name, mask in masks.items()}),
                "bits": in_order({name: int(bits) for name, bits in bcdl_jax.layer_bits(run.params["reduced"][index]).items()}),
                "rate": rates(bcdl_jax.rate, index),
                "rate_paper": rates(bcdl_jax.rate_paper, index),
                "seconds": round(run.seconds / len(seeds), 1),
                "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "thresholds": in_order({name: _finite(value) for name, value in run.thresholds[index].items()}),
                "relative_step": run.relative_steps[index],
                "round_off_rule": {
                    "test_error": round(float(measure(round_off, test)), 4),
                    "bits": in_order({name: int(bits) for name, bits in bcdl_jax.layer_bits(round_off).items()}),
                    "rate_paper": _finite(float(bcdl_jax.rate_paper(round_off))),
                },
            }
        )
    return results


def result(experiment: str, method: str, dataset: Dataset, recipe: Recipe, command: str, runs: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The content of result.json."""
    summary = dataset.summary() | ({"notice": dataset.notice} if dataset.notice else {})
    averaged = [{key: run[key] for key in ("test_error", "rate", "rate_paper")} for run in runs]
    return {
        "experiment": experiment,
        "method": method,
        "dataset": summary,
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "seconds": round(seconds, 1),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "runs": runs,
        "mean": _combine(averaged, lambda values: sum(values) / len(values)),
        "range": _combine(averaged, lambda values: [min(values), max(values)]),
    }


def print_table(runs: list[dict[str, Any]], file: Any = None) -> None:
    """A table like the tutorial's: for each seed one line per stage."""
    header = f"{'seed':>4}  {'stage':<26} {'test error %':>12} {'rate':>8} {'paper rate':>10}  {'kept units':<14} {'bits per layer'}"
    print(header, "-" * len(header), sep="\n", file=file)
    for run in runs:
        full, kept = ("-".join(map(str, run[key])) for key in ("total_units", "kept_units"))
        rows = [
            ("after training", run["test_error"]["trained"], 1.0, 1.0, full, [32] * len(run["bits"])),
            ("after pruning", run["test_error"]["pruned"], run["rate"]["pruned"], run["rate_paper"]["pruned"], kept, [32] * len(run["bits"])),
            ("after precision reduction", run["test_error"]["reduced"], run["rate"]["reduced"], run["rate_paper"]["reduced"], kept, run["bits"]),
            ("  by the paper's rule", run["round_off_rule"]["test_error"], None, run["round_off_rule"]["rate_paper"], kept, run["round_off_rule"]["bits"]),
        ]
        for stage, error, rate, rate_paper, units, bits in rows:
            print(
                f"{run['seed']:>4}  {stage:<26} {error:>12.2f} {_times(rate):>8} {_times(rate_paper):>10}  {units:<14} {'-'.join(map(str, bits))}",
                file=file,
            )
    errors = {stage: np.array([run["test_error"][stage] for run in runs]) for stage in STAGES}
    print(
        "mean test error over seeds: " + ", ".join(f"{stage} {values.mean():.2f} % ({values.min():.2f} to {values.max():.2f})" for stage, values in errors.items()),
        file=file,
    )


def write_params(out: Path, run: Run, seeds: Sequence[int]) -> list[str]:
    """Writes the parameters of every stage and seed; returns the names of the files."""
    names = []
    for stage in STAGES:
        for index, seed in enumerate(seeds):
            names.append(params_file(stage, seed))
            files.write_arrays(out / names[-1], run.params[stage][index])
    return names


def params_file(stage: str, seed: int) -> str:
    return f"{stage}_seed{seed}.npz"


def _times(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}x"


def _on_device(split: Split) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(split.images), jnp.asarray(split.labels)


def _snapshot(epoch: int, stacked_params: Any) -> Snapshot:
    kernels, rates = jax.device_get(_snapshot_arrays(stacked_params))
    return Snapshot(epoch, kernels, rates)


@jax.jit
def _snapshot_arrays(stacked_params: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    params = bcdl_jax.unstack(stacked_params, 0)
    layers = bcdl_jax.posteriors(params).items()
    return {name: layer.kernel_moments()[0].astype(jnp.float16) for name, layer in layers}, bcdl_jax.log_dropout_rates(params)


def _machine() -> str:
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{platform.system()} {platform.machine()}, {len(jax.devices())} x {devices}, {_cores()} CPU cores"


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finite(value: float) -> float | None:
    """JSON has no infinity: the rate of a net with nothing left, or the threshold of a layer that keeps everything, is null."""
    return value if math.isfinite(value) else None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return _finite(value) if isinstance(value, float) else value


def _combine(trees: list[Any], combine: Callable[[list[float]], Any]) -> Any:
    if isinstance(trees[0], dict):
        return {key: _combine([tree[key] for tree in trees], combine) for key in trees[0]}
    values = [value for value in trees if value is not None]
    return combine(values) if values else None
