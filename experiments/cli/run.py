"""A run of an experiment, from the command line to the result file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experiments.runtime.timing  # noqa: F401  It records the start of the program.
from experiments.cli.options import adapt, parse
from experiments.io.dataset_table import EMBEDDED
from experiments.pipeline.recipe import Training
from experiments.registry import PLAIN_METHODS, PRIORS, Experiment, is_plain, method_title, title_at_width
from experiments.runtime import caches, devices, memory
from experiments.runtime.command import command_line, reporting_errors
from experiments.runtime.errors import UserError

# Importing JAX takes seconds. Functions import the modules that use JAX, so that --help and errors in the arguments appear at once.
if TYPE_CHECKING:
    import flax.linen as nn

    from experiments.io.data import Dataset
    from experiments.pipeline.context import RunContext, RunNetworks

_PROFILED_STEPS = 5


@reporting_errors()
def main(experiment: Experiment, arguments: list[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    run(experiment, parse(experiment, arguments), command_line(experiment.name, arguments))
    return 0


def run(experiment: Experiment, args: argparse.Namespace, command: str) -> None:
    """Loads the data, pre-trains, compresses, scores, and writes all files. The files of processes but the first are discarded."""
    print(f"{experiment.network.title}: starting ...", flush=True)
    if not args.process_id:
        _run(experiment, args, command)
        return
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        own = {"out": out, "tensorboard": False, "resume": False}
        _run(experiment, argparse.Namespace(**vars(args) | own), command)


@dataclasses.dataclass(frozen=True)
class _Setup:
    """A run before its directory is prepared.

    Attributes:
      dataset: The data.
      recipe: The recipe with the changes of the options.
      model: The network with the family of the method.
      devices: The devices to train on.
      seeds: The seeds.
      width: The width of the network; None where it has one width.
      pretrained: The arrays of --pretrained, or None.
    """

    dataset: Dataset
    recipe: Training
    model: nn.Module
    devices: list[Any]
    seeds: list[int]
    width: float | None
    pretrained: dict[str, Any] | None


def _run(experiment: Experiment, args: argparse.Namespace, command: str) -> None:
    from experiments.io import logs

    start = time.perf_counter()
    setup = _set_up(experiment, args)
    out, checkpoints = _begin(experiment, args, setup)
    _print_plan(experiment, args, setup)
    try:
        with (
            caches.compilation_cache(not args.no_compilation_cache),
            memory.rare_garbage_collection(),
            logs.Logs(out, tensorboard=args.tensorboard) as log,
        ):
            context = _context(experiment, args, setup, out, log, checkpoints)
            nets = _compress(args.method, context, setup.pretrained)
        if not devices.is_writer():
            return
        result = _report(experiment, args, setup, context, nets, command, start)
        checkpoints.remove()
    except KeyboardInterrupt:
        print(f"\nInterrupted; the finished files are in {out}.", file=sys.stderr)
        raise SystemExit(130) from None
    from experiments.report.run_table import print_table

    print_table(result["runs"], plain=not setup.recipe.variational)
    print(f"{result['seconds']:.0f} s, {result['runs'][0]['peak_memory_mb']} MB peak memory; files in {out}")
    if setup.dataset.notice:
        print(setup.dataset.notice)


def _set_up(experiment: Experiment, args: argparse.Namespace) -> _Setup:
    """Checks the directory, joins the other processes, loads the data and builds the network."""
    from experiments.io import checkpoints, data, files, logs
    from experiments.pipeline import context

    # The files of an interrupted run are replaced without --overwrite.
    cut_short = args.resume and checkpoints.are_in(args.out)
    if args.resume and not cut_short and (finished := Path(args.out, context.RESULT)).is_file():
        raise UserError(
            f"--resume is given, but the run in {args.out} is complete, its result is {finished}; leave --resume out, or name another --out."
        )
    files.check_out(args.out, args.overwrite or cut_short)
    if args.tensorboard:
        logs.check_tensorboard()
    devices.join(args)
    chosen = devices.choose(args.devices)
    dataset = data.load(args.dataset, args.data_dir).padded_to(experiment.network.image_shape)
    for sentence in (dataset.notice, dataset.remark):
        if sentence:
            print(sentence, flush=True)
    recipe = adapt(experiment.recipe(dataset.name, args.quick, args.method, args.width), args)
    if recipe.batch_size > len(dataset.train):
        raise UserError(
            f"--batch-size is {recipe.batch_size}; it must be at most the number of training examples, {len(dataset.train)}."
        )
    devices.check_batch_size(recipe.batch_size, len(chosen))
    dataset, recipe = _for_devices(len(chosen), dataset, recipe)
    model = experiment.network.build(_family(args.method, recipe), args.width)
    pretrained = None
    if args.pretrained is not None:
        pretrained = files.read_pretrained(args.pretrained, dataset.name, (EMBEDDED,))
        _check_pretrained(experiment, model, args.pretrained, pretrained)
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    width = args.width if experiment.network.has_widths else None
    return _Setup(dataset, recipe, model, chosen, seeds, width, pretrained)


def _family(method: str, recipe: Any) -> Any:
    """The family of a method. Plain methods have the family in whose form pruned networks are scored."""
    import bcdl_jax

    if recipe.variational:
        return PRIORS[method].family(recipe)
    return bcdl_jax.SparseVariationalDropout()


def _for_devices(count: int, dataset: Dataset, recipe: Training) -> tuple[Dataset, Training]:
    """The data and the recipe for several devices; prints the changes."""
    if rest := len(dataset.train) % count:
        images, labels = dataset.train.images[:-rest], dataset.train.labels[:-rest]
        dataset = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, images=images, labels=labels))
        print(f"The last {rest} training examples are left out, so that {count} devices hold equally many.", flush=True)
    if count > 1 and recipe.max_shrinking_change is not None:
        recipe = recipe.at_full_size()
        print(
            "On several devices the network is trained at full size to the end: it shrinks on one device only.",
            flush=True,
        )
    return dataset, recipe


def _begin(experiment: Experiment, args: argparse.Namespace, setup: _Setup) -> tuple[Path, Any]:
    """Prepares the output directory; returns it and the checkpoints of the run."""
    from experiments.io import checkpoints, logs, run_settings
    from experiments.pipeline import context

    written = [
        context.RESULT,
        context.INTERRUPTED,
        *logs.WRITTEN,
        *(context.params_file(stage, "*") for stage in (context.PRETRAINED, *context.STAGES)),
        context.compressed_file("*"),
        *experiment.pictures,
    ]
    settings = run_settings.settings(
        experiment.name,
        setup.recipe,
        setup.dataset,
        setup.seeds,
        thresholds=args.thresholds,
        pretrained=run_settings.checksum(setup.pretrained),
        method=args.method,
        **{"devices trained on": len(setup.devices)} | ({} if setup.width is None else {"width": setup.width}),
    )
    return checkpoints.begin(
        args.out,
        settings,
        written,
        logs.METRICS,
        every=args.checkpoint_every,
        resume=args.resume,
        overwrite=args.overwrite,
    )


def _print_plan(experiment: Experiment, args: argparse.Namespace, setup: _Setup) -> None:
    dataset, recipe = setup.dataset, setup.recipe
    sizes = f"{len(dataset.train)} training, {len(dataset.validation)} validation and {len(dataset.test)} test images"
    epochs = [recipe.epochs, recipe.fine_tune_epochs]
    if recipe.pretrain_epochs:
        epochs.insert(0, recipe.pretrain_epochs)
    length = f"{' + '.join(map(str, epochs))} epochs, seeds {' '.join(map(str, setup.seeds))}"
    title = title_at_width(experiment.network.title, setup.width)
    print(f"{title}, {method_title(args.method)}, {dataset.name}: {sizes}; {length}", flush=True)


def _context(
    experiment: Experiment, args: argparse.Namespace, setup: _Setup, out: Path, log: Any, checkpoints: Any
) -> RunContext:
    from experiments.pipeline.context import RunContext

    chain = experiment.network.chain
    return RunContext(
        model=setup.model,
        dataset=setup.dataset,
        recipe=setup.recipe,
        chain=chain,
        seeds=setup.seeds,
        out=out,
        logs=log,
        checkpoints=checkpoints,
        mesh=devices.mesh_of(setup.devices),
        thresholds=None if args.thresholds is None else dict(zip(chain, args.thresholds, strict=True)),
        profile_steps=_PROFILED_STEPS if args.profile else 0,
    )


def _compress(method: str, context: RunContext, arrays: dict[str, Any] | None) -> RunNetworks:
    from experiments.pipeline.bayesian import compress
    from experiments.pipeline.plain import compress_plain
    from experiments.pipeline.pretrain import pretrain

    pretrained: Any = None if arrays is None else [arrays] * len(context.seeds)
    if context.recipe.pretrain_epochs:
        dropout = context.recipe.dropout
        learner: Any = context.model.clone(dropout=dropout) if dropout else context.model  # type: ignore[call-arg]
        pretrained = pretrain(dataclasses.replace(context, model=learner))
    if is_plain(method):
        return compress_plain(context, PLAIN_METHODS[method].load(), pretrained)
    return compress(context, pretrained)


def _report(
    experiment: Experiment,
    args: argparse.Namespace,
    setup: _Setup,
    context: RunContext,
    nets: RunNetworks,
    command: str,
    start: float,
) -> dict[str, Any]:
    """Reads the test set, draws the pictures and writes result.json; returns its content."""
    from experiments.io import files
    from experiments.pipeline.context import RESULT
    from experiments.report import result, scoring

    file_errors = scoring.in_fresh_process(nets.files, setup.dataset.name, args.data_dir, setup.width)
    runs = result.score(context, nets, file_errors)
    if context.recipe.variational:
        _draw(experiment, setup, context, nets)
    content = result.result(
        context,
        runs,
        experiment=experiment.name,
        method=args.method,
        command=command,
        seconds=context.checkpoints.earlier_seconds + time.perf_counter() - start,
        width=setup.width,
    )
    files.write_json(context.out / RESULT, content)
    return content


def _draw(experiment: Experiment, setup: _Setup, context: RunContext, nets: RunNetworks) -> None:
    from experiments.report import figures  # matplotlib takes a second to import

    assert nets.thresholds is not None  # A variational run has thresholds.
    figures.draw(
        context.out,
        nets.snapshots,
        {name: nets.thresholds[0][name] for name in context.chain},
        setup.dataset.test.images,
        setup.dataset.test.labels,
        setup.seeds[0],
        experiment.pictures,
        context.recipe.score.replace("_", " "),
    )


def _check_pretrained(experiment: Experiment, model: Any, path: str, arrays: dict[str, Any]) -> None:
    """Raises UserError unless the arrays are exactly those of the plain network."""
    import jax
    import numpy as np

    network = experiment.network
    sample = np.zeros((1, *network.image_shape), np.uint8)
    twin = jax.eval_shape(model.clone(family=None).init, jax.random.key(0), sample)["params"]
    expected = {f"{name}/{part}": twin[name][part].shape for name in network.chain for part in ("kernel", "bias")}
    for name, shape in expected.items():
        if name not in arrays:
            raise UserError(f"--pretrained {path} has no array {name}; it must hold {', '.join(expected)}.")
        if arrays[name].shape != shape:
            raise UserError(f"--pretrained {path} has {name} of shape {arrays[name].shape}; it must be {shape}.")
    if extra := sorted(set(arrays) - set(expected)):
        raise UserError(
            f"--pretrained {path} holds {', '.join(extra)}; allowed are {', '.join(expected)} and trained_on."
        )
