"""The options that the experiments share: their texts, their checks, and the changes of the recipe that they make."""

from __future__ import annotations

import argparse
import dataclasses

from experiments.io.dataset_table import EMBEDDED
from experiments.pipeline.recipe import Training
from experiments.registry import Experiment, is_plain, method_names, method_title
from experiments.registry.experiments import DEFAULT_METHOD
from experiments.runtime import devices
from experiments.runtime.errors import UserError

_CHECKPOINT_EVERY = 5


def parse(experiment: Experiment, arguments: list[str] | None) -> argparse.Namespace:
    """Reads and checks the options. Raises UserError for values that are not allowed."""
    args = _parser(experiment).parse_args(arguments)
    if args.out is None:
        args.out = f"runs/{experiment.name}" + (f"_{args.method}" if args.method != DEFAULT_METHOD else "")
    _check_choices(experiment, args)
    _check_numbers(experiment, args)
    devices.check(args)
    if is_plain(args.method):
        _check_plain(args)
    return args


def adapt(recipe: Training, args: argparse.Namespace) -> Training:
    """The recipe with the changes of the options. The KL warm-up keeps its share of the epochs."""
    names = ("epochs", "fine_tune_epochs", "pretrain_epochs", "batch_size", "learning_rate")
    given = {name: getattr(args, name) for name in names}
    if args.pretrained is not None:
        given["pretrain_epochs"] = 0
    if args.learning_rate is not None:
        ratio = recipe.fine_tune_learning_rate / recipe.learning_rate
        given["fine_tune_learning_rate"] = ratio * args.learning_rate
    if args.epochs is not None and recipe.variational:
        given["warmup_epochs"] = round(recipe.warmup_epochs * args.epochs / recipe.epochs)
    recipe = dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
    return recipe.at_full_size() if args.no_shrinking else recipe


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    first, title = experiment.datasets[0], experiment.network.title
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment.name}",
        description=f"Trains a variational {title}, prunes it, reduces its precision, and writes a result file, parameters and "
        f"pictures. Without {first} and without an internet connection it runs on 5,000 embedded digits.",
    )
    _add_choices(parser, experiment)
    _add_training(parser, experiment)
    _add_start(parser, experiment)
    _add_files(parser, experiment)
    devices.add_options(parser)
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything anew; otherwise compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or in the user's cache directory",
    )
    return parser


def _add_choices(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    titles = ", ".join(f"{name}, {method_title(name)}" for name in method_names())
    parser.add_argument(
        "--method",
        default=DEFAULT_METHOD,
        metavar="|".join(method_names()),
        help=f"compression method: {titles} (default: {DEFAULT_METHOD})",
    )
    parser.add_argument(
        "--dataset",
        default=experiment.datasets[0],
        metavar="|".join(experiment.datasets),
        help=f"data set to train on (default: {experiment.datasets[0]})",
    )
    parser.add_argument(
        "--data-dir",
        help="directory of prepared tensorflow-datasets data, or where to prepare it (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="one run for each seed (default: 0 1 2)")
    parser.set_defaults(width=1.0)
    if experiment.network.has_widths:
        parser.add_argument(
            "--width",
            type=float,
            metavar="W",
            help="width of the layers as a factor of the paper's, more than 0 and at most 1; 0.25 suits a CPU (default: 1)",
        )


def _add_training(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    first = experiment.datasets[0]
    full, embedded = experiment.recipe(first), experiment.recipe(EMBEDDED)
    where = f"{first} at full width" if experiment.network.has_widths else first
    parser.add_argument(
        "--epochs",
        type=int,
        help=f"epochs of training before or during pruning (default: the recipe's, {full.epochs} for gnj on {where})",
    )
    parser.add_argument(
        "--fine-tune-epochs",
        type=int,
        help=f"epochs of fine-tuning after pruning (default: the recipe's, {full.fine_tune_epochs} for gnj on {where})",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"examples per training step (default: {full.batch_size}; {embedded.batch_size} on the embedded digits)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="Adam's step size at the start of training, which falls to 0 along a cosine; the step size of fine-tuning "
        f"changes in proportion (default for gnj: {full.learning_rate} on {where}; {embedded.learning_rate} on the embedded digits)",
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="T",
        help=f"{len(experiment.network.chain)} scores, one per layer, from which a unit is pruned: log dropout rates, unless the recipe names "
        "another score (default: chosen on the validation data)",
    )
    parser.set_defaults(no_shrinking=False)
    if full.max_shrinking_change is not None:
        parser.add_argument(
            "--no-shrinking",
            action="store_true",
            help="train at full size to the end; otherwise training leaves out the units that can be pruned, which is faster",
        )


def _add_start(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    first, layer = experiment.datasets[0], experiment.network.chain[0]
    full = experiment.recipe(first)
    where = f"{first} at full width" if experiment.network.has_widths else first
    parser.add_argument(
        "--pretrain-epochs",
        type=int,
        metavar="N",
        help="epochs of training the plain network, from whose weights the variational training starts; 0 to start from scratch "
        f"(default: the recipe's, {full.pretrain_epochs} for gnj on {where})",
    )
    parser.add_argument(
        "--pretrained",
        metavar="FILE.npz",
        help=f"trained weights to start from, in place of a pre-training: arrays {layer}/kernel, {layer}/bias and so "
        "on, and the name of their data set in trained_on",
    )


def _add_files(parser: argparse.ArgumentParser, experiment: Experiment) -> None:
    parser.add_argument(
        "--out",
        help=f"directory for the files of the run (default: runs/{experiment.name} for {DEFAULT_METHOD}, runs/{experiment.name}_METHOD for other methods)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=_CHECKPOINT_EVERY,
        metavar="N",
        help=f"write a checkpoint after every N epochs; 0: only after SIGTERM or Ctrl-C (default: {_CHECKPOINT_EVERY})",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="resume the interrupted run in --out from its last checkpoint (a plain method: from its pre-training)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in --out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few epochs and one seed, to see everything work; the figures mean nothing",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the metrics as TensorBoard event files, into --out/tensorboard",
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a JAX profile of a few training steps into --out/profile"
    )


def _check_choices(experiment: Experiment, args: argparse.Namespace) -> None:
    if args.method not in method_names():
        raise UserError(f"--method is {args.method!r}; allowed are {', '.join(method_names())}.")
    if args.dataset not in experiment.datasets:
        raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(experiment.datasets)}.")
    if args.pretrained is not None and args.pretrain_epochs:
        raise UserError(
            "--pretrained and --pretrain-epochs exclude each other: the file takes the place of the pre-training."
        )
    if args.seeds is not None and len(set(args.seeds)) != len(args.seeds):
        raise UserError(f"--seeds names a seed twice: {' '.join(map(str, args.seeds))}; each may be named once.")
    for seed in args.seeds or ():
        if not 0 <= seed < 2**31:
            raise UserError(f"--seeds holds {seed}; a seed must be at least 0 and less than 2147483648.")


def _check_numbers(experiment: Experiment, args: argparse.Namespace) -> None:
    if not 0 < args.width <= 1:
        raise UserError(f"--width is {args.width:g}; it must be more than 0 and at most 1.")
    limits = {"epochs": 1, "fine_tune_epochs": 0, "pretrain_epochs": 0, "batch_size": 1, "checkpoint_every": 0}
    for name, smallest in limits.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}.")
    if args.learning_rate is not None and not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning-rate is {args.learning_rate}; it must be a positive number.")
    count = len(experiment.network.chain)
    if args.thresholds is not None and len(args.thresholds) != count:
        raise UserError(f"--thresholds has {len(args.thresholds)} values; it must have {count}, one per layer.")
    if args.thresholds is not None and any(value != value for value in args.thresholds):
        raise UserError("--thresholds holds a value that is not a number.")


def _check_plain(args: argparse.Namespace) -> None:
    if args.pretrain_epochs == 0 and args.pretrained is None:
        raise UserError(
            f"--pretrain-epochs is 0; --method {args.method} compresses a trained network; give at least 1 epoch, or give --pretrained."
        )
    unknown = {
        "--thresholds": args.thresholds is not None,
        "--profile": args.profile,
        "--no-shrinking": args.no_shrinking,
    }
    for name, given in unknown.items():
        if given:
            raise UserError(f"{name} cannot be used with --method {args.method}; leave it out.")
    for name, value in (("--devices", args.devices), ("--num-processes", args.num_processes)):
        if value not in (None, 1):
            raise UserError(f"{name} is {value}; with --method {args.method} it must be 1.")
