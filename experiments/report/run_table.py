"""The table that a run prints: one line for each seed and stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.pipeline.context import PRETRAINED


def print_table(runs: list[dict[str, Any]], *, plain: bool = False) -> None:
    """Prints the figures of a run.

    Args:
      runs: The entries "runs" of a result.
      plain: True where the stage "trained" is the pre-trained network itself.
    """
    header = f"{'seed':>4}  {'stage':<26} {'test error %':>12} {'rate_paper':>10} {'rate':>8}  {'kept units':<14} {'bits per layer'}"
    print(header, "-" * len(header), sep="\n")
    for run in runs:
        for stage, error, rate, rate_paper, units, bits in _rows(run, plain):
            print(
                f"{run['seed']:>4}  {stage:<26} {error:>12.2f} {_times(rate_paper):>10} {_times(rate):>8}  {units:<14} {'-'.join(map(str, bits))}"
            )
    for run in runs:
        print(_size_sentence(run))
        print(_prediction_sentence(run))
    for run in runs:
        if run["failure"]:
            print(f"not in the mean: {run['failure']}")
    if finished := [run for run in runs if not run["failure"]]:
        print(_mean_sentence(finished, plain))


def _rows(run: dict[str, Any], plain: bool) -> list[tuple[Any, ...]]:
    """Stage, test error, rate, rate by the paper's accounting, units and bits per layer."""
    full, kept = ("-".join(map(str, run[key])) for key in ("total_units", "kept_units"))
    float_bits = [32] * len(run["bits"])
    errors, rate, rate_paper = run["test_error"], run["rate"], run["rate_paper"]
    rows: list[tuple[Any, ...]] = []
    if PRETRAINED in errors:
        rows.append(("after pre-training", errors[PRETRAINED], None, None, full, float_bits))
    if not plain:
        rows.append(("after training", errors["trained"], 1.0, 1.0, full, float_bits))
    rows.append(("after pruning", errors["pruned"], rate["pruned"], rate_paper["pruned"], kept, float_bits))
    rows.append(
        ("after precision reduction", errors["reduced"], rate["reduced"], rate_paper["reduced"], kept, run["bits"])
    )
    if rule := run["round_off_rule"]:
        rows.append(("  by the paper's rule", rule["test_error"], None, rule["rate_paper"], kept, rule["bits"]))
    return rows


def _size_sentence(run: dict[str, Any]) -> str:
    shrunk, multiply_adds = run["shrunk_float32_bytes"], run["multiply_adds"]
    return (
        f"seed {run['seed']}: {run['float32_bytes']:,} bytes of float32; shrunk to the kept units {shrunk:,} "
        f"({_times(run['float32_bytes'] / shrunk if shrunk else None)}), multiply-adds {multiply_adds[0]:,} -> {multiply_adds[1]:,}; "
        f"compressed file {run['file_bytes']:,} ({_times(run['ratio_file'])}), decoded from it {run['test_error']['file']:.2f} % error; "
        f"the paper's maximum rate {_times(run['rate_paper']['maximum'])}"
    )


def _prediction_sentence(run: dict[str, Any]) -> str:
    return "  predictions: " + "; ".join(
        f"{way} {values['error']:.2f} % error, {values['nll']:.4f} nats, calibration error {values['ece']:.2f} %"
        for way, values in run["uncertainty"].items()
    )


def _mean_sentence(finished: list[dict[str, Any]], plain: bool) -> str:
    stages = [stage for stage in finished[0]["test_error"] if not (plain and stage == "trained")]
    errors = {stage: np.array([run["test_error"][stage] for run in finished]) for stage in stages}
    return "mean test error over seeds: " + ", ".join(
        f"{stage} {values.mean():.2f} % ({values.min():.2f} to {values.max():.2f})" for stage, values in errors.items()
    )


def _times(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}x"
