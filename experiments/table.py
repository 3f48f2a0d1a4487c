"""The paper's table beside this project's own: ``python -m experiments.table``."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import lenet5, lenet300, vgg
from experiments.cli.command_line import METHODS, at_width
from experiments.io import files
from experiments.io.data import EMBEDDED, NAMES
from experiments.report.published import MODELS, PAPER, PAPER_ERRORS, PaperRow
from experiments.runtime.errors import UserError

COMMITTED = Path(__file__).parent / "results"
TITLES = {"lenet300": "LeNet-300-100, MNIST", "lenet5": "LeNet-5-Caffe, MNIST", "vgg": "VGG, CIFAR-10"}
# What each is for, the data set of the paper's rows first.
_DATASETS = {module.EXPERIMENT.name: module.EXPERIMENT.datasets for module in (lenet300, lenet5, vgg)}
QUICK_NETWORKS = ("lenet300", "lenet5")
_COLUMNS = (
    "method",
    "kept weights",
    "after pruning",
    "after precision reduction",
    "maximum",
    "file",
    "error of the net",
)

Key = tuple[str, str]


def network_of(result: dict[str, Any]) -> str:
    """The experiment that a result is of, with the width of a network that is not as wide as the paper's."""
    return at_width(result["experiment"], result.get("width"))


def read_results(
    directories: Iterable[Path], datasets: Collection[str], quick: bool = False
) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """The results of data sets by network, see ``network_of``, and method; later directories go before earlier ones.

    Args:
      directories: that hold result files, or runs.
      datasets: their names.
      quick: whether those of ``--quick`` runs count, whose figures mean nothing.

    Returns:
      The results, and a sentence for each that does not count; none for the committed ones.

    Raises:
      UserError: a directory does not exist, or a file in it is not a result.
    """
    found: dict[Key, dict[str, Any]] = {}
    left_out = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"--results {directory} is not a directory; it must hold result files.")
        for path in sorted([*directory.glob("*.json"), *directory.glob("*/result.json")]):
            try:
                result = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read as a result: {error}.") from error
            if not isinstance(result, dict) or result.get("method") not in METHODS:
                continue  # of a benchmark
            try:
                key, dataset = (network_of(result), result["method"]), result["dataset"]["name"]
                is_quick = "--quick" in result["command"].split()
                # What will be shown of it.
                title_of(result["experiment"])
                our_row(result)
                commands({key: result})
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{path} is not the whole result of a run ({error!r}).") from error
            if is_quick and not quick:
                left_out.append((path, "is of a --quick run, whose figures mean nothing"))
            elif dataset not in datasets:
                left_out.append((path, f"is of {dataset}" + f"; --dataset {dataset} shows it" * (dataset in NAMES)))
            else:
                found[key] = result
    committed = COMMITTED.resolve()
    return found, [f"Left out: {path} {why}." for path, why in left_out if path.parent.resolve() != committed]


def _cell(rate: float | None, error: float | None) -> str:
    if rate is None:
        return "-"
    number = f"{rate:.0f}x" if rate >= 20 else f"{rate:.1f}x".replace(".0x", "x")
    return number if error is None else f"{number} ({error:.2f})"


def paper_row(row: PaperRow) -> list[str]:
    """The cells of a row of the paper; its errors have one digit."""
    pairs = [row.pruned, row.reduced, row.maximum]
    cells = ["-" if pair is None else f"{pair[0]:g}x ({pair[1]:.1f})" for pair in pairs]
    return [f"{METHODS[row.method]}, paper", f"{row.kept:g} %", *cells, "-", f"{PAPER_ERRORS[row.network]:.1f}"]


def our_row(result: dict[str, Any]) -> list[str]:
    """The cells of a result of ours: means over its seeds."""
    mean, runs = result["mean"], [run for run in result["runs"] if not run["failure"]]
    _, _, width = network_of(result).partition(" ")
    title = f"{METHODS[result['method']]}, here" + (f" {width}" if width else "")
    if mean is None:
        return [title, "no seed was trained to the end", *["-"] * (len(_COLUMNS) - 2)]
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


def title_of(network: str, dataset: str | None = None) -> str:
    """The network with the data set of the paper's rows, and that of ours where it is another; None for the paper's."""
    other = dataset not in (None, _DATASETS[network][0])
    return f"{TITLES[network]}; ours: {dataset}" if other else TITLES[network]


def make_table(results: dict[Key, dict[str, Any]], dataset: str | None = None) -> list[tuple[str, list[list[str]]]]:
    """Per network its title and its rows: each of the paper's, and ours below it.

    Args:
      results: of ``read_results``.
      dataset: of all of them, where it is not the paper's.
    """
    table = []
    for network in TITLES:
        option = "" if dataset in (None, _DATASETS[network][0]) else f" --dataset {dataset}"
        ours = [key for key in sorted(results) if key[0].split(" ")[0] == network]
        if not ours and dataset not in (None, *_DATASETS[network]):
            continue
        rows: list[list[str]] = []
        published = {row.method: row for row in PAPER if row.network == network}
        for method in METHODS:
            if method in published:
                rows.append(paper_row(published[method]))
            if (network, method) in results:
                rows.append(our_row(results[network, method]))
            elif method in published:
                command = f"not run here: python -m experiments.{network} --method {method}{option}"
                rows.append([f"{METHODS[method]}, here", command, *["-"] * (len(_COLUMNS) - 2)])
            rows += [our_row(results[key]) for key in ours if key[1] == method and key[0] != network]
        table.append((title_of(network, dataset), rows))
    return table


def as_text(table: list[tuple[str, list[list[str]]]]) -> str:
    """For a terminal."""
    lines = []
    for title, rows in table:
        widths = [max(len(row[place]) for row in [list(_COLUMNS), *rows]) for place in range(len(_COLUMNS))]
        lines += [
            "",
            title,
            "  ".join(name.ljust(width) for name, width in zip(_COLUMNS, widths, strict=True)).rstrip(),
        ]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    return "\n".join(lines[1:])


def as_markdown(table: list[tuple[str, list[list[str]]]]) -> str:
    """For a document."""
    lines = []
    for title, rows in table:
        lines += [f"**{title}**", "", f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


EXPLANATION = (
    "A rate is the size of the float32 weights by that of what is kept, by the paper's accounting, with the test error in percent beside it "
    "(means over seeds); methods without groups pay as many bits again for the index of every kept weight. The file holds everything, and its error is that of "
    "the network decoded from it."
)


def commands(results: dict[Key, dict[str, Any]]) -> list[str]:
    """How each result was made."""
    return [
        f"{result['command']}: {result['seconds'] / 60:.0f} minutes, {result['machine']}, data set {result['dataset']['name']}"
        + (f". {result['dataset']['remark']}" if "remark" in result["dataset"] else "")
        for _, result in sorted(results.items())
    ]


def run_quick(out: Path, methods: Sequence[str] = tuple(METHODS), networks: Sequence[str] = QUICK_NETWORKS) -> None:
    """Runs every method on the embedded digits with ``--quick``, two at a time.

    Raises:
      UserError: one of them failed; its last words are in the message.
    """
    start = time.perf_counter()

    def run(network: str, method: str) -> str:
        options = [
            "--method",
            method,
            "--dataset",
            EMBEDDED,
            "--quick",
            "--overwrite",
            "--out",
            str(out / f"{network}_{method}"),
        ]
        command = [sys.executable, "-m", f"experiments.{network}", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise UserError(f"{shlex.join(command[1:])} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return f"{network} --method {method}"

    pairs = [(network, method) for network in networks for method in methods]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(run, *pair) for pair in pairs]
        try:
            for number, future in enumerate(concurrent.futures.as_completed(waiting), start=1):
                seconds = time.perf_counter() - start
                print(f"{number} of {len(pairs)} runs, after {seconds:.0f} s: {future.result()}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def draw(path: Path, results: dict[Key, dict[str, Any]], dataset: str | None = None) -> None:
    """Test errors against bytes: the files of the results, and the published models.

    Args:
      path: of the PNG file.
      results, dataset: as for ``make_table``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    networks = [name for name in TITLES if any(key[0].split(" ")[0] == name for key in results)]
    figure, grid = plt.subplots(
        1, len(networks), figsize=(6.4 * len(networks), 6), dpi=110, layout="constrained", squeeze=False
    )
    for panel, network in zip(grid[0], networks, strict=True):
        order = list(METHODS)
        points = []
        for key in sorted(
            (key for key in results if key[0].split(" ")[0] == network), key=lambda key: (order.index(key[1]), key)
        ):
            runs = [run for run in results[key]["runs"] if not run["failure"]]
            if runs:
                sizes, errors = [run["file_bytes"] for run in runs], [run["test_error"]["file"] for run in runs]
                panel.scatter(sizes, errors, s=36, label=f"{our_row(results[key])[0]}: files")
                points += list(zip(sizes, errors, strict=True))
        models = [model for model in MODELS if model.network == network]
        points += [(model.bytes, model.error) for model in models]
        # Room for the names, and for a few points that are alike.
        low, high = min((size for size, _ in points), default=1), max((size for size, _ in points), default=1)
        panel.set_xlim(low / 2, high * 2)
        panel.margins(y=0.1)
        for number, model in enumerate(models):
            panel.scatter(
                model.bytes, model.error, marker="x", color="#555555", label="published" if not number else None
            )
            right = model.bytes**2 > low * high
            panel.annotate(
                f"{model.title} ({model.kind})",
                (model.bytes, model.error),
                xytext=(-5 if right else 5, 3),
                textcoords="offset points",
                horizontalalignment="right" if right else "left",
                fontsize=6,
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_title(title_of(network, dataset))
        panel.set_xlabel("bytes of the compressed network")
        panel.set_ylabel("test error in %")
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    files.write_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
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
        help="directories of result files, or of runs that hold one; the last goes first (default: the committed results, then runs)",
    )
    parser.add_argument(
        "--dataset",
        default=None,
        metavar="|".join(NAMES),
        help=f"data set of the results (default: mnist and cifar10; {EMBEDDED} with --run-quick)",
    )
    parser.add_argument(
        "--run-quick",
        action="store_true",
        help="run all methods on both LeNets first, a few epochs each on the embedded digits, into --out: to see every method work; the figures mean nothing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/table"),
        help="directory for table.md and table.png (default: runs/table)",
    )
    args = parser.parse_args(arguments)
    try:
        if args.run_quick and (args.results is not None or args.dataset not in (None, EMBEDDED)):
            name = "--dataset" if args.results is None else "--results"
            raise UserError(
                f"{name} is given with --run-quick, which makes its own results, of {EMBEDDED}; leave one of them out."
            )
        if args.dataset not in (None, *NAMES):
            raise UserError(f"--dataset is {args.dataset!r}; allowed are {', '.join(NAMES)}.")
        dataset = EMBEDDED if args.run_quick else args.dataset
        datasets = ("mnist", "cifar10") if dataset is None else (dataset,)
        files.check_out(args.out, overwrite=True)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.run_quick:
            print("All methods on the embedded digits, a few epochs each: the figures mean nothing.", flush=True)
            run_quick(args.out.resolve())
            results, left_out = read_results([args.out], datasets, quick=True)
        else:
            local = Path("runs")
            directories = args.results or [COMMITTED, *([local] if local.is_dir() else [])]
            results, left_out = read_results(directories, datasets)
        table = make_table(results, dataset)
        print(as_text(table), "", EXPLANATION, *commands(results), *left_out, sep="\n")
        text = "\n".join([as_markdown(table), EXPLANATION, "", *(f"- {line}" for line in commands(results)), ""])
        files.write_atomically(args.out / "table.md", lambda file: file.write(text.encode()))
        if results:
            draw(args.out / "table.png", results, dataset)
        print(f"Written to {args.out}: table.md{', table.png' if results else ''}.")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
