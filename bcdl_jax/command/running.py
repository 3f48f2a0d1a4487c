"""The run of ``python -m bcdl_jax compress``: convert, train, compress, and write the files."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bcdl_jax import train
from bcdl_jax._atomic_file import write_atomically
from bcdl_jax._tree import PyTree
from bcdl_jax.budget import Compressed, compress, report_page, squared_error, wrong_class, wrong_label
from bcdl_jax.budget.compressing import check_budget
from bcdl_jax.budget.errors import Error, ExampleErrors
from bcdl_jax.codec import save
from bcdl_jax.command.arguments import given_budget
from bcdl_jax.command.files import CommandError, read_data, read_params
from bcdl_jax.conversion import variational
from bcdl_jax.export.network_file import check_exportable
from bcdl_jax.graph.example_inputs import as_inputs

_NETWORK, _PARAMS, _PAGE, _TEXT, _CHECKPOINTS = (
    "network.bcdn",
    "params.bcdl",
    "report.html",
    "report.txt",
    "checkpoints",
)
_VALIDATION_SHARE = 0.1


def run_compress(args: argparse.Namespace) -> None:
    """Runs the command. An interrupted run goes on when it is started again.

    Raises:
      CommandError: An argument or a file is wrong.
      OSError: A file cannot be read or written.
    """
    apply, params = _function(args.apply), read_params(args.params)
    data, validation = _training_and_validation(args)
    test = None if args.test is None else read_data(args.test, "--test")
    try:
        _check(args, apply, params, {"--data": data, "--validation": validation} | ({"--test": test} if test else {}))
        out = _prepared(args)
        small, fitted = _compressed(args, apply, params, data, validation, out)
    except ValueError as error:
        raise CommandError(str(error)) from error
    lines = [str(fitted), str(small.report)]
    if test is not None:
        before, after = (
            float(ExampleErrors(function, _error(args), *test)(own).mean())
            for function, own in ((apply, params), (small.apply, small.params))
        )
        lines.append(f"test error: {before:.4g} before, {after:.4g} after")
    title = f"{args.apply}, {Path(args.params).name}"
    for name, text in ((_PAGE, report_page(small.report, title)), (_TEXT, "\n".join(lines) + "\n")):
        write_atomically(out / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    save(out / _PARAMS, small.full_params, names=True)
    small.save(out / _NETWORK)
    shutil.rmtree(out / _CHECKPOINTS)
    print("\n".join(lines))
    print(f"Files in {out}: {', '.join((_NETWORK, _PARAMS, _PAGE, _TEXT))}")


def _check(args: argparse.Namespace, apply: Callable[..., PyTree], params: PyTree, parts: dict[str, Any]) -> None:
    """Raises ValueError or CommandError for what would fail after the training."""
    check_budget(**given_budget(args))  # type: ignore[arg-type]
    for option, (inputs, targets) in parts.items():
        two = jax.tree.map(lambda array: array[:2], (inputs, targets))
        try:
            ExampleErrors(apply, _error(args), *two)(params)
        except (TypeError, ValueError) as error:
            raise CommandError(f"The network or --error fails on {option}: {str(error).splitlines()[0]}") from error
    check_exportable(apply, params, jax.tree.map(lambda array: array[:2], parts["--data"][0]))


def _compressed(
    args: argparse.Namespace, apply: Callable[..., PyTree], params: PyTree, data: Any, validation: Any, out: Path
) -> tuple[Compressed, train.FitResult]:
    """The small network, and the result of the training."""
    example = jax.tree.map(lambda array: array[:2], as_inputs(data[0]))
    model = variational(apply, params, example)
    print(model.plan, flush=True)
    losses: dict[str, train.Loss] = {
        "softmax": train.SoftmaxLoss(),
        "sigmoid": train.SigmoidLoss(),
        "gaussian": train.GaussianLoss(),
    }
    config = train.FitConfig() if args.batch_size is None else train.FitConfig(batch_size=args.batch_size)
    if args.steps is not None:
        config = dataclasses.replace(
            config,
            steps=args.steps,
            rounds=2,
            round_steps=max(1, args.steps // 4),
            fine_tune_steps=max(1, args.steps // 3),
        )
    fitted = train.fit(
        model,
        losses[args.loss],
        data,
        validation,
        key=jax.random.key(args.seed),
        config=config,
        checkpoints=out / _CHECKPOINTS,
    )
    return compress(model, fitted.params, validation, _error(args), **given_budget(args)), fitted  # type: ignore[arg-type]


def _error(args: argparse.Namespace) -> Error:
    """The error of examples that the arguments choose."""
    usual = {"softmax": "wrong_class", "sigmoid": "wrong_label", "gaussian": "squared_error"}
    errors = {"wrong_class": wrong_class, "wrong_label": wrong_label, "squared_error": squared_error}
    return errors[args.error or usual[args.loss]]


def _prepared(args: argparse.Namespace) -> Path:
    """The directory of the run. Raises CommandError if it holds the files of a finished run."""
    out = Path(args.out)
    finished = [name for name in (_NETWORK, _PARAMS, _PAGE, _TEXT) if (out / name).exists()]
    if finished and not args.overwrite:
        raise CommandError(f"--out {out} holds {', '.join(finished)}; give another directory, or --overwrite.")
    for name in finished:  # Without them, the run goes on from its own checkpoints if it is interrupted.
        (out / name).unlink()
    if finished:
        shutil.rmtree(out / _CHECKPOINTS, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _function(name: str) -> Callable[..., PyTree]:
    """The function "module:function"."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise CommandError(f"--apply is {name}; it must be MODULE:FUNCTION, such as my_model:apply.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # As ``python -m`` does.
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CommandError(f"--apply is {name}, but {module_name} cannot be imported: {error}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise CommandError(f"--apply is {name}, but {module_name} has no function {attribute}.")
    return function


def _training_and_validation(args: argparse.Namespace) -> tuple[Any, Any]:
    """The training data and the validation data."""
    data = read_data(args.data, "--data")
    if args.validation is not None:
        return data, read_data(args.validation, "--validation")
    count = len(data[1])
    order, held_out = np.random.default_rng(args.seed).permutation(count), max(8, round(_VALIDATION_SHARE * count))
    if count < 2 * held_out:
        raise CommandError(f"--data {args.data} has {count} examples; give more of them, or --validation.")
    parts = order[held_out:], order[:held_out]
    training, validation = (jax.tree.map(lambda array, rows=rows: array[rows], data) for rows in parts)
    return training, validation
