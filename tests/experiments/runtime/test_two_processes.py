"""A run in two processes over loopback. One of them writes the checkpoints, and both are resumed from them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.checks.parallel import free_port


def start(out, *more):
    address = f"127.0.0.1:{free_port()}"
    common = ["--dataset", "mnist_5k", "--quick", "--epochs", "4", "--checkpoint-every", "1", "--out", str(out), *more]
    children = []
    for number in range(2):
        command = [sys.executable, "-m", "experiments.lenet300", *common, "--coordinator", address]
        command += ["--num-processes", "2", "--process-id", str(number)]
        children.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[3]
            )
        )
    return children


def end(children):
    outputs = [child.communicate(timeout=300)[0] for child in children]
    return [child.returncode for child in children], outputs


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_was_stopped_is_resumed_to_the_same_files(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    statuses, outputs = end(start(whole))
    assert statuses == [0, 0], outputs
    children = start(cut)
    metrics = cut / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or not metrics.read_text().strip():
        assert time.monotonic() < deadline
        assert all(child.poll() is None for child in children), end(children)
        time.sleep(0.05)
    for child in children:
        child.send_signal(signal.SIGTERM)
    statuses, outputs = end(children)
    assert statuses == [143, 143], outputs
    assert "--resume continues from there" in outputs[0]
    statuses, outputs = end(start(cut, "--resume"))
    assert statuses == [0, 0], outputs
    assert "Resumes the run" in outputs[0]
    result = json.loads((cut / "result.json").read_text())
    assert result["resumed"] == 1
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in cut.iterdir())
    for path in whole.glob("*.npz"):
        with np.load(path) as one, np.load(cut / path.name) as other:
            for name in one.files:
                np.testing.assert_array_equal(one[name], other[name], err_msg=f"{path.name} {name}")
