import argparse

import jax
import pytest

from experiments.runtime import devices
from experiments.runtime.errors import UserError


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    devices.add_options(parser)
    args = parser.parse_args(arguments)
    devices.check(args)
    return args


def test_one_device_of_one_process_is_the_default():
    args = parsed()
    devices.join(args)  # There is no other process.
    assert devices.choose(args.devices) == jax.devices()[:1]
    assert devices.is_writer()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices is 0; it must be at least 1"),
        (["--coordinator", "a:1"], "--num-processes and --process-id must be given too"),
        (
            ["--coordinator", "a", "--num-processes", "2", "--process-id", "0"],
            "--coordinator is a; it must be HOST:PORT",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id is 2; it must be between 0 and 1",
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"],
            "--num-processes is 0; it must be at least 1",
        ),
    ],
)
def test_options_that_are_not_allowed(arguments, message):
    with pytest.raises(UserError, match=message):
        parsed(*arguments)


def test_devices_that_do_not_exist_are_refused():
    count = len(jax.devices())
    with pytest.raises(UserError, match=f"--devices is {count + 1}, but there (is|are) {count} cpu device"):
        devices.choose(count + 1)


def test_a_batch_that_cannot_be_divided_is_refused():
    devices.check_batch_size(128, 8)
    with pytest.raises(UserError, match="--batch-size is 100; it must be a multiple of the number of devices, 8"):
        devices.check_batch_size(100, 8)


def test_a_coordinator_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(devices, "_CONNECT_SECONDS", 0.2)
    args = parsed("--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "1")
    with pytest.raises(UserError, match=r"--coordinator is 127.0.0.1:1, but no process answers there within 0.2 s"):
        devices.join(args)
