"""The road of every experiment: train many seeds, prune, fine-tune, reduce precision, score, write the files."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

import bcdl_jax
from experiments.io import files
from experiments.io.checkpoints import Checkpoints
from experiments.io.data import Dataset, Split, pieces
from experiments.io.logs import Logs, process_memory, profile
from experiments.pipeline import uncertainty
from experiments.pipeline.augmentation import augmented
from experiments.pipeline.recipe import Recipe, Training
from experiments.runtime import devices, interruption, startup
from experiments.runtime.errors import UserError

PRETRAINED, STAGES = "pretrained", ("trained", "pruned", "reduced")
RESULT, INTERRUPTED = "result.json", "interrupted.npz"
_MOST_FRAMES = 60
_SHRINKING_IMAGES = 500
# Weights of a layer of which pictures are made; every frame of them stays in memory.
_LARGEST_DRAWN = 500_000


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One frame of the pictures: an epoch, and by layer name the mean kernels, but for the largest, and the scores of the groups, all of one seed.

    Where weights are pruned one by one, a kernel is zero where they would be at the default threshold, and a group's score is its lowest.
    """

    epoch: int
    kernels: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that was made. Lists hold an entry per seed; the snapshots are those of the first seed.

    ``pretrained`` holds the plain twin's params, None where training started from scratch. Thresholds, relative steps and what the paper's
    rule gives are there for variational networks only; the params of others have the form of sparse variational dropout.
    """

    pretrained: list[Any] | None
    params: dict[str, list[Any]]
    thresholds: list[dict[str, float]] | None
    relative_steps: list[float] | None
    by_round_off: list[Any] | None
    failures: list[str | None]
    files: list[Path]
    snapshots: list[Snapshot]
    seconds: float
    resumed: int


def bar(total: int, title: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar with the time left, on a terminal only."""
    hidden = not sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=title, unit=unit, disable=hidden, dynamic_ncols=True)


class Progress:
    """A progress bar over the epochs of all seeds; messages go above it."""

    def __init__(self, total: int, title: str, done: int = 0):
        self._bar = bar(total, title, "epoch", done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def write(self, message: str) -> None:
        self._bar.write(message)
        sys.stdout.flush()

    def say(self, state: str) -> None:
        """One epoch more, and how things stand."""
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update()

    def show(self, report: bcdl_jax.train.EnsembleReport) -> None:
        for message in report.messages:
            self._bar.write(f"warning: {message}", file=sys.stderr)
        for piece in report.news:
            self._bar.write(piece, file=sys.stderr)
        kept = " ".join("-".join(map(str, seed.kept.values())) for seed in report.reports)
        error = " ".join(f"{seed.validation_error:.2f}" for seed in report.reports)
        self.say(f"kept {kept}, validation error {error} %")


def error_percent(model: nn.Module, params: Any, data: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Share of wrong predictions at the mean weights, in percent."""
    images, labels = data
    logits: Any = model.apply({"params": params}, images)
    wrong = jnp.argmax(logits, axis=-1) != labels
    return 100 * jnp.mean(wrong)


def error_in_pieces(model: nn.Module) -> Callable[[Any, tuple[jax.Array, jax.Array]], float]:
    """``error_percent`` as a function of params and data that takes the images in pieces; not to be compiled."""
    measure = jax.jit(functools.partial(error_percent, model))

    def in_pieces(params: Any, data: tuple[jax.Array, jax.Array]) -> float:
        parts = [tuple(array[piece] for array in data) for piece in pieces(len(data[1]))]
        return sum(len(part[1]) * float(measure(params, part)) for part in parts) / len(data[1])

    return in_pieces


def measure_change(
    model: nn.Module, images: jax.Array, masked: Any = None
) -> Callable[[Any], Callable[[Any], jax.Array]]:
    """``measure_change(model, images)(before)(after)``: KL(predictions of before || predictions of after), at the mean weights.

    A scalar, in nats per example. Thresholds and rounding are chosen by it. It grows smoothly with the damage, while the error
    moves in steps of whole images, so that on a few thousand of them luck would choose; and it sees damage that the cross-entropy
    of an overconfident network hides.

    Args:
      model: variational.
      images: to predict.
      masked: params whose masked groups are masked in all that is measured too: those are left out, which is faster. Nothing is where
        weights are pruned one by one: a unit that has lost all of its inputs is constant, and would be folded into what reads it, which may
        be pruned later.
    """

    def logits(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    predict: Callable[..., Any] = logits
    report = None
    if masked is not None and not any(layer.prunes_weights for layer in bcdl_jax.variational_layers(masked).values()):
        predict, _, report = bcdl_jax.shrink(logits, masked, images[:2])

    @jax.jit
    def log_probabilities(params: Any, images: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(predict(params, images))

    @jax.jit
    def difference(old: jax.Array, params: Any, images: jax.Array) -> jax.Array:
        new = log_probabilities(params, images)
        return jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=-1))

    def shrunk(params: Any) -> Any:
        return params if report is None else bcdl_jax.cut(params, report)

    def from_before(params: Any) -> Callable[[Any], jax.Array]:
        old = log_probabilities(shrunk(params), images)
        return lambda after: difference(old, shrunk(after), images)

    return from_before


def sampled_cross_entropy(
    model: nn.Module,
    params: Any,
    batch: tuple[jax.Array, jax.Array],
    key: jax.Array,
    *,
    mirror: bool = False,
    shift: int = 0,
) -> jax.Array:
    """Mean cross-entropy of a batch in nats, with weights sampled per example, of images changed at random, see ``augmented``."""
    images, labels = batch
    images = augmented(images, key, mirror=mirror, shift=shift)
    logits: Any = model.apply({"params": params}, images, deterministic=False, rngs={"noise": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compress(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    chain: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    logs: Logs,
    profile_steps: int,
    thresholds: dict[str, float] | None,
    pretrained: Sequence[dict[str, np.ndarray]] | None,
    checkpoints: Checkpoints,
    mesh: Mesh | None = None,
) -> Run:
    """Trains, prunes, fine-tunes and reduces the precision of one net per seed.

    Args:
      model: variational, called with images of uint8.
      dataset: only its training and validation parts are used.
      recipe: see ``Recipe``.
      chain: layer names in the order of the data flow.
      seeds: one run each, all trained at once.
      out: directory for the parameters; where Ctrl-C leaves the last ones.
      logs: where the metrics go.
      profile_steps: of how many training steps to write a profile; 0 for none.
      thresholds: by layer name, or None to choose them on the validation data.
      pretrained: per seed, weights to start from, by "layer/kernel" and "layer/bias"; None starts from scratch.
      checkpoints: of this run; what it has taken up is not trained again, and the rest follows from it.
      mesh: of the devices to train on, from ``bcdl_jax.train.make_mesh``; None for one device. The training examples must be a multiple of
        them, and the recipe must not shrink. Every process of the mesh must call this, with an ``out`` of its own.

    Raises:
      UserError: pretrained weights that do not fit the model, or seeds that were all stopped by values that are not
        finite.
    """
    start = time.perf_counter()
    validation = on_device(dataset.validation)
    train, held_out = _placed(dataset, validation, mesh)
    run_phase = functools.partial(
        _run_phase, model, recipe, train, held_out, chain, seeds, out, logs, thresholds, checkpoints, mesh
    )
    fresh = functools.partial(_fresh_params, model, validation[0][:1], recipe.balanced)
    weights = None if pretrained is None else bcdl_jax.train.stack_seeds(pretrained)
    params, failures, snapshots = run_phase("train", fresh, weights, first_epoch=1, profile_steps=profile_steps)
    jax.clear_caches()  # the compiled phases take most of the memory
    startup.release_memory()
    trained = [bcdl_jax.train.select_seed(params, index) for index in range(len(seeds))]
    write_params(out, "trained", trained, seeds)
    if all(failures):
        checkpoints.remove()  # the same would come of them again
        raise UserError(f"No seed could be trained to the end; what they reached is in {out}. {failures[0]}")
    chosen = [
        thresholds
        or bcdl_jax.choose_thresholds(
            net,
            measure_change(model, validation[0], None if recipe.max_shrinking_change is None else net)(net),
            max_increase=recipe.max_pruning_change,
            chain=chain,
            score=score_of(recipe),
        )
        for net in tqdm(trained, desc="choose thresholds", unit="seed", disable=not sys.stderr.isatty())
    ]
    pruned = [
        bcdl_jax.prune(net, by_layer, chain, score_of(recipe)) for net, by_layer in zip(trained, chosen, strict=True)
    ]
    if recipe.fine_tune_epochs:
        stacked = bcdl_jax.train.stack_seeds(pruned)
        params, later_failures, _ = run_phase("fine_tune", _as_they_are, stacked, first_epoch=recipe.epochs + 1)
        failures = [first or later for first, later in zip(failures, later_failures, strict=True)]
        jax.clear_caches()
        startup.release_memory()
        pruned = [bcdl_jax.train.select_seed(params, index) for index in range(len(seeds))]
    write_params(out, "pruned", pruned, seeds)
    change_from = measure_change(model, validation[0])
    steps = [
        bcdl_jax.choose_relative_step(
            net,
            change_from(net),
            max_increase=recipe.max_rounding_change,
        )
        for net in pruned
    ]
    reduced = [bcdl_jax.reduce_precision(net, step) for net, step in zip(pruned, steps, strict=True)]
    write_params(out, "reduced", reduced, seeds)
    compressed = [out / compressed_file(seed) for seed in seeds]
    for path, net in zip(compressed, reduced, strict=True):
        bcdl_jax.save(path, net)
    return Run(
        pretrained=None if pretrained is None else [flax.traverse_util.unflatten_dict(net, "/") for net in pretrained],
        params={"trained": trained, "pruned": pruned, "reduced": reduced},
        thresholds=chosen,
        relative_steps=steps,
        by_round_off=[bcdl_jax.compression.reduce_precision_by_round_off(net) for net in pruned],
        failures=failures,
        files=compressed,
        snapshots=snapshots,
        seconds=checkpoints.earlier_seconds + time.perf_counter() - start,
        resumed=checkpoints.resumed,
    )


def _fresh_params(
    model: nn.Module, images: jax.Array, balanced: bool, seed: jax.Array, weights: dict[str, jax.Array] | None
) -> Any:
    """Start values of one seed, from trained weights if there are any."""
    params = model.init(jax.random.key(seed), images)["params"]
    if weights is not None:
        params = bcdl_jax.from_trained(params, weights)
    return bcdl_jax.balance_scales(params) if balanced else params


def _as_they_are(_: jax.Array, params: Any) -> Any:
    return params


def _run_phase(
    model: nn.Module,
    recipe: Recipe,
    train: tuple[jax.Array, jax.Array],
    validation: tuple[jax.Array, jax.Array],
    chain: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    logs: Logs,
    thresholds: dict[str, float] | None,
    checkpoints: Checkpoints,
    mesh: Mesh | None,
    phase: str,
    start_params: Callable[[jax.Array, Any], Any],
    given: Any,
    *,
    first_epoch: int,
    profile_steps: int = 0,
) -> tuple[Any, list[str | None], list[Snapshot]]:
    """One phase of training, "train" or "fine_tune", of all seeds, from where its last checkpoint stands.

    ``start_params(seed, given)`` are the params of one seed that the phase starts from; ``given`` is stacked.

    Returns:
      Stacked params, per seed the sentence that says why it was stopped, or None, and the frames of the pictures.

    Raises:
      KeyboardInterrupt: Ctrl-C came, and a checkpoint was written.
      SystemExit: likewise for SIGTERM, with status 143.
    """
    fine_tune = phase == "fine_tune"
    epochs = recipe.fine_tune_epochs if fine_tune else recipe.epochs
    num_examples = len(train[1])
    steps = num_examples // recipe.batch_size
    schedule = (
        recipe.fine_tune_learning_rate
        if fine_tune
        else optax.cosine_decay_schedule(recipe.learning_rate, max(1, epochs * steps))
    )
    factor = recipe.fine_tune_log_variance_factor if fine_tune else recipe.log_variance_factor
    decay = 1 - 1 / max(1, recipe.fine_tune_averaging_epochs * steps)
    averaging = bcdl_jax.train.params_ema(decay) if fine_tune else optax.identity()
    factors = {"log_variance": factor, "scale": recipe.scale_factor}
    optimizer = optax.chain(optax.adam(schedule), bcdl_jax.train.scale_by_kind(factors), averaging)
    kl_weight = (
        recipe.fine_tune_kl_weight
        if fine_tune
        else bcdl_jax.kl_warmup(recipe.warmup_epochs * steps, to=recipe.kl_weight)
    )
    likelihood = functools.partial(sampled_cross_entropy, model, mirror=recipe.mirror, shift=recipe.shift)
    make_step = functools.partial(
        bcdl_jax.train.make_train_step, optimizer=optimizer, num_examples=num_examples, kl_weight=kl_weight
    )
    shrinking = None
    if recipe.max_shrinking_change is not None:
        # The groups are chosen by the time of fine-tuning: then what pruning masked is left out, and no more.
        gone = (
            math.inf
            if fine_tune
            else _what_is_gone(model, recipe.max_shrinking_change, train[0], chain, score_of(recipe))
        )
        # A CPU gains by every channel that goes. An accelerator computes eight as fast as seven, and so fast that compiling a smaller step
        # again and again takes longer than all of the training: there the net shrinks once, when it is fine-tuned.
        on_cpu = jax.default_backend() == "cpu"
        shrinking = bcdl_jax.train.Shrinking(
            likelihood,
            make_step,
            gone,
            chain,
            score=score_of(recipe),
            first=recipe.first_shrinking,
            regular=recipe.regular_shrinking and not fine_tune,
            least_saving=recipe.least_shrinking_saving,
            multiple_of=1 if on_cpu else 8,
            leave_out=on_cpu or fine_tune,
        )

    # It runs once: what the compiler gains from optimising it is far less than what that takes.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    @jax.vmap
    def make_start(seed: jax.Array, given: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), 1 + fine_tune)
        return bcdl_jax.train.create_train_state(start_params(seed, given), optimizer, key)

    given = devices.same_everywhere(given)
    # The families' own thresholds are log dropout rates. What is masked counts in any case.
    for_reports = math.inf if fine_tune or (thresholds is None and recipe.score != "log_dropout_rate") else thresholds
    step = make_step(likelihood)
    how: dict[str, Any] = {"batch_size": recipe.batch_size, "in_turn": recipe.in_turn, "shards": _shards(mesh)}
    with startup.CompileTime() as compile_time, concurrent.futures.ThreadPoolExecutor(1) as thread:
        compiling = None
        # What is taken up again, or has been pruned, may be trained at another size at once.
        if mesh is None and not checkpoints.resumed and (shrinking is None or not fine_tune):
            shapes = jax.eval_shape(make_start, np.array(seeds), given)
            compiling = thread.submit(bcdl_jax.train.compile_ensemble, shapes, train, step=step, **how)
        start = make_start(np.array(seeds), given)
        start = start.replace(params=devices.same_everywhere(start.params))
        if mesh is not None:
            start = bcdl_jax.train.place_state(start, mesh)
        snapshots = [_snapshot(0, start.params, recipe)]
        program = None if compiling is None else compiling.result()
    startup.release_memory()
    every = math.ceil(epochs / (_MOST_FRAMES - 1))
    failures: list[str | None] = [None] * len(seeds)
    restored = checkpoints.restore(phase, start)
    if restored is not None:
        start, failures = restored.state, restored.facts["failures"]
        snapshots = [_snapshot_of(epoch, arrays) for epoch, arrays in sorted(restored.frames.items())]

    def save(complete: bool = False) -> Path | None:
        frames = {} if fine_tune else {snapshot.epoch: _arrays_of(snapshot) for snapshot in snapshots}
        facts = {"failures": failures, "step": int(states.step.max())}
        return checkpoints.save(phase, states, facts=facts, frames=frames, complete=complete)

    if profile_steps:
        _profile(out, step, start, train, profile_steps, recipe, mesh)
    states, done, taken, told = start, int(start.step.max()) // steps, int(start.step.sum()), False
    with (
        Progress(epochs, phase.replace("_", "-"), done) as progress,
        interruption.noted() as stop,
        compile_time,
    ):
        clock, compiled = time.perf_counter(), compile_time.seconds
        watch = startup.FirstStep(stop)
        for states, report in bcdl_jax.train.train_ensemble(
            start,
            train,
            step=step,
            epochs=epochs,
            validation_error=functools.partial(error_percent, model),
            validation_data=validation,
            seeds=seeds,
            first_epoch=first_epoch,
            thresholds=for_reports,
            score=score_of(recipe),
            shrinking=shrinking,
            stop=watch,
            program=program,
            **how,
        ):
            if report is None:
                break
            if not told:
                progress.write(
                    f"{phase.replace('_', '-')}: {watch.sentence() if not fine_tune else ''}{compile_time.sentence()}"
                )
                told = True
            progress.show(report)
            seconds = time.perf_counter() - clock - (compile_time.seconds - compiled)
            seen, taken = (int(states.step.sum()) - taken) * recipe.batch_size, int(states.step.sum())
            reports = [dataclasses.asdict(seed_report) for seed_report in report.reports]
            logs.log_epoch(phase, reports, images_per_second=seen / seconds)
            failures = [seed_report.failure for seed_report in report.reports]
            done = report.reports[0].epoch - first_epoch + 1
            if done % every == 0 or done == epochs:
                snapshots.append(_snapshot(report.reports[0].epoch, states.params, recipe))
            if checkpoints.every and done % checkpoints.every == 0 and done < epochs:
                save()
            if report.news:
                jax.clear_caches()  # a network that has shrunk leaves a hundred megabytes of programs and traces
            if compile_time.seconds > compiled:
                startup.release_memory()
            clock, compiled = time.perf_counter(), compile_time.seconds
        complete = done == epochs or all(failures)
        saved = None
        came = devices.same_facts(stop.signal)  # process 0 decides
        if came or (checkpoints.every and not (restored is not None and restored.complete)):
            saved = save(complete)
        if came == signal.SIGINT:
            files.write_arrays(out / INTERRUPTED, states.params)
            raise KeyboardInterrupt
        if came == signal.SIGTERM:
            advice = "could not be saved" if saved is None else f"is saved in {saved}; --resume goes on from there"
            print(f"\nStopped by SIGTERM; what was trained so far {advice}.", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)
    logs.flush()
    if mesh is not None:
        states = bcdl_jax.train.fetch(states)
    if fine_tune:
        averaged = jax.jit(bcdl_jax.clip_variances)(bcdl_jax.train.averaged_params(states.optimizer_state))
        return averaged, failures, snapshots
    return states.params, failures, snapshots


def score_of(recipe: Recipe) -> bcdl_jax.compression.Score:
    """What the recipe's thresholds are compared with."""
    return getattr(bcdl_jax.compression, recipe.score)


def _what_is_gone(
    model: nn.Module, max_change: float, images: jax.Array, chain: Sequence[str], score: bcdl_jax.compression.Score
) -> Callable[[Any], dict[str, float]]:
    """From params to thresholds of what may be left out in training: the most that hardly changes the predictions on a few images."""
    change_from = measure_change(model, images[:: max(1, len(images) // _SHRINKING_IMAGES)])

    def thresholds(params: Any) -> dict[str, float]:
        return bcdl_jax.choose_thresholds(
            params, change_from(params), max_increase=max_change, chain=chain, score=score
        )

    return thresholds


def _placed(dataset: Dataset, validation: tuple[jax.Array, jax.Array], mesh: Mesh | None) -> tuple[Any, Any]:
    """The training data and the validation data where training takes place: the former in parts, the latter on every device."""
    if mesh is None:
        return on_device(dataset.train), validation
    rows = bcdl_jax.train.process_rows(mesh, len(dataset.train))
    part = dataset.train.images[rows], dataset.train.labels[rows]
    return bcdl_jax.train.place_data(part, mesh, examples=len(dataset.train)), bcdl_jax.train.place_state(
        validation, mesh
    )


def _shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.size


def _profile(out: Path, step: Any, states: Any, train: Any, count: int, recipe: Recipe, mesh: Mesh | None) -> None:
    """Writes a profile of ``count`` training steps, of all seeds at once or, in turn, of the first."""
    train_steps: Any = bcdl_jax.train.make_train_loop(step, batch_size=recipe.batch_size, shards=_shards(mesh))
    if recipe.in_turn:
        states = bcdl_jax.train.select_seed(states, 0)
    else:
        train_steps = bcdl_jax.train.each_seed(train_steps)
    few_steps = jax.jit(train_steps)
    profile(out, lambda: few_steps(states, train, np.int32(count)))


def score(
    model: nn.Module,
    run: Run,
    dataset: Dataset,
    seeds: Sequence[int],
    chain: Sequence[str],
    file_errors: Sequence[float],
) -> list[dict[str, Any]]:
    """Reads the test set, once, and collects the figures of every seed; ``file_errors`` are those of the compressed files."""
    test = on_device(dataset.test)
    measure = error_in_pieces(model)

    def rates(measured: Callable[[Any], jax.Array], index: int) -> dict[str, float | None]:
        return {stage: _finite(float(measured(run.params[stage][index]))) for stage in STAGES[1:]}

    def in_order(by_layer: dict[str, Any]) -> list[Any]:
        return [by_layer[name] for name in chain]

    def by_the_papers_rule(net: Any) -> dict[str, Any]:
        return {
            "test_error": round(float(measure(net, test)), 4),
            "bits": in_order({name: int(bits) for name, bits in bcdl_jax.compression.layer_bits(net).items()}),
            "rate_paper": _finite(float(bcdl_jax.compression.rate_paper(net))),
        }

    probabilities = uncertainty.mean_probabilities(model)

    def qualities(index: int) -> dict[str, dict[str, float]]:
        images, labels = test
        found = {
            "mean": probabilities(run.params["pruned"][index], images),
            "compressed": probabilities(run.params["reduced"][index], images),
        }
        if run.thresholds is not None:
            net, key = run.params["pruned"][index], jax.random.fold_in(jax.random.key(seeds[index]), 5)
            found = {"sampled": uncertainty.sampled_probabilities(model, net, images, key)} | found
        return {
            way: {name: round(float(value), 5) for name, value in uncertainty.quality(predicted, labels).items()}
            for way, predicted in found.items()
        }

    twin: Any = model.clone(family=None)  # type: ignore[call-arg]
    measure_twin = error_in_pieces(twin)
    results = []
    for index, seed in enumerate(seeds):
        errors = {} if run.pretrained is None else {PRETRAINED: measure_twin(run.pretrained[index], test)}
        errors |= {stage: measure(run.params[stage][index], test) for stage in STAGES}
        pruned_layers = bcdl_jax.variational_layers(run.params["pruned"][index])
        masks = {name: layer.group_mask for name, layer in pruned_layers.items()}
        file_bytes = run.files[index].stat().st_size
        _, _, shrunk = bcdl_jax.shrink(
            lambda weights, images: twin.apply({"params": weights}, images),
            bcdl_jax.mean_weights(run.params["reduced"][index]),
            test[0][:2],
        )
        float32_bytes = 4 * sum(
            math.prod(layer.kernel_shape) + (0 if layer.bias_mean is None else layer.bias_mean.size)
            for layer in bcdl_jax.variational_layers(run.params["trained"][index]).values()
        )
        results.append(
            {
                "seed": seed,
                "failure": run.failures[index],
                "test_error": {stage: round(float(error), 4) for stage, error in errors.items()}
                | {"file": round(file_errors[index], 4)},
                "float32_bytes": float32_bytes,
                "shrunk_float32_bytes": 4 * sum(math.prod(leaf.after) for leaf in shrunk.leaves if _is_weight(leaf)),
                "multiply_adds": [count // 2 for count in shrunk.multiply_adds],
                "file_bytes": file_bytes,
                "ratio_file": round(float32_bytes / file_bytes, 2),
                "kept_units": in_order({name: int((mask > 0).sum()) for name, mask in masks.items()}),
                "total_units": in_order({name: mask.size for name, mask in masks.items()}),
                "bits": in_order(
                    {
                        name: int(bits)
                        for name, bits in bcdl_jax.compression.layer_bits(run.params["reduced"][index]).items()
                    }
                ),
                "rate": rates(bcdl_jax.rate, index),
                "rate_paper": rates(bcdl_jax.compression.rate_paper, index)
                | {"maximum": _finite(float(bcdl_jax.compression.rate_paper_maximum(run.params["reduced"][index])))},
                "kept_weights": sum(int(layer.kept_weights()) for layer in pruned_layers.values()),
                "total_weights": sum(math.prod(layer.kernel_shape) for layer in pruned_layers.values()),
                "uncertainty": qualities(index),
                "seconds": round(run.seconds / len(seeds), 1),
                "thresholds": run.thresholds
                and in_order({name: _finite(value) for name, value in run.thresholds[index].items()}),
                "relative_step": run.relative_steps and run.relative_steps[index],
                "round_off_rule": run.by_round_off and by_the_papers_rule(run.by_round_off[index]),
            }
        )
    return results


def result(
    experiment: str,
    method: str,
    dataset: Dataset,
    recipe: Training,
    command: str,
    runs: list[dict[str, Any]],
    seconds: float,
    resumed: int = 0,
    width: float | None = None,
) -> dict[str, Any]:
    """The content of result.json.

    Time is that of all starts of the run, up to the checkpoints that were taken up (``resumed`` times); peak memory is that of
    the last process. Runs share them. ``width`` is that of a VGG.
    """
    runs = [run | {"peak_memory_mb": process_memory()} for run in runs]
    averaged = [
        {
            key: run[key]
            for key in ("test_error", "rate", "rate_paper", "kept_weights", "uncertainty", "file_bytes", "ratio_file")
        }
        for run in runs
        if not run["failure"]
    ]
    return {
        "experiment": experiment,
        "method": method,
        **({} if width is None else {"width": width}),
        "dataset": dataset.summary(),
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "seconds": round(seconds, 1),
        "resumed": resumed,
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "runs": runs,
        "mean": _combine(averaged, lambda values: sum(values) / len(values)) if averaged else None,
        "range": _combine(averaged, lambda values: [min(values), max(values)]) if averaged else None,
    }


def print_table(runs: list[dict[str, Any]], *, plain: bool = False, file: Any = None) -> None:
    """A table like the tutorial's: for each seed one line per stage.

    Args:
      runs: of ``score``.
      plain: whether the stage "trained" is the pre-trained network itself.
      file: where to print, standard output if None.
    """
    header = f"{'seed':>4}  {'stage':<26} {'test error %':>12} {'rate_paper':>10} {'rate':>8}  {'kept units':<14} {'bits per layer'}"
    print(header, "-" * len(header), sep="\n", file=file)
    for run in runs:
        full, kept = ("-".join(map(str, run[key])) for key in ("total_units", "kept_units"))
        rows = [
            *(
                [("after pre-training", run["test_error"][PRETRAINED], None, None, full, [32] * len(run["bits"]))]
                if PRETRAINED in run["test_error"]
                else []
            ),
            *(
                []
                if plain
                else [("after training", run["test_error"]["trained"], 1.0, 1.0, full, [32] * len(run["bits"]))]
            ),
            (
                "after pruning",
                run["test_error"]["pruned"],
                run["rate"]["pruned"],
                run["rate_paper"]["pruned"],
                kept,
                [32] * len(run["bits"]),
            ),
            (
                "after precision reduction",
                run["test_error"]["reduced"],
                run["rate"]["reduced"],
                run["rate_paper"]["reduced"],
                kept,
                run["bits"],
            ),
        ]
        if rule := run["round_off_rule"]:
            rows.append(("  by the paper's rule", rule["test_error"], None, rule["rate_paper"], kept, rule["bits"]))
        for stage, error, rate, rate_paper, units, bits in rows:
            print(
                f"{run['seed']:>4}  {stage:<26} {error:>12.2f} {_times(rate_paper):>10} {_times(rate):>8}  {units:<14} {'-'.join(map(str, bits))}",
                file=file,
            )
    for run in runs:
        shrunk, multiply_adds = run["shrunk_float32_bytes"], run["multiply_adds"]
        print(
            f"seed {run['seed']}: {run['float32_bytes']:,} bytes of float32; shrunk to the kept units {shrunk:,} "
            f"({_times(run['float32_bytes'] / shrunk if shrunk else None)}), multiply-adds {multiply_adds[0]:,} -> {multiply_adds[1]:,}; "
            f"compressed file {run['file_bytes']:,} ({_times(run['ratio_file'])}), decoded from it {run['test_error']['file']:.2f} % error; "
            f"the paper's maximum rate {_times(run['rate_paper']['maximum'])}",
            file=file,
        )
        print(
            "  predictions: "
            + "; ".join(
                f"{way} {values['error']:.2f} % error, {values['nll']:.4f} nats, calibration error {values['ece']:.2f} %"
                for way, values in run["uncertainty"].items()
            ),
            file=file,
        )
    for run in runs:
        if run["failure"]:
            print(f"not in the mean: {run['failure']}", file=file)
    finished = [run for run in runs if not run["failure"]]
    if not finished:
        return
    stages = [stage for stage in finished[0]["test_error"] if not (plain and stage == "trained")]
    errors = {stage: np.array([run["test_error"][stage] for run in finished]) for stage in stages}
    print(
        "mean test error over seeds: "
        + ", ".join(
            f"{stage} {values.mean():.2f} % ({values.min():.2f} to {values.max():.2f})"
            for stage, values in errors.items()
        ),
        file=file,
    )


def _is_weight(leaf: bcdl_jax.shrinking.LeafReport) -> bool:
    return leaf.path.endswith(("/kernel", "/bias"))


def write_params(out: Path, stage: str, params: Sequence[Any], seeds: Sequence[int]) -> None:
    for net, seed in zip(params, seeds, strict=True):
        files.write_arrays(out / params_file(stage, seed), net)


def compressed_file(seed: int | str) -> str:
    return f"compressed_seed{seed}.bcdl"


def params_file(stage: str, seed: int | str) -> str:
    return f"{stage}_seed{seed}.npz"


def _times(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}x"


def on_device(split: Split) -> tuple[jax.Array, jax.Array]:
    """images and labels as JAX arrays."""
    return jnp.asarray(split.images), jnp.asarray(split.labels)


def _arrays_of(snapshot: Snapshot) -> dict[str, np.ndarray]:
    parts = {"kernels": snapshot.kernels, "rates": snapshot.scores}
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def _snapshot_of(epoch: int, arrays: dict[str, np.ndarray]) -> Snapshot:
    parts: dict[str, dict[str, np.ndarray]] = {"kernels": {}, "rates": {}}
    for path, array in arrays.items():
        part, _, name = path.partition("/")
        parts[part][name] = array
    return Snapshot(epoch, parts["kernels"], parts["rates"])


def _snapshot(epoch: int, stacked_params: Any, recipe: Recipe) -> Snapshot:
    kernels, scores = jax.device_get(_snapshot_arrays(stacked_params, score_of(recipe)))
    return Snapshot(epoch, kernels, scores)


@functools.partial(jax.jit, static_argnums=1)
def _snapshot_arrays(
    stacked_params: Any, score: bcdl_jax.compression.Score
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    params = bcdl_jax.train.select_seed(stacked_params, 0)
    layers = bcdl_jax.variational_layers(params).items()
    small = [(name, layer) for name, layer in layers if math.prod(layer.kernel_shape) <= _LARGEST_DRAWN]
    kernels = {name: _kernel_to_draw(layer).astype(jnp.float16) for name, layer in small}
    return kernels, {name: layer.group_scores() if layer.prunes_weights else score(layer) for name, layer in layers}


def _kernel_to_draw(layer: bcdl_jax.Posterior) -> jax.Array:
    kernel = layer.kernel_moments()[0]
    if not layer.prunes_weights:
        return kernel
    return jnp.where(layer.log_dropout_rate() < layer.default_threshold, kernel, 0)


def machine() -> str:
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{platform.system()} {platform.machine()}, {len(jax.devices())} x {devices}, {_cores()} CPU cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finite(value: float) -> float | None:
    """JSON has no infinity: the rate of a net with nothing left, or the threshold of a layer that keeps everything, is null."""
    return value if math.isfinite(value) else None


def _combine(trees: list[Any], combine: Callable[[list[float]], Any]) -> Any:
    if isinstance(trees[0], dict):
        return {key: _combine([tree[key] for tree in trees], combine) for key in trees[0]}
    values = [value for value in trees if value is not None]
    return combine(values) if values else None
