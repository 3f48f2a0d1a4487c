"""LeNet-300-100 on MNIST with the group normal-Jeffreys prior: ``python -m experiments.lenet300``."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from typing import TYPE_CHECKING

from experiments.data import EMBEDDED, NAMES
from experiments.errors import UserError

if TYPE_CHECKING:  # importing it takes JAX along, which --help and bad arguments need not wait for
    from experiments.compress import Recipe

CHAIN = ("Dense_0", "Dense_1", "Dense_2")
WIDTHS = (784, 300, 100, 10)
PICTURES = ("weights_layer1.gif", "weights_layer2.gif", "feature_importance.gif", "log_dropout_rates.png")
DEFAULT_OUT = "runs/lenet300"


def recipe(dataset: str, quick: bool) -> Recipe:
    """The recipe for a data set; figures expected of it stand in the README."""
    from experiments.compress import Recipe

    full = Recipe(epochs=180, fine_tune_epochs=60, warmup_epochs=50)
    embedded = dataclasses.replace(
        full,
        epochs=100,
        fine_tune_epochs=30,
        batch_size=32,
        learning_rate=1e-3,
        log_variance_factor=4.0,
        fine_tune_averaging_epochs=6,
        max_pruning_change=0.01,
        max_rounding_change=0.002,
    )
    chosen = embedded if dataset == EMBEDDED else full
    return dataclasses.replace(chosen, epochs=3, fine_tune_epochs=1, warmup_epochs=0) if quick else chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.lenet300",
        description="Trains a variational LeNet-300-100, prunes it, reduces its precision, and writes a result file, parameters and pictures. "
        "Without the full MNIST and without a network it runs on 5,000 embedded digits.",
    )
    parser.add_argument(
        "--dataset", default="mnist", metavar="|".join(NAMES), help="data set to train on (default: mnist)"
    )
    parser.add_argument(
        "--data-dir",
        help="directory of prepared tensorflow-datasets data, or where to prepare it (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--epochs", type=int, help="epochs of training before pruning (default: the recipe's, 180 on full MNIST)"
    )
    parser.add_argument(
        "--fine-tune-epochs",
        type=int,
        help="epochs of fine-tuning after pruning (default: the recipe's, 60 on full MNIST)",
    )
    parser.add_argument(
        "--batch-size", type=int, help="examples per training step (default: 128; 32 on the embedded digits)"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="Adam's step size at the start of training, from where it falls to 0 along a cosine; that of fine-tuning is constant and "
        "changes in proportion (default: 0.002; 0.001 on the embedded digits)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="one run for each seed, all trained at once (default: 0 1 2)",
    )
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="T",
        help="three log dropout rates, one per layer, above which a unit is pruned (default: chosen on the validation data)",
    )
    parser.add_argument(
        "--pretrained",
        metavar="FILE.npz",
        help="start from trained weights: arrays Dense_0/kernel, Dense_0/bias and so on, and the name of their data set in trained_on",
    )
    parser.add_argument(
        "--out", default=DEFAULT_OUT, help=f"directory for the files of the run (default: {DEFAULT_OUT})"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=5,
        metavar="N",
        help="write a checkpoint after every N epochs; 0 for none but on SIGTERM and Ctrl-C (default: 5)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out that was cut short, from its last checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in --out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few epochs and one seed, to see everything work; its figures mean nothing",
    )
    args = parser.parse_args(arguments)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises UserError for values that are not allowed."""
    if args.dataset not in NAMES:
        raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(NAMES)}.")
    for name, smallest in (("epochs", 1), ("fine_tune_epochs", 0), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}.")
    if args.checkpoint_every < 0:
        raise UserError(f"--checkpoint-every is {args.checkpoint_every}; it must be at least 0.")
    if args.learning_rate is not None and not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning-rate is {args.learning_rate}; it must be a positive number.")
    if args.thresholds is not None and len(args.thresholds) != len(CHAIN):
        raise UserError(f"--thresholds has {len(args.thresholds)} values; it must have {len(CHAIN)}, one per layer.")
    if args.thresholds is not None and any(value != value for value in args.thresholds):
        raise UserError("--thresholds holds a value that is not a number.")
    if args.seeds is not None and len(set(args.seeds)) != len(args.seeds):
        raise UserError(f"--seeds names a seed twice: {' '.join(map(str, args.seeds))}; each may be named once.")
    for seed in args.seeds or ():
        if not 0 <= seed < 2**31:
            raise UserError(f"--seeds holds {seed}; a seed must be at least 0 and less than 2147483648.")


def run(args: argparse.Namespace, command: str) -> None:
    # Imported late, so that --help and bad arguments are answered at once.
    from experiments import checkpoints, compress, data, figures, files, score
    from experiments.models import LeNet300

    start = time.perf_counter()
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    # Where a run was cut short, its files give way without --overwrite.
    cut_short = args.resume and checkpoints.are_in(args.out)
    files.check_out(args.out, args.overwrite or cut_short)
    dataset = data.load(args.dataset, args.data_dir)
    if dataset.notice:
        print(dataset.notice, flush=True)
    settings = adapt(recipe(dataset.name, args.quick), args)
    if settings.batch_size > len(dataset.train):
        raise UserError(
            f"--batch-size is {settings.batch_size}; it must be at most the number of training examples, {len(dataset.train)}."
        )
    pretrained = None
    if args.pretrained is not None:
        pretrained = files.read_pretrained(args.pretrained, dataset.name, (EMBEDDED,))
        check_pretrained(args.pretrained, pretrained)
    thresholds = None if args.thresholds is None else dict(zip(CHAIN, args.thresholds, strict=True))
    params_files = [compress.params_file(stage, "*") for stage in compress.STAGES]
    compressed_files = compress.compressed_file("*")
    written = [compress.RESULT, compress.METRICS, compress.INTERRUPTED, *params_files, compressed_files, *PICTURES]
    run_settings = checkpoints.settings(
        "lenet300", settings, dataset, seeds, thresholds=args.thresholds, pretrained=checkpoints.checksum(pretrained)
    )
    out, kept = checkpoints.begin(
        args.out, run_settings, written, compress.METRICS, args.checkpoint_every, args.resume, args.overwrite
    )

    sizes = f"{len(dataset.train)} to train on, {len(dataset.validation)} to choose on, {len(dataset.test)} to test on"
    length = f"{settings.epochs} + {settings.fine_tune_epochs} epochs, seeds {' '.join(map(str, seeds))}"
    print(f"LeNet-300-100, group normal-Jeffreys prior, {dataset.name}: {sizes}; {length}", flush=True)
    try:
        model = LeNet300()
        compressed = compress.compress(
            model,
            dataset,
            settings,
            chain=CHAIN,
            seeds=seeds,
            out=out,
            thresholds=thresholds,
            pretrained=pretrained,
            checkpoints=kept,
        )
        file_errors = score.in_fresh_process(compressed.files, dataset.name, args.data_dir)
        runs = compress.score(model, compressed, dataset, seeds, CHAIN, file_errors)
        first_thresholds = {name: compressed.thresholds[0][name] for name in CHAIN}
        figures.draw(out, compressed.snapshots, first_thresholds, dataset.test.images, dataset.test.labels, seeds[0])
        result = compress.result(
            "lenet300",
            "gnj",
            dataset,
            settings,
            command,
            runs,
            kept.earlier_seconds + time.perf_counter() - start,
            kept.resumed,
        )
        files.write_json(out / compress.RESULT, result)
        kept.remove()
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was finished so far is in {out}.", file=sys.stderr)
        raise SystemExit(130) from None
    compress.print_table(runs)
    print(f"{result['seconds']:.0f} s, {result['runs'][0]['peak_memory_mb']} MB peak memory; files in {out}")
    if dataset.notice:
        print(dataset.notice)


def adapt(settings: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes; the KL warm-up keeps its share of the epochs."""
    given = {name: getattr(args, name) for name in ("epochs", "fine_tune_epochs", "batch_size", "learning_rate")}
    if args.learning_rate is not None:
        ratio = settings.fine_tune_learning_rate / settings.learning_rate
        given["fine_tune_learning_rate"] = ratio * args.learning_rate
    if args.epochs is not None:
        given["warmup_epochs"] = round(settings.warmup_epochs * args.epochs / settings.epochs)
    return dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})


def check_pretrained(path: str, arrays: dict) -> None:
    """Raises UserError unless the arrays are just those of the network."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs in zip(CHAIN, WIDTHS[:-1], WIDTHS[1:], strict=True):
        expected |= {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}
    for name, shape in expected.items():
        if name not in arrays:
            raise UserError(f"--pretrained {path} has no array {name}; it must hold {', '.join(expected)}.")
        if arrays[name].shape != shape:
            raise UserError(f"--pretrained {path} has {name} of shape {arrays[name].shape}; it must be {shape}.")
    if extra := sorted(set(arrays) - set(expected)):
        raise UserError(
            f"--pretrained {path} holds {', '.join(extra)}; allowed are {', '.join(expected)} and trained_on."
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    try:
        args = parse(arguments)
        run(
            args,
            shlex.join(["python", "-m", "experiments.lenet300", *(sys.argv[1:] if arguments is None else arguments)]),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
