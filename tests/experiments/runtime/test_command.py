import sys

import pytest

from experiments.runtime.command import command_line, reporting_errors
from experiments.runtime.errors import UserError


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("--out is missing."), 2, "error: --out is missing.\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_an_error_ends_a_command_with_one_line(error, status, printed, capsys):
    @reporting_errors(OSError)
    def main():
        raise error

    assert main() == status
    assert capsys.readouterr().err == printed


def test_other_errors_and_results_pass():
    assert reporting_errors()(lambda value: value)(1) == 1

    @reporting_errors()
    def main():
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        main()


def test_the_command_line_can_be_pasted_into_a_shell(monkeypatch):
    assert command_line("table", ["--out", "my runs"]) == "python -m experiments.table --out 'my runs'"
    monkeypatch.setattr(sys, "argv", ["table.py", "--run-quick"])
    assert command_line("table", None) == "python -m experiments.table --run-quick"
