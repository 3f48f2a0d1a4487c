"""The paper's table of results beside this project's own results."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.io.dataset_table import DATASETS
from experiments.registry import EXPERIMENTS, method_names, method_title, title_at_width
from experiments.report.published import PAPER, PAPER_ERRORS, PaperRow
from experiments.runtime.errors import UserError

COMMITTED = Path(__file__).parents[1] / "results"
_COLUMNS = (
    "method",
    "kept weights",
    "after pruning",
    "after precision reduction",
    "maximum",
    "file",
    "error before compression",
)


class Key(NamedTuple):
    """The identity of a result.

    Attributes:
      experiment: The name of the experiment.
      width: The width of the network as a fraction of the paper's.
      method: The name of the method.
    """

    experiment: str
    width: float
    method: str


# A title and rows of cells per network.
Table = list[tuple[str, list[list[str]]]]

EXPLANATION = (
    "A rate is the size of the float32 weights divided by the size of the kept weights, by the paper's accounting, with the test error in percent "
    "in brackets (means over seeds). Methods that prune single weights pay as many bits again for the index of every kept weight. The file "
    "holds the whole network, and its error is the error of the network that is decoded from it."
)


def _key_of(result: dict[str, Any]) -> Key:
    width = result.get("width")
    return Key(result["experiment"], 1 if width is None else width, result["method"])


def read_results(
    directories: Iterable[Path], datasets: Collection[str], quick: bool = False
) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """Reads the results of data sets. Results in later directories replace those in earlier ones.

    Args:
      directories: Directories that contain result files, or directories of runs.
      datasets: The names of the data sets.
      quick: True to include ``--quick`` runs, whose figures mean nothing.

    Returns:
      The results by network and method, and a sentence for each result that is left out, except for committed ones.

    Raises:
      UserError: A directory does not exist, or a file in it is not a result.
    """
    found: dict[Key, dict[str, Any]] = {}
    left_out = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"--results {directory} is not a directory; it must hold result files.")
        for path in sorted([*directory.glob("*.json"), *directory.glob("*/result.json")]):
            result = _read_json(path)
            if not isinstance(result, dict) or result.get("method") not in method_names():
                continue  # The file belongs to a benchmark.
            key, dataset, is_quick = _check_whole(path, result)
            if is_quick and not quick:
                left_out.append((path, "comes from a --quick run, whose figures mean nothing"))
            elif dataset not in datasets:
                left_out.append((path, f"is of {dataset}" + f"; --dataset {dataset} shows it" * (dataset in DATASETS)))
            else:
                found[key] = result
    committed = COMMITTED.resolve()
    return found, [f"Left out: {path} {why}." for path, why in left_out if path.parent.resolve() != committed]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a result: {error}.") from error


def _check_whole(path: Path, result: dict[str, Any]) -> tuple[Key, str, bool]:
    """The key and the data set of a result, and True if it comes from a ``--quick`` run. Raises UserError if a value for the table is missing."""
    try:
        key, dataset = _key_of(result), result["dataset"]["name"]
        is_quick = "--quick" in result["command"].split()
        title_of(result["experiment"])
        our_row(result)
        commands({key: result})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the whole result of a run ({error!r}).") from error
    return key, dataset, is_quick


def _cell(rate: float | None, error: float | None) -> str:
    if rate is None:
        return "-"
    number = f"{rate:.0f}x" if rate >= 20 else f"{rate:.1f}x".replace(".0x", "x")
    return number if error is None else f"{number} ({error:.2f})"


def paper_row(row: PaperRow) -> list[str]:
    """The cells of a row of the paper, whose errors have one decimal."""
    pairs = [row.pruned, row.reduced, row.maximum]
    cells = ["-" if pair is None else f"{pair[0]:g}x ({pair[1]:.1f})" for pair in pairs]
    return [f"{method_title(row.method)}, paper", f"{row.kept:g} %", *cells, "-", f"{PAPER_ERRORS[row.network]:.1f}"]


def our_row(result: dict[str, Any]) -> list[str]:
    """The cells of one of this project's results: means over its seeds."""
    mean, runs = result["mean"], [run for run in result["runs"] if not run["failure"]]
    title = title_at_width(f"{method_title(result['method'])}, here", _key_of(result).width)
    if mean is None:
        return [title, "no seed was trained to the end", *_dashes()]
    errors, rates = mean["test_error"], mean["rate_paper"]
    kept = 100 * mean["kept_weights"] / runs[0]["total_weights"] if "kept_weights" in mean else None
    plain = errors.get("pretrained")
    return [
        f"{title} ({len(runs)} seed{'s' * (len(runs) > 1)})",
        "-" if kept is None else f"{kept:.2g} %",
        _cell(rates["pruned"], errors["pruned"]),
        _cell(rates["reduced"], errors["reduced"]),
        _cell(rates.get("maximum"), errors["file"]),
        f"{mean['file_bytes']:,.0f} B, {_cell(mean['ratio_file'], errors['file'])}",
        "-" if plain is None else f"{plain:.2f}",
    ]


def _dashes() -> list[str]:
    """The cells behind the second one of a row without figures."""
    return ["-"] * (len(_COLUMNS) - 2)


def title_of(experiment: str, dataset: str | None = None) -> str:
    """The title of an experiment's table: the network and the data set of the paper's rows, and the data set of this project's if it differs.

    Args:
      experiment: The name of the experiment.
      dataset: The name of the data set of this project's rows; None for the paper's.
    """
    papers = EXPERIMENTS[experiment].datasets[0]
    title = f"{EXPERIMENTS[experiment].network.title}, {DATASETS[papers].title}"
    return title if dataset in (None, papers) else f"{title}; ours: {dataset}"


def make_table(results: dict[Key, dict[str, Any]], dataset: str | None = None) -> Table:
    """The table: each row of the paper, and this project's rows below it.

    Args:
      results: The results from ``read_results``.
      dataset: The data set of all results; None for the paper's.
    """
    return [
        (title_of(experiment, dataset), _rows(experiment, results, dataset))
        for experiment in EXPERIMENTS
        if _results_of(experiment, results) or dataset in (None, *EXPERIMENTS[experiment].datasets)
    ]


def _results_of(experiment: str, results: dict[Key, dict[str, Any]]) -> list[Key]:
    """The keys of an experiment's results, at all widths."""
    return [key for key in sorted(results) if key.experiment == experiment]


def _rows(experiment: str, results: dict[Key, dict[str, Any]], dataset: str | None) -> list[list[str]]:
    option = "" if dataset in (None, EXPERIMENTS[experiment].datasets[0]) else f" --dataset {dataset}"
    published = {row.method: row for row in PAPER if row.network == experiment}
    rows: list[list[str]] = []
    for method in method_names():
        if method in published:
            rows.append(paper_row(published[method]))
        full = Key(experiment, 1, method)
        if full in results:
            rows.append(our_row(results[full]))
        elif method in published:
            command = f"not run here: python -m experiments.{experiment} --method {method}{option}"
            rows.append([f"{method_title(method)}, here", command, *_dashes()])
        narrower = [key for key in _results_of(experiment, results) if key.method == method and key != full]
        rows += [our_row(results[key]) for key in narrower]
    return rows


def as_text(table: Table) -> str:
    """The table for a terminal."""
    lines = []
    for title, rows in table:
        columns = zip(_COLUMNS, *rows, strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines += ["", title, *(_aligned(row, widths) for row in [list(_COLUMNS), *rows])]
    return "\n".join(lines[1:])


def _aligned(row: list[str], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def as_markdown(table: Table) -> str:
    """The table in Markdown."""
    lines = []
    for title, rows in table:
        lines += [f"**{title}**", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def commands(results: dict[Key, dict[str, Any]]) -> list[str]:
    """The command, the time, the machine and the data set of each result, one line each."""
    return [
        f"{result['command']}: {result['seconds'] / 60:.0f} minutes, {result['machine']}, data set {result['dataset']['name']}"
        + (f". {result['dataset']['remark']}" if "remark" in result["dataset"] else "")
        for _, result in sorted(results.items())
    ]
