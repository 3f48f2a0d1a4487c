import re
import subprocess
import sys
from pathlib import Path

from experiments.runtime import timing


def test_the_first_step_ends_at_the_second_call_of_stop():
    answers = iter([False, False, True])
    watch = timing.FirstStep(lambda: next(answers))
    assert watch.sentence() == ""
    assert not watch()
    assert watch.sentence() == ""
    assert not watch()
    assert re.fullmatch(r"first step after \d+\.\d s, ", watch.sentence())
    measured = watch.sentence()
    assert watch()
    assert watch.sentence() == measured


def test_help_and_bad_arguments_need_not_wait_for_jax():
    code = (
        "import sys\nfrom experiments import lenet5\n"
        "assert lenet5.main(['--epochs', '0']) == 2\nassert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], capture_output=True)
