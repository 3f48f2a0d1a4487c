"""The paper's table of results beside this project's own: ``python -m experiments.table``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bcdl_jax
from experiments.io import files
from experiments.io.data import DATASETS, EMBEDDED
from experiments.registry import paper_datasets
from experiments.report import quick_runs, tables, tradeoff
from experiments.runtime.command import reporting_errors
from experiments.runtime.errors import UserError


@reporting_errors(OSError)
def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    args = _parser().parse_args(arguments)
    _check(args)
    files.check_out(args.out, overwrite=True)
    args.out.mkdir(parents=True, exist_ok=True)
    _make(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.table",
        description="Prints the paper's table of results beside this project's own, from the committed results and those of local runs, and writes "
        "it as Markdown, with a plot of errors against bytes.",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="directories of result files or of runs; a later one takes precedence (default: the committed results, then runs)",
    )
    parser.add_argument(
        "--dataset",
        default=None,
        metavar="|".join(DATASETS),
        help=f"data set of the results (default: {' and '.join(paper_datasets())}; {EMBEDDED} with --run-quick)",
    )
    parser.add_argument(
        "--run-quick",
        action="store_true",
        help="first run all methods on both LeNets, a few epochs each on the embedded digits, into --out, to see every method work; "
        "the figures mean nothing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/table"),
        help="directory for table.md and table.png (default: runs/table)",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.run_quick and (args.results is not None or args.dataset not in (None, EMBEDDED)):
        name = "--dataset" if args.results is None else "--results"
        raise UserError(
            f"{name} is given with --run-quick, which makes its own results, of {EMBEDDED}; leave one of them out."
        )
    if args.dataset not in (None, *DATASETS):
        raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(DATASETS)}.")


def _make(args: argparse.Namespace) -> None:
    """Collects the results, prints the table and writes the files."""
    dataset = EMBEDDED if args.run_quick else args.dataset
    datasets = paper_datasets() if dataset is None else (dataset,)
    if args.run_quick:
        print("All methods on the embedded digits, a few epochs each: the figures mean nothing.", flush=True)
        quick_runs.run_quick(args.out.resolve())
        results, left_out = tables.read_results([args.out], datasets, quick=True)
    else:
        local = Path("runs")
        directories = args.results or [tables.COMMITTED, *([local] if local.is_dir() else [])]
        results, left_out = tables.read_results(directories, datasets)
    table = tables.make_table(results, dataset)
    commands = tables.commands(results)
    print(tables.as_text(table), "", tables.EXPLANATION, *commands, *left_out, sep="\n")
    text = "\n".join([tables.as_markdown(table), tables.EXPLANATION, "", *(f"- {line}" for line in commands), ""])
    bcdl_jax.codec.write_atomically(args.out / "table.md", lambda file: file.write(text.encode()))
    if results:
        tradeoff.draw(args.out / "table.png", results, dataset)
    print(f"Written to {args.out}: table.md{', table.png' if results else ''}.")


if __name__ == "__main__":
    sys.exit(main())
