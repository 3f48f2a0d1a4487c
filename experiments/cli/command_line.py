"""The command line that the experiments share: options, checks, and a run from the data to the result file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.io.data import DIGIT_NAMES, EMBEDDED
from experiments.pipeline.recipe import PlainRecipe, Recipe, Training
from experiments.runtime import devices
from experiments.runtime.errors import UserError

if TYPE_CHECKING:
    from experiments.io.data import Dataset

# Of which --profile writes a profile.
_PROFILED_STEPS = 5

METHODS = {
    "gnj": "group normal-Jeffreys prior",
    "ghs": "group horseshoe prior",
    "sparse_vd": "sparse variational dropout",
    "dc": "Deep Compression",
    "dns": "Dynamic Network Surgery",
    "sws": "soft weight-sharing",
}
# Those that compress a trained plain network, weight by weight.
PLAIN_METHODS = ("dc", "dns", "sws")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What one experiment is, as data.

    Attributes:
      name: of its module, its result and its default output directory, such as "lenet300".
      title: the network's name for people.
      model: the class of the network in ``experiments.models``; a name, so that --help need not wait for JAX.
      chain: layer names in the order of the data flow.
      pictures: names of the files that ``figures.draw`` makes of it.
      recipes: how to train, by the method's name, then by the data set's; that of the first for names that are not there.
      quick: what --quick changes in the recipe.
      datasets: names of those it is trained on, the default first.
      image_shape: of the images that the network takes; smaller ones are padded.
      widths: whether the network is there in other widths, see ``models.vgg_widths``.
      full_width: recipes for the paper's width, where they differ, by method and data set.
    """

    name: str
    title: str
    model: str
    chain: tuple[str, ...]
    pictures: tuple[str, ...]
    recipes: Mapping[str, Mapping[str, Training]]
    quick: Mapping[str, Any]
    datasets: tuple[str, ...] = DIGIT_NAMES
    image_shape: tuple[int, int, int] = (28, 28, 1)
    widths: bool = False
    full_width: Mapping[str, Mapping[str, Training]] = dataclasses.field(default_factory=dict)

    def recipe(self, dataset: str, quick: bool = False, method: str = "gnj", width: float = 1) -> Training:
        """The recipe for a data set."""
        chosen = self.recipes[method].get(dataset, self.recipes[method][self.datasets[0]])
        if width == 1:
            chosen = self.full_width.get(method, {}).get(dataset, chosen)
        if not quick:
            return chosen
        names = {field.name for field in dataclasses.fields(chosen)}
        changes = {name: value for name, value in self.quick.items() if name in names}
        # A plain network is compressed only once it has been trained.
        if method in PLAIN_METHODS:
            changes["pretrain_epochs"] = 1
        return dataclasses.replace(chosen, **changes)


def at_width(name: str, width: float | None) -> str:
    """A network's name with its width, where that is not the paper's."""
    return name if width in (None, 1) else f"{name} at {width:g} times the width"


def parse(experiment: Experiment, arguments: list[str] | None) -> argparse.Namespace:
    """Reads and checks the options. Raises UserError for values that are not allowed."""
    parser = _parser(experiment)
    args = parser.parse_args(arguments)
    if args.out is None:
        args.out = f"runs/{experiment.name}" + (f"_{args.method}" if args.method != "gnj" else "")
    _check(experiment, args)
    return args


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    first = experiment.datasets[0]
    full, embedded = experiment.recipe(first), experiment.recipe(EMBEDDED)
    there = f"{first} at full width" if experiment.widths else first
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}",
        description=f"Trains a variational {experiment.title}, prunes it, reduces its precision, and writes a result file, parameters and "
        f"pictures. Without {first} at hand and without a network it runs on 5,000 embedded digits.",
    )
    parser.add_argument(
        "--method",
        default="gnj",
        metavar="|".join(METHODS),
        help="how to compress: " + ", ".join(f"{name}, {title}" for name, title in METHODS.items()) + " (default: gnj)",
    )
    parser.add_argument(
        "--dataset",
        default=first,
        metavar="|".join(experiment.datasets),
        help=f"data set to train on (default: {first})",
    )
    parser.add_argument(
        "--data-dir",
        help="directory of prepared tensorflow-datasets data, or where to prepare it (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help=f"epochs of training before pruning, or while pruning (default: the recipe's, {full.epochs} for gnj on {there})",
    )
    parser.add_argument(
        "--fine-tune-epochs",
        type=int,
        help=f"epochs of fine-tuning after pruning (default: the recipe's, {full.fine_tune_epochs} for gnj on {there})",
    )
    parser.add_argument(
        "--pretrain-epochs",
        type=int,
        metavar="N",
        help="epochs of training the plain network, whose weights the variational training starts from; 0 starts it from scratch "
        f"(default: the recipe's, {full.pretrain_epochs} for gnj on {there})",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"examples per training step (default: {full.batch_size}; {embedded.batch_size} on the embedded digits)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="Adam's step size at the start of training, from where it falls to 0 along a cosine; that of fine-tuning "
        f"changes in proportion (default for gnj: {full.learning_rate} on {there}; {embedded.learning_rate} on the embedded digits)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="one run for each seed (default: 0 1 2)",
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="T",
        help=f"{len(experiment.chain)} scores, one per layer, from which a unit is pruned: log dropout rates, if the recipe names no other"
        " score (default: chosen on the validation data)",
    )
    parser.add_argument(
        "--pretrained",
        metavar="FILE.npz",
        help=f"start from trained weights, in place of a pre-training: arrays {experiment.chain[0]}/kernel, {experiment.chain[0]}/bias and so "
        "on, and the name of their data set in trained_on",
    )
    if experiment.widths:
        parser.add_argument(
            "--width",
            type=float,
            default=1.0,
            metavar="W",
            help="train a network whose layers are so many times as wide, more than 0 and at most 1; 0.25 suits a CPU (default: 1)",
        )
    if getattr(full, "max_shrinking_change", None) is not None:
        parser.add_argument(
            "--no-shrinking",
            action="store_true",
            help="train at full size to the end; otherwise training goes on without the units that are safely gone, which is faster",
        )
    out = f"runs/{experiment.name}"
    parser.add_argument(
        "--out",
        help=f"directory for the files of the run (default: {out}, with _METHOD behind it for a method but gnj)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=5,
        metavar="N",
        help="write a checkpoint after every N epochs; 0 for none but on SIGTERM and Ctrl-C (default: 5)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out that was cut short, from its last checkpoint (dc, dns, sws: from the last net that was pre-trained)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in --out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few epochs and one seed, to see everything work; its figures mean nothing",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the metrics as TensorBoard event files too, into --out/tensorboard",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a JAX profile of a few training steps into --out/profile"
    )
    devices.add_options(parser)
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything anew; otherwise compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or in the user's cache directory",
    )
    return parser


def _check(experiment: Experiment, args: argparse.Namespace) -> None:
    if args.method not in METHODS:
        raise UserError(f"--method is {args.method!r}; allowed are {', '.join(METHODS)}.")
    if args.dataset not in experiment.datasets:
        raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(experiment.datasets)}.")
    if experiment.widths and not 0 < args.width <= 1:
        raise UserError(f"--width is {args.width:g}; it must be more than 0 and at most 1.")
    for name, smallest in (("epochs", 1), ("fine_tune_epochs", 0), ("pretrain_epochs", 0), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}.")
    devices.check(args)
    if args.checkpoint_every < 0:
        raise UserError(f"--checkpoint-every is {args.checkpoint_every}; it must be at least 0.")
    if args.method in PLAIN_METHODS:
        if args.pretrain_epochs == 0 and args.pretrained is None:
            raise UserError(
                f"--pretrain-epochs is 0; --method {args.method} compresses a trained network, so it must be at least 1, or --pretrained given."
            )
        unknown = {
            "--thresholds": args.thresholds is not None,
            "--profile": args.profile,
            "--no-shrinking": getattr(args, "no_shrinking", False),
        }
        for name, given in unknown.items():
            if given:
                raise UserError(f"{name} is given; --method {args.method} has none, it must be left out.")
        for name, value in (("--devices", args.devices), ("--num-processes", args.num_processes)):
            if value not in (None, 1):
                raise UserError(f"{name} is {value}; with --method {args.method} it must be 1.")
    if args.pretrained is not None and args.pretrain_epochs:
        raise UserError(
            "--pretrained and --pretrain-epochs exclude each other: the file takes the place of the pre-training."
        )
    if args.learning_rate is not None and not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning-rate is {args.learning_rate}; it must be a positive number.")
    if args.thresholds is not None and len(args.thresholds) != len(experiment.chain):
        raise UserError(
            f"--thresholds has {len(args.thresholds)} values; it must have {len(experiment.chain)}, one per layer."
        )
    if args.thresholds is not None and any(value != value for value in args.thresholds):
        raise UserError("--thresholds holds a value that is not a number.")
    if args.seeds is not None and len(set(args.seeds)) != len(args.seeds):
        raise UserError(f"--seeds names a seed twice: {' '.join(map(str, args.seeds))}; each may be named once.")
    for seed in args.seeds or ():
        if not 0 <= seed < 2**31:
            raise UserError(f"--seeds holds {seed}; a seed must be at least 0 and less than 2147483648.")


def run(experiment: Experiment, args: argparse.Namespace, command: str) -> None:
    """Loads the data, pre-trains, compresses, scores, and writes all files; those of processes but the first are thrown away."""
    print(f"{experiment.title}: starting ...", flush=True)
    if not args.process_id:
        _run(experiment, args, command)
        return
    with tempfile.TemporaryDirectory() as out, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        _run(
            experiment, argparse.Namespace(**vars(args) | {"out": out, "tensorboard": False, "resume": False}), command
        )


def _run(experiment: Experiment, args: argparse.Namespace, command: str) -> None:
    # Imported late, so that --help and bad arguments are answered at once.
    from experiments import score
    from experiments.io import checkpoints, data, files, logs
    from experiments.networks import models
    from experiments.pipeline import bayesian as compress
    from experiments.pipeline.plain import compress_plain
    from experiments.pipeline.pretrain import pretrain
    from experiments.runtime import startup

    start = time.perf_counter()
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    # Where a run was cut short, its files give way without --overwrite.
    cut_short = args.resume and checkpoints.are_in(args.out)
    if args.resume and not cut_short and (finished := Path(args.out, compress.RESULT)).is_file():
        raise UserError(
            f"--resume is given, but the run in {args.out} is complete, its result is {finished}; leave --resume out, or name another --out."
        )
    files.check_out(args.out, args.overwrite or cut_short)
    if args.tensorboard:
        logs.check_tensorboard()
    devices.join(args)
    chosen = devices.choose(args.devices)
    dataset = data.load(args.dataset, args.data_dir).padded_to(experiment.image_shape)
    for sentence in (dataset.notice, dataset.remark):
        if sentence:
            print(sentence, flush=True)
    settings = adapt(experiment.recipe(dataset.name, args.quick, args.method, getattr(args, "width", 1)), args)
    if settings.batch_size > len(dataset.train):
        raise UserError(
            f"--batch-size is {settings.batch_size}; it must be at most the number of training examples, {len(dataset.train)}."
        )
    devices.check_batch_size(settings.batch_size, len(chosen))
    dataset, settings = _adapt_to(len(chosen), dataset, settings)
    width = args.width if experiment.widths else None
    family = models.family(args.method, settings)
    model = getattr(models, experiment.model)(family) if width is None else models.vgg(family, width)
    pretrained, arrays = None, None
    if args.pretrained is not None:
        arrays = files.read_pretrained(args.pretrained, dataset.name, (EMBEDDED,))
        _check_pretrained(experiment, model, args.pretrained, arrays)
        pretrained = [arrays] * len(seeds)
    chain = experiment.chain
    thresholds = None if args.thresholds is None else dict(zip(chain, args.thresholds, strict=True))
    stages = (compress.PRETRAINED, *compress.STAGES)
    params_files = [compress.params_file(stage, "*") for stage in stages]
    compressed_files = compress.compressed_file("*")
    written = [
        compress.RESULT,
        compress.INTERRUPTED,
        *logs.WRITTEN,
        *params_files,
        compressed_files,
        *experiment.pictures,
    ]
    run_settings = checkpoints.settings(
        experiment.name,
        settings,
        dataset,
        seeds,
        thresholds=args.thresholds,
        pretrained=checkpoints.checksum(arrays),
        method=args.method,
        **{"devices trained on": len(chosen)} | ({} if width is None else {"width": width}),
    )
    out, kept = checkpoints.begin(
        args.out, run_settings, written, logs.METRICS, args.checkpoint_every, args.resume, args.overwrite
    )

    sizes = f"{len(dataset.train)} to train on, {len(dataset.validation)} to choose on, {len(dataset.test)} to test on"
    epochs = [settings.epochs, settings.fine_tune_epochs]
    if settings.pretrain_epochs:
        epochs.insert(0, settings.pretrain_epochs)
    length = f"{' + '.join(map(str, epochs))} epochs, seeds {' '.join(map(str, seeds))}"
    title = at_width(experiment.title, width)
    print(f"{title}, {METHODS[args.method]}, {dataset.name}: {sizes}; {length}", flush=True)
    try:
        with (
            startup.compilation_cache(not args.no_compilation_cache),
            startup.rare_garbage_collection(),
            logs.Logs(out, tensorboard=args.tensorboard) as log,
        ):
            if settings.pretrain_epochs:
                dropout = getattr(settings, "dropout", 0)
                learner = model.clone(dropout=dropout) if dropout else model  # type: ignore[call-arg]
                pretrained = pretrain(learner, dataset, settings, seeds=seeds, out=out, logs=log, checkpoints=kept)
            shared: dict[str, Any] = {"chain": chain, "seeds": seeds, "out": out, "logs": log, "pretrained": pretrained}
            if isinstance(settings, PlainRecipe):
                compressed = compress_plain(args.method, model, dataset, settings, **shared)
            else:
                assert isinstance(settings, Recipe)
                compressed = compress.compress(
                    model,
                    dataset,
                    settings,
                    **shared,
                    profile_steps=_PROFILED_STEPS if args.profile else 0,
                    thresholds=thresholds,
                    checkpoints=kept,
                    mesh=devices.mesh_of(chosen),
                )
        if not devices.is_writer():
            return
        file_errors = score.in_fresh_process(compressed.files, dataset.name, args.data_dir, width)
        runs = compress.score(model, compressed, dataset, seeds, chain, file_errors)
        if compressed.thresholds is not None and isinstance(settings, Recipe):
            first_thresholds = {name: compressed.thresholds[0][name] for name in chain}
            from experiments.report import figures

            images, labels = dataset.test.images, dataset.test.labels
            figures.draw(
                out,
                compressed.snapshots,
                first_thresholds,
                images,
                labels,
                seeds[0],
                experiment.pictures,
                settings.score.replace("_", " "),
            )
        result = compress.result(
            experiment.name,
            args.method,
            dataset,
            settings,
            command,
            runs,
            kept.earlier_seconds + time.perf_counter() - start,
            kept.resumed,
            width,
        )
        files.write_json(out / compress.RESULT, result)
        kept.remove()
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was finished so far is in {out}.", file=sys.stderr)
        raise SystemExit(130) from None
    compress.print_table(runs, plain=args.method in PLAIN_METHODS)
    print(f"{result['seconds']:.0f} s, {result['runs'][0]['peak_memory_mb']} MB peak memory; files in {out}")
    if dataset.notice:
        print(dataset.notice)


def _adapt_to(count: int, dataset: Dataset, settings: Training) -> tuple[Dataset, Training]:
    """The data and the recipe as several devices need them, with a word on what changes."""
    if rest := len(dataset.train) % count:
        images, labels = dataset.train.images[:-rest], dataset.train.labels[:-rest]
        dataset = dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, images=images, labels=labels))
        print(f"The last {rest} training examples are left out, so that {count} devices hold equally many.", flush=True)
    if count > 1 and isinstance(settings, Recipe) and settings.max_shrinking_change is not None:
        settings = dataclasses.replace(settings, max_shrinking_change=None)
        print(
            "On several devices the network is trained at full size to the end: only on one does it shrink.", flush=True
        )
    return dataset, settings


def adapt(settings: Training, args: argparse.Namespace) -> Training:
    """The recipe with what the command line changes; the KL warm-up keeps its share of the epochs."""
    names = ("epochs", "fine_tune_epochs", "pretrain_epochs", "batch_size", "learning_rate")
    given = {name: getattr(args, name) for name in names}
    if args.pretrained is not None:
        given["pretrain_epochs"] = 0
    if args.learning_rate is not None:
        ratio = settings.fine_tune_learning_rate / settings.learning_rate
        given["fine_tune_learning_rate"] = ratio * args.learning_rate
    if args.epochs is not None and isinstance(settings, Recipe):
        given["warmup_epochs"] = round(settings.warmup_epochs * args.epochs / settings.epochs)
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})
    if isinstance(settings, Recipe) and getattr(args, "no_shrinking", False):
        settings = dataclasses.replace(settings, max_shrinking_change=None)
    return settings


def _check_pretrained(experiment: Experiment, model: Any, path: str, arrays: dict[str, Any]) -> None:
    """Raises UserError unless the arrays are just those of the plain network."""
    import jax
    import numpy as np

    sample = np.zeros((1, *experiment.image_shape), np.uint8)
    twin = jax.eval_shape(model.clone(family=None).init, jax.random.key(0), sample)["params"]
    expected = {f"{name}/{part}": twin[name][part].shape for name in experiment.chain for part in ("kernel", "bias")}
    for name, shape in expected.items():
        if name not in arrays:
            raise UserError(f"--pretrained {path} has no array {name}; it must hold {', '.join(expected)}.")
        if arrays[name].shape != shape:
            raise UserError(f"--pretrained {path} has {name} of shape {arrays[name].shape}; it must be {shape}.")
    if extra := sorted(set(arrays) - set(expected)):
        raise UserError(
            f"--pretrained {path} holds {', '.join(extra)}; allowed are {', '.join(expected)} and trained_on."
        )


def main(experiment: Experiment, arguments: list[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        run(
            experiment,
            parse(experiment, arguments),
            shlex.join(["python", "-m", f"experiments.{experiment.name}", *given]),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0
