"""Checks the library on networks of public packages: ``python -m experiments.public_models``.

Each network is small, has random weights, and loses a third of its units by ``with_zeros`` in ``model.py``. The packages are no dependencies of
the project. Networks of packages that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.checks.public_models.checks import CHECKS, OK, ModelError, Result, check_model
from experiments.checks.public_models.model import PublicModel
from experiments.runtime.command import reporting_errors
from experiments.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """A package with networks.

    Attributes:
      module: The name under which the package is imported.
      models: The names of the networks. The module ``PACKAGE_models`` makes them.
    """

    module: str
    models: tuple[str, ...]

    def load(self) -> dict[str, Callable[[], PublicModel]]:
        """The functions that make the networks."""
        return importlib.import_module(f"experiments.checks.public_models.{self.module}_models").models()


# The packages, by the names under which they are installed.
SOURCES = {
    "flax": Source(
        "flax",
        (
            "linen_mlp",
            "linen_convolutions",
            "linen_lstm_gru",
            "linen_transformer",
            "linen_scan",
            "linen_bfloat16",
            "nnx_mlp",
            "nnx_transformer",
            "nnx_lstm",
        ),
    ),
    "dm-haiku": Source("haiku", ("resnet", "mobilenet_v1", "lstm", "gru", "attention")),
    "equinox": Source("equinox", ("mlp", "convolutions", "lstm", "gru", "attention")),
    "keras": Source(
        "keras",
        (
            "mobilenet_v2",
            "mobilenet_v3",
            "efficientnet",
            "densenet",
            "resnet",
            "convnext",
            "unet",
            "lstm_gru",
            "attention",
        ),
    ),
    "transformers": Source(
        "transformers",
        (
            "bert",
            "distilbert",
            "gpt2",
            "llama",
            "mistral",
            "gemma",
            "bloom",
            "t5",
            "bart",
            "whisper",
            "vit",
            "clip",
            "resnet",
            "regnet",
        ),
    ),
}
CHOICES = {"agreeing": False, "own": True}
COLUMNS = ("model", "package", "zeros", "bytes", "multiply-adds", "shrink", "difference", "batches", *CHECKS)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: the name of the model, its package, the choice of zeros and the result."""

    name: str
    package: str
    choice: str
    result: Result

    def cells(self) -> list[str]:
        """The texts of the columns."""
        result, outcomes = self.result, self.result.outcomes
        head = [self.name, self.package, self.choice]
        if result.bytes is None or result.multiply_adds is None:
            return [*head, "", "", outcomes["shrink"].text, *[""] * (len(COLUMNS) - 6)]
        batches = ", ".join(map(str, result.batches)) or "none"
        refused = [outcome.text for name, outcome in outcomes.items() if name.startswith("batch")]
        return [
            *head,
            "{:,} -> {:,}".format(*result.bytes),
            "{:,} -> {:,}".format(*result.multiply_adds),
            f"{result.seconds:.1f} s",
            f"{result.difference:.0e}",
            f"{batches} ({refused[0]})" if refused else batches,
            *[outcomes[name].text for name in CHECKS],
        ]


def markdown(rows: list[Row], notes: list[str]) -> str:
    """The table, and a list of notes on skipped models."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *[row.cells() for row in rows]]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n".join([table, *([""] * bool(notes)), *[f"- {note}" for note in notes]]) + "\n"


def selected(names: list[str] | None) -> dict[str, list[str]]:
    """The selected models by package.

    Args:
      names: Names of packages or "package/model"; None for all.

    Raises:
      UserError: There is no such model.
    """
    every = {package: list(source.models) for package, source in SOURCES.items()}
    if names is None:
        return every
    chosen: dict[str, list[str]] = {}
    for name in names:
        package, _, model = name.partition("/")
        if package not in every or (model and model not in every[package]):
            known = " ".join([*every, *(f"{each}/{one}" for each, models in every.items() for one in models)])
            raise UserError(f"--only is {name!r}; allowed are {known}.")
        chosen.setdefault(package, []).extend([model] if model else every[package])
    return chosen


def run(chosen: dict[str, list[str]], choices: list[str], notes: list[str]) -> Iterator[Row]:
    """Checks the models one by one. Appends a note for each that is skipped."""
    for package, names in chosen.items():
        count = f"{len(names)} model{'s' * (len(names) > 1)} skipped"
        if importlib.util.find_spec(SOURCES[package].module) is None:
            notes.append(f"{package} is not installed: {count}")
            continue
        version = f"{package} {importlib.metadata.version(package)}"
        try:
            makers = SOURCES[package].load()
        except (
            ImportError,
            AttributeError,
            TypeError,
            UserError,
        ) as error:  # The package does not fit the installed JAX.
            notes.append(f"{version} cannot be imported: {count}. {type(error).__name__}: {error}")
            continue
        for name in names:
            try:
                model = makers[name]()
            except Exception as error:
                notes.append(f"{name} of {version} is skipped: it cannot be made: {type(error).__name__}: {error}")
                continue
            for choice in choices:
                try:
                    result = check_model(model, CHOICES[choice])
                except ModelError as error:
                    notes.append(f"{name} of {version} is skipped: {error}")
                    break
                yield Row(name, version, choice, result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.public_models",
        description="Zeroes a third of the units of small networks from public packages, and checks shrink, all exports, save and load on them.",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"packages ({', '.join(SOURCES)}) or models, such as keras/resnet"
    )
    parser.add_argument(
        "--zeros",
        nargs="+",
        choices=CHOICES,
        default=list(CHOICES),
        help="zeros on which all layers of the same width agree, or each layer's own choice (default: both)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/public_models"),
        help="directory for public_models.md (default: runs/public_models)",
    )
    return parser


def _progress(row: Row, seconds: float) -> str:
    failures = [f"{name}: {outcome.text}" for name, outcome in row.result.outcomes.items() if outcome.failed]
    refused = [name for name, each in row.result.outcomes.items() if not each.failed and each.text != OK]
    text = f"FAILED {'; '.join(failures)}" if failures else OK
    return f"{row.package}, {row.name}, {row.choice} zeros, {seconds:.0f} s: {text}" + (
        f"; not supported: {', '.join(refused)}" if refused else ""
    )


@reporting_errors(OSError)
def main(arguments: list[str] | None = None) -> int:
    """Runs the checks and returns the exit status: 0, 1 if something else was computed, 2 for an error."""
    args = _parser().parse_args(arguments)
    rows: list[Row] = []
    notes: list[str] = []
    chosen = selected(args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for row in run(chosen, args.zeros, notes):
        print(_progress(row, time.perf_counter() - start), flush=True)
        rows.append(row)
        start = time.perf_counter()
    text = markdown(rows, notes)
    (args.out / "public_models.md").write_text(text)
    print(f"\n{text}")
    return 1 if any(row.result.failed for row in rows) else 0
