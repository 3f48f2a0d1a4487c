"""Test error of compressed files, decoded and shrunk: ``python -m experiments.score FILE ...``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from experiments.io.data import DATASETS, EMBEDDED
from experiments.registry import EXPERIMENTS
from experiments.runtime.command import reporting_errors
from experiments.runtime.errors import UserError


@reporting_errors()
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    if args.dataset is None:
        args.dataset = _default_dataset(has_widths=args.vgg is not None)
    if args.dataset not in DATASETS:
        raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(DATASETS)}.")
    if args.vgg is not None and not 0 < args.vgg <= 1:
        raise UserError(f"--vgg is {args.vgg}; it must be more than 0 and at most 1.")
    from experiments.report import scoring  # JAX takes seconds to import

    errors = scoring.test_errors(args.files, args.dataset, args.data_dir, args.vgg)
    if args.json:
        print(json.dumps(errors))
        return 0
    if args.dataset == EMBEDDED:
        print(
            "The embedded digits are training images of full MNIST: an error on them is meaningful only for a network that was trained on them."
        )
    for path, percent in zip(args.files, errors, strict=True):
        print(f"{path}: {Path(path).stat().st_size:,} bytes, test error {percent:.2f} %")
    return 0


def _default_dataset(has_widths: bool) -> str:
    """The paper's data set for the networks that have widths, or for those that have none."""
    return next(found.datasets[0] for found in EXPERIMENTS.values() if found.network.has_widths == has_widths)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.score",
        description="Decodes compressed files, as experiments.lenet300, experiments.lenet5 and experiments.vgg write them, and prints their "
        "test errors.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a compressed file")
    parser.add_argument(
        "--dataset",
        metavar="|".join(DATASETS),
        help=f"data set to test on (default: {_default_dataset(False)}, {_default_dataset(True)} with --vgg)",
    )
    parser.add_argument(
        "--data-dir", help="directory of tensorflow-datasets data (default: TFDS_DATA_DIR, then ~/tensorflow_datasets)"
    )
    parser.add_argument(
        "--vgg",
        type=float,
        metavar="WIDTH",
        help="the files are of experiments.vgg, at this --width (otherwise: of a LeNet)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of numbers instead of sentences")
    return parser


if __name__ == "__main__":
    sys.exit(main())
