"""The options of ``python -m bcdl_jax compress``."""

from __future__ import annotations

import argparse

LOSSES, ERRORS = ("softmax", "sigmoid", "gaussian"), ("wrong_class", "wrong_label", "squared_error")
# The budgets, with the type of their number and their help.
_BUDGETS = {
    "--max-increase": (
        float,
        "largest increase of the error, in its own unit: percentage points for wrong_class and wrong_label",
    ),
    "--max-relative-increase": (float, "largest increase of the error, as a share of the error before"),
    "--target-bytes": (int, "largest size of the coded params"),
    "--target-multiply-adds": (int, "largest number of multiply-adds on two examples"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser."""
    add = parser.add_argument
    add(
        "--apply",
        required=True,
        metavar="MODULE:FUNCTION",
        help="the network: a function (params, *inputs) of JAX in a Python module",
    )
    add(
        "--params",
        required=True,
        metavar="FILE",
        help='the trained params, .npz or .safetensors; names are paths such as "params/Dense_0/kernel"',
    )
    add(
        "--data",
        required=True,
        metavar="FILE",
        help='training data, .npz or .safetensors: "inputs" (or "inputs_0", "inputs_1", ...) and "targets"',
    )
    add("--validation", metavar="FILE", help="validation data in the same form (default: a tenth of the training data)")
    add("--test", metavar="FILE", help="test data in the same form, which are used once, at the end")
    add(
        "--loss",
        choices=LOSSES,
        default="softmax",
        help="kind of the targets (default: softmax, one class out of many)",
    )
    add(
        "--error",
        choices=ERRORS,
        help="error of an example (default: wrong_class for softmax, wrong_label for sigmoid, squared_error for gaussian)",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    for name, (kind, text) in _BUDGETS.items():
        budget.add_argument(name, type=kind, metavar="X", help=text)
    add(
        "--out",
        required=True,
        metavar="DIR",
        help="directory for network.bcdn, params.bcdl, report.html and report.txt",
    )
    add(
        "--steps",
        type=int,
        help="training steps before pruning, for a shorter run, which has two rounds of pruning (default: the recipe of FitConfig)",
    )
    add("--batch-size", type=int, help="examples of a training step (default: that of FitConfig)")
    add("--seed", type=int, default=0, help="seed of the noise and of the order of the examples (default: 0)")
    add("--overwrite", action="store_true", help="replace the files of an earlier run in --out")


def given_budget(args: argparse.Namespace) -> dict[str, float]:
    """The budget of the arguments, as an argument of ``compress``."""
    names = [name.removeprefix("--").replace("-", "_") for name in _BUDGETS]
    return {name: value for name in names if (value := getattr(args, name)) is not None}
